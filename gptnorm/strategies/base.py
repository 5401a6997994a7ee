"""The contract: everything that anyone asks about normalisation is asked of a `Strategy`.

A strategy is a frozen object that holds its options and no tensors. It answers with data
(`After`, `Attention`, `FeedForward`, `Logits`, `Draw`, `Constraint`, `Group`) and with the block equation itself
(`open`, `block`, `close`); the backbone owns every weight. Layers count from 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pydantic.dataclasses
from torch import Tensor

from gptnorm.config import STRICT, OptionsConfig, PositiveFloat, Scalar
from gptnorm.norms import After, Axis, Frozen, LearnedScale, Norm
from gptnorm.shape import NormKind, Role, Shape

State = tuple[Tensor, ...]
"""The residual streams between blocks, each (batch, time, d); most strategies carry one."""

EPS = 1e-5
"""Added inside the square root where a strategy says nothing else."""

Branch = Callable[[Tensor], Tensor]
"""Attention or feed-forward with its projections' own norms: (batch, time, d) to the same."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a reader should know before choosing the strategy."""

    title: str
    paper: str
    """Where the equation comes from."""
    equation: str
    """The block, as the paper writes it."""
    norms: str
    """Axis and eps of each norm."""
    rope: str
    """Order of query/key norms against the rotary positions."""
    folds: str
    """What can be merged into a weight at inference."""
    claims: str
    """What its paper reports; what we measured stands in `gptnorm.strategies.measured`."""
    published_with: str
    """Backbones, and dense or with experts, in its paper as far as we know; all other pairs are our extrapolation."""
    ours: str
    """What is a choice or an extrapolation of ours, not the paper's."""


@dataclass(frozen=True, kw_only=True)
class Attention:
    """What happens to queries, keys and values inside attention."""

    softmax_scale: float
    """Factor of the logits q.k."""
    q: Norm | Frozen | None = None
    k: Norm | Frozen | None = None
    v: Norm | Frozen | None = None
    softcap: float | None = None
    """c in c tanh(logit / c)."""
    clip: float | None = None
    """Largest attention logit tau of QK-clip: W_q and W_k of a head that went beyond it shrink after the step."""
    averaging: float | None = None
    """c: the values' average at position t = 1, 2, … is multiplied by max(1, sqrt(c t)). None: it is not."""
    rope_first: bool = False
    """Whether queries and keys are normed after the rotary positions instead of before."""
    qk_scale: LearnedScale | None = None
    """One vector of n_kv_heads * head_dim numbers on normed queries and on keys; with grouped
    queries every query head of a group shares its key head's numbers."""


@dataclass(frozen=True, kw_only=True)
class FeedForward:
    """Factors inside down(post * act(pre * gate(x)) * up(x)), or down(post * act(pre * up(x)))."""

    pre_activation: float = 1.0
    post_activation: float = 1.0


@dataclass(frozen=True, kw_only=True)
class BranchScale:
    """Constant factors of the branches' outputs in the forward pass."""

    attn: float = 1.0
    ffn: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Logits:
    """What happens to the head's output on its way to the loss."""

    softcap: float | None = None
    """c in c tanh(logit / c)."""
    z_loss: float = 0.0
    """Weight of the mean squared logsumexp of the logits in the training objective."""


@dataclass(frozen=True, kw_only=True)
class Draw:
    """How a weight is drawn: N(0, (depth * std)^2), truncated at +-cut if that is given."""

    std: float
    cut: float | None = None
    depth: float = 1.0
    """The part of the standard deviation that makes deep stacks behave, apart so that it can be replaced."""


@dataclass(frozen=True, kw_only=True)
class Constraint:
    """What holds for a weight after every step: vectors along `axis` have L2 norm 1, or at most 1.

    At initialisation they are brought to exactly 1 in every case. A "penalty" pulls a vector w of n
    numbers that is longer than 1 back instead of cutting it: after each step
    lambda <- max(0, lambda + 2 (|w|^2 - 1) / n), w <- (1 - lambda) w
    (constrained parameter regularisation, Franke et al. 2023, arXiv 2311.09058, with one multiplier per
    vector). It is a soft bound: a vector that each update lengthens stays above 1 until its multiplier
    has grown to undo the update. Without the 1/n, which is that of its public code, a vector that one
    update brings past sqrt(1.5) would flip its sign.
    """

    axis: Literal[-1, -2]
    """-1: along the input (rows), -2: along the output (columns). Leading axes are experts."""
    kind: Literal["unit", "bound", "penalty"]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Factors of the recipe's learning rate and weight decay for a parameter."""

    lr: float = 1.0
    weight_decay: float = 1.0


