r"""W → cW: what happens to L, C and H, in x and in vec(W).

After a norm of degree 0, N(cz) = N(z), y does not move, so that in x nothing does, and in vec(W) everything has 1/c²
(H in vec(W) is H_zz ⊗ x xᵀ, and H_zz has 1/r²). A bare map under a quadratic loss has exactly c²; under another loss
H_yy moves too. ε breaks the invariance where c² mean(z²) is not far above it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import get_args

from torch import Tensor

from gptnorm.format import lr_text, short_text
from gptnorm.norms import AfterModule, DynamicTanh, Norm
from gptnorm.report.panels import Panel
from gptnorm.study.measures import mean_of
from gptnorm.theory import draws
from gptnorm.theory.finding import Finding, Table, verdict_of
from gptnorm.theory.fits import exponent
from gptnorm.theory.layer import Layer, NormName, build, dense, norm
from gptnorm.theory.losses import Quadratic, softmax_head

OUT, IN, VOCAB = 10, 6, 64
"""d, m and V: whole matrices, in vec(W) too."""

FACTORS = (0.01, 0.03, 0.1, 0.3, 1.0, 10.0, 100.0)
"""c."""

EPS = 1e-5
"""The published ε."""

EXACT = 1e-9
"""Relative change up to which a matrix counts as unchanged in fp64."""

VISIBLE = 0.01
"""Relative change above which ε is said to break the invariance."""

QUADRATIC, SOFTMAX, TANH = "no norm, quadratic loss", "no norm, softmax loss", "tanh, softmax loss"

SMALL = 3
"""The first so many of c, at which a softmax is nearly what it is at 0."""

Make = Callable[[int, float], AfterModule | None]
"""What follows the map, for a seed and an ε."""


def _norm(kind: NormName, seed: int, eps: float) -> AfterModule:
    return build(Norm(kind=kind, size=OUT, eps=eps), gain=draws.uniform(seed, "gain", 0.5, 2.0, OUT))


NORMS: Mapping[str, Make] = {kind: partial(_norm, kind) for kind in get_args(NormName)}
"""Of degree 0."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Matrices:
    """Of a layer at one c."""

    hessian: Tensor
    gauss_newton: Tensor
    curvature: Tensor
    weights: Tensor
    """H in vec(W)."""

    @classmethod
    def of(cls, layer: Layer) -> Matrices:
        return cls(
            hessian=dense(layer.hessian()),
            gauss_newton=dense(layer.gauss_newton()),
            curvature=dense(layer.curvature()),
            weights=dense(layer.weight_hessian()),
        )


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A layer over c, one seed."""

    norms: Mapping[str, Sequence[float]]
    """‖H‖, ‖L‖, ‖C‖ and the ‖H‖ in vec(W), by "H", "L", "C", "W"."""
    changes: Sequence[float]
    """Largest relative change of H, L, C and c² H_vec(W), against the layer without ε at c = 1."""

    def exponent(self, part: str, first: int = len(FACTORS)) -> float:
        return exponent(FACTORS[:first], self.norms[part][:first])


def sweep(layer: Layer, reference: Layer) -> Sweep:
    """Norms and changes over c.

    Args:
        reference: the layer without ε.
    """
    base = Matrices.of(reference)
    norms: dict[str, list[float]] = {"H": [], "L": [], "C": [], "W": []}
    changes = []
    for c in FACTORS:
        found = Matrices.of(layer.scaled(c))
        pairs = {
            "H": (found.hessian, base.hessian),
            "L": (found.gauss_newton, base.gauss_newton),
            "C": (found.curvature, base.curvature),
            "W": (c * c * found.weights, base.weights),
        }
        for part, (matrix, _) in pairs.items():
            norms[part].append(norm(matrix) / (c * c if part == "W" else 1.0))
        changes.append(max(_change(*pair) for pair in pairs.values()))
    return Sweep(norms=norms, changes=changes)


def _change(found: Tensor, base: Tensor) -> float:
    size = norm(base)
    return norm(found - base) / size if size else norm(found)


def layer(seed: int, after: AfterModule | None, *, quadratic: bool = False) -> Layer:
    """At a seed's W and x, under a softmax head or a quadratic loss."""
    W, x = draws.weight(seed, OUT, IN), draws.normal(seed, "x", IN)
    made = Layer(W=W, after=after, loss=softmax_head(seed, OUT, VOCAB), x=x)
    if not quadratic:
        return made
    loss = Quadratic(at=made.y, g=draws.direction(seed, "g", OUT), hessian=draws.semidefinite(seed, "A", OUT))
    return replace(made, loss=loss)


