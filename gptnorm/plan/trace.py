"""What a forward and backward pass keeps in memory, found by running it without memory.

The model runs on fake tensors (`torch._subclasses.fake_tensor`): they have shapes, dtypes and storages but no numbers,
so a 70B model is traced on a laptop. A dispatch mode sees every storage come and go. Whatever a strategy, an option or
an expert router keeps is therefore counted, without a formula for any of them.

Fake tensors say that they are on the CPU (a build of torch without CUDA cannot pretend otherwise), where one kernel
keeps more than its CUDA twin: `F.rms_norm` falls apart into five operations there and is one fused kernel on CUDA,
which keeps its input and one number per row. `cuda_kernels` stands in for it. Fused attention keeps q, k, v, the output
and one number per row on both; all else is the same operations.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from gptnorm.config import Precision
from gptnorm.model import GPT
from gptnorm.sharding import as_spread, here

_to_copy = torch.ops.aten._to_copy.default


class Live(NamedTuple):
    """Bytes at one moment, beside weights, gradients, optimizer state and the tokens."""

    total: int
    copies: int
    """Of these, weights in another dtype: what autocast hands to the products, and keeps for the backward pass."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What is alive during a micro-batch's pass."""

    opened: Live
    """When the first block begins."""
    blocks: tuple[Live, ...]
    """When each block has ended, its predecessors included."""
    kept: Live
    """When the backward pass begins."""
    loss_peak: Live
    """At the worst moment from the last block's end until the gradient of the logits is there."""
    head_peak: Live
    """At the worst moment of the head's backward pass."""
    backward_peak: Live
    """At the worst moment of the rest: the blocks' forward and backward passes."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations in here made and that are still alive."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = Live(0, 0)
        self._sizes: dict[int, Live] = {}
        self.ignore(weights)
        self._weights = set(self._sizes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_copy = func is _to_copy and any(storage._cdata in self._weights for storage in _storages(args[0]))
        for leaf in tree_leaves(result):
            for storage in _storages(leaf):
                size = storage.nbytes()
                self._see(storage, Live(size, size if is_copy else 0))
        return result

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Storages that exist already and count as nothing."""
        for tensor in tensors:
            for storage in _storages(tensor):
                self._see(storage, Live(0, 0))

    def start_peak(self) -> None:
        self.peak = self.live

    def _see(self, storage: torch.UntypedStorage, size: Live) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = size
            self.live = Live(self.live.total + size.total, self.live.copies + size.copies)
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        size = self._sizes.pop(key)
        self.live = Live(self.live.total - size.total, self.live.copies - size.copies)


def _storages(x: object) -> Iterator[torch.UntypedStorage]:
    """Where the numbers of a tensor are; of a wrapper (DTensor), those of what it wraps."""
    if isinstance(x, Tensor):
        if is_traceable_wrapper_subclass(x):
            for name in x.__tensor_flatten__()[0]:
                yield from _storages(getattr(x, name))
        else:
            yield x.untyped_storage()


@contextlib.contextmanager
def cuda_kernels() -> Iterator[None]:
    """`F.rms_norm` as CUDA's fused kernel treats memory: it keeps its input, its gain and 1/rms.

    With a gain of another dtype torch has no fused kernel on CUDA either.
    """
    plain = F.rms_norm

    def rms_norm(x: Tensor, size: tuple[int, ...], gain: Tensor | None = None, eps: float | None = None) -> Tensor:
        if gain is None or gain.dtype == x.dtype:
            # Function.apply is declared to return anything.
            return _FusedRMSNorm.apply(x, tuple(size), gain)  # type: ignore[return-value]
        return plain(x, list(size), gain, eps)

    with _replaced("rms_norm", rms_norm):
        yield


@contextlib.contextmanager
def _fp32_experts() -> Iterator[None]:
    """`F.grouped_mm` in fp32, which runs on real tensors but has no sizes for fake ones (torch 2.13)."""
    plain = F.grouped_mm

    def grouped_mm(x: Tensor, weight: Tensor, *, offs: Tensor | None = None) -> Tensor:
        if x.dtype == torch.bfloat16:
            return plain(x, weight, offs=offs)
        # As above.
        return _GroupedProduct.apply(x, weight)  # type: ignore[return-value]

    with _replaced("grouped_mm", grouped_mm):
        yield


