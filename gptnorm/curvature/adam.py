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
from gptnorm.train.checkpoint import load_checkpoint
from gptnorm.train.optim import Optimizers, build_optimizer


def preconditioner(optimizers: Optimizers, leaves: Sequence[Tensor]) -> Tensor:
    """The diagonal of $P^{-1/2}$ over leaves that AdamW updates, flat; for `gptnorm.curvature.operators.Scaled`.

    Raises:
        UserError: a leaf is not AdamW's, or has not been updated yet.
    """
    found: dict[int, Tensor] = {}
    for part in optimizers.parts:
        if not isinstance(part, torch.optim.AdamW):
            continue
        for group in part.param_groups:
            for parameter in group["params"]:
                state = part.state.get(parameter)
                if state and state["exp_avg_sq"].any():
                    found[id(parameter)] = _inverse_root(state, group)
    if any(id(leaf) not in found for leaf in leaves):
        raise UserError("curvature: AdamW has no second moments of some of these parameters; has it updated them?")
    return torch.cat([found[id(leaf)].reshape(-1).to(leaf) for leaf in leaves])


def next_update(optimizers: Optimizers, leaves: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    r"""What AdamW would subtract at rate 1, given gradients: $f\, \hat m / (\sqrt{\hat v} + \epsilon)$ with the moments
    that hold them, without weight decay. The optimizers stay as they are.

    Args:
        leaves: AdamW's, updated before.
        gradients: of each, clipped as training would.
    """
    groups = {id(parameter): group for group in optimizers.param_groups for parameter in group["params"]}
    found = []
    for leaf, g in zip(leaves, gradients, strict=True):
        group, state = groups[id(leaf)], optimizers.state[leaf]
        (beta1, beta2), step = group["betas"], float(state["step"]) + 1
        m = state["exp_avg"].lerp(g, 1 - beta1) / (1 - beta1**step)
        v = state["exp_avg_sq"].lerp(g.square(), 1 - beta2) / (1 - beta2**step)
        found.append(group["lr_factor"] * m / (v.sqrt() + group["eps"]))
    return found


def _inverse_root(state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
    _, beta2 = group["betas"]
    second = state["exp_avg_sq"].double() / (1 - beta2 ** float(state["step"]))
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
