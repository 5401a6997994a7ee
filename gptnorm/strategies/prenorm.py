r"""PreNorm: each branch reads a normed copy of the stream, the stream itself is never normed.

    x ── N ── F ──(+)──►        x ← x + F(N(x))       F = attention, then feed-forward
    └──────────────┘            output: N(x_L)

Source: Xiong et al. 2020 (arXiv 2002.04745); the Llama and GPT-2 placement.
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
class PreNorm(Normed):
    """x ← x + F(N(x)), with a final norm before the head."""

    card = Card(
        title="PreNorm",
        paper="Xiong et al. 2020, arXiv 2002.04745; Llama 2 (arXiv 2307.09288), GPT-2",
        equation="x ← x + Attn(N(x));  x ← x + FFN(N(x));  head reads N(x_L)",
        norms="two per block and one at the end, over the stream's d features, eps 1e-5",
        rope="no query/key norm unless qk_norm is set, then before RoPE",
        folds="every gain into the matrices that read the normed stream; the final one only into an untied head",
        claims="trains without the long warm-up that PostNorm needs; 7B with rate 1e-3 fails in the "
        "SimpleGPT paper (training loss 4.115 at 20K steps), 3e-4 works",
        published_with="GPT-2, Llama 2 and Llama 3, dense, and with experts on Llama (Mixtral)",
        ours="nothing",
    )

    def block_parts(self, layer: int, shape: Shape) -> dict[str, After]:
        norm = self.make_norm(shape.d, shape)
        return {"attn_norm": norm, "ffn_norm": norm}

    def end_parts(self, shape: Shape) -> dict[str, After]:
        return {"final_norm": self.make_norm(shape.d, shape)}

    def block(self, state: State, attn: Branch, ffn: Branch, own: Any, layer: int, n_layers: int) -> State:
        (x,) = state
        x = x + attn(own.attn_norm(x))
        x = x + ffn(own.ffn_norm(x))
        return (x,)

    def close(self, state: State, own: Any) -> Tensor:
        return own.final_norm(self.stream(state))
