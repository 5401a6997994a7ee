r"""Reordered norm (OLMo 2): the norm stands on each branch's output and not on its input.

    x ── F ── N ──(+)──►        x ← x + N(F(x))       F = attention, then feed-forward
    └──────────────┘            head reads N(x_L)
    q, k normed over all heads together, before RoPE

The branches read the raw stream. The norms of q and k (`options.qk_norm`, preset to "full") belong
to the method: without them nothing bounds the attention logits, and gradients explode with depth.

Source: OLMo 2 (arXiv 2501.00656) and its code in `transformers`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic.dataclasses import dataclass

from gptnorm.config import STRICT, Scalar
from gptnorm.strategies.base import Branch, Card, State
from gptnorm.strategies.prenorm import PreNorm


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Reordered(PreNorm):
    """x ← x + N(F(x)) with normed queries and keys, and a final norm."""

    card = Card(
        title="Reordered norm (OLMo 2)",
        paper="OLMo 2, arXiv 2501.00656",
        equation="x ← x + N(Attn(x));  x ← x + N(FFN(x));  q ← N(q), k ← N(k) over the full width;  head reads N(x_L)",
        norms="two per block and one at the end, over d; one each on q and k over all heads together; eps 1e-5",
        rope="query/key norm, then split into heads, then RoPE",
        folds="only the final gain, into an untied head",
        claims="steadier training than PreNorm, with the norms of q and k (recalled, not checked)",
        published_with="OLMo 2, dense; experts: not known here",
        ours="the backbone's published initialisation is kept (OLMo 2 draws every matrix alike, as we recall): the "
        "size of W_o and W_down changes Adam's relative step, not the forward pass. OLMo 2 itself has eps 1e-6",
    )
    recipe_defaults: ClassVar[Mapping[str, Scalar]] = {"options.qk_norm": "full"}

    def block(self, state: State, attn: Branch, ffn: Branch, own: Any, layer: int, n_layers: int) -> State:
        (x,) = state
        x = x + own.attn_norm(attn(x))
        x = x + own.ffn_norm(ffn(x))
        return (x,)
