r"""B2T connection: PostNorm whose second sum also takes the block's input, past the first norm.

    x ──┬── Attn ──(+)── N ── y ──┬── FFN ──(+)── N ──►     y ← N(x + Attn(x))
        ├───────────┘             └──────────┤              x ← N(x + y + FFN(y))
        └────────────────────────────────────┘

The route from bottom to top passes one norm per block instead of two. x_L is normed already, so
there is no final norm.

Source: Takase et al. 2022 (arXiv 2206.00330).
"""

from __future__ import annotations

from typing import Any

from pydantic.dataclasses import dataclass

from gptnorm.config import STRICT
from gptnorm.strategies.base import Branch, Card, State
from gptnorm.strategies.postnorm import PostNorm


@dataclass(frozen=True, kw_only=True, config=STRICT)
class B2T(PostNorm):
    """PostNorm with a skip from the block's input to its last norm."""

    card = Card(
        title="B2T connection",
        paper="Takase et al. 2022, arXiv 2206.00330",
        equation="y = N(x + Attn(x));  x ← N(x + y + FFN(y));  head reads x_L",
        norms="two per block, over the stream's d features, eps 1e-5",
        rope="no query/key norm unless qk_norm is set, then before RoPE",
        folds="nothing: the gains also scale a skip",
        claims="as deep and stable as PreNorm, as good as PostNorm: 27.30 BLEU at 18 layers against 26.57 for PreNorm "
        "(English-German, as a third-party summary reports)",
        published_with="transformers for translation; GPTs and experts: not known here",
        ours="the equation rests on a summary of the paper and third-party code; its initialisation is not known to "
        "us, the backbone's published one is kept",
    )

    def block(self, state: State, attn: Branch, ffn: Branch, own: Any, layer: int, n_layers: int) -> State:
        (x,) = state
        y = own.attn_norm(x + attn(x))
        x = own.ffn_norm(x + y + ffn(y))
        return (x,)
