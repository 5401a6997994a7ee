"""Hooks that measure a forward pass while it runs; the model is left as it was.

Numbers stay on the device until somebody asks for them, so that a pass waits for the device once.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gptnorm.model import GPT
from gptnorm.model.gpt import Block
from gptnorm.model.projection import WeightOwner
from gptnorm.model.router import Choice
from gptnorm.norms import DynamicTanhModule, FrozenModule, NormModule
from gptnorm.probe.measures import (
    exact,
    largest_logits,
    logit_bounds,
    mean_norm,
    mean_square,
    step_cosine,
    token_cosine,
)
from gptnorm.strategies.base import State


@dataclass
class Pool:
    """Mean square over all the tensors that were put in: a role may have several maps in a block."""

    total: Tensor | None = None
    count: int = 0

    def add(self, x: Tensor) -> None:
        square = exact(x).square().sum()
        self.total = square if self.total is None else self.total + square
        self.count += x.numel()

    def rms(self) -> Tensor | None:
        return None if self.total is None else (self.total / max(1, self.count)).sqrt()


@dataclass
class BlockTrace:
    """What the hooks saw of one block, x' = block(x); see `measures` for the formulas."""

    measured: dict[str, Tensor] = field(default_factory=dict)
    """Scalars: stream_square, stream_norm, attn_square, attn_norm, ffn_square, ffn_norm, cosine, token_cosine."""
    logit_bound_H: Tensor | None = None
    logit_max_H: Tensor | None = None
    raw: defaultdict[str, Pool] = field(default_factory=lambda: defaultdict(Pool))
    """Outputs W x of the linear maps, by role."""
    used: defaultdict[str, Pool] = field(default_factory=lambda: defaultdict(Pool))
    """What their norms and scales make of them; of q, k and v, what the attention reads."""
    norm_squares: dict[str, Tensor] = field(default_factory=dict)
    """Mean square of the input of each norm of the wiring, by the name that the strategy gave it."""
    state: State = ()
    """The streams after the block, with their graph; only if asked for."""


@dataclass
class Trace:
    """What the hooks saw of one forward pass."""

    blocks: list[BlockTrace]
    start: Tensor | None = None
    """The stream before the first block, cut from the graph."""
    squares: list[Tensor] = field(default_factory=list)
    """Mean squares of every stream between blocks."""
    end_norm_squares: dict[str, Tensor] = field(default_factory=dict)
    """As `BlockTrace.norm_squares`, of the norms outside the blocks."""


@contextlib.contextmanager
def traced(model: GPT, *, slots: bool = False, states: bool = False) -> Iterator[Trace]:
    """Measures the forward passes of the body, in eval mode: what only training counts is left alone.

    Args:
        slots: whether linear maps and the wiring's norms are measured too.
        states: whether the streams are kept with their graph.
    """
    trace = Trace([BlockTrace() for _ in model.blocks])
    with contextlib.ExitStack() as stack:
        stack.enter_context(watchable(model))
        for block, seen in zip(blocks_of(model), trace.blocks, strict=True):
            _hook_block(stack, block, seen, trace, states)
            _hook_branches(stack, block, seen)
            if slots:
                _hook_projections(stack, block, seen)
                _hook_norms(stack, block.own, seen.norm_squares)
        if slots:
            _hook_norms(stack, model.own, trace.end_norm_squares)
        yield trace


@contextlib.contextmanager
def watchable(model: GPT) -> Iterator[None]:
    """Eval mode, in which what only training counts is left alone; eager, since compiled blocks would ask no hooks."""
    training = model.training
    with torch.compiler.set_stance("force_eager"):
        model.eval()
        try:
            yield
        finally:
            model.train(training)


def blocks_of(model: GPT) -> list[Block]:
    """The model's blocks, typed."""
    return [block for block in model.blocks if isinstance(block, Block)]


def _hook_block(stack: contextlib.ExitStack, block: Block, seen: BlockTrace, trace: Trace, states: bool) -> None:
    def after(module: nn.Module, inputs: tuple[Any, ...], output: tuple[State, Any]) -> None:
        before, state = inputs[0], output[0]
        old, new = (block.strategy.stream(s).detach() for s in (before, state))
        if trace.start is None:
            trace.start = old
            trace.squares += map(mean_square, before)
        trace.squares += map(mean_square, state)
        seen.measured["stream_square"] = mean_square(new)
        seen.measured["stream_norm"] = mean_norm(new)
        seen.measured["cosine"] = step_cosine(old, new)
        seen.measured["token_cosine"] = token_cosine(new)
        if states:
            seen.state = state

    stack.callback(block.register_forward_hook(after).remove)


def _hook_branches(stack: contextlib.ExitStack, block: Block, seen: BlockTrace) -> None:
    """The branches' outputs as the wiring reads them, and what the attention reads."""

    def put(name: str, factor: float, y: Tensor) -> None:
        seen.measured[f"{name}_square"] = mean_square(y) * factor**2
        seen.measured[f"{name}_norm"] = mean_norm(y) * abs(factor)

    on_output(stack, block.attn, partial(put, "attn", block.scale.attn))
    on_output(stack, block.ffn, partial(put, "ffn", block.scale.ffn))

    attn = block.attn
    attend = attn._attend

    def watched(q_BHTE: Tensor, k_BGTE: Tensor, v_BGTE: Tensor) -> Tensor:
        seen.logit_bound_H = logit_bounds(q_BHTE, k_BGTE, attn.softmax_scale)
        seen.logit_max_H = largest_logits(q_BHTE, k_BGTE, attn.softmax_scale)
        for role, z in (("q", q_BHTE), ("k", k_BGTE), ("v", v_BGTE)):
            seen.used[role] = Pool()
            seen.used[role].add(z)
        return attend(q_BHTE, k_BGTE, v_BGTE)

    # Queries and keys after norms and rotation are no module's output: the method is covered by an attribute of the
    # same name, which goes again.
    attn._attend = watched
    stack.callback(delattr, attn, "_attend")


def _hook_projections(stack: contextlib.ExitStack, block: Block, seen: BlockTrace) -> None:
    for owner in block.modules():
        if not isinstance(owner, WeightOwner):
            continue
        raw, used = seen.raw[owner.role], seen.used[owner.role]
        if len(owner.after):
            on_input(stack, owner.after[0], raw.add)
            on_output(stack, owner.after[-1], used.add)
        else:
            on_output(stack, owner, raw.add)
            on_output(stack, owner, used.add)


def _hook_norms(stack: contextlib.ExitStack, own: nn.Module, squares: dict[str, Tensor]) -> None:
    def put(name: str, x: Tensor) -> None:
        square = mean_square(x)
        squares[name] = torch.maximum(squares[name], square) if name in squares else square

    for name, norm in own.named_children():
        if isinstance(norm, NormModule | FrozenModule | DynamicTanhModule):
            on_input(stack, norm, partial(put, name))


def on_input(stack: contextlib.ExitStack, module: nn.Module, see: Callable[[Tensor], None]) -> None:
    """Shows what the module reads, until the stack is left."""

    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        see(inputs[0])

    stack.callback(module.register_forward_pre_hook(hook).remove)


def on_output(stack: contextlib.ExitStack, module: nn.Module, see: Callable[[Tensor], None]) -> None:
    """Shows what the module returns, until the stack is left."""

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        # A mixture of experts also returns what its router did; a router's outputs are its logits.
        see(output.logits_NE if isinstance(output, Choice) else output if isinstance(output, Tensor) else output[0])

    stack.callback(module.register_forward_hook(hook).remove)
