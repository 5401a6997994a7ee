"""The loss of a GPT whose parameters are spread over processes, and its Hessian from gradients.

FSDP2 hands gradients to `.grad` and cannot be differentiated twice, so a product is a difference of two gradients, each
with its part of it on each process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gptnorm.curvature.operators import FiniteDifference
from gptnorm.curvature.reference import reference_paths
from gptnorm.curvature.vectors import SpreadSpace
from gptnorm.model import GPT
from gptnorm.model.router import frozen_routing
from gptnorm.sharding import here

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class SpreadLoss:
    """The training objective, the mean over all processes' sequences, as a function of all parameters.

    Everything is to be used inside `with loss.measuring():`, by all processes together.

    Args:
        tokens: this process's sequences, (B, T + 1); as many on every process.
        mesh: the processes ("data", "tensor").
    """

    def __init__(self, model: GPT, tokens: Tensor, mesh: DeviceMesh) -> None:
        self._model, self._tokens = model, tokens
        self.parameters = list(model.parameters())
        self.space = SpreadSpace(self.parameters, mesh)
        self.leaves = [here(parameter.detach()) for parameter in self.parameters]
        """This process's parts, in the parameters' own memory."""

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Plain kernels; routers keep to the experts that they choose for the weights as they are."""
        with reference_paths(self._model), frozen_routing(self._model):
            with torch.no_grad():
                self._model.loss(self._tokens)
            yield

    def gradient(self) -> Tensor:
        """This process's part of it, flat; the gradients that the parameters have are left as they are."""
        kept = [parameter.grad for parameter in self.parameters]
        try:
            for parameter in self.parameters:
                parameter.grad = None
            self._model.objective(self._tokens).total.backward()
            found = [
                torch.zeros_like(leaf) if parameter.grad is None else here(parameter.grad)
                for leaf, parameter in zip(self.leaves, self.parameters, strict=True)
            ]
            return self.space.join(found)
        finally:
            for parameter, gradient in zip(self.parameters, kept, strict=True):
                parameter.grad = gradient

    def finite_difference(self, *, step: float | None = None) -> FiniteDifference:
        """The Hessian; `step` as there."""
        return FiniteDifference(self.gradient, self.leaves, step=step, space=self.space, by_leaf=True)
