"""What is measured of a model's curvature, and how sure each number is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from gptnorm.config import OptimConfig
from gptnorm.curvature.activation import SlotLoss
from gptnorm.curvature.adam import next_update, preconditioner, stability_threshold, updated_by_adam
from gptnorm.curvature.algorithms import Eigenpair, hutch_pp, lanczos, ritz_value, spectral_density
from gptnorm.curvature.checks import refuse_wrong_products
from gptnorm.curvature.language import LanguageLoss
from gptnorm.curvature.operators import Operator, Scaled
from gptnorm.curvature.rates import CriticalRate, critical_rate_along
from gptnorm.errors import bad_value
from gptnorm.model import GPT
from gptnorm.model.router import frozen_routing
from gptnorm.train.optim import Optimizers

PROBES = 30
"""Products for a trace."""

SPECTRUM_PROBES, SPECTRUM_STEPS = 4, 40
"""Random vectors for a spectrum, and products for each."""

LARGE = 0.1
"""Part of the largest modulus above which an eigenvalue is one of the large ones."""


@dataclass(frozen=True, kw_only=True)
class Extreme:
    """An eigenvalue at an end of a spectrum."""

    value: float
    residual: float
    """Some eigenvalue is no further away."""

    @classmethod
    def of(cls, pair: Eigenpair) -> Extreme:
        return cls(value=pair.value, residual=pair.residual)


@dataclass(frozen=True, kw_only=True)
class Sharpness:
    """Of the loss over some parameters."""

    parameters: int
    loss: float
    gradient: float
    """‖∇ℓ‖."""
    largest: Extreme
    """λ_max of the Hessian."""
    smallest: Extreme
    gauss_newton: Extreme
    """λ_max of the Gauss-Newton matrix."""
    trace: float
    """Of the Hessian."""
    trace_error: float | None
    """Its standard error."""
    products: int
    """Of the Hessian, for its ends and its trace."""
    difference: float
    """How far a product is from finite differences of the gradient, relative."""


@dataclass(frozen=True, kw_only=True)
class AdamReading:
    """What AdamW sees at a checkpoint, over the parameters that it updates."""

    parameters: int
    lr: float
    """Of the next update."""
    largest: Extreme
    """λ_max of the preconditioned Hessian."""
    threshold: float | None
    """What it would be at most, were the loss quadratic and the rate stable; None: at the end of a schedule that falls
    to 0 there is no next update."""
    critical: CriticalRate
    """Along the update that it would make on these tokens, without weight decay, weights put back after it where their
    strategy wants them."""


@dataclass(frozen=True, kw_only=True)
class SpectrumReading:
    """How the Hessian's eigenvalues λ are distributed; each number with its standard error over random vectors."""

    values: list[list[float]]
    """Points of the distribution, for each random vector; see `Density`."""
    weights: list[list[float]]
    """Of each point; they sum to 1."""
    mean: tuple[float, float]
    rms: tuple[float, float]
    """√(mean λ²)."""
    above: tuple[float, float]
    """How many λ are above `LARGE` of the largest modulus."""
    below: tuple[float, float]
    """How many are below minus that."""


@dataclass(frozen=True, kw_only=True)
class WeightReading:
    """Of one weight, the others fixed."""

    name: str
    norm: float
    """‖W‖."""
    largest: Extreme
    """λ_max of the Hessian in W."""
    smallest: Extreme

    @property
    def scale_free(self) -> float:
        """‖W‖² λ_max, which W → cW leaves alone where the loss does not depend on the length of W."""
        return self.norm**2 * self.largest.value


@dataclass(frozen=True, kw_only=True)
class SlotReading:
    """Of what one slot reads at one token, or over the whole sequence; spectral norms."""

    name: str
    token: int | None
    """None: the whole sequence."""
    rms: float
    """Of x."""
    hessian: Extreme
    """‖H_xx‖."""
    gauss_newton: Extreme
    """‖L‖."""
    curvature: Extreme
    """‖C‖."""
    difference: float
    """How far a product of H_xx is from finite differences of the gradient, relative."""

    @property
    def scale_free(self) -> float:
        """RMS(x)² ‖H_xx‖."""
        return self.rms**2 * self.hessian.value


