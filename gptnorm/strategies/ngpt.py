r"""nGPT: everything lives on the unit sphere; weights are put back on it after every step.

    q, k = s_qk ⊙ N(rope(W_q h)), s_qk ⊙ N(rope(W_k h))      per head;  N(x) = x / ‖x‖₂
    h_A  = N(W_p Attn),  softmax scale √d_h
    h    = N(h + |α_A| ⊙ (h_A − h))
    u    = s_u ⊙ W_u h;   z = √d · s_v ⊙ W_z h
    h_M  = N(W_d (u ⊙ silu(z)))
    h    = N(h + |α_M| ⊙ (h_M − h))
    logits = s_z ⊙ (W_head h)                                no final norm

Weights that read the stream have unit rows (input axis), the two that write to it unit columns
(output axis), embedding and head unit rows. No warm-up, no weight decay.

Source: Loshchilov et al. 2024 (arXiv 2410.01131) and its published code, with a real RoPE (the
published one is not a rotation).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic.dataclasses import dataclass

from gptnorm.config import STRICT, OptionsConfig, PositiveFloat, Scalar
from gptnorm.norms import After, Axis, Constant, LearnedScale, Norm
from gptnorm.shape import Role, Shape
from gptnorm.strategies.base import Attention, Branch, Card, Constraint, Draw, FeedForward, State, Strategy

EPS = 1e-12
"""Guards N(0); relative to unit vectors it is below fp32's resolution."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class NGPT(Strategy):
    """Exact normalisation of activations and weights."""

    card = Card(
        title="nGPT",
        paper="Loshchilov et al. 2024, arXiv 2410.01131",
        equation="h ← N(h + |α_A| (N(Attn h) − h));  h ← N(h + |α_M| (N(FFN h) − h));  logits = s_z W h",
        norms="L2, over d for the stream and the branches' outputs, over one head for q and k; eps 1e-12",
        rope="RoPE first, then the norm of q and k per head",
        folds="s_u, s_v, s_z and √d into their matrices; the norms stay",
        claims="4-20 times fewer tokens to the same loss than GPT; independent runs found 1.5-4 times",
        published_with="a dense GPT with RoPE, SwiGLU and an untied head, here llama2",
        ours="with grouped queries the heads of a group share s_qk; learned positions are unit rows that are "
        "added and normed once; an ungated feed-forward has √d and s_u before its activation; experts have s_u, s_v "
        "and unit weights of their own, N follows their weighted sum, and the router (unit rows) has √d on its logits",
    )
    recipe_defaults: ClassVar[Mapping[str, Scalar]] = {"optim.warmup": 0, "optim.weight_decay": 0, "optim.floor": 0}

    alpha_init: PositiveFloat = 0.05
    """Initial step towards a branch's output (0.1 for 1B at 8k context, as a third-party reproduction reports)."""

    def projection(self, role: Role, layer: int, shape: Shape) -> tuple[After, ...]:
        if role == "router":
            return (Constant(value=shape.d**0.5),)
        if role in ("gate", "up"):
            return (LearnedScale(size=shape.d_ff, init=1.0, scale=1.0),)
        if role == "head":
            return (LearnedScale(size=shape.vocab, init=1.0, scale=shape.d**-0.5),)
        return ()

    def attention(self, layer: int, shape: Shape) -> Attention:
        norm = self.make_norm(shape.head_dim, shape, "head")
        s_qk = LearnedScale(size=shape.d_kv, init=1.0, scale=shape.d**-0.5)
        return Attention(softmax_scale=shape.head_dim**0.5, q=norm, k=norm, rope_first=True, qk_scale=s_qk)

    def feedforward(self, layer: int, shape: Shape) -> FeedForward:
        return FeedForward(pre_activation=shape.d**0.5)

    def block_parts(self, layer: int, shape: Shape) -> dict[str, After]:
        alpha = LearnedScale(size=shape.d, init=self.alpha_init, scale=shape.d**-0.5, absolute=True)
        return {"alpha_attn": alpha, "alpha_ffn": alpha, "unit": self.make_norm(shape.d, shape)}

    def end_parts(self, shape: Shape) -> dict[str, After]:
        return {"unit": self.make_norm(shape.d, shape)}

    def open(self, h: Any, own: Any) -> State:
        # Rows of the embedding are unit vectors already; only learned positions move h off the sphere.
        return (own.unit(h),)

    def block(self, state: State, attn: Branch, ffn: Branch, own: Any, layer: int, n_layers: int) -> State:
        (h,) = state
        h = own.unit(h + own.alpha_attn(own.unit(attn(h)) - h))
        h = own.unit(h + own.alpha_ffn(own.unit(ffn(h)) - h))
        return (h,)

    def init(self, role: Role, layer: int, shape: Shape, published: Draw) -> Draw:
        return Draw(std=shape.d**-0.5)

    def constraint(self, role: Role, layer: int, shape: Shape) -> Constraint:
        return Constraint(axis=-2 if role in ("o", "down") else -1, kind="unit")

    def refuses(self, options: OptionsConfig) -> dict[str, str]:
        found = {}
        if options.v_norm == "full":
            found["v_norm"] = "every head has norm 1 here, and a norm over all heads together would make them shorter"
        if options.norm_scale == "frozen":
            found["norm_scale"] = (
                "its steps go from one unit vector towards another, and only norms of each token put the stream back "
                "on the sphere"
            )
        return found

    def make_norm(self, size: int, shape: Shape, axis: Axis = "width") -> Norm:
        return Norm(kind="l2", size=size, eps=EPS, axis=axis)