def check_scale(seeds: Sequence[int], norms: Mapping[str, Make] = NORMS) -> Finding:
    """What W → cW leaves alone.

    Args:
        norms: what is claimed to be of degree 0.
    """
    exact = {
        kind: [sweep(layer(s, make(s, 0.0)), layer(s, make(s, 0.0))) for s in seeds] for kind, make in norms.items()
    }
    with_eps = {
        kind: [sweep(layer(s, make(s, EPS)), layer(s, make(s, 0.0))) for s in seeds] for kind, make in norms.items()
    }
    bare = {
        QUADRATIC: [layer(s, None, quadratic=True) for s in seeds],
        SOFTMAX: [layer(s, None) for s in seeds],
        TANH: [layer(s, build(DynamicTanh(size=OUT, alpha=1.0))) for s in seeds],
    }
    others = {name: [sweep(one, one) for one in layers] for name, layers in bare.items()}

    worst = {kind: _worst(sweeps) for kind, sweeps in exact.items()}
    quadratic = max(
        abs(one.exponent(part) - wanted) for one in others[QUADRATIC] for part, wanted in (("H", 2.0), ("W", 0.0))
    )
    held = {**{kind: change <= EXACT for kind, change in worst.items()}, "c²": quadratic <= EXACT}
    small = FACTORS[SMALL - 1]
    rows = [
        *(_row(kind, "0", sweeps) for kind, sweeps in exact.items()),
        *(_row(kind, f"{lr_text(EPS)}", sweeps) for kind, sweeps in with_eps.items()),
        *([*_row(name, "", others[name])[:-1], None] for name in (QUADRATIC, SOFTMAX)),
        # Where tanh saturates its curvature is nothing, which has no logarithm.
        *([*_row(f"{name}, c ≤ {small:g}", "", others[name], SMALL)[:-1], None] for name in (SOFTMAX, TANH)),
    ]
    over_c = {kind: _largest(sweeps) for kind, sweeps in with_eps.items()}
    first = next(iter(norms))
    failed = [kind for kind in norms if not held[kind]]
    reason = (
        f"without ε, L, C and H in x and c² times H in vec(W) change by at most {short_text(max(worst.values()))} of "
        f"their size for c from {FACTORS[0]:g} to {FACTORS[-1]:g}"
        if not failed
        else f"{', '.join(failed)}: changes by up to {short_text(max(worst[kind] for kind in failed))} of its size"
    )
    reason += (
        f"; the bare map under a quadratic loss has c² to {short_text(quadratic)} in the exponent. With ε = "
        f"{lr_text(EPS)} the change is above {100 * VISIBLE:g} % {_where(over_c)}."
    )
    return Finding(
        name="scale",
        title="Scale of the weight",
        claim="Under W → cW a norm after the map leaves L, C and H in x as they are and gives H in vec(W) 1/c², where "
        "a bare linear map has c² and c⁰.",
        source="SimpleGPT (arXiv 2602.01212), theorem 4.2 as others sum it up; closed forms ours, docs/theory.md",
        verdict=verdict_of(list(held.values())),
        reason=reason,
        tables=[
            Table(
                title="Exponents in c",
                head=["after W", "ε", "‖H‖", "‖L‖", "‖C‖", "‖H‖ in vec(W)", "largest change"],
                rows=rows,
                words=2,
            ),
            Table(
                title=f"Largest change with ε = {lr_text(EPS)}, by c",
                head=["after W", *(f"c = {c:g}" for c in FACTORS)],
                rows=[[kind, *changes] for kind, changes in over_c.items()],
            ),
        ],
        panels=[
            Panel(
                name="scale",
                title="‖H‖ in x",
                x_label="c",
                x=FACTORS,
                lines={
                    first: _mean(exact[first], "H"),
                    **{name: _mean(sweeps, "H") for name, sweeps in others.items()},
                },
                alt=f"Spectral norm of H in x over c: flat after {first}, c squared for the bare map under a "
                "quadratic loss. The exponents are in the table.",
                log_x=True,
                log_y=True,
            ),
            Panel(
                name="eps",
                title="Largest change of L, C, H, c² H_vec(W)",
                x_label="c",
                x=FACTORS,
                lines={
                    **{f"{kind}, ε {lr_text(EPS)}": changes for kind, changes in over_c.items()},
                    f"{first}, ε 0": _largest(exact[first]),
                },
                alt=f"Largest relative change over c with ε {lr_text(EPS)}: it rises as c falls. The numbers are in "
                "the table.",
                log_x=True,
                log_y=True,
            ),
        ],
        notes=[
            f"W is {OUT} × {IN} with entries of variance 1/{IN}, x standard normal: mean(z²) is about 1 at c = 1. "
            f"Gains are uniform in 0.5 … 2, the softmax head has {VOCAB} tokens (entries of variance 1/d). The "
            "quadratic loss has ‖g‖ = 1 and H_yy = GGᵀ of a normal G, scaled to ‖H_yy‖ = 1; tanh has α = 1.",
            "Exponents: slope of the logarithm of a spectral norm on log c over all c, mean over seeds.",
            "Largest change: of L, C, H and c² times H in vec(W), each relative to the spectral norm of its own at c "
            "= 1 without ε; the largest of the four and of the seeds.",
            "Under another loss than a quadratic one H_yy moves with y, so that a bare map has no one exponent: what "
            "is fitted is a mean over four decades: c² while the logits are small, then the softmax saturates, and "
            "tanh too.",
        ],
        numbers={
            **{f"change.{kind}": change for kind, change in worst.items()},
            "exponent error of the bare map": quadratic,
        },
    )


