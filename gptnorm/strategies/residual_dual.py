r"""ResiDual: a PostNorm stream that the branches read, and a second, never normed sum of their outputs.

    x ← N(x + F(x))       r ← r + F(x)       F = attention, then feed-forward, both read x
    output: x_L + N(r_L)                     x_0 = r_0 = embedding

Source: Xie et al. 2023 (arXiv 2304.14802).
"""

from __future__ import annotations

from typing import Any

from pydantic.dataclasses import dataclass
from torch import Tensor

from gptnorm.config import STRICT
from gptnorm.norms import After
from gptnorm.shape import Shape
from gptnorm.strategies.base import Branch, Card, Normed, State


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ResidualDual(Normed):
    """PostNorm and PreNorm residuals side by side."""

    card = Card(
        title="ResiDual",
        paper="Xie et al. 2023, arXiv 2304.14802",
        equation="f = F(x);  x ← N(x + f);  r ← r + f;  head reads x_L + N(r_L)",
        norms="two per block over the PostNorm stream, one on the dual stream at the end, eps 1e-5",
        rope="no query/key norm unless qk_norm is set, then before RoPE",
        folds="nothing",
        claims="avoids PostNorm's vanishing gradients and PreNorm's collapse of representations",
        published_with="not known here",
        ours="the published code also scales r by a constant against overflow in fp16; left out",
    )

    def block_parts(self, layer: int, shape: Shape) -> dict[str, After]:
        norm = self.make_norm(shape.d, shape)
        return {"attn_norm": norm, "ffn_norm": norm}

    def end_parts(self, shape: Shape) -> dict[str, After]:
        return {"dual_norm": self.make_norm(shape.d, shape)}

    def open(self, h: Tensor, own: Any) -> State:
        return (h, h)

    def block(self, state: State, attn: Branch, ffn: Branch, own: Any, layer: int, n_layers: int) -> State:
        x, r = state
        f = attn(x)
        x, r = own.attn_norm(x + f), r + f
        f = ffn(x)
        x, r = own.ffn_norm(x + f), r + f
        return (x, r)

    def close(self, state: State, own: Any) -> Tensor:
        x, r = state
        return x + own.dual_norm(r)
