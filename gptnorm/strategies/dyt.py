r"""DyT: dynamic tanh stands where PreNorm has its norms.

    DyT(x) = γ ⊙ tanh(α x)                   α one learned number, γ a vector; no statistics
    x_0 = s · embedding                      s one learned number, √d at the start
    x ← x + F(DyT(x))                        F = attention, then feed-forward
    head reads DyT(x_L)

It bounds what a branch reads, but does not undo the stream's size as a norm does.

Source: Zhu et al. 2025 (arXiv 2503.10622) and its code for Llama.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pydantic.dataclasses import dataclass
from torch import Tensor

from gptnorm.config import STRICT, PositiveFloat
from gptnorm.norms import After, DynamicTanh, LearnedScale
from gptnorm.shape import Role, Shape
from gptnorm.strategies.base import Branch, Card, Draw, State, Strategy


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DyT(Strategy):
    """x ← x + F(γ ⊙ tanh(α x))."""

    card = Card(
        title="DyT (dynamic tanh)",
        paper="Zhu et al. 2025, arXiv 2503.10622",
        equation="x_0 = s e;  x ← x + Attn(γ tanh(αx));  x ← x + FFN(γ tanh(αx));  head reads γ tanh(α x_L)",
        norms="none: γ tanh(α x) twice per block and at the end, with one α each",
        rope="no query/key norm unless qk_norm is set, then before RoPE, of the backbone's own kind",
        folds="every γ into the matrices that read it (the final one only into an untied head), s into the embedding "
        "(untied, without learned positions)",
        claims="as good as norms, mostly without tuning (abstract); at 64M parameters others found its loss 27 % lower "
        "after 1M tokens and 18.8 % higher after 118M (arXiv 2604.23434)",
        published_with="dense Llama of 7B to 70B in its code (which generation is not known here); experts: not known "
        "here",
        ours="α starts at the general 0.5; the Llama code takes 0.8 (attention), 0.2 and 0.2 at 7B. An untied "
        "embedding is drawn with std 1/√d, so that s times it has RMS 1; the rest as the backbone's authors have it. "
        "There is no β on gpt2 either (the general form has one, the Llama code none); there s multiplies the sum of "
        "token and position, and the tied table stays as published",
    )

    alpha_attn: PositiveFloat = 0.5
    """Initial α before attention; 0.8 in the published Llama 7B."""
    alpha_ffn: PositiveFloat = 0.5
    """Initial α before the feed-forward; 0.2 in the published Llama 7B."""
    alpha_final: PositiveFloat = 0.5
    """Initial α before the head; 0.2 in the published Llama 7B."""

    def block_parts(self, layer: int, shape: Shape) -> dict[str, After]:
        return {
            "attn_tanh": DynamicTanh(size=shape.d, alpha=self.alpha_attn),
            "ffn_tanh": DynamicTanh(size=shape.d, alpha=self.alpha_ffn),
        }

    def end_parts(self, shape: Shape) -> dict[str, After]:
        root = shape.d**0.5
        return {
            "embed_scale": LearnedScale(size=1, init=root, scale=root),
            "final_tanh": DynamicTanh(size=shape.d, alpha=self.alpha_final),
        }

    def open(self, h: Tensor, own: Any) -> State:
        return (own.embed_scale(h),)

    def block(self, state: State, attn: Branch, ffn: Branch, own: Any, layer: int, n_layers: int) -> State:
        (x,) = state
        x = x + attn(own.attn_tanh(x))
        x = x + ffn(own.ffn_tanh(x))
        return (x,)

    def close(self, state: State, own: Any) -> Tensor:
        return own.final_tanh(self.stream(state))

    def init(self, role: Role, layer: int, shape: Shape, published: Draw) -> Draw:
        if role == "embed" and not shape.tied:
            return replace(published, std=shape.d**-0.5)
        return published
