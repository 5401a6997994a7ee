r"""Which alignments of x, g, H_yy and the normalisation direction u = z / ‖z‖ make the norm's curvature large.

RMSNorm without ε, γ = 1, so b = g. From C = -(√d/r²) Wᵀ M W, M = (Pg) uᵀ + u (Pg)ᵀ + (u·g) P, r = ‖Wx‖:

1. *g turned towards u*, all singular values of W equal: ‖M‖ = ‖g‖ f(cos), f(c) = (|c| + √(4 - 3c²)) / 2, which is 1 at
   both ends and 2/√3 at c = 1/√3. So ‖C‖ hardly moves; what changes is its shape. Across u, C has two eigenvalues
   of either sign; along u it is -(√d/r²) (u·g) WᵀPW: all of space at once. Where g points against u (the loss wants y
   longer, which the norm refuses), C adds to L in every direction: with H_yy = I, H = (d/r²) (1 - u·g/√d) WᵀPW.
   The gradient is nothing there: ‖C‖ ≥ ‖∇_xℓ‖ / ‖x‖ does not say that C vanishes with it.
2. *x along the weakest singular direction of W*: r = σ_min ‖x‖, and everything has 1/r². Then
   ‖L‖ ≤ (d/r²) σ_max² ‖H_yy‖ is reached with H_yy = I, and grows as κ². ‖C‖ grows as κ where g lies across u, for one
   end of M is Wᵀu, which is short, and as κ² where g lies along u. x must be very close to that direction: with c the
   cosine, ‖L‖ has 1 / (1 - c² + c²/κ²), so that κ² needs an angle of about 1/κ.
3. *H_yy where W is weak*: L then keeps σ_min²/r², C does not, and ‖C‖/‖L‖ itself grows as κ². The sufficient
   condition ‖b‖ / (√d ‖PDH_yyDP‖) ≪ 1/κ² is therefore of the right order.
4. *H_yy = w wᵀ with w turned towards u*: L sees P w alone and vanishes, C stays: ‖C‖/‖L‖ has no bound at any κ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gptnorm.format import lr_text, short_text
from gptnorm.norms import Norm
from gptnorm.report.panels import Panel
from gptnorm.study.measures import Estimate
from gptnorm.theory import draws
from gptnorm.theory.closed import bracket_norm
from gptnorm.theory.finding import Cell, Finding, Table, verdict_of
from gptnorm.theory.fits import exponent_over
from gptnorm.theory.layer import Layer, build, dense, norm
from gptnorm.theory.losses import Quadratic

WIDTH = 32
COSINES = (-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 1 / math.sqrt(3), 0.75, 1.0)
TURNS = (0.0, 0.5, 0.9, 0.99, 0.999)
"""cos(w, u) of H_yy = w wᵀ; with 1, also the cosine of x and the weakest direction of W."""
LEANT = 100.0
"""κ of the latter."""
KAPPAS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
WEAK = 2
"""Singular values of W that are 1/κ; the others are 1."""
EPS = 1e-5
ROUNDING = 1e-13
SLACK = 1e-9
"""Relative rounding that a bound may be missed by."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of one layer; ‖x‖ = √d."""

    hessian: float
    gauss_newton: float
    curvature: float
    lowest: float
    """λ_min of H."""
    spread: float
    """‖C‖_F / ‖C‖: the root of how many directions C bends in."""
    floor: float
    """‖∇_xℓ‖ / ‖x‖, below which ‖C‖ cannot be without ε."""
    bracket: float
    """(√d/r²) ‖M‖: ‖C‖ where all singular values of W are 1, and above ‖C‖ / σ_max² otherwise."""
    strongest: float
    """σ_max of W."""

    @property
    def ratio(self) -> float:
        """‖C‖ / ‖L‖; inf where L is nothing."""
        return self.curvature / self.gauss_newton if self.gauss_newton else math.inf

    @property
    def within_bounds(self) -> bool:
        """‖∇_xℓ‖/‖x‖ ≤ ‖C‖ ≤ σ_max² (√d/r²) ‖M‖."""
        above = self.strongest**2 * self.bracket
        return self.floor <= self.curvature * (1 + SLACK) and self.curvature <= above * (1 + SLACK)


def measure(one: Layer) -> Sizes:
    """By whole matrices."""
    H, L, C = dense(one.hessian()), dense(one.gauss_newton()), dense(one.curvature())
    z, g = one.z, one.g()
    r, d = float(z.norm()), len(z)
    size = norm(C)
    return Sizes(
        hessian=norm(H),
        gauss_newton=norm(L),
        curvature=size,
        lowest=float(torch.linalg.eigvalsh(H)[0]),
        spread=float(C.norm()) / size if size else math.nan,
        floor=float(one.gradient().norm() / one.x.norm()),
        bracket=math.sqrt(d) / r**2 * bracket_norm(z / r, g),
        strongest=float(torch.linalg.matrix_norm(one.W, 2)),
    )


