r"""Tensor parallelism: processes that share every matrix product, by role (Shoeybi et al. 2019, arXiv 1909.08053).

| role | each process has | its output |
|---|---|---|
| q, k, v, gate, up | some rows of W: whole heads, some features of the feed-forward | its own features |
| o, down | the columns that read those | one term of a sum, which is then whole |
| embed | some rows | the same: zero for the tokens of other processes |
| head | some rows, those of the same tokens (it may be the same weight) | some logits, which are then gathered |

Positions, and every gain and scale on the residual stream, are on all processes, which compute the same there. What
follows a map follows its features: gains and scales are cut with them, a norm over the full width adds up its
statistics over the processes (`NormModule`), a norm per head does not, and its gain, which every head shares, gets the
sum of the processes' gradients. All of this is read off what a strategy declares (`projection`, `attention`), so that a
strategy needs no code here.

The logits are gathered whole, so that the loss is computed as by a single process, at the cost of V numbers a token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from gptnorm.errors import bad_value
from gptnorm.model import GPT
from gptnorm.model.gpt import Block
from gptnorm.model.projection import WeightOwner
from gptnorm.norms import After, AfterModule, Constant, DynamicTanh, Frozen, LearnedScale, Norm
from gptnorm.shape import Role, Shape
from gptnorm.sharding import Sharers, as_spread, enter, gather
from gptnorm.strategies import Strategy

CUT_OUTPUTS: tuple[Role, ...] = ("q", "k", "v", "gate", "up", "head")
"""Roles whose output features are spread over processes."""


def check_tensor_parallel(shape: Shape, strategy: Strategy, processes: int) -> None:
    """UserError if `processes` cannot share the matrix products of such a model."""
    if shape.experts is not None:
        raise bad_value("parallel.tensor", processes, "must be 1 with moe.experts: experts are not cut")
    sizes = {"model.n_heads": shape.n_heads, "model.n_kv_heads": shape.n_kv_heads, "model.d_ff": shape.d_ff}
    for key, size in sizes.items():
        if size % processes:
            raise bad_value("parallel.tensor", processes, f"must divide {key} = {size}")
    if shape.vocab % processes:
        larger = processes * -(-shape.vocab // processes)
        allowed = f"must divide model.vocab_size = {shape.vocab}; {larger} would do, its last rows are never met"
        raise bad_value("parallel.tensor", processes, allowed)
    for layer in range(shape.n_layers):
        for role in CUT_OUTPUTS:
            for step in strategy.projection(role, layer, shape):
                if not _is_local(step, shape.out_features(role)):
                    raise bad_value("parallel.tensor", processes, f"must be 1: {step} after {role} cannot be cut")
        spec = strategy.attention(layer, shape)
        for norm, width in ((spec.q, shape.d), (spec.k, shape.d_kv), (spec.v, shape.d_kv)):
            if norm is not None and norm.size != (shape.head_dim if norm.axis == "head" else width):
                raise bad_value("parallel.tensor", processes, f"must be 1: {norm} inside attention cannot be cut")


def _is_local(step: After, width: int) -> bool:
    """Whether a part of the features can be computed from that part and from sums over all of them."""
    match step:
        case Norm() | Frozen():
            return step.axis == "width" and step.size == width
        case DynamicTanh():
            return step.size == width
        case LearnedScale():
            return step.size in (1, width)
        case Constant():
            return True
        case _:
            return False


def split_tensors(model: GPT, mesh: DeviceMesh) -> None:
    """Spreads a model over the processes of a mesh of one axis, in place; every parameter becomes a DTensor."""
    shape, sharers = model.shape, Sharers.along(mesh)
    for block in model.blocks:
        assert isinstance(block, Block)
        for branch in (block.attn, block.ffn):
            _enter(branch, sharers)
        attn, heads = block.attn, shape.n_heads // sharers.size
        attn.own_heads = slice(sharers.rank * heads, (sharers.rank + 1) * heads)
        for part, width in ((attn.q_norm, shape.d), (attn.k_norm, shape.d_kv), (attn.v_norm, shape.d_kv)):
            if part is not None:
                _cut_after([part.norm], width, mesh)
        if attn.qk_scale is not None:
            _cut_after([attn.qk_scale], shape.d_kv, mesh)
    _enter(model.head, sharers)
    _gather_output(model.head, sharers)
    for _, owner in model.weights():
        _cut_weight(owner, shape, mesh)
    model.tie()
    _cut_after(_steps(model.head), shape.vocab, mesh)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if as_spread(parameter) is None:
                _spread(module, name, Replicate(), mesh)


def _enter(module: nn.Module, sharers: Sharers) -> None:
    def before(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (enter(args[0], sharers), *args[1:])

    module.register_forward_pre_hook(before)


def _gather_output(module: nn.Module, sharers: Sharers) -> None:
    def after(_: nn.Module, args: object, y: Tensor) -> Tensor:
        return gather(y, sharers)

    module.register_forward_hook(after)


def _cut_weight(owner: WeightOwner, shape: Shape, mesh: DeviceMesh) -> None:
    role = owner.role
    if role in CUT_OUTPUTS:
        _spread(owner, "weight", Shard(0), mesh)
        _cut_after(_steps(owner), shape.out_features(role), mesh)
    elif role in ("o", "down", "embed"):
        _spread(owner, "weight", Shard(0 if role == "embed" else 1), mesh)
        owner.sharers = Sharers.along(mesh)


def _steps(owner: WeightOwner) -> Iterator[AfterModule]:
    for step in owner.after:
        assert isinstance(step, AfterModule)
        yield step


def _cut_after(steps: Iterable[AfterModule], width: int, mesh: DeviceMesh) -> None:
    """What follows features of which each process has a part: its parameters are cut where they are as many."""
    for step in steps:
        step.sharers = Sharers.along(mesh)
        for name, parameter in step.named_parameters(recurse=False):
            if as_spread(parameter) is None:
                _spread(step, name, Shard(0) if parameter.shape[0] == width else Replicate(), mesh)


def _spread(module: nn.Module, name: str, placement: Placement, mesh: DeviceMesh) -> None:
    parameter = module.get_parameter(name)
    # Every process has the whole weight, or none (meta): nothing is sent.
    cut = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=None)
    module.register_parameter(name, nn.Parameter(cut, requires_grad=parameter.requires_grad))
