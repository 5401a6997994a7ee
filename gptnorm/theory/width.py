r"""‖C‖ / ‖L‖ against width: whether the curvature of the norm vanishes in high dimension.

W is square and normal, x too, γ = 1, RMSNorm without ε. y lives on a sphere of radius √d, whose curvature is 1/√d: for
fixed g and H_yy that is the ratio. Nothing says that they are fixed, so there are four regimes of the loss:

| regime | loss | ‖g‖ | ‖H_yy‖ |
|---|---|---|---|
| A | quadratic | 1 | 1 |
| B | quadratic | √d | 1 |
| C | softmax head, V tokens, as at initialisation: nearly uniform | about 1 | about 1/d |
| D | the same head with more than 99 % of the mass on 8 tokens | about 1 | about 1/4 |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gptnorm.curvature.operators import Operator
from gptnorm.curvature.reading import spectral_norm
from gptnorm.format import lr_text
from gptnorm.norms import Norm
from gptnorm.report.panels import Panel
from gptnorm.study.measures import Estimate, geometric_mean
from gptnorm.theory import draws
from gptnorm.theory.closed import estimated_ratio
from gptnorm.theory.finding import Cell, Finding, Table, verdict_of
from gptnorm.theory.fits import exponent_over, holds_zero
from gptnorm.theory.layer import Layer, build
from gptnorm.theory.losses import Quadratic, softmax_head, sure_head

VOCAB = 4096
TOLERANCE = 1e-3
"""Of the residual of an eigenvalue, relative."""

Loss = Callable[[Tensor], Tensor]
Regime = Callable[[int, int, Tensor], Loss]
"""The loss of a seed at a width, given y."""


def quadratic(length: Callable[[int], float], *, isotropic: bool = False) -> Regime:
    """With a gradient of some length in a random direction, and H_yy = GGᵀ / ‖GGᵀ‖ or the identity."""

    def made(seed: int, d: int, y: Tensor) -> Loss:
        hessian = torch.eye(d, dtype=y.dtype) if isotropic else draws.semidefinite(seed, "A", d)
        return Quadratic(at=y, g=length(d) * draws.direction(seed, "g", d), hessian=hessian)

    return made


REGIMES: Mapping[str, Regime] = {
    "A": quadratic(lambda d: 1.0),
    "A, H_yy = I": quadratic(lambda d: 1.0, isotropic=True),
    "B": quadratic(math.sqrt),
    "C": lambda seed, d, y: softmax_head(seed, d, VOCAB),
    "D": lambda seed, d, y: sure_head(seed, d, VOCAB),
}


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Of one layer."""

    measured: float
    """‖C‖ / ‖L‖."""
    estimated: float
    """‖b‖ / (√d ‖P D H_yy D P‖)."""
    g: float
    """‖∂ℓ/∂y‖."""
    hyy: float
    """‖H_yy‖."""


def layer(seed: int, d: int, regime: Regime) -> Layer:
    """At a width."""
    W, x = draws.weight(seed, d, d), draws.normal(seed, "x", d)
    made = Layer(W=W, after=build(Norm(kind="rmsnorm", size=d, eps=0.0)), loss=lambda y: y.sum(), x=x)
    return replace(made, loss=regime(seed, d, made.y))


def measure(one: Layer) -> Ratio:
    """By Lanczos, from products."""
    hyy, g = one.output_hessian(), one.g()
    L, C = _norm(one.gauss_newton()), _norm(one.curvature())
    return Ratio(
        measured=C / L,
        estimated=estimated_ratio(one.z, torch.ones_like(one.z), g, hyy, tolerance=TOLERANCE),
        g=float(g.norm()),
        hyy=_norm(hyy),
    )


def _norm(operator: Operator) -> float:
    return spectral_norm(operator, tolerance=TOLERANCE, most=400).value