@dataclass(frozen=True, kw_only=True)
class Frame:
    """W = U diag(σ) Vᵀ of a seed."""

    U: Tensor
    V: Tensor
    sigma: Tensor

    @classmethod
    def of(cls, seed: int, kappa: float) -> Frame:
        sigma = torch.ones(WIDTH, dtype=torch.float64)
        sigma[-WEAK:] = 1 / kappa
        return cls(U=draws.orthogonal(seed, "U", WIDTH), V=draws.orthogonal(seed, "V", WIDTH), sigma=sigma)

    @property
    def W(self) -> Tensor:
        return self.U * self.sigma @ self.V.mT

    def layer(self, x: Tensor, g: Callable[[Tensor], Tensor], hyy: Callable[[Tensor], Tensor], eps: float) -> Layer:
        """With x of length √d; g and H_yy are functions of u."""
        after = build(Norm(kind="rmsnorm", size=WIDTH, eps=eps))
        made = Layer(W=self.W, after=after, loss=lambda y: y.sum(), x=math.sqrt(WIDTH) * x / x.norm())
        u = made.z / made.z.norm()
        return replace(made, loss=Quadratic(at=made.y, g=g(u), hessian=hyy(u)))


def identity(u: Tensor) -> Tensor:
    return torch.eye(len(u), dtype=u.dtype)


def turned(seed: int, cosine: float) -> Callable[[Tensor], Tensor]:
    """A vector of length 1 at an angle to u."""

    def made(u: Tensor) -> Tensor:
        v = draws.direction(seed, "across", len(u))
        v = v - (u @ v) * u
        return cosine * u + math.sqrt(max(0.0, 1 - cosine**2)) * v / v.norm()

    return made


@dataclass(frozen=True, kw_only=True)
class Case:
    """An alignment over κ."""

    x: str
    g: str
    hyy: str
    derived: tuple[float, float] | None
    """Exponents of ‖L‖ and ‖C‖ in κ; None where ε leaves none."""
    eps: float = 0.0

    @property
    def name(self) -> str:
        return f"x {self.x}, g {self.g}, H_yy {self.hyy}" + (f", ε {lr_text(self.eps)}" if self.eps else "")

    def layer(self, seed: int, kappa: float) -> Layer:
        frame = Frame.of(seed, kappa)
        inputs = {"random": draws.direction(seed, "x", WIDTH), "weakest": frame.V[:, -1]}
        gradients = {
            "random": turned(seed, float(draws.direction(seed, "g", WIDTH)[0])),
            "across u": lambda u: frame.U[:, 0],
            "along u": lambda u: u,
            "against u": lambda u: -u,
        }
        weak = torch.outer(frame.U[:, -WEAK], frame.U[:, -WEAK])
        hessians = {"I": identity, "weak": lambda u: weak}
        return frame.layer(inputs[self.x], gradients[self.g], hessians[self.hyy], self.eps)


CASES = (
    Case(x="random", g="random", hyy="I", derived=(0.0, 0.0)),
    Case(x="weakest", g="across u", hyy="I", derived=(2.0, 1.0)),
    Case(x="weakest", g="along u", hyy="I", derived=(2.0, 2.0)),
    Case(x="weakest", g="against u", hyy="I", derived=(2.0, 2.0)),
    Case(x="weakest", g="against u", hyy="weak", derived=(0.0, 2.0)),
    Case(x="weakest", g="against u", hyy="I", derived=None, eps=EPS),
)


