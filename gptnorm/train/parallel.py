"""A run on many processes: who they are, how the model is laid out over them, and what is summed over them.

torchrun starts the processes; they form a mesh ("data", "tensor"). Processes along "tensor" share every matrix product
(`gptnorm.train.tensor_parallel`) and see the same sequences; those along "data" see different ones and share weights,
gradients and the optimizer's moments (FSDP2): each block's weights are gathered where they are used, and the gradient
is averaged over "data" as it is cut. The loss is a mean over tokens and every process has equally many, so the average
is the gradient of the whole batch's loss.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from gptnorm.config import Config, ParallelConfig
from gptnorm.errors import SharedError, UserError, bad_value
from gptnorm.model import GPT
from gptnorm.model.backbones import make_shape
from gptnorm.sharding import cut_over, here, sum_over
from gptnorm.strategies import make_strategy
from gptnorm.train.blocks import prepare_blocks
from gptnorm.train.inputs import resolve_device
from gptnorm.train.tensor_parallel import check_tensor_parallel, split_tensors


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among those of the run; alone, it is all of it and has no mesh."""

    device: torch.device
    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    """The processes as ("data", "tensor"); None without torchrun."""
    data_rank: int = 0
    data_size: int = 1
    tensor_size: int = 1

    @property
    def main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0


LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
"""What torchrun tells each of its processes."""


def launched_size() -> int:
    """How many processes torchrun started; 1 without it.

    Raises:
        UserError: WORLD_SIZE is no number.
    """
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        return 1
    told = os.environ["WORLD_SIZE"]
    try:
        return int(told)
    except ValueError:
        raise bad_value("WORLD_SIZE", told, "must be a number, as torchrun sets it") from None


