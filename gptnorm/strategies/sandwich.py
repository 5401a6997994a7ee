r"""Sandwich norm: PreNorm with a second norm on each branch's output.

    x ── N ── F ── N ──(+)──►       x ← x + N(F(N(x)))       F = attention, then feed-forward
    └───────────────────┘           head reads N(x_L)

Each branch adds a vector of RMS 1 (times a gain) whatever its weights' size.

Source: Ding et al. 2021 (CogView, arXiv 2105.13290); Gemma 2 (arXiv 2408.00118) has the same four
norms per block.
"""

from __future__ import annotations

from typing import Any

from pydantic.dataclasses import dataclass

from gptnorm.config import STRICT
from gptnorm.norms import After
from gptnorm.shape import Shape
from gptnorm.strategies.base import Branch, Card, State
from gptnorm.strategies.prenorm import PreNorm


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Sandwich(PreNorm):
    """x ← x + N(F(N(x))), with a final norm before the head."""

    card = Card(
        title="Sandwich norm",
        paper="Ding et al. 2021 (CogView), arXiv 2105.13290; Gemma 2, arXiv 2408.00118",
        equation="x ← x + N(Attn(N(x)));  x ← x + N(FFN(N(x)));  head reads N(x_L)",
        norms="four per block and one at the end, over the stream's d features, eps 1e-5",
        rope="no query/key norm unless qk_norm is set, then before RoPE",
        folds="the gains of the branches' inputs into the matrices that read them, the final one into an untied head; "
        "those of the outputs stay with their norms",
        claims="keeps values small enough for training in fp16 (CogView; recalled, not checked)",
        published_with="CogView's transformer (recalled) and Gemma 2, dense, with grouped queries; experts: not known "
        "here",
        ours="CogView's equation is recalled, Gemma 2's checked against `transformers`; the backbone's published "
        "initialisation is kept: the size of W_o and W_down changes Adam's relative step, not the forward pass",
    )

    def block_parts(self, layer: int, shape: Shape) -> dict[str, After]:
        norm = self.make_norm(shape.d, shape)
        return {name: norm for name in ("attn_in", "attn_out", "ffn_in", "ffn_out")}

    def block(self, state: State, attn: Branch, ffn: Branch, own: Any, layer: int, n_layers: int) -> State:
        (x,) = state
        x = x + own.attn_out(attn(own.attn_in(x)))
        x = x + own.ffn_out(ffn(own.ffn_in(x)))
        return (x,)
