r"""KEEL: PostNorm with a highway: the skip is α times as loud, and each branch reads a normed input.

    x ──┬── N_in ── F ──(+)── N_out ──►     x ← N_out(α x + F(N_in(x)))
        └────── ·α ──────┘                  α = number of sub-layers, 2L

With α of the size of the depth the norms on the identity route damp the gradient by a bounded
factor in all, not by one per branch. x_L is normed already, so there is no final norm.

Source: Chen and Wei 2026 (arXiv 2601.19895), as summaries of it report.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic.dataclasses import dataclass

from gptnorm.config import STRICT
from gptnorm.norms import After
from gptnorm.shape import Shape
from gptnorm.strategies.base import Branch, Card, Normed, State


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Keel(Normed):
    """x ← N_out(α x + F(N_in(x)))."""

    card = Card(
        title="KEEL",
        paper="Chen and Wei 2026, arXiv 2601.19895",
        equation="x ← N(α x + Attn(N(x)));  x ← N(α x + FFN(N(x)));  α = 2L;  head reads x_L",
        norms="four per block, over the stream's d features, eps 1e-5",
        rope="no query/key norm unless qk_norm is set, then before RoPE",
        folds="the gains of the branches' inputs into the matrices that read them; those of the stream stay",
        claims="trains from 64 to over 1000 layers at larger rates than PreNorm and with better perplexity, without an "
        "initialisation of its own",
        published_with="not known here",
        ours="that α counts sub-layers is a summary's reading; another implementation counts blocks (alpha_count). No "
        "final norm, all sub-layers alike (first_attention) and the backbone's published initialisation are ours",
    )

    alpha_count: Literal["2L", "L"] = "2L"
    """What α counts: sub-layers (2L, as the paper is reported) or blocks (L)."""

    first_attention: Literal["highway", "plain"] = "highway"
    """The skip of the first sub-layer: times α as all others, or as it is. Notes on the paper fit either."""

    def block_parts(self, layer: int, shape: Shape) -> dict[str, After]:
        norm = self.make_norm(shape.d, shape)
        return {name: norm for name in ("attn_in", "attn_out", "ffn_in", "ffn_out")}

    def block(self, state: State, attn: Branch, ffn: Branch, own: Any, layer: int, n_layers: int) -> State:
        (x,) = state
        alpha = 2 * n_layers if self.alpha_count == "2L" else n_layers
        first = 1 if layer == 0 and self.first_attention == "plain" else alpha
        x = own.attn_out(first * x + attn(own.attn_in(x)))
        x = own.ffn_out(alpha * x + ffn(own.ffn_in(x)))
        return (x,)
