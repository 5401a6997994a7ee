r"""Mix-LN: the first floor(a L) blocks are PostNorm, the others PreNorm.

    l < floor(a L):  x ← N(x + F(x))        F = attention, then feed-forward;  l counts from 0
    other blocks:    x ← x + F(N(x))        head reads N(x_L)

PostNorm's early blocks have small gradients and PreNorm's late ones: each is used where its are larger.

Source: Li et al. 2024 (arXiv 2412.13795); the switch as in a public copy of its code (`post_pre`).
"""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from gptnorm.config import STRICT
from gptnorm.strategies.base import Branch, Card, State
from gptnorm.strategies.prenorm import PreNorm


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MixLN(PreNorm):
    """PostNorm blocks below, PreNorm blocks above, and a final norm."""

    card = Card(
        title="Mix-LN",
        paper="Li et al. 2024, arXiv 2412.13795",
        equation="first floor(aL) blocks: x ← N(x + F(x));  others: x ← x + F(N(x));  head reads N(x_L)",
        norms="two per block and one at the end, over the stream's d features, eps 1e-5",
        rope="no query/key norm unless qk_norm is set, then before RoPE",
        folds="in the PreNorm blocks as PreNorm's, in the others nothing",
        claims="better than PreNorm and PostNorm from 70M to 7B, with gradients more even over the depth; a about 0.25 "
        "at 250M, 0.06 at 7B (as third-party notes report)",
        published_with="70M to 7B: dense Llama blocks in its code (which generation is not known here); experts: not "
        "known here",
        ours="the backbone's published initialisation is kept in every block, as its code draws both kinds alike "
        "(without depth factors: options.scale_mode=none)",
    )

    fraction: Annotated[float, Field(ge=0, le=1)] = 0.25
    """a, the part of the blocks that are PostNorm; rounded down to whole blocks."""

    def block(self, state: State, attn: Branch, ffn: Branch, own: Any, layer: int, n_layers: int) -> State:
        (x,) = state
        # The small number keeps 0.29 * 100 = 28.999999999999996 at 29.
        if layer < math.floor(self.fraction * n_layers + 1e-9):
            x = own.attn_norm(x + attn(x))
            x = own.ffn_norm(x + ffn(x))
        else:
            x = x + attn(own.attn_norm(x))
            x = x + ffn(own.ffn_norm(x))
        return (x,)
