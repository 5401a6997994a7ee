"""The mixture-of-experts branch."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from gptnorm.config import MoEConfig
from gptnorm.shape import Shape
from gptnorm.strategies import Strategy


class Routing(NamedTuple):
    """What one router did with a batch; only `balance` and `z` carry a gradient."""

    balance: Tensor
    """Balancing loss, a scalar: E sum_e f_e p_e, 1 if the load is even."""
    z: Tensor
    """Mean squared logsumexp of the router's logits, a scalar."""
    load: Tensor
    """(E,): the share of the (token, choice) pairs that went to each expert; sums to 1."""
    entropy: Tensor
    """Mean entropy in nats of the router's distribution over experts, a scalar."""


class MixtureOfExperts(nn.Module):
    """(B, T, d) → ((B, T, d), Routing)."""

    def __init__(self, layer: int, shape: Shape, strategy: Strategy, config: MoEConfig) -> None:
        super().__init__()

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Routing]:
        raise NotImplementedError


def describe_routing(routings: list[Routing]) -> dict[str, float]:
    """Router statistics for the metrics, means over micro-batches and blocks; nothing without experts."""
    return {}
