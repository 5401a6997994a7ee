"""Several tensors as one flat vector, and back; also where each process holds a part of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gptnorm.sharding import copies_of, here, part_of, sum_over

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Space:
    """The flat vectors that belong to a list of tensors, in their order.

    All tensors have one dtype and one device.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        assert tensors, "no tensors"
        self.shapes = [tensor.shape for tensor in tensors]
        self.sizes = [tensor.numel() for tensor in tensors]
        self.size = sum(self.sizes)
        self.dimension = self.size
        """Of the whole space; `size` is how much of a vector this process holds."""
        self.dtype, self.device = tensors[0].dtype, tensors[0].device
        assert all((tensor.dtype, tensor.device) == (self.dtype, self.device) for tensor in tensors)

    def split(self, v: Tensor) -> list[Tensor]:
        """(size,) → a view for each tensor."""
        return [part.view(shape) for part, shape in zip(v.split(self.sizes), self.shapes, strict=True)]

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """A tensor of each shape → (size,)."""
        return torch.cat([tensor.reshape(-1) for tensor in tensors])

    def draw(self, generator: torch.Generator) -> Tensor:
        """A vector of independent standard normal numbers, the same on every device and for every layout."""
        return self.join([self._draw(shape, generator) for shape in self.shapes])

    def inner(self, rows: Tensor, w: Tensor) -> Tensor:
        """Inner products of vectors (…, size) with w, (…)."""
        return rows @ w

    def norm(self, v: Tensor) -> Tensor:
        """‖v‖₂, a 0-d tensor."""
        return v.norm()

    def norms(self, v: Tensor) -> Tensor:
        """‖·‖₂ of each tensor's part of v, (tensors,)."""
        return torch.stack([part.norm() for part in v.split(self.sizes)])

    def _draw(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        # Tensor by tensor, so that a process never draws more than one whole tensor at a time.
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.device, self.dtype)


class SpreadSpace(Space):
    """The vectors of tensors that are spread over the processes of a mesh: each holds its own parts.

    Inner products and norms are those of the whole vectors, the same on every process; an entry that several processes
    hold counts once. All processes have to call them together.

    Args:
        tensors: DTensors over axes of the mesh, or plain ones, which every process holds whole.
    """

    def __init__(self, tensors: Sequence[Tensor], mesh: DeviceMesh) -> None:
        super().__init__([here(tensor.detach()) for tensor in tensors])
        self.dimension = sum(tensor.numel() for tensor in tensors)
        self._spread, self._mesh = [tensor.detach() for tensor in tensors], mesh
        self._copies = [copies_of(tensor, mesh) for tensor in tensors]

    def draw(self, generator: torch.Generator) -> Tensor:
        return self.join([part_of(self._draw(x.shape, generator), like=x) for x in self._spread])

    def inner(self, rows: Tensor, w: Tensor) -> Tensor:
        return self._summed(rows @ self.join([p / n for p, n in zip(w.split(self.sizes), self._copies, strict=True)]))

    def norm(self, v: Tensor) -> Tensor:
        return self.inner(v, v).sqrt()

    def norms(self, v: Tensor) -> Tensor:
        parts = zip(v.split(self.sizes), self._copies, strict=True)
        return self._summed(torch.stack([part.square().sum() / copies for part, copies in parts])).sqrt()

    def _summed(self, x: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        sum_over(x, self._mesh, *(self._mesh.mesh_dim_names or ()))
        return x
