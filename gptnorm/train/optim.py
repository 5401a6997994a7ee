"""AdamW with the parameter groups of recipe and strategy."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import nn

from gptnorm.config import OptimConfig
from gptnorm.model import GPT


def build_optimizer(model: GPT, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over groups of equal decay and equal learning-rate multiplier (key `lr_multiplier`)."""
    multipliers = {
        id(owner.weight): model.strategy.lr_multiplier(owner.role, owner.layer, model.shape)
        for _, owner in model.weights()
    }
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for parameter in model.parameters():
        decays = config.decay_on == "all" or parameter.ndim >= 2
        key = (config.weight_decay if decays else 0.0, multipliers.get(id(parameter), 1.0))
        groups[key].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": decay, "lr_multiplier": multiplier}
            for (decay, multiplier), parameters in groups.items()
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of the next update; each group multiplies it by its own factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_multiplier"]