def check_width(seeds: Sequence[int], widths: Sequence[int], regimes: Mapping[str, Regime] = REGIMES) -> Finding:
    """How the ratio goes with the width, regime by regime.

    Args:
        seeds: two or more: a slope is judged by its interval.
        widths: two or more.
    """
    found = {
        name: {seed: [measure(layer(seed, d, regime)) for d in widths] for seed in seeds}
        for name, regime in regimes.items()
    }
    slopes = {
        name: exponent_over({seed: [one.measured for one in row] for seed, row in rows.items()}, widths)
        for name, rows in found.items()
    }
    falls = {name: slope.high is not None and slope.high < 0 for name, slope in slopes.items()}
    measured = {name: _over_seeds(rows, "measured") for name, rows in found.items()}
    last = {name: row[-1] for name, row in measured.items()}
    reason = "; ".join(f"{name}: {_told(slopes[name], last[name], widths[-1])}" for name in regimes)
    table = Table(
        title="‖C‖ / ‖L‖",
        head=["regime", *(f"d = {d}" for d in widths), "exponent in d"],
        rows=[[name, *measured[name], slopes[name]] for name in regimes],
    )
    sizes: list[list[Cell]] = []
    for name, rows in found.items():
        first, final = ([row[at] for row in rows.values()] for at in (0, -1))
        sizes.append(
            [
                name,
                *(geometric_mean([one.g for one in ones]).value for ones in (first, final)),
                *(geometric_mean([one.hyy for one in ones]).value for ones in (first, final)),
                *(geometric_mean([one.estimated for one in ones]).value for ones in (first, final)),
                *(geometric_mean([one.measured / one.estimated for one in ones]).value for ones in (first, final)),
            ]
        )
    ends = (widths[0], widths[-1])
    head = [f"{what} at {d}" for what in ("‖g‖", "‖H_yy‖", "estimate", "ratio / estimate") for d in ends]
    return Finding(
        name="width",
        title="‖C‖ / ‖L‖ against width",
        claim="In high dimension the curvature of the norm vanishes beside the Gauss-Newton part: ‖C‖ / ‖L‖ falls as "
        "d grows, as 1/√d for a gradient and an H_yy of fixed size.",
        source="SimpleGPT (arXiv 2602.01212), theorem 4.1 as others sum it up; the regimes are ours, docs/theory.md",
        verdict=verdict_of(list(falls.values())),
        reason=reason,
        tables=[table, Table(title="What decides it", head=["regime", *head], rows=sizes)],
        panels=[
            Panel(
                name="width",
                title="‖C‖ / ‖L‖",
                x_label="width d",
                x=widths,
                lines={name: [one.value for one in row] for name, row in measured.items()},
                ranges={name: [(one.low, one.high) for one in row] for name, row in measured.items()},
                alt="Ratio of the spectral norms of C and L over width, a line for each regime, with 95 % intervals. "
                "The numbers are in the table.",
                log_x=True,
                log_y=True,
            ),
            Panel(
                name="estimate",
                title="The estimate ‖b‖ / (√d ‖PDH_yyDP‖)",
                x_label="width d",
                x=widths,
                lines={name: [one.value for one in _over_seeds(rows, "estimated")] for name, rows in found.items()},
                alt="The estimate of the ratio over width, a line for each regime. The numbers are in the second "
                "table.",
                log_x=True,
                log_y=True,
            ),
        ],
        notes=[
            "W: d × d, entries of variance 1/d; x: standard normal; γ = 1; RMSNorm without ε. Spectral norms by "
            f"Lanczos, residuals below {lr_text(TOLERANCE)} of them.",
            "A, B: quadratic loss, g of length 1 and √d in a random direction, H_yy = GGᵀ / ‖GGᵀ‖ of a square normal "
            "G. With H_yy = I the constant is another, the exponent the same.",
            f"C: softmax over {VOCAB} tokens, entries of the head of variance 1/d, any of them the target. D: the "
            "same with 12 added to the logits of 8 tokens, one of them the target.",
            "Means over seeds are geometric, with 95 % t-intervals of the logarithms. The exponent is the mean over "
            "seeds of each seed's slope of log ratio on log d.",
            "Estimate: ‖b‖ / (√d ‖P D H_yy D P‖), b = γ ⊙ g, P the projection off u = z / ‖z‖: the sufficient "
            "condition without its κ(W)², which for a square normal W is of order d² and proves nothing.",
            "A regime falls if the interval of its exponent lies below 0; the claim holds if all fall.",
        ],
        numbers={f"exponent.{name}": slope.value for name, slope in slopes.items()},
    )


def _over_seeds(rows: Mapping[int, Sequence[Ratio]], what: str) -> list[Estimate]:
    columns = zip(*rows.values(), strict=True)
    return [geometric_mean([getattr(one, what) for one in column]) for column in columns]


def _told(slope: Estimate, last: Estimate, width: int) -> str:
    if slope.low is None or slope.high is None or holds_zero(slope):
        how = "neither falls nor grows"
    else:
        how = "falls" if slope.high < 0 else "grows"
        how += " as 1/√d" if holds_zero(slope, -0.5) else ""
    ends = "" if slope.low is None or slope.high is None else f" [{slope.low:.2f}, {slope.high:.2f}]"
    return f"{how}, exponent {slope.value:.2f}{ends}, {last.value:.2g} at d = {width}"