def check_alignment(seeds: Sequence[int], cases: Sequence[Case] = CASES) -> Finding:
    """How far ‖C‖, ‖L‖ and ‖H‖ can be driven by aligning what they are made of.

    Args:
        cases: alignments over κ.
    """
    turns = {
        cosine: [
            measure(Frame.of(s, 1.0).layer(draws.direction(s, "x", WIDTH), turned(s, cosine), identity, 0.0))
            for s in seeds
        ]
        for cosine in COSINES
    }
    radial = {cosine: [measure(_radial(s, cosine)) for s in seeds] for cosine in TURNS}
    leaning = {cosine: [measure(_leaning(s, cosine)) for s in seeds] for cosine in (*TURNS, 1.0)}
    sweeps = {case: {seed: [measure(case.layer(seed, kappa)) for kappa in KAPPAS] for seed in seeds} for case in cases}
    exponents = {
        case: {
            what: exponent_over({s: [getattr(one, what) for one in row] for s, row in rows.items()}, KAPPAS)
            for what in ("gauss_newton", "curvature", "ratio", "hessian")
        }
        for case, rows in sweeps.items()
    }
    exact = [
        *(one for ones in (*turns.values(), *radial.values(), *leaning.values()) for one in ones),
        *(one for case, rows in sweeps.items() if not case.eps for row in rows.values() for one in row),
    ]
    bracket = max(abs(one.curvature / one.bracket - 1) for ones in turns.values() for one in ones)
    broken = sum(not one.within_bounds for one in exact)
    small = [one.ratio < 1 for one in exact]
    off = max(
        (
            abs(exponents[case][what].value - wanted)
            for case in cases
            if case.derived is not None
            for what, wanted in zip(("gauss_newton", "curvature"), case.derived, strict=True)
        ),
        default=0.0,
    )
    worst = max(cases, key=lambda case: exponents[case]["ratio"].value)
    least, most = min(one.ratio for one in exact), max(one.ratio for one in exact)
    swing = [_mean(ones, "curvature") for ones in turns.values()]
    reason = (
        f"‖C‖/‖L‖ runs from {short_text(least)} to {short_text(most)}. At κ = 1 turning g changes ‖C‖ by a factor of "
        f"{max(swing) / min(swing):.3f} (derived 2/√3 = {2 / math.sqrt(3):.3f}), and ‖C‖ is (√d/r²)‖M‖ to "
        f"{short_text(bracket)}; the ratio grows fastest, as κ^{exponents[worst]['ratio'].value:.2f}, with "
        f"{worst.name}; measured exponents are within {off:.2g} of the derived ones; "
        + (
            f"‖∇ℓ‖/‖x‖ ≤ ‖C‖ ≤ σ_max²(√d/r²)‖M‖ in all {len(exact)} layers without ε."
            if not broken
            else f"the bounds of ‖C‖ are broken in {broken} of {len(exact)} layers."
        )
    )
    return Finding(
        name="alignment",
        title="Alignment of x, g, H_yy and u",
        claim="The curvature of the norm stays below the Gauss-Newton part, ‖C‖ < ‖L‖, however x, g, H_yy and the "
        "normalisation direction u are aligned.",
        source="SimpleGPT (arXiv 2602.01212), theorem 4.1 as others sum it up, asks for alignments that are not "
        "pathological; which ones are is derived here, docs/theory.md",
        verdict="does not hold" if broken else verdict_of(small),
        reason=reason,
        tables=[
            Table(
                title="g turned towards u (all singular values of W equal, H_yy = I, ‖g‖ = 1)",
                head=["cos(g, u)", "‖L‖", "‖C‖", "(√d/r²)‖M‖", "‖C‖/‖L‖", "‖C‖_F/‖C‖", "‖H‖", "λ_min H", "‖∇ℓ‖/‖x‖"],
                rows=[
                    [
                        f"{cosine:.3g}",
                        *(
                            _mean(ones, what)
                            for what in (
                                "gauss_newton",
                                "curvature",
                                "bracket",
                                "ratio",
                                "spread",
                                "hessian",
                                "lowest",
                                "floor",
                            )
                        ),
                    ]
                    for cosine, ones in turns.items()
                ],
            ),
            Table(
                title="H_yy = w wᵀ, w turned towards u (same W, g across u)",
                head=["cos(w, u)", "‖L‖", "‖C‖", "‖C‖/‖L‖"],
                rows=[
                    [f"{cosine:g}", *(_mean(ones, what) for what in ("gauss_newton", "curvature", "ratio"))]
                    for cosine, ones in radial.items()
                ],
            ),
            Table(
                title=f"x turned towards the weakest direction of W (κ = {LEANT:g}, H_yy = I, g against u)",
                head=["cos(x, weakest)", "‖L‖", "derived", "‖C‖", "‖C‖/‖L‖", "‖H‖"],
                rows=[
                    [
                        f"{cosine:g}",
                        _mean(ones, "gauss_newton"),
                        1 / (1 - cosine**2 + cosine**2 / LEANT**2),
                        *(_mean(ones, what) for what in ("curvature", "ratio", "hessian")),
                    ]
                    for cosine, ones in leaning.items()
                ],
            ),
            Table(
                title="Exponents in κ",
                head=["x", "g", "H_yy", "ε", "‖L‖", "‖C‖", "derived", "‖C‖/‖L‖", "‖H‖"],
                rows=[_exponent_row(case, exponents[case]) for case in cases],
                words=4,
            ),
            Table(
                title="‖C‖/‖L‖ by κ",
                head=["alignment", *(f"κ = {kappa:g}" for kappa in KAPPAS)],
                rows=[[case.name, *_by_kappa(rows, "ratio")] for case, rows in sweeps.items()],
            ),
            Table(
                title="‖H‖ by κ",
                head=["alignment", *(f"κ = {kappa:g}" for kappa in KAPPAS)],
                rows=[[case.name, *_by_kappa(rows, "hessian")] for case, rows in sweeps.items()],
            ),
        ],
        panels=[
            Panel(
                name="turn",
                title="g turned towards u, κ = 1",
                x_label="cos(g, u)",
                x=COSINES,
                lines={
                    "‖C‖/‖L‖": [_mean(ones, "ratio") for ones in turns.values()],
                    "‖H‖": [_mean(ones, "hessian") for ones in turns.values()],
                    "‖∇ℓ‖/(‖x‖ ‖L‖)": [_mean(ones, "floor") / _mean(ones, "gauss_newton") for ones in turns.values()],
                },
                limits=(0.0, 1.3),
                alt="Ratio of C to L, norm of H and the lower bound over the cosine of g and u: the ratio hardly "
                "moves, H is largest where g points against u, the bound falls to nothing at both ends. The numbers "
                "are in the table.",
            ),
            Panel(
                name="kappa",
                title="‖H‖ as W loses two directions",
                x_label="κ",
                x=KAPPAS,
                lines={case.name: _by_kappa(rows, "hessian") for case, rows in sweeps.items()},
                alt="Norm of H over the condition number of W, a line for each alignment. The numbers are in the "
                "table.",
                log_x=True,
                log_y=True,
            ),
            Panel(
                name="ratio",
                title="‖C‖ / ‖L‖ as W loses two directions",
                x_label="κ",
                x=KAPPAS,
                lines={case.name: _by_kappa(rows, "ratio") for case, rows in sweeps.items()},
                alt="Ratio of C to L over the condition number of W, a line for each alignment. The numbers are in "
                "the table.",
                log_x=True,
                log_y=True,
            ),
        ],
        notes=[
            f"W = U diag(σ) Vᵀ, d = {WIDTH}, U and V random rotations, σ = 1 but for {WEAK} that are 1/κ; ‖x‖ = √d; "
            "RMSNorm, γ = 1, no ε unless told; quadratic loss with ‖g‖ = 1 and ‖H_yy‖ = 1.",
            "u = z/‖z‖ with z = Wx; r = ‖z‖; P = I - uuᵀ; M = (Pg)uᵀ + u(Pg)ᵀ + (u·g)P.",
            "x weakest: along a singular direction of 1/κ, so that r = ‖x‖/κ. g across u: along a strong direction of "
            "W. H_yy weak: of rank one, along the other weak direction.",
            "‖C‖_F/‖C‖: the root of the number of directions that C bends in, were its eigenvalues equal.",
            "‖∇ℓ‖/‖x‖: ∇ℓ in x; ‖C‖ is never below it.",
        ],
        numbers={"largest ratio": most, "smallest ratio": least, "bounds broken": float(broken), "exponent error": off},
    )


