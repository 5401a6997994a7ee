"""A linear map with what its strategy puts after it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptnorm.model.float8 import float8_linear
from gptnorm.model.init import normalize_, pull_back_
from gptnorm.norms import build_all
from gptnorm.shape import Role, Shape
from gptnorm.sharding import Sharers, here, leave
from gptnorm.strategies import Strategy


class WeightOwner(nn.Module):
    """A weight of some role, what follows it, and what holds for it after every step.

    The weight is (out, in), or (experts, out, in) with gains for each expert.
    """

    sharers: Sharers | None = None
    """The processes that share what the weight reads (tensor parallelism): each has one term of the raw output."""

    def __init__(self, role: Role, layer: int, shape: Shape, strategy: Strategy, size: tuple[int, ...]) -> None:
        super().__init__()
        self.role: Role = role
        self.layer = layer
        self.weight = nn.Parameter(torch.empty(size))
        self.after = build_all(strategy.projection(role, layer, shape), experts=size[0] if len(size) == 3 else None)
        self.constraint = strategy.constraint(role, layer, shape)
        if self.constraint and self.constraint.kind == "penalty":
            # One multiplier per vector; they grow while it is too long, so they belong to a checkpoint.
            self.register_buffer("multiplier", torch.empty_like(self.weight.detach().select(self.constraint.axis, 0)))
            self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        if self.constraint and self.constraint.kind == "penalty":
            self.get_buffer("multiplier").zero_()

    @torch.no_grad()
    def after_step(self) -> None:
        """Puts the weight back where its strategy wants it."""
        if self.constraint is None:
            return
        if self.constraint.kind == "penalty":
            pull_back_(self.weight, self.constraint.axis, self.get_buffer("multiplier"))
        else:
            normalize_(self.weight, self.constraint.axis, only_longer=self.constraint.kind == "bound")

    def extra_repr(self) -> str:
        return f"{self.role}, {tuple(self.weight.shape)}"


class Projection(WeightOwner):
    """y = after(W x), W of shape (out_features, in_features), no bias."""

    float8: bool = False
    """Whether what is multiplied is rounded to float8 (`gptnorm.model.float8`)."""

    def __init__(self, role: Role, layer: int, shape: Shape, strategy: Strategy) -> None:
        super().__init__(role, layer, shape, strategy, (shape.out_features(role), shape.in_features(role)))

    def forward(self, x: Tensor) -> Tensor:
        weight = here(self.weight)
        y = float8_linear(x, weight) if self.float8 else F.linear(x, weight)
        if self.sharers is not None:
            y = leave(y, self.sharers)
        for step in self.after:
            y = step(y)
        return y


class Table(WeightOwner):
    """y = after(W[i]): the embedding of tokens or of positions, W of shape (rows, d).

    As a linear map it reads a vector with a single 1, so processes that share it have a part of the rows each.
    """

    def __init__(self, role: Role, rows: int, shape: Shape, strategy: Strategy) -> None:
        super().__init__(role, 0, shape, strategy, (rows, shape.d))

    def forward(self, index: Tensor) -> Tensor:
        y = F.embedding(index, here(self.weight)) if self.sharers is None else self._shared_rows(index, self.sharers)
        for step in self.after:
            y = step(y)
        return y

    def _shared_rows(self, index: Tensor, sharers: Sharers) -> Tensor:
        rows = here(self.weight)
        own = index - sharers.rank * len(rows)
        absent = (own < 0) | (own >= len(rows))
        y = F.embedding(own.masked_fill(absent, 0), rows)
        return leave(y.masked_fill(absent[..., None], 0.0), sharers)
