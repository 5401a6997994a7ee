"""A linear map with what its strategy puts after it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptnorm.norms import build_all
from gptnorm.shape import Role, Shape
from gptnorm.strategies import Strategy


class Projection(nn.Module):
    """y = after(W x), W of shape (out_features, in_features), no bias."""

    def __init__(self, role: Role, layer: int, shape: Shape, strategy: Strategy) -> None:
        super().__init__()
        self.role: Role = role
        self.layer = layer
        self.weight = nn.Parameter(torch.empty(shape.out_features(role), shape.in_features(role)))
        self.after = build_all(strategy.projection(role, layer, shape))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        for step in self.after:
            y = step(y)
        return y

    def extra_repr(self) -> str:
        return f"{self.role}, {tuple(self.weight.shape)}"


class Table(nn.Module):
    """y = after(W[i]): the embedding of tokens or of positions, W of shape (rows, d)."""

    def __init__(self, role: Role, rows: int, shape: Shape, strategy: Strategy) -> None:
        super().__init__()
        self.role: Role = role
        self.layer = 0
        self.weight = nn.Parameter(torch.empty(rows, shape.d))
        self.after = build_all(strategy.projection(role, 0, shape))

    def forward(self, index: Tensor) -> Tensor:
        y = F.embedding(index, self.weight)
        for step in self.after:
            y = step(y)
        return y

    def extra_repr(self) -> str:
        return f"{self.role}, {tuple(self.weight.shape)}"
