r"""SpanNorm: one residual over the whole block, normed where it ends.

    x ──┬──────────────────────────────────(+)── N2 ──►     y  = N1(x + Attn(x))
        ├── Attn ──(+)── N1 ── y ── FFN ────┘               x' = N2(x + m FFN(y))
        └───────────┘

The skip of the second sum is the block's input, not y: the norm of the attention aggregate feeds the
feed-forward alone, and one norm per block stands on the identity route instead of PostNorm's two. The
first attention reads N0(x), its skip stays raw. No final norm: x_L is N2's output. A depth factor
m = 1/√(2L) on the feed-forward branch keeps gradients bounded in depth (options.scale_mode = "forward",
options.scale_target = "ffn"; "init" and "both" put it into the initialisation of W_o and W_down instead,
the literal sense of "ScaleInit").

Source: arXiv 2601.22580, whose body was not at hand. The block follows public third-party code that
cites the paper's equations 5-8; where the depth factor stands and how large it is are our derivation.
The other readings are options.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic.dataclasses import dataclass
from torch import Tensor

from gptnorm.config import STRICT, PositiveFloat, Scalar
from gptnorm.norms import After
from gptnorm.shape import Role, Shape
from gptnorm.strategies.base import Branch, Card, Draw, Normed, State


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SpanNorm(Normed):
    """y = N1(x + Attn(x));  x ← N2(x + m FFN(y))."""

    card = Card(
        title="SpanNorm",
        paper="Wang et al. 2026, arXiv 2601.22580 (block as third-party code cites it)",
        equation="y = N(x + Attn(x));  x ← N(x + FFN(y)/√(2L));  the first attention reads N(x);  head reads x_L",
        norms="two per block over the stream's d features and one before the first attention, eps 1e-5",
        rope="no query/key norm unless options.qk_norm is set, then before RoPE",
        folds="nothing of N2, whose gain also scales the skip; N1's gain into the feed-forward's first matrices",
        claims="bounded variance and gradients in depth without changing the learning rate; better than standard "
        "placements, dense and mixture-of-experts (abstract). Others measured it at 1.3B: better than PreNorm at rate "
        "4e-4 (11.00 against 11.21 perplexity), equal at 1e-3, diverged at 2e-3 (arXiv 2602.08064)",
        published_with="dense and mixture-of-experts GPTs (abstract), whose backbone is not known here",
        ours="the depth factor: 1/√(2L), in the forward pass, on the feed-forward branch, with no depth factor in the "
        "initialisation; Adam's epsilon of 1e-12, since attention's gradients shrink with depth; an embedding of RMS 1 "
        "(normed where the head shares it); RMSNorm's eps; the gain of a mixture of experts' routed sum",
    )
    recipe_defaults: ClassVar[Mapping[str, Scalar]] = {
        "options.scale_mode": "forward",
        "options.scale_target": "ffn",
        "optim.eps": 1e-12,
        "moe.branch_gain": "auto",
    }

    variant: Literal["A", "A1", "C", "D"] = "A"
    """A: the block above. Other readings of the abstract: A1 without N1; C: m = x + Attn(x), x ← N2(m + FFN(N1(m)));
    D: y = N1(Attn(x)), without attention's residual."""
    first_attention_norm: bool = True
    """Whether the first block's attention reads N0(x)."""
    embedding: Literal["unit", "none", "norm"] = "unit"
    """unit: RMS 1, drawn so or, where the head shares the embedding, normed; none: the backbone's; norm: normed."""
    final_norm: bool = False
    """Whether one more norm stands before the head."""
    skip_alpha: PositiveFloat = 1.0
    """Factor of x in both sums."""

    def block_parts(self, layer: int, shape: Shape) -> dict[str, After]:
        norm = self.make_norm(shape.d, shape)
        parts: dict[str, After] = {"n2": norm}
        if self.variant != "A1":
            parts["n1"] = norm
        if self._norms_first(layer):
            parts["n0"] = norm
        return parts

    def end_parts(self, shape: Shape) -> dict[str, After]:
        norm = self.make_norm(shape.d, shape)
        normed = self.embedding == "norm" or (self.embedding == "unit" and shape.tied)
        return {**({"embed_norm": norm} if normed else {}), **({"final_norm": norm} if self.final_norm else {})}

    def open(self, h: Tensor, own: Any) -> State:
        return (own.embed_norm(h) if hasattr(own, "embed_norm") else h,)

    def block(self, state: State, attn: Branch, ffn: Branch, own: Any, layer: int, n_layers: int) -> State:
        (x,) = state
        a = attn(own.n0(x) if self._norms_first(layer) else x)
        skip = self.skip_alpha * x
        match self.variant:
            case "A":
                y = own.n1(skip + a)
            case "A1":
                y = skip + a
            case "C":
                skip = skip + a
                y = own.n1(skip)
            case "D":
                y = own.n1(a)
        return (own.n2(skip + ffn(y)),)

    def close(self, state: State, own: Any) -> Tensor:
        (x,) = state
        return own.final_norm(x) if self.final_norm else x

    def init(self, role: Role, layer: int, shape: Shape, published: Draw) -> Draw:
        if role == "embed" and self.embedding == "unit" and not shape.tied:
            return replace(published, std=1.0)
        return published

    def _norms_first(self, layer: int) -> bool:
        return layer == 0 and self.first_attention_norm
