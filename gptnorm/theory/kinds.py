r"""Kinds of norm at the same W, x and loss: their curvature, and the identities of a norm of degree 0.

For N(cz) = N(z), c > 0, y does not move along x, so that (Euler)

$$L x = 0, \qquad C x = -\nabla_x \ell, \qquad x \cdot \nabla_x \ell = 0.$$

A constant and no norm at all are of degree 1: there C = 0 and L x ≠ 0. Tanh is of no degree: x is in no kernel. ε takes
a norm off degree 0 by about ε / mean(z²). A layernorm does not see the mean of z either: with W w = 1 (all entries),
y does not move along w, so that L w = C w = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptnorm.format import lr_text, short_text
from gptnorm.norms import AfterModule, DynamicTanh, Norm
from gptnorm.report.panels import Panel
from gptnorm.study.measures import Estimate, geometric_mean
from gptnorm.theory import draws
from gptnorm.theory.finding import Cell, Finding, Table, verdict_of
from gptnorm.theory.layer import Layer, NormName, build, build_frozen, dense, norm
from gptnorm.theory.losses import softmax_head

WIDTH, VOCAB = 32, 256
EPS = 1e-5
EXACT, BROKEN = 1e-9, 1e-3
"""Relative error up to which an identity holds in fp64, and from which it fails; what lies between is neither."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What may follow a linear map."""

    name: str
    degree: int | None
    """Of what it is claimed to be, 0 or 1; None: of none."""
    make: Callable[[Tensor, Tensor], AfterModule | None]
    """From z and a gain, which not every kind has."""
    exact: bool = True
    """Whether ε is 0; the identities are judged there."""


def _norm(kind: NormName, eps: float, *, gained: bool = True) -> Callable[[Tensor, Tensor], AfterModule]:
    return lambda z, gain: build(Norm(kind=kind, size=len(z), eps=eps), gain if gained else None)


def _frozen(z: Tensor, gain: Tensor) -> AfterModule:
    return build_frozen(Norm(kind="rmsnorm", size=len(z), eps=0.0), z, gain)


