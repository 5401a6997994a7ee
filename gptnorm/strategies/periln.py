r"""Peri-LN: norms around every branch, on the embedding and before the head.

    x_0 = N(embedding)
    x ── N ── F ── N ──(+)──►       x ← x + N(F(N(x)))       F = attention, then feed-forward
    └───────────────────┘           head reads N(x_L)

At the start each branch adds a vector of RMS 1 to a stream of RMS 1, so its variance grows linearly
with the depth, whatever the weights' initial size.

Source: Kim et al. 2025 (arXiv 2502.02732).
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
class PeriLN(Normed):
    """x_0 = N(embedding);  x ← x + N(F(N(x)));  a final norm."""

    card = Card(
        title="Peri-LN",
        paper="Kim et al. 2025, arXiv 2502.02732",
        equation="x_0 = N(e);  x ← x + N(Attn(N(x)));  x ← x + N(FFN(N(x)));  head reads N(x_L)",
        norms="four per block, one on the embedding, one at the end, over the stream's d features, eps 1e-5",
        rope="no query/key norm unless qk_norm is set, then before RoPE",
        folds="the gains of the branches' inputs into the matrices that read them, the final one into an untied head, "
        "the embedding's norm into its table (untied, without learned positions)",
        claims="400M: loss 3.34 against 3.43 for PreNorm, five-task average 51.57 against 49.69, no overflow in fp16; "
        "up to 2.8 points over 400M-3.2B (as a third-party review reports)",
        published_with="models of 400M to 3.2B, whose backbone is not known here; experts: not known here",
        ours="the backbone's published initialisation is kept: the size of W_o and W_down changes Adam's relative "
        "step, not the forward pass; learned positions are added before the embedding's norm",
    )

    def block_parts(self, layer: int, shape: Shape) -> dict[str, After]:
        norm = self.make_norm(shape.d, shape)
        return {name: norm for name in ("attn_in", "attn_out", "ffn_in", "ffn_out")}

    def end_parts(self, shape: Shape) -> dict[str, After]:
        norm = self.make_norm(shape.d, shape)
        return {"embed_norm": norm, "final_norm": norm}

    def open(self, h: Tensor, own: Any) -> State:
        return (own.embed_norm(h),)

    def block(self, state: State, attn: Branch, ffn: Branch, own: Any, layer: int, n_layers: int) -> State:
        (x,) = state
        x = x + own.attn_out(attn(own.attn_in(x)))
        x = x + own.ffn_out(ffn(own.ffn_in(x)))
        return (x,)

    def close(self, state: State, own: Any) -> Tensor:
        return own.final_norm(self.stream(state))
