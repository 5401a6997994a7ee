r"""SimpleNorm: a norm directly after every linear map of the block, and none before it.

    Ψ(x; W, γ) = N(W x) = γ ⊙ √d · W x / ‖W x‖₂            (RMSNorm; d = length of W x)

    h   = x + Ψ_o(Attn(rope(heads(Ψ_q(x))), rope(heads(Ψ_k(x))), heads(Ψ_v(x))))
    out = h + Ψ_2(silu(Ψ_1(h)) ⊙ Ψ_3(h))
    logits = W_out N(x_L)

The norm runs over the whole output, all heads together, before the split and before RoPE. The
branches read the raw stream: they do not change when it is scaled (degree 0), so no PreNorm is
needed. At initialisation each branch adds RMS 1.

Source: Chen et al., SimpleGPT (arXiv 2602.01212), figure 1, and its reference code.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic.dataclasses import dataclass
from torch import Tensor

from gptnorm.config import STRICT
from gptnorm.norms import After
from gptnorm.shape import NormKind, Role, Shape
from gptnorm.strategies.base import Branch, Card, Normed, State


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SimpleNorm(Normed):
    """N(W x) for every linear map of the block; a final norm before the plain head."""

    card = Card(
        title="SimpleNorm (SimpleGPT)",
        paper="Chen et al. 2026, arXiv 2602.01212",
        equation="Ψ(x) = N(Wx);  h = x + Ψ_o(Attn(Ψ_q x, Ψ_k x, Ψ_v x));  out = h + Ψ_2(silu(Ψ_1 h) ⊙ Ψ_3 h)",
        norms="one per linear map of the block over its whole output, one before the head, eps 1e-5",
        rope="the norm of q and k runs over all heads together, before the split and before RoPE",
        folds="the gain of v into W_o, that of up into W_2, the final one into the head; those of q and k (RoPE), gate "
        "(activation), o and 2 (the stream) stay, and so do the norms",
        claims="3-10 times larger stable learning rates; 7B at 60K steps: training loss 2.208 against 2.290 "
        "for PreNorm + QK-norm; about 3 % more time per step",
        published_with="GPT-2 (1.4B), Llama 2 (1B, 7B) and Llama 3 (8B), dense; whether with experts is not known here",
        ours="on GPT-2 the placement (q, k, v apart, both feed-forward maps) is our reading of figure 1. With experts "
        "each map of each expert has a norm with a gain of its own, and the router is plain (normed with "
        "moe.router_norm)",
    )

    norm: NormKind | Literal["backbone"] = "rmsnorm"
    """rmsnorm (the paper's), layernorm, np_layernorm (no gain), or the backbone's."""

    def projection(self, role: Role, layer: int, shape: Shape) -> tuple[After, ...]:
        if role in shape.matrix_roles:
            return (self.make_norm(shape.out_features(role), shape),)
        return ()

    def end_parts(self, shape: Shape) -> dict[str, After]:
        return {"final_norm": self.make_norm(shape.d, shape)}

    def block(self, state: State, attn: Branch, ffn: Branch, own: Any, layer: int, n_layers: int) -> State:
        (x,) = state
        h = x + attn(x)
        out = h + ffn(h)
        return (out,)

    def close(self, state: State, own: Any) -> Tensor:
        return own.final_norm(self.stream(state))