def open_world(config: Config) -> World:
    """This process's place in the run that torchrun started, or a world of one without torchrun.

    Every process calls it once, and `close_world` at the end; a process group that exists already is used.

    Raises:
        SharedError: the layout does not fit the processes, the batch or the model. Nothing has been opened yet.
    """
    launched = {"RANK", "WORLD_SIZE"} <= os.environ.keys()
    rank, size = (int(os.environ["RANK"]), launched_size()) if launched else (0, 1)
    try:
        _check_layout(config, size, launched)
    except UserError as error:
        raise SharedError(str(error)) from None
    if not launched:
        return World(device=resolve_device(config.train.device))
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    device = _own_device(config.train.device, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    tensor = config.parallel.tensor
    mesh = init_device_mesh(device.type, (size // tensor, tensor), mesh_dim_names=("data", "tensor"))
    return World(
        device=device,
        rank=rank,
        size=size,
        mesh=mesh,
        data_rank=mesh.get_local_rank("data"),
        data_size=size // tensor,
        tensor_size=tensor,
    )


def close_world(world: World) -> None:
    """Lets go of the process group."""
    if world.mesh is not None and dist.is_initialized():
        dist.destroy_process_group()


def parallelize(model: GPT, world: World, config: Config) -> None:
    """Lays a model out over the processes, in place; alone, it only prepares the blocks.

    On many processes the model may be on the `meta` device: `to_empty(device=world.device)` and `init_weights(seed)`
    then give every process its part of the weights that a single process would have, one whole weight at a time.
    From here on parameters are DTensors, cut along axis 0 over "data", and gradients, too.

    Raises:
        UserError: tensor parallelism cannot carry the model.
    """
    if world.tensor_size > 1:
        assert world.mesh is not None
        check_tensor_parallel(model.shape, model.strategy, world.tensor_size)
        split_tensors(model, world.mesh["tensor"])
    train = config.train
    prepare_blocks(model, train.recompute, compiled=train.compile, float8=train.precision == "fp8")
    if world.mesh is not None:
        model.count_over(world.mesh)
        _shard(model, world.mesh["data"], config.parallel)


def _shard(model: GPT, mesh: DeviceMesh, config: ParallelConfig) -> None:
    """FSDP2 over blocks, embedding, head, and what is left."""
    policy = MixedPrecisionPolicy()
    if config.param_dtype == "bf16":
        # Inputs are left alone: activations follow the weights, and the rotary angles stay in fp32.
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    # Two uses of one weight have to be in one group: a tied embedding stays with the root.
    ends = () if model.shape.tied else (model.embed, model.head)
    for module in (*model.blocks, *ends):
        # The head's weight is needed again at once.
        reshard = config.reshard and module is not model.head
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    model.register_forward_hook(lambda *_: _let_go(model))
    # The other ways into the model.
    for name in ("objective", "features"):
        register_fsdp_forward_method(model, name)
        setattr(model, name, _letting_go(model, getattr(model, name)))
    # Nothing here changes an output in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def _let_go(model: GPT) -> None:
    """Lets gathered weights go where no backward pass will do it: who reads the parameters next must meet the parts."""
    if not torch.is_grad_enabled():
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _letting_go(model: GPT, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        output = method(*args, **kwargs)
        _let_go(model)
        return output

    return run


def clip_gradients(model: nn.Module, max_norm: float, world: World) -> Tensor:
    """Scales all gradients so that their common L2 norm is at most `max_norm`; returns the norm before.

    On many processes every element of a gradient counts once, however many processes hold it.

    Returns:
        The norm of the whole gradient, a plain 0-d tensor, the same on every process; the device is not waited for.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    if world.mesh is None:
        return nn.utils.clip_grad_norm_(parameters, max_norm)
    gradients = [p.grad for p in parameters if p.grad is not None]
    parts = [here(gradient) for gradient in gradients]
    # By the axes of the mesh over which a gradient is cut: over those its squares are to be added.
    groups: defaultdict[tuple[str, ...], list[Tensor]] = defaultdict(list)
    for gradient, part in zip(gradients, parts, strict=True):
        groups[cut_over(gradient)].append(part)
    total = torch.zeros((), device=world.device)
    for names, group in groups.items():
        square = nn.utils.get_total_norm(group).square()
        sum_over(square, world.mesh, *names)
        total = total + square
    norm = total.sqrt()
    torch._foreach_mul_(parts, (max_norm / (norm + 1e-6)).clamp(max=1.0))  # pyright: ignore[reportPrivateImportUsage]
    return norm


def mean_over_data(value: Tensor, world: World) -> Tensor:
    """The mean of a plain tensor over processes that saw different sequences; the device is not waited for."""
    if world.mesh is None:
        return value
    value = value.detach().clone()
    sum_over(value, world.mesh, "data")
    return value / world.data_size


def _check_layout(config: Config, size: int, launched: bool) -> None:
    parallel, train = config.parallel, config.train
    how = "" if launched else "; start them with torchrun"
    tensor = parallel.tensor
    if parallel.data is not None and parallel.data * tensor != size:
        allowed = f"times parallel.tensor = {tensor} must be the number of processes, {size}{how}"
        raise bad_value("parallel.data", parallel.data, allowed)
    if size % tensor:
        raise bad_value("parallel.tensor", tensor, f"must divide the number of processes, {size}{how}")
    if parallel.param_dtype != "fp32" and not launched:
        allowed = 'needs torchrun (one process will do); train.precision = "bf16" does not'
        raise bad_value("parallel.param_dtype", parallel.param_dtype, allowed)
    data, micro = size // tensor, train.batch_size // train.accumulate
    if micro % data:
        allowed = f"over train.accumulate = {train.accumulate} must be a multiple of the {data} processes that share it"
        raise bad_value("train.batch_size", train.batch_size, allowed)
    if tensor > 1:
        # The vocabulary may not be known yet; `parallelize` looks at it again.
        shape = make_shape(config.model, config.moe, vocab=tensor, context=train.seq_len)
        check_tensor_parallel(shape, make_strategy(config.model.strategy, config.strategy, config.options), tensor)


def _own_device(name: str, local_rank: int) -> torch.device:
    """The device of one process of several on a machine."""
    device = resolve_device(name)
    if device.type == "cpu":
        return device
    if device.index is not None:
        raise bad_value("train.device", name, "must be 'auto', 'cpu' or 'cuda' under torchrun, which numbers them")
    return resolve_device(f"cuda:{local_rank}")