Say = Callable[[str], None]
"""Is told what is measured next."""


def measure_sharpness(
    model: GPT, batches: Sequence[Tensor], names: Sequence[str], *, tolerance: float, most: int, say: Say = print
) -> Sharpness:
    """Both ends and the trace of the Hessian, and the Gauss-Newton matrix's largest eigenvalue.

    Args:
        batches, names: see `LanguageLoss`.
        tolerance, most: see `lanczos`.
        say: is told what comes next.

    Raises:
        UserError: a product disagrees with finite differences of the gradient.
    """
    say("comparing with finite differences")
    loss = LanguageLoss(model, batches, names)
    with loss.measuring():
        hessian = loss.hessian()
        difference = check_products(model, batches[0], names)
        say("ends of the Hessian's spectrum")
        (largest,), (smallest,) = lanczos(hessian, smallest=1, tolerance=tolerance, most=most)
        say("trace of the Hessian")
        trace = hutch_pp(hessian, probes=PROBES)
        gradient = float(hessian.gradient().norm())
        del hessian
        say("Gauss-Newton matrix")
        (gauss_newton,), _ = lanczos(loss.gauss_newton(), tolerance=tolerance, most=most)
        return Sharpness(
            parameters=sum(leaf.numel() for leaf in loss.leaves),
            loss=loss.value(),
            gradient=gradient,
            largest=Extreme.of(largest),
            smallest=Extreme.of(smallest),
            gauss_newton=Extreme.of(gauss_newton),
            trace=trace.value,
            trace_error=trace.error,
            products=largest.products + trace.products,
            difference=difference,
        )


