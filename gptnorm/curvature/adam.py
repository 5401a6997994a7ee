r"""What AdamW sees of the Hessian: preconditioned by its second moments.

An update is $-\eta f\, \hat m / (\sqrt{\hat v} + \epsilon)$, f the factor of the parameter's group. With
$P = (\sqrt{\hat v} + \epsilon) / f$, which changes slowly, a quadratic loss is stable under it as long as

$$\lambda_\max(P^{-1/2} H P^{-1/2}) < \frac{2 + 2 \beta_1}{(1 - \beta_1)\, \eta}.$$

Source: Cohen et al. 2022 (arXiv 2207.14484), section 2. Weight decay is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptnorm.config import OptimConfig
from gptnorm.errors import UserError
from gptnorm.model import GPT
from gptnorm.sharding import here
from gptnorm.train.checkpoint import load_checkpoint
from gptnorm.train.optim import Optimizers, build_optimizer


def preconditioner(
    optimizers: Optimizers, leaves: Sequence[Tensor], gradients: Sequence[Tensor] | None = None
) -> Tensor:
    """The diagonal of $P^{-1/2}$ over leaves that AdamW updates, flat; for `gptnorm.curvature.operators.Scaled`.

    Args:
        gradients: of each leaf, clipped as training would: P is then that of the update that they would make. None:
            that of the last one, in which what had no gradient for a while, a rare token's row, has next to no P.

    Raises:
        UserError: a leaf is not AdamW's, or has not been updated yet.
    """
    known = _moments(optimizers).items()
    moments = {id(leaf): pair for leaf, pair in known if pair[0]["exp_avg_sq"].any()}
    if any(id(leaf) not in moments for leaf in leaves):
        raise UserError("curvature: AdamW has no second moments of some of these parameters; has it updated them?")
    each = [None] * len(leaves) if gradients is None else gradients
    found = [_inverse_root(*moments[id(leaf)], g).to(leaf) for leaf, g in zip(leaves, each, strict=True)]
    return torch.cat([scale.reshape(-1) for scale in found])


def next_update(optimizers: Optimizers, leaves: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    r"""What AdamW would subtract at rate 1, given gradients: $f\, \hat m / (\sqrt{\hat v} + \epsilon)$ with the moments
    that hold them, without weight decay. The optimizers stay as they are.

    Args:
        leaves: AdamW's, updated before.
        gradients: of each, clipped as training would.
    """
    moments, found = _moments(optimizers), []
    for leaf, g in zip(leaves, gradients, strict=True):
        state, group = moments[leaf]
        beta1, step = group["betas"][0], float(state["step"]) + 1
        m = state["exp_avg"].lerp(g, 1 - beta1) / (1 - beta1**step)
        found.append((m * _inverse_root(state, group, g).square()).to(leaf))
    return found


def following_preconditioner(optimizers: Optimizers, parameters: Sequence[Tensor]) -> Tensor | None:
    """As `preconditioner`, but P of the update that the parameters' gradients are about to make; 0 where it is not
    AdamW's, so that only what AdamW updates counts. Of parameters that are spread over processes, this one's parts.

    None before AdamW's first update: P would be the gradient's size alone.
    """
    moments, found, some = _moments(optimizers), [], False
    for parameter in parameters:
        local = here(parameter.detach())
        if parameter in moments and parameter.grad is not None:
            found.append(_inverse_root(*moments[parameter], here(parameter.grad)).to(local))
            some = True
        else:
            found.append(torch.zeros_like(local))
    return torch.cat([scale.reshape(-1) for scale in found]) if some else None


def _moments(optimizers: Optimizers) -> dict[Tensor, tuple[dict[str, Tensor], dict[str, Any]]]:
    """AdamW's state of each parameter that it has updated, and the parameter's group."""
    parts = [part for part in optimizers.parts if isinstance(part, torch.optim.AdamW)]
    pairs = [(parameter, group) for part in parts for group in part.param_groups for parameter in group["params"]]
    state = optimizers.state
    return {parameter: (state[parameter], group) for parameter, group in pairs if state.get(parameter)}


def _inverse_root(state: dict[str, Tensor], group: dict[str, Any], gradient: Tensor | None) -> Tensor:
    """Of the last update, or of the one that the gradient is about to make."""
    _, beta2 = group["betas"]
    second, step = here(state["exp_avg_sq"]).double(), float(state["step"])
    if gradient is not None:
        second, step = beta2 * second + (1 - beta2) * gradient.double().square(), step + 1
    second = second / (1 - beta2**step)
    return (group["lr_factor"] / (second.sqrt() + group["eps"])).sqrt()


def read_optimizers(checkpoint: Path, model: GPT, config: OptimConfig) -> Optimizers:
    """A run's optimizers as they were at a verified checkpoint, on its model; UserError if it lacks them."""
    optimizers = build_optimizer(model, config)
    optimizers.prime()
    load_checkpoint(checkpoint, {f"optimizer/{name}": tensor for name, tensor in optimizers.tensors(model)})
    return optimizers


def updated_by_adam(optimizers: Optimizers, model: GPT, names: Sequence[str]) -> list[str]:
    """Those of the names of parameters that AdamW updates."""
    parts = [part for part in optimizers.parts if isinstance(part, torch.optim.AdamW)]
    own = {id(parameter) for part in parts for group in part.param_groups for parameter in group["params"]}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return [name for name in names if id(parameters[name]) in own]


def stability_threshold(lr: float, beta1: float) -> float:
    r"""$(2 + 2 \beta_1) / ((1 - \beta_1)\, \eta)$: the largest preconditioned eigenvalue that a rate bears."""
    return (2 + 2 * beta1) / ((1 - beta1) * lr)
