r"""anGPT: constants instead of norms, and weight vectors that are kept from growing.

    q, k, v = ν_qkv W h;    q, k = N(rope(q)), N(rope(k)) per head;    softmax scale √d_h
    x_A  = ν_p W_p Attn                                      N(x) = x / ‖x‖₂
    h    = ν(α_A) ⊙ (h + α_A ⊙ (x_A − h))
    u, z = ν_uz W_u h, ν_uz W_z h
    x_M  = ν_d W_d (ν_acf u ⊙ silu(√d z))
    h    = ν(α_M) ⊙ (h + α_M ⊙ (x_M − h))
    logits = s_Z ⊙ (W_head h)                                no norm before it

Every ν is 1/√E‖·‖² for a unit vector h and unit rows, so it follows from the shapes:

    ν_qkv = √(d/d_h)    ν_p = √(d_h/d)    ν_uz = √(d/d_ff)    ν_d = √(d_ff/d)
    ν_acf = E[silu(ν_uz g)²]^(-1/2), g ~ N(0, 1)              3.72 for d_ff = 4 d
    ν(α)  = 1/√(α² + (1−α)²)

Without a gate a = ν_acf gelu(√d u), ν_acf = (d_ff E[gelu(ν_uz g)²])^(-1/2). Learned positions add a
second unit row, so both tables carry 1/√2. Rows of every matrix start at norm 1 and are brought back
to it after a step where they are longer. No warm-up, no weight decay.

Source: Franke et al. 2025 (arXiv 2505.22014), through summaries: its body was not at hand. The card's
`ours` lists what is therefore a choice; the options hold the alternatives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from gptnorm.activations import second_moment
from gptnorm.config import STRICT, OptionsConfig, PositiveFloat, Scalar
from gptnorm.norms import After, Axis, Constant, LearnedScale, LearnedScaleModule, Norm
from gptnorm.shape import Role, Shape
from gptnorm.strategies.base import Attention, Branch, Card, Constraint, Draw, FeedForward, State, Strategy

EPS = 1e-12
"""Guards N(0); relative to unit vectors it is below fp32's resolution."""

