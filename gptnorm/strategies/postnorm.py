r"""PostNorm: the stream is normed after every addition, as in the first transformer.

    x ──┬── F ──(+)── N ──►     x ← N(x + F(x))       F = attention, then feed-forward
        └────────┘              no final norm: x_L is one already

Source: Vaswani et al. 2017 (arXiv 1706.03762); analysis in Xiong et al. 2020 (arXiv 2002.04745).
"""

from __future__ import annotations

from typing import Any

from pydantic.dataclasses import dataclass

from gptnorm.config import STRICT
from gptnorm.norms import After
from gptnorm.shape import Shape
from gptnorm.strategies.base import Branch, Card, Normed, State


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PostNorm(Normed):
    """x ← N(x + F(x))."""

    card = Card(
        title="PostNorm",
        paper="Vaswani et al. 2017, arXiv 1706.03762",
        equation="x ← N(x + Attn(x));  x ← N(x + FFN(x));  head reads x_L",
        norms="two per block, over the stream's d features, eps 1e-5",
        rope="no query/key norm unless qk_norm is set, then before RoPE",
        folds="nothing: the gain also scales the skip",
        claims="needs a learning-rate warm-up (Xiong et al. 2020)",
        published_with="the encoder-decoder transformer of 2017, dense, which is none of the backbones here",
        ours="the backbone's published initialisation is kept; the original used its own",
    )

    def block_parts(self, layer: int, shape: Shape) -> dict[str, After]:
        norm = self.make_norm(shape.d, shape)
        return {"attn_norm": norm, "ffn_norm": norm}

    def block(self, state: State, attn: Branch, ffn: Branch, own: Any, layer: int, n_layers: int) -> State:
        (x,) = state
        x = own.attn_norm(x + attn(x))
        x = own.ffn_norm(x + ffn(x))
        return (x,)
