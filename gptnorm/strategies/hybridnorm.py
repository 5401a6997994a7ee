r"""HybridNorm: norms on q, k and v inside attention, PostNorm around the feed-forward.

    y = x + Attn(x),   q, k, v ← N(q), N(k), N(v) per head, before RoPE; no norm on attention's input
    z = N(y)
    x ← z + FFN(z)     head reads N(x_L)

HybridNorm* (`strategy.first_block = "prenorm"`) wires block 1 as PreNorm, with the same attention:

    y = x + Attn(N(x));   x ← y + FFN(N(y))

The initialisation is Megatron's: W_o and W_down are drawn (2L)^(-1/2) times as large
(`options.scale_mode` is preset to "init").

Source: Zhuo et al. 2025 (arXiv 2503.04598), its published configurations and code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic.dataclasses import dataclass

from gptnorm.config import STRICT, Scalar
from gptnorm.norms import After
from gptnorm.shape import Shape
from gptnorm.strategies.base import Attention, Branch, Card, State
from gptnorm.strategies.prenorm import PreNorm


@dataclass(frozen=True, kw_only=True, config=STRICT)
class HybridNorm(PreNorm):
    """y = x + Attn(x) with normed q, k, v;  z = N(y);  x ← z + FFN(z)."""

    card = Card(
        title="HybridNorm",
        paper="Zhuo et al. 2025, arXiv 2503.04598",
        equation="y = x + Attn(x), q, k, v normed;  z = N(y);  x ← z + FFN(z);  head reads N(x_L)",
        norms="one per block and one at the end, over d; three per block over one head of q, of k, of v; eps 1e-5",
        rope="query/key norm per head, then RoPE",
        folds="the gain of v into W_o, the final one into an untied head; the others stay",
        claims="better than PreNorm and PostNorm at 1.2B (16 layers, 1T tokens) and for a 1B-7B mixture of experts "
        "(500B tokens), by up to 3.8 % on benchmarks (as its README and summaries report); in SiameseNorm's tests it "
        "diverges at rates from 1e-3",
        published_with="OLMo, dense (1.2B, grouped queries), and OLMoE with experts (1B-7B, the starred form)",
        ours="of its initialisation the depth factor is taken, its std sqrt(2/(5d)) is not: init.std stays the "
        "recipe's. The plain form is the default here, with experts, too",
    )
    recipe_defaults: ClassVar[Mapping[str, Scalar]] = {"options.scale_mode": "init"}

    first_block: Literal["hybrid", "prenorm"] = "hybrid"
    """How block 1 is wired: as the others, or as PreNorm (HybridNorm*)."""

    def attention(self, layer: int, shape: Shape) -> Attention:
        norm = self.make_norm(shape.head_dim, shape, "head")
        return replace(super().attention(layer, shape), q=norm, k=norm, v=norm)

    def block_parts(self, layer: int, shape: Shape) -> dict[str, After]:
        norm = self.make_norm(shape.d, shape)
        return {"attn_norm": norm, "ffn_norm": norm} if self._is_prenorm(layer) else {"ffn_norm": norm}

    def block(self, state: State, attn: Branch, ffn: Branch, own: Any, layer: int, n_layers: int) -> State:
        (x,) = state
        if self._is_prenorm(layer):
            y = x + attn(own.attn_norm(x))
            return (y + ffn(own.ffn_norm(y)),)
        z = own.ffn_norm(x + attn(x))
        return (z + ffn(z),)

    def _is_prenorm(self, layer: int) -> bool:
        return layer == 0 and self.first_block == "prenorm"