KINDS = (
    Kind(name="rmsnorm", degree=0, make=_norm("rmsnorm", 0.0)),
    Kind(name="layernorm", degree=0, make=_norm("layernorm", 0.0)),
    Kind(name="rmsnorm (γ 1)", degree=0, make=_norm("rmsnorm", 0.0, gained=False)),
    Kind(name="np_layernorm", degree=0, make=_norm("np_layernorm", 0.0)),
    Kind(name="l2", degree=0, make=_norm("l2", 0.0)),
    Kind(name=f"rmsnorm (ε {lr_text(EPS)})", degree=0, make=_norm("rmsnorm", EPS), exact=False),
    Kind(name="frozen rmsnorm", degree=1, make=_frozen),
    Kind(name="tanh", degree=None, make=lambda z, gain: build(DynamicTanh(size=len(z), alpha=1.0), gain)),
    Kind(name="nothing", degree=1, make=lambda z, gain: None),
)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Of one layer."""

    y: float
    """‖y‖."""
    hessian: float
    gauss_newton: float
    curvature: float
    Lx: float
    """‖L x‖ / (‖L‖ ‖x‖)."""
    Cx: float
    """‖C x + ∇ℓ‖ / ‖∇ℓ‖."""
    radial: float
    """|x·∇ℓ| / (‖x‖ ‖∇ℓ‖)."""
    Hw: float
    """‖H w‖ / (‖H‖ ‖w‖), W w = 1."""

    @property
    def euler(self) -> float:
        """The largest error of the three identities of degree 0."""
        return max(self.Lx, self.Cx, self.radial)


def layer(seed: int, kind: Kind) -> Layer:
    """At the W, x, gain and head of a seed, whatever the kind."""
    W, x = draws.weight(seed, WIDTH, WIDTH), draws.normal(seed, "x", WIDTH)
    gain = draws.uniform(seed, "gain", 0.5, 2.0, WIDTH)
    return Layer(W=W, after=kind.make(W @ x, gain), loss=softmax_head(seed, WIDTH, VOCAB), x=x)


def measure(one: Layer) -> Reading:
    """By whole matrices."""
    H, L, C = dense(one.hessian()), dense(one.gauss_newton()), dense(one.curvature())
    x, gradient, w = one.x, one.gradient(), torch.linalg.solve(one.W, torch.ones_like(one.z))
    size, slope = float(x.norm()), float(gradient.norm())
    return Reading(
        y=float(one.y.norm()),
        hessian=norm(H),
        gauss_newton=norm(L),
        curvature=norm(C),
        Lx=float((L @ x).norm()) / (norm(L) * size),
        Cx=float((C @ x + gradient).norm()) / slope,
        radial=abs(float(x @ gradient)) / (size * slope),
        Hw=float((H @ w).norm()) / (norm(H) * float(w.norm())),
    )


def check_kinds(seeds: Sequence[int], kinds: Sequence[Kind] = KINDS) -> Finding:
    """Curvature and identities, kind by kind.

    Args:
        kinds: the first is what the others are compared with.
    """
    found = {kind.name: {seed: measure(layer(seed, kind)) for seed in seeds} for kind in kinds}
    errors = {name: [one.euler for one in readings.values()] for name, readings in found.items()}
    judged = {kind.name: _as_claimed(kind, errors[kind.name]) for kind in kinds if kind.exact}
    failed = [name for name, held in judged.items() if not held]
    zero = [kind.name for kind in kinds if kind.degree == 0 and kind.exact]
    other = [kind.name for kind in kinds if kind.degree != 0]
    told = []
    if zero:
        told.append(f"{', '.join(zero)} keep the identities to {short_text(max(max(errors[name]) for name in zero))}")
    if other:
        told.append(f"{', '.join(other)} miss them by {min(min(errors[name]) for name in other):.2g} or more")
    if failed:
        told = [f"not as claimed: {', '.join(f'{name} (error {short_text(max(errors[name]))})' for name in failed)}"]
    first = kinds[0].name
    over = {name: _over(readings, found[first], "hessian") for name, readings in found.items()}
    told.append(
        f"‖H‖ over that of {first}: "
        + ", ".join(f"{name} {ratio.value:.3g}" for name, ratio in over.items() if name != first)
    )
    return Finding(
        name="kinds",
        title="Kinds of norm",
        claim="A norm of degree 0 has L x = 0, C x = -∇ℓ and x·∇ℓ = 0, of whichever kind it is; what is no norm has "
        "not.",
        source="Euler's theorem on homogeneous functions; SimpleGPT (arXiv 2602.01212) compares no kinds of norm",
        verdict=verdict_of(list(judged.values())) if judged else "depends",
        reason=f"{'; '.join(told)}.",
        tables=[
            Table(
                title="Curvature",
                head=["after W", "‖y‖", "‖H‖", "‖L‖", "‖C‖", "‖C‖/‖L‖", f"‖H‖ over {first}", f"‖C‖ over {first}"],
                rows=[_curvature_row(name, readings, found[first]) for name, readings in found.items()],
            ),
            Table(
                title="Identities: largest error over seeds",
                head=["after W", "degree", "L x = 0", "C x = -∇ℓ", "x·∇ℓ = 0", "H w = 0, W w = 1"],
                rows=[
                    [
                        kind.name,
                        "none" if kind.degree is None else str(kind.degree),
                        *(max(getattr(one, what) for one in found[kind.name].values()) for what in IDENTITIES),
                    ]
                    for kind in kinds
                ],
                words=2,
            ),
        ],
        panels=[
            Panel(
                name=f"kinds{part}",
                title=f"‖{part}‖, seed by seed",
                x_label="seed",
                x=list(seeds),
                lines={
                    kind.name: [getattr(found[kind.name][seed], what) for seed in seeds]
                    for kind in kinds
                    if kind.exact and kind.degree == 0
                },
                alt=f"Spectral norm of {part} over seeds, a line for each norm. The means are in the table.",
                log_y=True,
            )
            for part, what in (("L", "gauss_newton"), ("C", "curvature"))
        ],
        notes=[
            f"W: {WIDTH} × {WIDTH}, entries of variance 1/{WIDTH}; x: standard normal; gains uniform in 0.5 … 2, "
            "where a kind has one and unless told (np_layernorm and l2 have none: compare them with γ 1); softmax "
            f"head over {VOCAB} tokens. W, x, gain and head are the same for all kinds of a seed; g and H_yy follow "
            "from y.",
            "frozen rmsnorm: the constant that the norm is at this z. tanh: γ ⊙ tanh(αz), α = 1. nothing: y = Wx.",
            "Means over seeds are geometric, ratios paired by seed, with 95 % t-intervals.",
            "Errors: ‖Lx‖/(‖L‖‖x‖), ‖Cx + ∇ℓ‖/‖∇ℓ‖, |x·∇ℓ|/(‖x‖‖∇ℓ‖), ‖Hw‖/(‖H‖‖w‖). An identity holds up to "
            f"{lr_text(EXACT)} and fails from {lr_text(BROKEN)}.",
        ],
        numbers={f"error.{name}": max(values) for name, values in errors.items()},
    )


IDENTITIES = ("Lx", "Cx", "radial", "Hw")


def _as_claimed(kind: Kind, errors: Sequence[float]) -> bool:
    return max(errors) <= EXACT if kind.degree == 0 else min(errors) >= BROKEN


def _over(ours: Mapping[int, Reading], theirs: Mapping[int, Reading], what: str) -> Estimate:
    return geometric_mean([getattr(ours[seed], what) / getattr(theirs[seed], what) for seed in ours])


def _curvature_row(name: str, ours: Mapping[int, Reading], theirs: Mapping[int, Reading]) -> list[Cell]:
    def mean(what: str) -> float | None:
        values = [getattr(one, what) for one in ours.values()]
        return geometric_mean(values).value if min(values) > 0 else max(values)

    bends = min(one.curvature for one in ours.values()) > 0
    ratio = geometric_mean([one.curvature / one.gauss_newton for one in ours.values()]) if bends else 0.0
    return [
        name,
        *(mean(what) for what in ("y", "hessian", "gauss_newton", "curvature")),
        ratio,
        _over(ours, theirs, "hessian"),
        _over(ours, theirs, "curvature") if bends else 0.0,
    ]