@contextlib.contextmanager
def _replaced(name: str, function: Callable[..., Tensor]) -> Iterator[None]:
    """Another function in torch.nn.functional. A mode of torch would not do: it is off inside `backward`."""
    plain = getattr(F, name)
    setattr(F, name, function)
    try:
        yield
    finally:
        setattr(F, name, plain)


class _GroupedProduct(torch.autograd.Function):
    """Sizes only, no numbers: for fake tensors."""

    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, weight_EDF: Tensor) -> Tensor:
        ctx.save_for_backward(x_PD, weight_EDF)
        return x_PD.new_empty(x_PD.shape[0], weight_EDF.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(saved) for saved in ctx.saved_tensors)


class _FusedRMSNorm(torch.autograd.Function):
    """Sizes only, no numbers: for fake tensors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: tuple[int, ...], gain: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, gain, x.new_empty((*x.shape[: -len(size)], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor | None]:
        x, gain, _ = ctx.saved_tensors
        return torch.empty_like(x), None, None if gain is None else torch.empty_like(gain)


@contextlib.contextmanager
def fake_model(model: GPT, dtype: torch.dtype = torch.float32) -> Iterator[GPT]:
    """The model, built on `meta`, with fake weights on the CPU; what is done in here allocates nothing."""
    with FakeTensorMode(allow_non_fake_inputs=True), _fp32_experts():
        made: dict[int, nn.Parameter] = {}
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    # A tied weight stays one.
                    if id(parameter) not in made:
                        made[id(parameter)] = nn.Parameter(_fake(parameter.detach(), dtype))
                    module._parameters[name] = made[id(parameter)]
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
        # There are no numbers to look at.
        model.calibrated = True
        yield model


def _fake(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    local = torch.empty(here(parameter).shape, dtype=dtype, device="cpu")
    spread = as_spread(parameter)
    if spread is None:
        return local
    from torch.distributed.tensor import DTensor

    size = {"shape": spread.shape, "stride": spread.stride()}
    return DTensor.from_local(local, spread.device_mesh, spread.placements, run_check=False, **size)


def trace_pass(
    model: GPT,
    *,
    sequences: int,
    seq_len: int,
    precision: Precision,
    cuda: bool = True,
) -> Trace:
    """One forward and backward pass of a fake (or a real, CPU) model into gradients that are there already.

    Args:
        sequences: of the micro-batch.
        cuda: whether CUDA's kernels are stood in for; only on fake tensors.
    """
    tokens = torch.zeros(sequences, seq_len + 1, dtype=torch.int64)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    tracker = LiveBytes(model.parameters())
    tracker.ignore((tokens, *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)))
    marks: list[Live] = []
    peaks: list[Live] = []

    def mark(*_: object) -> None:
        marks.append(tracker.live)

    def before_head(head: nn.Module, inputs: tuple[Tensor]) -> None:
        next_peak()
        inputs[0].register_hook(next_peak)

    def after_head(head: nn.Module, inputs: tuple[Tensor], logits: Tensor) -> None:
        logits.register_hook(next_peak)

    def next_peak(*_: object) -> None:
        peaks.append(tracker.peak)
        tracker.start_peak()

    handles = [
        model.blocks[0].register_forward_pre_hook(mark),
        *(block.register_forward_hook(mark) for block in model.blocks),
        model.head.register_forward_pre_hook(before_head),
        model.head.register_forward_hook(after_head),
    ]
    autocast = contextlib.nullcontext() if precision == "fp32" else torch.autocast("cpu", torch.bfloat16)
    with tracker, cuda_kernels() if cuda else contextlib.nullcontext():
        with autocast:
            total = model.objective(tokens).total
        kept = tracker.live
        total.backward()
    for handle in handles:
        handle.remove()
    model.zero_grad(set_to_none=True)
    forward_peak, loss_peak, head_peak = peaks
    return Trace(
        opened=marks[0],
        blocks=tuple(marks[1:]),
        kept=kept,
        loss_peak=loss_peak,
        head_peak=head_peak,
        backward_peak=max(forward_peak, tracker.peak),
    )
