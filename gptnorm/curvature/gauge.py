r"""The curvature of the loss, read now and then while a run trains: keys of its `train` lines in metrics.jsonl.

At a due step, between its gradient and its update, so with the weights before the update, on a few of its sequences:

| key | meaning |
|---|---|
| hessian_max | $\lambda_\max$ of the Hessian H over all parameters |
| adam_sharpness | $\lambda_\max(P^{-1/2} H P^{-1/2})$ over what AdamW updates, P that of this very update |
| adam_threshold | $(2 + 2\beta_1) / ((1 - \beta_1) \eta)$ at this update's rate η (`gptnorm.curvature.adam`) |
| slots | by name $\lVert H_{xx} \rVert$ (`hessian`), $\lVert L \rVert$ (`gauss_newton`), $\lVert C \rVert$ |
| | (`curvature`) at one token of the first sequence (`gptnorm.curvature.activation`) |
| gauge_refused | why there are no numbers |

Each eigenvalue has beside it its residual $\lVert A v - \lambda v \rVert$ (`…_residual`): an eigenvalue is no further
off (`gptnorm.curvature.algorithms.ritz_value`). Before AdamW's first update there is no sharpness of its
own, since P would be the gradient's size alone.

Before a number is told, a product is compared with differences of the gradient over all parameters, and with that
through every kernel of the model; where it disagrees, the reading is refused, and the run goes on. This is done at
every reading, so that a reading depends on weights, gradient, moments, tokens and settings alone, and a resumed run has
the same ones. It draws no random number and leaves everything as it was.

In memory are the graph of the gradient on those sequences, and a handful of vectors of the parameters' size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gptnorm.config import NO_SLOTS, Config
from gptnorm.curvature.activation import SlotLoss, slots_of, used_once
from gptnorm.curvature.adam import following_preconditioner, stability_threshold
from gptnorm.curvature.algorithms import RitzValue, ritz_value
from gptnorm.curvature.checks import refuse_wrong_products
from gptnorm.curvature.language import LanguageLoss
from gptnorm.curvature.operators import FiniteDifference, Operator, Scaled
from gptnorm.curvature.reading import middle
from gptnorm.curvature.spread import SpreadLoss
from gptnorm.errors import SharedError, UserError, bad_value
from gptnorm.model import GPT
from gptnorm.model.router import frozen_routing
from gptnorm.train.optim import Optimizers

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

FEWEST = 6
"""Products before an iteration may stop: an unlucky start hides an eigenvalue from the first few."""

Reading = dict[str, Any]


class Gauge:
    """Readings of one model.

    Args:
        optimizers: those that update it.
        mesh: the processes over which it is spread, if it is; all of them read together, by differences of gradients.

    Raises:
        UserError: a setting does not fit the model.
    """

    def __init__(self, model: GPT, optimizers: Optimizers, config: Config, mesh: DeviceMesh | None = None) -> None:
        self._model, self._optimizers, self._mesh = model, optimizers, mesh
        self._config, self._beta1 = config.gauge, config.optim.betas[0]
        self._twice = mesh is None and config.gauge.products != "differences"
        if mesh is not None:
            _refuse_spread(config)
        wanted = config.gauge.every > 0 and self._twice and config.gauge.slots != NO_SLOTS
        self.slots = self._find_slots() if wanted else []
        """Names."""

    def due(self, update: int) -> bool:
        """Whether there is a reading before update number `update` (from 1): the first, and then every so many."""
        every = self._config.every
        return every > 0 and (update == 1 or update % every == 0)

    def read(self, tokens_BT: Tensor, lr: float) -> Reading:
        """A reading as plain numbers of six digits.

        Args:
            tokens_BT: the sequences, (B, T + 1); on several processes this one's own.
            lr: the rate of the update.
        """
        try:
            return self._read(tokens_BT, lr)
        except UserError as error:
            return {"gauge_refused": str(error).removeprefix("curvature: ")}
        except (MemoryError, torch.OutOfMemoryError):
            if self._mesh is not None:
                raise  # the others wait for this one
            return {"gauge_refused": "out of memory; lower gauge.sequences"}

    def _read(self, tokens_BT: Tensor, lr: float) -> Reading:
        found: Reading = {}
        with self._hessian(tokens_BT) as hessian:
            found |= self._largest("hessian_max", hessian)
            scales = following_preconditioner(self._optimizers, list(self._model.parameters()))
            if scales is not None:
                found |= self._largest("adam_sharpness", Scaled(hessian, scales))
                if lr > 0:
                    found["adam_threshold"] = _digits(stability_threshold(lr, self._beta1))
        if self.slots:
            found["slots"] = {name: self._slot(tokens_BT[0], name) for name in self.slots}
        return found

    @contextlib.contextmanager
    def _hessian(self, tokens_BT: Tensor) -> Iterator[Operator]:
        """Over all parameters, checked where there are two ways to have it."""
        if self._mesh is not None:
            spread = SpreadLoss(self._model, tokens_BT, self._mesh)
            with spread.measuring():
                yield spread.finite_difference()
            return
        loss = LanguageLoss(self._model, [tokens_BT])
        with loss.measuring(), frozen_routing(self._model):
            loss.value()  # routers choose here, before anything is moved
            if self._twice:
                hessian = loss.hessian()
                differences = loss.finite_difference(extrapolated=True)
                refuse_wrong_products(hessian, differences, loss.leaves, what="parameters")
                yield hessian
            else:
                yield FiniteDifference(loss.gradient, loss.leaves, by_leaf=True)

    def _largest(self, name: str, operator: Operator) -> Reading:
        how = self._config
        return _told(name, ritz_value(operator, tolerance=how.tolerance, most=how.most, fewest=FEWEST))

    def _slot(self, tokens: Tensor, name: str) -> Reading:
        """Of one sequence (T + 1,)."""
        token = middle(tokens) if self._config.token is None else self._config.token
        loss, found = SlotLoss(self._model, tokens, name, token), {}
        how = {"tolerance": self._config.tolerance, "most": self._config.most, "fewest": FEWEST}
        with loss.measuring():
            for part, operator in (
                ("hessian", loss.hessian),
                ("gauss_newton", loss.gauss_newton),
                ("curvature", loss.curvature),
            ):
                norm = ritz_value(operator(), modulus=True, **how)
                found |= _told(part, replace(norm, value=abs(norm.value)))
        return found

    def _find_slots(self) -> list[str]:
        """The chosen ones, or those of the middle block that a forward pass uses once."""
        model, chosen = self._model, list(dict.fromkeys(self._config.slots))
        slots = slots_of(model)
        inside = f"blocks.{len(model.blocks) // 2}."
        some = [name for name in slots if name.startswith(inside)]
        for name in chosen:
            if name not in slots:
                allowed = f"no such slot; there are {', '.join(some)}, and so on in the other blocks"
                raise bad_value("gauge.slots", name, allowed)
        # How often a slot is used does not hang on constants that may still have to be measured.
        calibrated, model.calibrated = model.calibrated, True
        try:
            tokens = torch.zeros(3, dtype=torch.long, device=model.embed.weight.device)
            once = used_once(model, tokens, chosen or some)
        finally:
            model.calibrated = calibrated
        for name in chosen:
            if name not in once:
                raise bad_value("gauge.slots", name, "is used more than once in a forward pass, so x is not one input")
        return once


def _refuse_spread(config: Config) -> None:
    """SharedError if a setting needs the whole model on one process."""
    gauge = config.gauge
    if gauge.every and gauge.slots not in ((), NO_SLOTS):
        raise SharedError(str(bad_value("gauge.slots", list(gauge.slots), "must be left out on several processes")))
    if gauge.every and gauge.products == "autograd":
        allowed = 'must be "auto" or "differences" under torchrun: sharded weights cannot be differentiated twice'
        raise SharedError(str(bad_value("gauge.products", gauge.products, allowed)))


def flat(reading: Reading) -> dict[str, float]:
    """The numbers of a reading one by one, as TensorBoard wants them: `slots.NAME.hessian` and so on."""
    found: dict[str, float] = {}
    for key, value in reading.items():
        if isinstance(value, dict):
            found |= {f"{key}.{name}": number for name, number in flat(value).items()}
        elif isinstance(value, int | float):
            found[key] = value
    return found


def _told(name: str, found: RitzValue) -> Reading:
    return {name: _digits(found.value), f"{name}_residual": _digits(found.residual)}


def _digits(x: float) -> float:
    return float(f"{x:.6g}")
