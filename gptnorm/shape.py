"""The numbers that fix every tensor of a model, and what strategies may ask of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["embed", "position", "q", "k", "v", "o", "gate", "up", "down", "router", "head"]
"""What a weight does. `up` is the first map of an ungated feed-forward, too."""

NormKind = Literal["rmsnorm", "layernorm", "np_layernorm"]


@dataclass(frozen=True, kw_only=True)
class Experts:
    """Sizes of a mixture-of-experts feed-forward; every expert is `Shape.d_ff` wide."""

    routed: int
    """Experts that the router chooses from, E."""
    top_k: int
    """Routed experts of each token, k."""
    shared: int = 0
    """Experts that every token passes through."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model's sizes, in the papers' symbols where they have one."""

    d: int
    """Width of the residual stream."""
    n_layers: int
    """Blocks, L."""
    n_heads: int
    """Query heads, h."""
    n_kv_heads: int
    """Key and value heads; fewer than n_heads with grouped queries."""
    d_ff: int
    """Width of the feed-forward, or of one expert."""
    vocab: int
    """Rows of the embedding, V."""
    context: int
    """Longest sequence; the number of rows of a learned position table."""
    gated: bool
    """Whether the feed-forward is act(gate(x)) * up(x), or act(up(x))."""
    activation: Literal["silu", "gelu"]
    rope_theta: float | None
    """Base of the rotary positions; None: learned positions."""
    tied: bool
    """Whether the head is the embedding's weight."""
    norm: NormKind
    """The norm that the backbone was published with."""
    experts: Experts | None = None
    """The feed-forward's experts; None: it is dense."""

    @property
    def head_dim(self) -> int:
        return self.d // self.n_heads

    @property
    def d_kv(self) -> int:
        """Width of keys and of values, all heads together."""
        return self.n_kv_heads * self.head_dim

    def out_features(self, role: Role) -> int:
        """Length of a projection's output: what its norm runs over."""
        if role == "router":
            assert self.experts is not None, "a dense model has no router"
            return self.experts.routed
        sizes = {"k": self.d_kv, "v": self.d_kv, "gate": self.d_ff, "up": self.d_ff, "head": self.vocab}
        return sizes.get(role, self.d)

    def in_features(self, role: Role) -> int:
        """Length of a projection's input."""
        return self.d_ff if role == "down" else self.d

    @property
    def matrix_roles(self) -> tuple[Role, ...]:
        """The linear maps of one block, in the order in which a token meets them; a router is none of them."""
        return ("q", "k", "v", "o", *(("gate",) if self.gated else ()), "up", "down")
