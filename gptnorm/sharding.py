"""Tensors that are spread over processes: the part that one process holds, and what it takes to put parts together.

A weight of a parallel run is a DTensor over the mesh ("data", "tensor"). "tensor" cuts it first, along the features
that its processes share; "data" (FSDP2) then cuts what is left along axis 0. Where a module computes, FSDP2 has put
the whole of the second cut back, and `here` is what is left of the first.

Activations are plain tensors on every process: either all processes of a "tensor" group hold the same ("whole"), or
each holds its own features ("part"). Three maps lead from one to the other; all can be differentiated twice:

| map | forward | backward |
|---|---|---|
| enter | whole, as it is | sum of the parts' gradients |
| leave | sum of the parts' terms | whole, as it is |
| gather | concatenation of the parts | own features of the gradient |

(Shoeybi et al. 2019, arXiv 1909.08053, call the first two f and g.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

# DTensor takes a second to import, so it is imported only where there is one already.

_functional = torch.ops._c10d_functional
"""Collectives that return a new tensor, which torch.compile can trace."""


@dataclass(frozen=True, kw_only=True)
class Sharers:
    """The processes that share features (an axis "tensor" of the mesh), as plain numbers for torch.compile."""

    group: str
    """Name of their process group."""
    rank: int
    """Of this process among them."""
    size: int

    @classmethod
    def along(cls, mesh: DeviceMesh) -> Sharers:
        """Those of a mesh of one axis."""
        return cls(group=mesh.get_group().group_name, rank=mesh.get_local_rank(), size=mesh.size())


def as_spread(x: Tensor) -> DTensor | None:
    """x, if it is a DTensor."""
    return cast("DTensor", x) if type(x).__name__ == "DTensor" else None


def here(x: Tensor, *, on_part: bool = False) -> Tensor:
    """What this process holds of x; x itself where nothing is spread.

    Args:
        on_part: it will meet a part of an activation. The gradient of a parameter that all processes hold is then
            one term of a sum.
    """
    spread = as_spread(x)
    if spread is None:
        return x
    if not on_part or any(_axis(placement) is not None for placement in spread.placements):
        return spread.to_local()
    from torch.distributed.tensor import Partial

    return spread.to_local(grad_placements=[Partial()] * len(spread.placements))


def whole(x: Tensor) -> Tensor:
    """All of x on every process; x itself where nothing is spread."""
    spread = as_spread(x)
    return x if spread is None else spread.full_tensor()


def part_of(full: Tensor, like: Tensor) -> Tensor:
    """The part of `full` that this process would hold if it were spread as `like` is: a view, no communication.

    Args:
        full: of the shape of `like`, or with axes of length 1 to be broadcast, which stay whole.
    """
    for cut in reversed(_cuts(like)):
        if full.shape[cut.axis] == 1 != like.shape[cut.axis]:
            continue
        chunks = full.chunk(cut.size, cut.axis)
        # The last processes may be left with nothing.
        full = chunks[cut.rank] if cut.rank < len(chunks) else full.narrow(cut.axis, 0, 0)
    return full


def cut_over(x: Tensor) -> tuple[str, ...]:
    """The axes of the mesh over which x is cut, by name."""
    return tuple(cut.name for cut in _cuts(x))


def copies_of(x: Tensor, mesh: DeviceMesh) -> int:
    """How many processes of the mesh hold each entry of x."""
    return mesh.size() // math.prod(cut.size for cut in _cuts(x))


def is_cut(x: Tensor, axis: int) -> bool:
    """Whether the vectors along `axis` are spread over processes."""
    return any(cut.axis == axis % x.ndim for cut in _cuts(x))


def squares_along(x: Tensor, axis: int) -> Tensor:
    """Squared L2 norm, in fp32 or better, of the vectors along `axis` of what this process holds.

    The axis is kept, with length 1. Where the vectors themselves are cut, their squares are summed over the processes.
    """
    squares = _own_squares(x, axis)
    for cut in _cuts(x):
        if cut.axis == axis % x.ndim:
            dist.all_reduce(squares, group=cut.group)
    return squares


def all_squares_along(x: Tensor, axis: int) -> Tensor:
    """As `squares_along`, of all vectors: the same on every process."""
    shape = list(x.shape)
    shape[axis] = 1
    own = _own_squares(x, axis)
    full = own.new_zeros(shape)
    part_of(full, like=x).copy_(own)
    for cut in _cuts(x):
        dist.all_reduce(full, group=cut.group)
    return full


def _own_squares(x: Tensor, axis: int) -> Tensor:
    part = here(x)
    return part.to(torch.promote_types(x.dtype, torch.float32)).square().sum(axis, keepdim=True)


def sum_over(x: Tensor, mesh: DeviceMesh | None, *names: str) -> None:
    """Adds up a plain tensor, in place, over the processes of the named axes of a mesh; no mesh, no change."""
    _reduce(x, mesh, names, dist.ReduceOp.SUM)


def max_over(x: Tensor, mesh: DeviceMesh | None, *names: str) -> None:
    """As `sum_over`, the elementwise maximum."""
    _reduce(x, mesh, names, dist.ReduceOp.MAX)


def _reduce(x: Tensor, mesh: DeviceMesh | None, names: tuple[str, ...], op: dist.ReduceOp.RedOpType) -> None:
    if mesh is not None:
        for name in names:
            dist.all_reduce(x, op, group=mesh.get_group(name))


@dataclass(frozen=True, kw_only=True)
class _Cut:
    """One cut of a tensor: along which of its axes, and over which axis of the mesh."""

    axis: int
    name: str
    group: dist.ProcessGroup
    rank: int
    """Of this process along that axis of the mesh."""
    size: int


def _cuts(x: Tensor) -> list[_Cut]:
    spread = as_spread(x)
    if spread is None:
        return []
    mesh = spread.device_mesh
    return [
        _Cut(
            axis=axis,
            name=(mesh.mesh_dim_names or ())[number],
            group=mesh.get_group(number),
            rank=mesh.get_local_rank(number),
            size=mesh.size(number),
        )
        for number, placement in enumerate(spread.placements)
        if (axis := _axis(placement)) is not None
    ]


def _axis(placement: object) -> int | None:
    """The axis that a placement cuts; strided shards are a class of their own in some versions of torch."""
    return getattr(placement, "dim", None)


def enter(x: Tensor, sharers: Sharers) -> Tensor:
    """Whole to whole, where parts of the features are made from x."""
    return _Enter.apply(x, sharers.group)


def leave(x: Tensor, sharers: Sharers) -> Tensor:
    """Each process's term to the sum, whole on every process."""
    return _Leave.apply(x, sharers.group)


def gather(x: Tensor, sharers: Sharers) -> Tensor:
    """Parts along the last axis to the whole."""
    return _Gather.apply(x, sharers.group, sharers.rank, sharers.size)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _Leave.apply(g, ctx.group), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return _functional.wait_tensor(_functional.all_reduce(x.contiguous(), "sum", group))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _Enter.apply(g, ctx.group), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str, rank: int, size: int) -> Tensor:
        ctx.where = group, rank, size
        stacked = _functional.wait_tensor(_functional.all_gather_into_tensor(x.contiguous(), size, group))
        return torch.cat(stacked.chunk(size), -1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _Own.apply(g, *ctx.where), None, None, None


class _Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, group: str, rank: int, size: int) -> Tensor:
        ctx.where = group, rank, size
        return g.chunk(size, -1)[rank].contiguous()

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _Gather.apply(x, *ctx.where), None, None, None
