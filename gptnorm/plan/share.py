"""One GPU's share of a model under tensor parallelism, without the other GPUs.

The model is split by the trainer's own code (`gptnorm.train.tensor_parallel`) over a process group that is only
pretended ("fake": its collectives return at once and move nothing).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from gptnorm.errors import UserError


@contextlib.contextmanager
def pretended_processes(count: int) -> Iterator[DeviceMesh | None]:
    """A mesh of so many processes, of which this is the first; none for one.

    Raises:
        UserError: this process is part of a real group.
    """
    if count == 1:
        yield None
        return
    if dist.is_initialized():
        raise UserError("parallel.tensor: cannot be planned inside a process group; run this without torchrun")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (count,), mesh_dim_names=("tensor",))
    finally:
        dist.destroy_process_group()