AVERAGING = {"none": None, "sqrt(t)": 1.0, "sqrt(t/e)": 1 / 2.718281828459045}


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AnGPT(Strategy):
    """Approximate normalisation: h ← ν(α) (h + α (ν F(h) − h)), rows bounded by 1."""

    card = Card(
        title="anGPT",
        paper="Franke et al. 2025, arXiv 2505.22014 (read through summaries)",
        equation="h ← ν(α_A) (h + α_A (ν_p Attn h − h));  h ← ν(α_M) (h + α_M (ν_d FFN h − h));  logits = s_Z W h",
        norms="none but L2 of q and k over one head, eps 1e-12; constants elsewhere",
        rope="RoPE first, then the norm of q and k per head (without gains the order does not matter)",
        folds="every ν, s_Z and ν(α) α into their matrices; h ← ν(α) (1−α) h stays, and so does the norm of q and k",
        claims="as reported by a summary: 1.40 times fewer tokens to the same loss than GPT with QK-norm at 0.5B "
        "(nGPT 1.29), 2.75 % more time per step (nGPT 9.6 %); unstable without ν(α); errors of 2 % in the others "
        "change nothing",
        published_with="a dense GPT with RoPE, SwiGLU and QK-norm, here llama2; whether its head was tied is not known "
        "here",
        ours="α starts at 0.01 (the summary's number, its subscript unclear) and is stored at 1/√d; one α per feature, "
        "ν(α) elementwise, α may turn negative; s_Z starts at 1; no gain in the norm of q and k; no factor for "
        "attention's averaging; rows are cut to norm 1 (the paper may use a penalty), embedding and head too; the "
        "cosine ends at 0. On gpt2 ν_acf is GELU's, both tables carry 1/√2 and the head stays tied; with grouped "
        "queries each head's ν stays; with experts each is a feed-forward of its own, router rows are bounded, its "
        "logits carry √d and the routed sum has a gain (moe.branch_gain = auto)",
    )
    recipe_defaults: ClassVar[Mapping[str, Scalar]] = {
        "optim.warmup": 0,
        "optim.weight_decay": 0,
        "optim.floor": 0,
        "moe.branch_gain": "auto",
    }

    alpha_init: PositiveFloat | Literal["1/L"] = 0.01
    """Initial step α towards a branch's output; "1/L" is one over the number of blocks."""
    alpha_per: Literal["feature", "branch"] = "feature"
    """Whether α is a vector of d numbers or one number."""
    alpha_absolute: bool = False
    """Whether |α| is used, as in nGPT."""
    nu_alpha: Literal["elementwise", "scalar", "none"] = "elementwise"
    """ν(α) for each feature, 1/√mean(α² + (1−α)²) for all, or 1 (the paper's ablation)."""
    bound: Literal["hard", "penalty"] = "hard"
    """How rows are kept from growing beyond 1: cut after each step, or an augmented Lagrangian."""
    attention_factor: Literal["none", "sqrt(t)", "sqrt(t/e)"] = "none"
    """Makes up for the averaging of t values, which shrinks them: at least 1. The paper leaves it open."""
    norm_qk: bool = True
    """Whether queries and keys are normed; the paper has runs without."""
    s_z_init: PositiveFloat = 1.0
    """Initial logit scale; √d would give logits of variance 1."""

    def projection(self, role: Role, layer: int, shape: Shape) -> tuple[After, ...]:
        if role == "head":
            return (LearnedScale(size=shape.vocab, init=self.s_z_init, scale=shape.d**-0.5),)
        nu = _nu(role, shape)
        return (Constant(value=nu),) if nu != 1.0 else ()

    def attention(self, layer: int, shape: Shape) -> Attention:
        norm = Norm(kind="l2", size=shape.head_dim, eps=EPS, axis="head") if self.norm_qk else None
        return Attention(
            softmax_scale=shape.head_dim**0.5,
            q=norm,
            k=norm,
            rope_first=True,
            averaging=AVERAGING[self.attention_factor],
        )

    def feedforward(self, layer: int, shape: Shape) -> FeedForward:
        return FeedForward(pre_activation=shape.d**0.5, post_activation=_nu_acf(shape))

    def make_norm(self, size: int, shape: Shape, axis: Axis = "width") -> Norm:
        return Norm(kind="l2", size=size, eps=EPS, axis=axis)

    def block_parts(self, layer: int, shape: Shape) -> dict[str, After]:
        alpha = LearnedScale(
            size=shape.d if self.alpha_per == "feature" else 1,
            init=1 / shape.n_layers if self.alpha_init == "1/L" else self.alpha_init,
            scale=shape.d**-0.5,
            absolute=self.alpha_absolute,
        )
        return {"alpha_attn": alpha, "alpha_ffn": alpha}

    def block(self, state: State, attn: Branch, ffn: Branch, own: Any, layer: int, n_layers: int) -> State:
        (h,) = state
        h = self._lerp(h, attn(h), own.alpha_attn)
        h = self._lerp(h, ffn(h), own.alpha_ffn)
        return (h,)

    def _lerp(self, h: Tensor, x: Tensor, scale: LearnedScaleModule) -> Tensor:
        alpha = scale.value()
        square = alpha**2 + (1 - alpha) ** 2
        if self.nu_alpha == "scalar":
            square = square.mean()
        nu = torch.ones_like(square) if self.nu_alpha == "none" else torch.rsqrt(square)
        return (nu * (1 - alpha)).to(h.dtype) * h + (nu * alpha).to(h.dtype) * x

    def init(self, role: Role, layer: int, shape: Shape, published: Draw) -> Draw:
        return Draw(std=shape.in_features(role) ** -0.5)

    def constraint(self, role: Role, layer: int, shape: Shape) -> Constraint:
        return Constraint(axis=-1, kind="bound" if self.bound == "hard" else "penalty")

    def refuses(self, options: OptionsConfig) -> dict[str, str]:
        found = {}
        for key in ("qk_norm", "v_norm"):
            if getattr(options, key) == "full":
                found[key] = "every head has norm 1 here, and a norm over all heads together would make them shorter"
        if options.scale_mode in ("forward", "both"):
            found["scale_mode"] = "its residual moves towards branches of norm 1, and a factor would make them shorter"
        return found


def _nu(role: Role, shape: Shape) -> float:
    d, d_ff, d_h = shape.d, shape.d_ff, shape.head_dim
    if role in ("embed", "position"):
        return 2**-0.5 if shape.rope_theta is None else 1.0
    factors = {
        "q": d / d_h,
        "k": d / d_h,
        "v": d / d_h,
        "o": d_h / d,
        "gate": d / d_ff,
        "up": d / d_ff,
        "down": d_ff / d,
        "router": d,
    }
    return factors[role] ** 0.5


def _nu_acf(shape: Shape) -> float:
    moment = second_moment(shape.activation, (shape.d / shape.d_ff) ** 0.5)
    return (moment if shape.gated else shape.d_ff * moment) ** -0.5
