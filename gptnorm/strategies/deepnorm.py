r"""DeepNorm: PostNorm with a louder skip and a quieter start, both set by the depth L.

    x ──┬── F ──(+)── N ──►     x ← N(α x + F(x))       F = attention, then feed-forward
        └── ·α ──┘              α = (2L)^(1/4),  β = (8L)^(-1/4)       (decoder only)

W_v, W_o and the feed-forward's matrices are drawn β times as large, W_q and W_k are not. x_L is
normed already, so there is no final norm.

Source: Wang et al. 2022 (arXiv 2203.00555); α and β as in torchscale's decoder.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pydantic.dataclasses import dataclass

from gptnorm.config import STRICT
from gptnorm.shape import Role, Shape
from gptnorm.strategies.base import Branch, Card, Draw, State
from gptnorm.strategies.postnorm import PostNorm


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DeepNorm(PostNorm):
    """x ← N(α x + F(x)) with the initialisation that belongs to it."""

    card = Card(
        title="DeepNorm",
        paper="Wang et al. 2022 (DeepNet), arXiv 2203.00555; code: torchscale",
        equation="x ← N(α x + Attn(x));  x ← N(α x + FFN(x));  α = (2L)^(1/4);  v, o, FFN drawn x (8L)^(-1/4)",
        norms="two per block, over the stream's d features, eps 1e-5",
        rope="no query/key norm unless qk_norm is set, then before RoPE",
        folds="nothing: the gain also scales the skip",
        claims="trains up to 1000 layers; in translation 200 layers (3.2B) beat 48 layers (12B) by 5 BLEU",
        published_with="transformers for translation (its code has the constants of a decoder alone, too); GPTs and "
        "experts: not known here",
        ours="the factor (8L)^(-1/4) stands on the backbone's own std, in place of its depth factors (the paper: on "
        "Xavier's); a gate, which the paper does not have, is drawn like the rest of the feed-forward",
    )

    def block(self, state: State, attn: Branch, ffn: Branch, own: Any, layer: int, n_layers: int) -> State:
        (x,) = state
        alpha = (2 * n_layers) ** 0.25
        x = own.attn_norm(alpha * x + attn(x))
        x = own.ffn_norm(alpha * x + ffn(x))
        return (x,)

    def init(self, role: Role, layer: int, shape: Shape, published: Draw) -> Draw:
        if role in ("v", "o", "gate", "up", "down"):
            return replace(published, depth=(8 * shape.n_layers) ** -0.25)
        return published
