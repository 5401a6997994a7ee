r"""One forward and one backward pass, as numbers.

With $x_l$ the stream after block l ($x_0$ before the first), $L$ the training objective on the batch, $B$ sequences of
$T$ tokens, and $\lVert\cdot\rVert$ the root of the sum of squares over all entries:

| field | formula |
|---|---|
| stream, attn, ffn | RMS of $x_l$, of the branches' outputs before what the wiring itself puts after them |
| slots[role].raw, .used | RMS of W x, and of what norms and scales make of it (q, k, v: what attention reads) |
| slots[role].grad, .weight | $\lVert \partial L/\partial W \rVert$, RMS of W |
| grad | $\lVert \partial L/\partial x_l \rVert$; with several streams, of all of them together |
| q_over_v, k_over_v | the gradient norms of $W_q$ and of $W_k$ over that of $W_v$ |
| cosine | $\mathrm{mean}_t \cos(x_{l-1}, x_l)$ |
| token_cosine | mean cosine of two tokens of a sequence in $x_l$; 1 is rank collapse |
| logit_bound, logit_max | per head, see `measures` |
| norms[name] | RMS of the input of each norm that the wiring owns; the largest, where it is used twice |
| max_variance | largest mean square of any stream between blocks, or of the input of any norm of the wiring |
| gradient_ratio | $\lVert \partial L/\partial x_1 \rVert / \lVert \partial L/\partial x_L \rVert$ |
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from gptnorm.model import GPT
from gptnorm.probe.measures import exact, mean_square, token_cosine
from gptnorm.probe.trace import BlockTrace, Trace, traced


@dataclass(frozen=True, kw_only=True)
class Slot:
    """The weights of one role in a block (or at an end), all experts together."""

    raw: float | None
    """RMS of W x; None if no hook sees it."""
    used: float | None
    """RMS of what is made of it."""
    grad: float
    weight: float


@dataclass(frozen=True, kw_only=True)
class BlockReading:
    """One block; see the module's table."""

    stream: float
    attn: float
    ffn: float
    slots: dict[str, Slot]
    norms: dict[str, float]
    grad: float
    q_over_v: float
    k_over_v: float
    cosine: float
    token_cosine: float
    logit_bound: tuple[float, ...]
    logit_max: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One forward and one backward pass; see the module's table."""

    loss: float
    """Cross-entropy in nats per token."""
    max_variance: float
    gradient_ratio: float
    start: float
    """RMS of the stream before the first block."""
    start_token_cosine: float
    norms: dict[str, float]
    """Of the norms outside the blocks, as `BlockReading.norms`."""
    ends: dict[str, Slot]
    """Embedding, positions and head."""
    blocks: tuple[BlockReading, ...]


def probe(model: GPT, tokens_BT: Tensor) -> Probe:
    """Measures `model`, in the dtype of its weights, on tokens (B, T + 1); T are read and T predicted.

    Weights, gradients and buffers of the model are left as they are.
    """
    with traced(model, slots=True, states=True) as trace, torch.enable_grad():
        objective = model.objective(tokens_BT)
        owners = [owner for _, owner in model.weights()]
        states = [_distinct(seen.state) for seen in trace.blocks]
        flat = [x for state in states for x in state]
        found = torch.autograd.grad(objective.total, [o.weight for o in owners] + flat, allow_unused=True)
    gradients = [0.0 if g is None else exact(g).norm().item() for g in found]

    ends, inside = _by_place(model, gradients[: len(owners)])
    of_state = iter(gradients[len(owners) :])
    stream_gradients = [math.hypot(*(next(of_state) for _ in state)) for state in states]
    assert trace.start is not None
    return Probe(
        loss=objective.loss.item(),
        max_variance=_largest_square(trace),
        gradient_ratio=_ratio(stream_gradients[0], stream_gradients[-1]),
        start=mean_square(trace.start).sqrt().item(),
        start_token_cosine=token_cosine(trace.start).item(),
        norms=_roots(trace.end_norm_squares),
        ends={role: _slot(None, role, sizes) for role, sizes in ends.items()},
        blocks=tuple(
            _block(seen, grad, inside[layer])
            for layer, (seen, grad) in enumerate(zip(trace.blocks, stream_gradients, strict=True))
        ),
    )


@dataclass
class _Sizes:
    """Sums over the weights of one role."""

    grad_square: float = 0.0
    weight_square: float = 0.0
    count: int = 0


def _by_place(model: GPT, gradients: list[float]) -> tuple[dict[str, _Sizes], list[dict[str, _Sizes]]]:
    """Sizes of weights and gradients by role: of the ends, and of each block."""
    ends: defaultdict[str, _Sizes] = defaultdict(_Sizes)
    inside = [defaultdict(_Sizes) for _ in model.blocks]
    for (name, owner), gradient in zip(model.weights(), gradients, strict=True):
        sizes = (inside[owner.layer] if name.startswith("blocks.") else ends)[owner.role]
        sizes.grad_square += gradient**2
        sizes.weight_square += exact(owner.weight).square().sum().item()
        sizes.count += owner.weight.numel()
    return dict(ends), [dict(block) for block in inside]


def _slot(seen: BlockTrace | None, role: str, sizes: _Sizes) -> Slot:
    raw, used = (None, None) if seen is None else (seen.raw[role].rms(), seen.used[role].rms())
    return Slot(
        raw=None if raw is None else raw.item(),
        used=None if used is None else used.item(),
        grad=sizes.grad_square**0.5,
        weight=(sizes.weight_square / sizes.count) ** 0.5,
    )


def _block(seen: BlockTrace, grad: float, sizes: dict[str, _Sizes]) -> BlockReading:
    measured = {name: value.item() for name, value in seen.measured.items()}
    slots = {role: _slot(seen, role, own) for role, own in sizes.items()}
    assert seen.logit_bound_H is not None
    assert seen.logit_max_H is not None
    return BlockReading(
        stream=measured["stream_square"] ** 0.5,
        attn=measured["attn_square"] ** 0.5,
        ffn=measured["ffn_square"] ** 0.5,
        slots=slots,
        norms=_roots(seen.norm_squares),
        grad=grad,
        q_over_v=_ratio(slots["q"].grad, slots["v"].grad),
        k_over_v=_ratio(slots["k"].grad, slots["v"].grad),
        cosine=measured["cosine"],
        token_cosine=measured["token_cosine"],
        logit_bound=tuple(seen.logit_bound_H.tolist()),
        logit_max=tuple(seen.logit_max_H.tolist()),
    )


def _largest_square(trace: Trace) -> float:
    norms = [trace.end_norm_squares, *(seen.norm_squares for seen in trace.blocks)]
    return torch.stack([*trace.squares, *(square for squares in norms for square in squares.values())]).max().item()


def _roots(squares: dict[str, Tensor]) -> dict[str, float]:
    return {name: square.sqrt().item() for name, square in squares.items()}


def _distinct(state: tuple[Tensor, ...]) -> list[Tensor]:
    """The streams, one that stands twice in the state only once."""
    return list({id(x): x for x in state}.values())


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan
