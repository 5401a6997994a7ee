"""Optimizers with the parameter groups of recipe and strategy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gptnorm.config import OptimConfig
from gptnorm.model import GPT


class Optimizers:
    """AdamW, or Muon and AdamW, as one."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self) -> dict[Tensor, dict[str, Any]]:
        """What the optimizers remember of each parameter."""
        return {parameter: values for part in self.parts for parameter, values in part.state.items()}

    def set_lr(self, lr: float) -> None:
        """The learning rate of the next update; each group multiplies it by its own factor."""
        for group in self.param_groups:
            group["lr"] = lr * group["lr_factor"]

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def step(self, leave_out: Tensor | None = None) -> None:
        """One update.

        Args:
            leave_out: a float32 scalar; 1.0 leaves weights, moments and step counts as they are. Fused AdamW
                looks at it on the device (as it does for mixed precision's gradient scaler); Muon has no such
                input, so with it the host has to look.
        """
        if leave_out is not None and len(self.parts) > 1 and leave_out.item():
            return
        for part in self.parts:
            if isinstance(part, torch.optim.AdamW):
                # Attributes that only the gradient scaler sets, so that the class does not declare them.
                part.grad_scale, part.found_inf = None, leave_out  # type: ignore[attr-defined]
            part.step()

    def tensors(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the state, as `exp_avg/<parameter>` and the like; none before the first step."""
        state = self.state
        for name, parameter in model.named_parameters():
            for key, value in state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    yield f"{key}/{name}", value

    @torch.no_grad()
    def prime(self) -> None:
        """Makes the state exist, so that a checkpoint can be read into it; weights and gradients stay.

        A step at rate 0 with gradients of 0 makes it with the right devices and shards, whatever the optimizer.
        """
        rates = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] = 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        self.step()
        for group, lr in zip(self.param_groups, rates, strict=True):
            group["lr"] = lr
        self.zero_grad()


def build_optimizer(model: GPT, config: OptimConfig) -> Optimizers:
    """The optimizer over groups of equal decay and equal factor of the learning rate (key `lr_factor`).

    `optim.decay_on = "matrices"` means linear maps and tables, not gains and learned scales, however
    many axes these have. Muon takes the matrices of the blocks, at AdamW's rate: its updates are scaled to the RMS that
    AdamW's have (0.2 sqrt(max(out, in)), Moonlight, arXiv 2502.16982). Embeddings, head, router, gains and the
    three-dimensional weights of experts stay with AdamW.
    """
    owners = {id(owner.weight): owner for _, owner in model.weights()}
    groups: dict[tuple[bool, float, float], list[nn.Parameter]] = defaultdict(list)
    for parameter in model.parameters():
        owner = owners.get(id(parameter))
        role, layer = (owner.role, owner.layer) if owner else (None, 0)
        factors = model.strategy.group(role, layer, model.shape)
        decays = config.decay_on == "all" or owner is not None
        matrix = role in model.shape.matrix_roles and parameter.ndim == 2
        decay = config.weight_decay * factors.weight_decay if decays else 0.0
        groups[(config.name == "muon" and matrix, decay, factors.lr)].append(parameter)
    by_muon, by_adamw = (
        [
            {"params": parameters, "weight_decay": decay, "lr_factor": factor}
            for (muon, decay, factor), parameters in groups.items()
            if muon == wanted
        ]
        for wanted in (True, False)
    )
    parts: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(by_adamw, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    ]
    if by_muon:
        muon = torch.optim.Muon(by_muon, lr=config.lr, momentum=config.momentum, adjust_lr_fn="match_rms_adamw")
        parts.append(muon)
    return Optimizers(parts)
