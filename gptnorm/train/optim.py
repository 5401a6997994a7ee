"""AdamW with the parameter groups of recipe and strategy."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import nn

from gptnorm.config import OptimConfig
from gptnorm.model import GPT


def build_optimizer(model: GPT, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over groups of equal decay and equal factor of the learning rate (key `lr_factor`).

    `optim.decay_on = "matrices"` means linear maps and tables, not gains and learned scales, however
    many axes these have.
    """
    owners = {id(owner.weight): owner for _, owner in model.weights()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for parameter in model.parameters():
        owner = owners.get(id(parameter))
        role, layer = (owner.role, owner.layer) if owner else (None, 0)
        factors = model.strategy.group(role, layer, model.shape)
        decays = config.decay_on == "all" or owner is not None
        groups[(config.weight_decay * factors.weight_decay if decays else 0.0, factors.lr)].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": decay, "lr_factor": factor}
            for (decay, factor), parameters in groups.items()
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of the next update; each group multiplies it by its own factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]
