r"""LayerNorm scaling: PreNorm whose branches read an input that shrinks with the depth.

    x ── N ── ·1/√l ── F ──(+)──►       x ← x + F(N(x) / √l)       l = 1 … L, one number per block
    └──────────────────────┘            head reads N(x_L)

The stream's variance then grows more slowly, so that deep blocks still change it. The paper advises
against depth factors in the initialisation at the same time: `options.scale_mode` is preset to "none".

Source: Sun et al. 2025 (arXiv 2502.05795), with both branches of block l scaled alike as in its code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic.dataclasses import dataclass

from gptnorm.config import STRICT, Scalar
from gptnorm.strategies.base import Branch, Card, State
from gptnorm.strategies.prenorm import PreNorm


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LNS(PreNorm):
    """x ← x + F(N(x) / √l)."""

    card = Card(
        title="LayerNorm scaling (LNS)",
        paper="Sun et al. 2025, arXiv 2502.05795",
        equation="x ← x + Attn(N(x)/√l);  x ← x + FFN(N(x)/√l);  l from 1;  head reads N(x_L)",
        norms="two per block and one at the end, over the stream's d features, eps 1e-5",
        rope="no query/key norm unless qk_norm is set, then before RoPE",
        folds="every gain with its 1/√l into the matrices that read the normed stream; the final one only into an "
        "untied head",
        claims="better pre-training than PreNorm from 130M to 7B, and deep blocks that matter; a depth factor in the "
        "initialisation takes some of that away (abstract)",
        published_with="130M to 7B: dense Llama blocks in its code (which generation is not known here), OLMo at 7B; "
        "experts: not known here",
        ours="every depth factor of the backbone's initialisation is taken out (options.scale_mode = none), that of "
        "Llama's up included",
    )
    recipe_defaults: ClassVar[Mapping[str, Scalar]] = {"options.scale_mode": "none"}

    def block(self, state: State, attn: Branch, ffn: Branch, own: Any, layer: int, n_layers: int) -> State:
        (x,) = state
        scale = (layer + 1) ** -0.5
        x = x + attn(scale * own.attn_norm(x))
        x = x + ffn(scale * own.ffn_norm(x))
        return (x,)
