"""Causal multi-head attention with grouped queries."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from gptnorm.model.projection import Projection
from gptnorm.model.rope import rotate
from gptnorm.norms import Norm
from gptnorm.shape import Shape
from gptnorm.strategies import Strategy


class CausalAttention(nn.Module):
    """o(softmax(scale q kᵀ + causal mask) v), with the norms and scales that the strategy asks for.

    Dimensions: B batch, T time, D width, H heads, G key/value heads, E one head's features.
    """

    def __init__(self, layer: int, shape: Shape, strategy: Strategy) -> None:
        super().__init__()
        self.shape = shape
        spec = strategy.attention(layer, shape)
        self.q = Projection("q", layer, shape, strategy)
        self.k = Projection("k", layer, shape, strategy)
        self.v = Projection("v", layer, shape, strategy)
        self.o = Projection("o", layer, shape, strategy)
        self.q_norm = _HeadNorm(spec.q) if spec.q else None
        self.k_norm = _HeadNorm(spec.k) if spec.k else None
        self.v_norm = _HeadNorm(spec.v) if spec.v else None
        self.qk_scale = spec.qk_scale.build() if spec.qk_scale else None
        self.rope_first = spec.rope_first
        self.softmax_scale = spec.softmax_scale

    def forward(self, x_BTD: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        head_dim = self.shape.head_dim
        q_BTHE = self.q(x_BTD).unflatten(-1, (-1, head_dim))
        k_BTGE = self.k(x_BTD).unflatten(-1, (-1, head_dim))
        v_BTGE = self.v(x_BTD).unflatten(-1, (-1, head_dim))

        if rotation and self.rope_first:
            q_BTHE, k_BTGE = rotate(q_BTHE, rotation), rotate(k_BTGE, rotation)
        if self.q_norm:
            q_BTHE = self.q_norm(q_BTHE)
        if self.k_norm:
            k_BTGE = self.k_norm(k_BTGE)
        if self.v_norm:
            v_BTGE = self.v_norm(v_BTGE)
        if self.qk_scale:
            s_GE = self.qk_scale.value().unflatten(-1, (-1, head_dim))
            s_HE = s_GE.repeat_interleave(self.shape.n_heads // self.shape.n_kv_heads, dim=0)
            q_BTHE, k_BTGE = q_BTHE * s_HE.to(q_BTHE.dtype), k_BTGE * s_GE.to(k_BTGE.dtype)
        if rotation and not self.rope_first:
            q_BTHE, k_BTGE = rotate(q_BTHE, rotation), rotate(k_BTGE, rotation)

        o_BHTE = F.scaled_dot_product_attention(
            q_BTHE.transpose(1, 2),
            k_BTGE.transpose(1, 2),
            v_BTGE.transpose(1, 2),
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=self.shape.n_kv_heads != self.shape.n_heads,
        )
        return self.o(o_BHTE.transpose(1, 2).flatten(-2))


class _HeadNorm(nn.Module):
    """A norm of a (…, heads, features) tensor, per head or over all heads together."""

    def __init__(self, spec: Norm) -> None:
        super().__init__()
        self.norm = spec.build()
        self.per_head = spec.axis == "head"

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) if self.per_head else self.norm(x.flatten(-2)).view_as(x)
