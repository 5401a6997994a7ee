r"""SiameseNorm: a normed and a never normed stream, fed by the same branches.

    o = F(X' + N(Y))                 F = attention, then feed-forward;  X_0 = Y_0 = embedding
    X ← N(X + o/c),   Y ← Y + o      head reads N(N(X_L) + N(Y_L))

Two wirings of X (`strategy.x_stream`), l counting blocks from 0:

    "hybrid" (the published code for language models): q, k, v normed per head; X' = s ⊙ X with
        a learned s in attention; one norm N_in on the feed-forward's whole input; X normed after
        attention only:    o = Attn(s ⊙ X + N(Y));         X ← N(X + o/c);  Y ← Y + o
                           o = FFN(N_in(X + N(Y)));        X ← X + o/c;     Y ← Y + o
    "post" (the equation as the paper is reported): per branch
                           o = F(N_in(X + N(Y)));          X ← N(X + o/c);  Y ← Y + o
        and the head reads X_L + N(Y_L)

c = √(2(l+1)) in the code, √(l+1) in the equation: the same to within one branch if the equation's l
counts branches. The initialisation is Megatron's: W_o and W_down are drawn (2L)^(-1/2) times as large
(`options.scale_mode` is preset to "init").

Source: Li et al. 2026 (arXiv 2602.08064) and its published code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic.dataclasses import dataclass
from torch import Tensor

from gptnorm.config import STRICT, Scalar
from gptnorm.norms import After, LearnedScale
from gptnorm.shape import Shape
from gptnorm.strategies.base import Attention, Branch, Card, Normed, State


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SiameseNorm(Normed):
    """Two streams with the same updates, one of them normed."""

    card = Card(
        title="SiameseNorm",
        paper="Li et al. 2026, arXiv 2602.08064",
        equation="o = Attn(s ⊙ X + N(Y));  X ← N(X + o/c);  Y ← Y + o;  o = FFN(N(X + N(Y)));  X ← X + o/c;  Y ← Y + o",
        norms="four per block and three at the end, over d; three per block over one head of q, of k, of v; eps 1e-5",
        rope="query/key norm per head, then RoPE",
        folds="the gain of v into W_o, that of the feed-forward's input into the matrices that read it, the last one "
        "into an untied head; the others stay",
        claims="as notes on the paper report, 1.3B, 100B tokens: perplexity 10.57 against 11.21 for PreNorm at rate "
        "4e-4, 10.43 against 10.84 at 1e-3, 10.48 against 10.89 at 2e-3; 0.5 % slower",
        published_with="OLMo, dense (390M, 1.3B), and a mixture of experts (15B, 2B of them active)",
        ours="the published code is the default, the equation an option. Of its initialisation the depth factor is "
        "taken, its std is not: init.std stays the recipe's",
    )
    recipe_defaults: ClassVar[Mapping[str, Scalar]] = {"options.scale_mode": "init"}

    x_stream: Literal["hybrid", "post"] = "hybrid"
    """The normed stream's wiring: HybridNorm's (the published code) or PostNorm's (the equation)."""
    depth_scale: Literal["2(l+1)", "l+1"] | None = None
    """What c is the square root of; l counts blocks from 0. Left out: 2(l+1) for hybrid, l+1 for post."""

    def attention(self, layer: int, shape: Shape) -> Attention:
        plain = super().attention(layer, shape)
        norm = self.make_norm(shape.head_dim, shape, "head")
        return replace(plain, q=norm, k=norm, v=norm) if self.x_stream == "hybrid" else plain

    def block_parts(self, layer: int, shape: Shape) -> dict[str, After]:
        norm = self.make_norm(shape.d, shape)
        shared: dict[str, After] = {"attn_y": norm, "attn_x": norm, "ffn_y": norm, "ffn_in": norm}
        if self.x_stream == "hybrid":
            return shared | {"x_scale": LearnedScale(size=shape.d, init=1.0, scale=1.0)}
        return shared | {"attn_in": norm, "ffn_x": norm}

    def end_parts(self, shape: Shape) -> dict[str, After]:
        norm = self.make_norm(shape.d, shape)
        return {"x_norm": norm, "y_norm": norm, "final_norm": norm} if self.x_stream == "hybrid" else {"y_norm": norm}

    def open(self, h: Tensor, own: Any) -> State:
        return (h, h)

    def block(self, state: State, attn: Branch, ffn: Branch, own: Any, layer: int, n_layers: int) -> State:
        x, y = state
        hybrid = self.x_stream == "hybrid"
        doubled = hybrid if self.depth_scale is None else self.depth_scale == "2(l+1)"
        c = ((2 if doubled else 1) * (layer + 1)) ** 0.5
        o = attn(own.x_scale(x) + own.attn_y(y) if hybrid else own.attn_in(x + own.attn_y(y)))
        x, y = own.attn_x(x + o / c), y + o
        o = ffn(own.ffn_in(x + own.ffn_y(y)))
        x, y = x + o / c, y + o
        return (x if hybrid else own.ffn_x(x), y)

    def close(self, state: State, own: Any) -> Tensor:
        x, y = state
        if self.x_stream == "hybrid":
            return own.final_norm(own.x_norm(x) + own.y_norm(y))
        return x + own.y_norm(y)