def _radial(seed: int, cosine: float) -> Layer:
    def hyy(u: Tensor) -> Tensor:
        w = turned(seed, cosine)(u)
        return torch.outer(w, w)

    x = draws.direction(seed, "x", WIDTH)
    return Frame.of(seed, 1.0).layer(x, turned(seed + 10_000, 0.0), hyy, 0.0)


def _leaning(seed: int, cosine: float) -> Layer:
    """x between a strong direction of W and the weakest."""
    frame = Frame.of(seed, LEANT)
    x = cosine * frame.V[:, -1] + math.sqrt(1 - cosine**2) * frame.V[:, 0]
    return frame.layer(x, lambda u: -u, identity, 0.0)


def _mean(ones: Sequence[Sizes], what: str) -> float:
    """Over seeds; what is nothing but rounding is 0."""
    found = sum(getattr(one, what) for one in ones) / len(ones)
    return found if abs(found) > ROUNDING else 0.0


def _by_kappa(rows: Mapping[int, Sequence[Sizes]], what: str) -> list[float]:
    return [_mean(column, what) for column in zip(*rows.values(), strict=True)]


def _exponent_row(case: Case, found: Mapping[str, Estimate]) -> list[Cell]:
    derived = "" if case.derived is None else f"{case.derived[0]:g}, {case.derived[1]:g}"
    values = {what: round(estimate.value, 6) + 0.0 for what, estimate in found.items()}
    return [
        case.x,
        case.g,
        case.hyy,
        lr_text(case.eps) if case.eps else "0",
        values["gauss_newton"],
        values["curvature"],
        derived,
        values["ratio"],
        values["hessian"],
    ]
