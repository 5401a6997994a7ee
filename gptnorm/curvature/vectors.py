"""Several tensors as one flat vector, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Space:
    """The flat vectors that belong to a list of tensors, in their order.

    All tensors have one dtype and one device.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        assert tensors, "no tensors"
        self.shapes = [tensor.shape for tensor in tensors]
        self.sizes = [tensor.numel() for tensor in tensors]
        self.size = sum(self.sizes)
        self.dtype, self.device = tensors[0].dtype, tensors[0].device
        assert all((tensor.dtype, tensor.device) == (self.dtype, self.device) for tensor in tensors)

    def split(self, v: Tensor) -> list[Tensor]:
        """(size,) → a view for each tensor."""
        return [part.view(shape) for part, shape in zip(v.split(self.sizes), self.shapes, strict=True)]

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """A tensor of each shape → (size,)."""
        return torch.cat([tensor.reshape(-1) for tensor in tensors])

    def draw(self, generator: torch.Generator) -> Tensor:
        """A vector of independent standard normal numbers, the same on every device."""
        return torch.randn(self.size, generator=generator, dtype=torch.float64).to(self.device, self.dtype)