def _worst(sweeps: Sequence[Sweep]) -> float:
    return max(change for one in sweeps for change in one.changes)


def _largest(sweeps: Sequence[Sweep]) -> list[float]:
    """Over seeds, by c."""
    return [max(changes) for changes in zip(*(one.changes for one in sweeps), strict=True)]


def _mean(sweeps: Sequence[Sweep], part: str) -> list[float]:
    """Over seeds, by c."""
    columns = zip(*(one.norms[part] for one in sweeps), strict=True)
    return [sum(column) / len(column) for column in columns]


def _row(name: str, eps: str, sweeps: Sequence[Sweep], first: int = len(FACTORS)) -> list[str | float | None]:
    slopes = [mean_of([one.exponent(part, first) for one in sweeps]).value for part in ("H", "L", "C", "W")]
    shown = [None if math.isnan(slope) else round(slope, 6) + 0.0 for slope in slopes]
    return [name, eps, *shown, _worst(sweeps)]


def _where(over_c: Mapping[str, Sequence[float]]) -> str:
    """Up to which c, kind by kind."""
    told = []
    for kind, changes in over_c.items():
        broken = [c for c, change in zip(FACTORS, changes, strict=True) if change > VISIBLE]
        told.append(f"{kind} up to c = {max(broken):g}" if broken else f"{kind} nowhere")
    return f"for {', '.join(told)}" if told else "nowhere"