def measure_spectrum(
    model: GPT, batches: Sequence[Tensor], names: Sequence[str], *, say: Say = print
) -> SpectrumReading:
    """Arguments as of `measure_sharpness`, which has to have found the products right."""
    say("spectrum of the Hessian")
    loss = LanguageLoss(model, batches, names)
    with loss.measuring():
        hessian = loss.hessian()
        density = spectral_density(hessian, steps=SPECTRUM_STEPS, probes=SPECTRUM_PROBES)
    limit, size = LARGE * float(density.values.abs().max()), hessian.space.size

    def count(chosen: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        share, error = density.mean(lambda x: chosen(x).to(x.dtype))
        return size * share, size * error

    mean, square = density.mean(lambda x: x), density.mean(lambda x: x**2)
    rms = math.sqrt(square[0])
    return SpectrumReading(
        values=density.values.tolist(),
        weights=density.weights.tolist(),
        mean=mean,
        rms=(rms, square[1] / (2 * rms) if rms else 0.0),
        above=count(lambda x: x > limit),
        below=count(lambda x: x < -limit),
    )


def measure_adam(
    model: GPT,
    batches: Sequence[Tensor],
    names: Sequence[str],
    optimizers: Optimizers,
    *,
    lr: float,
    config: OptimConfig,
    tolerance: float,
    most: int,
    say: Say = print,
) -> AdamReading:
    """The preconditioned Hessian, and how large an update the loss bears; other arguments as of `measure_sharpness`.

    Args:
        lr: of the next update.

    Raises:
        UserError: AdamW updates none of the parameters.
    """
    say("preconditioned Hessian")
    own = updated_by_adam(optimizers, model, names)
    if not own:
        raise bad_value("--what", "adam", "AdamW updates no parameter of --part")
    whole, loss = LanguageLoss(model, batches), LanguageLoss(model, batches, own)
    with whole.measuring():
        norm = float(whole.gradient().norm())
    with loss.measuring():
        hessian = loss.hessian()
        clipped = hessian.gradient() * (min(1.0, config.clip / norm) if config.clip and norm else 1.0)
        gradients = hessian.space.split(clipped)
        seen = Scaled(hessian, preconditioner(optimizers, loss.leaves, gradients))
        (largest,), _ = lanczos(seen, tolerance=tolerance, most=most)
        say("critical rate")
        update = next_update(optimizers, loss.leaves, gradients)
        owners = [owner for _, owner in model.weights() if owner.constraint is not None]

        def constrain() -> None:
            for owner in owners:
                owner.after_step()

        critical = critical_rate_along(
            loss.value,
            loss.leaves,
            update,
            lr or config.lr,
            constrain=constrain,
            constrained=[tensor for owner in owners for tensor in (owner.weight, *owner.buffers(recurse=False))],
        )
    return AdamReading(
        parameters=seen.space.size,
        lr=lr,
        largest=Extreme.of(largest),
        threshold=stability_threshold(lr, config.betas[0]) if lr > 0 else None,
        critical=critical,
    )


def measure_weights(
    model: GPT, batches: Sequence[Tensor], names: Sequence[str], *, tolerance: float, most: int, say: Say = print
) -> list[WeightReading]:
    """Each weight by itself; arguments as of `measure_sharpness`."""
    found = []
    for name in names:
        say(name)
        loss = LanguageLoss(model, batches, [name])
        with loss.measuring():
            (largest,), (smallest,) = lanczos(loss.hessian(), smallest=1, tolerance=tolerance, most=most)
            norm = float(loss.leaves[0].detach().norm())
        ends = {"largest": Extreme.of(largest), "smallest": Extreme.of(smallest)}
        found.append(WeightReading(name=name, norm=norm, **ends))
    return found


def measure_slots(
    model: GPT,
    tokens: Tensor,
    slots: Sequence[str],
    token: int | None,
    *,
    tolerance: float,
    most: int,
    say: Say = print,
) -> list[SlotReading]:
    """Each slot at one token of one sequence (T + 1,), the other tokens fixed; or at all of them (None)."""
    found = []
    for name in slots:
        say(name)
        loss = SlotLoss(model, tokens, name, token)
        with loss.measuring():
            hessian = loss.hessian()
            with frozen_routing(model):
                difference = refuse_wrong_products(hessian, loss.finite_difference(), [loss.x], what=name)
            parts = (hessian, loss.gauss_newton(), loss.curvature())
            norms = [spectral_norm(part, tolerance=tolerance, most=most) for part in parts]
        found.append(
            SlotReading(
                name=name,
                token=token,
                rms=float(loss.x.square().mean().sqrt()),
                hessian=norms[0],
                gauss_newton=norms[1],
                curvature=norms[2],
                difference=difference,
            )
        )
    return found


def spectral_norm(operator: Operator, *, tolerance: float, most: int) -> Extreme:
    """The largest modulus of an eigenvalue."""
    found = ritz_value(operator, modulus=True, tolerance=tolerance, most=most)
    return Extreme(value=abs(found.value), residual=found.residual)


def check_products(model: GPT, batch: Tensor, names: Sequence[str]) -> float:
    """`refuse_wrong_products` on one micro-batch; routers keep to their choice meanwhile, for it jumps."""
    loss = LanguageLoss(model, [batch], names)
    with loss.measuring(), frozen_routing(model):
        return refuse_wrong_products(
            loss.hessian(), loss.finite_difference(extrapolated=True), loss.leaves, what="parameters"
        )


def weights_of(model: GPT, names: Sequence[str]) -> list[str]:
    """Those of the names that are weights of linear maps of the blocks."""
    owned = {f"{name}.weight" for name, owner in model.weights() if owner.layer >= 0 and name.startswith("blocks.")}
    return [name for name in names if name in owned]


def middle(tokens: Tensor) -> int:
    """The token in the middle of what a sequence (T + 1,) reads."""
    return (tokens.shape[-1] - 1) // 2