class Strategy(ABC):
    """How a GPT is normalised.

    `Normed` has the options of the strategies that are built from norms; `gptnorm.strategies.compose`
    adds what composes with any of them (QK-norm, soft-caps, ScaleInit, …).
    """

    card: ClassVar[Card]
    recipe_defaults: ClassVar[Mapping[str, Scalar]] = {}
    """Settings that its paper prescribes (`optim.warmup = 0` or `options.qk_norm = "full"`, say); recipe and
    command line win over them."""

    def projection(self, role: Role, layer: int, shape: Shape) -> tuple[After, ...]:
        """What happens to the raw output z of a linear map (or of a table look-up), in order."""
        return ()

    def attention(self, layer: int, shape: Shape) -> Attention:
        """Norms and scales inside attention; the default is plain attention, scale 1/sqrt(head_dim)."""
        return Attention(softmax_scale=shape.head_dim**-0.5)

    def feedforward(self, layer: int, shape: Shape) -> FeedForward:
        """Factors around the activation."""
        return FeedForward()

    def branch_scale(self, layer: int, shape: Shape) -> BranchScale:
        """Factors of the two branches' outputs; `block` sees the branches with them."""
        return BranchScale()

    def logits(self, shape: Shape) -> Logits:
        """Soft-cap and auxiliary loss of the head's output."""
        return Logits()

    def make_norm(self, size: int, shape: Shape, axis: Axis = "width") -> Norm:
        """A norm over `size` features as this strategy would have it, for options that add one."""
        return Norm(kind=shape.norm, size=size, eps=EPS, axis=axis)

    def block_parts(self, layer: int, shape: Shape) -> dict[str, After]:
        """What the wiring of block `layer` owns, by name; built, it is the `own` of `block`."""
        return {}

    def end_parts(self, shape: Shape) -> dict[str, After]:
        """What the wiring owns outside the blocks; built, it is the `own` of `open` and `close`."""
        return {}

    def open(self, h: Tensor, own: Any) -> State:
        """From the embedding (batch, time, d) to the state before the first block."""
        return (h,)

    @abstractmethod
    def block(self, state: State, attn: Branch, ffn: Branch, own: Any, layer: int, n_layers: int) -> State:
        """The block equation."""

    def close(self, state: State, own: Any) -> Tensor:
        """From the state after the last block to what the head reads, (batch, time, d)."""
        return self.stream(state)

    def stream(self, state: State) -> Tensor:
        """The stream that monitors read, (batch, time, d)."""
        return state[0]

    def init(self, role: Role, layer: int, shape: Shape, published: Draw) -> Draw:
        """How a weight is drawn, given what the backbone's authors (and `init.std`) say."""
        return published

    def constraint(self, role: Role, layer: int, shape: Shape) -> Constraint | None:
        """What the weight is projected onto at initialisation and after every step."""
        return None

    def refuses(self, options: OptionsConfig) -> dict[str, str]:
        """Options that make no sense here, each with the reason, where that does not follow from the answers."""
        return {}

    def group(self, role: Role | None, layer: int, shape: Shape) -> Group:
        """How a parameter is optimised; `role` is None for gains and learned scales."""
        return Group()


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class Normed(Strategy):
    """Options of every strategy that is built from a norm layer."""

    norm: NormKind | Literal["backbone"] = "backbone"
    """rmsnorm, layernorm, np_layernorm (no gain), or what the backbone was published with."""
    eps: PositiveFloat = EPS
    """Added inside the square root."""

    def make_norm(self, size: int, shape: Shape, axis: Axis = "width") -> Norm:
        return Norm(kind=shape.norm if self.norm == "backbone" else self.norm, size=size, eps=self.eps, axis=axis)
