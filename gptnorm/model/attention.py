"""Causal multi-head attention with grouped queries."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptnorm.model.projection import Projection
from gptnorm.model.rope import rotate
from gptnorm.norms import Frozen, Norm
from gptnorm.shape import Shape
from gptnorm.sharding import here, max_over, part_of
from gptnorm.strategies import Strategy

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class CausalAttention(nn.Module):
    """o(softmax(scale q kᵀ + causal mask) v), with the norms and scales that the strategy asks for.

    Dimensions: B batch, T time, D width, H heads, G key/value heads, E one head's features. Processes that share the
    heads (tensor parallelism) have equally many each, whole groups of H and G; nothing here asks how many.
    """

    mesh: DeviceMesh | None = None
    """The processes of the run, if there are several."""
    own_heads: slice = slice(None)
    """Which of H this process computes."""

    def __init__(self, layer: int, shape: Shape, strategy: Strategy) -> None:
        super().__init__()
        self.shape = shape
        spec = strategy.attention(layer, shape)
        self.q = Projection("q", layer, shape, strategy)
        self.k = Projection("k", layer, shape, strategy)
        self.v = Projection("v", layer, shape, strategy)
        self.o = Projection("o", layer, shape, strategy)
        self.q_norm = HeadNorm(spec.q) if spec.q else None
        self.k_norm = HeadNorm(spec.k) if spec.k else None
        self.v_norm = HeadNorm(spec.v) if spec.v else None
        self.qk_scale = spec.qk_scale.build() if spec.qk_scale else None
        self.rope_first = spec.rope_first
        self.softmax_scale = spec.softmax_scale
        self.averaging = spec.averaging
        self.softcap = spec.softcap
        self.clip = spec.clip
        if self.clip is not None:
            self.register_buffer("largest_logit", torch.empty(shape.n_heads))
            self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        if self.clip is not None:
            self.get_buffer("largest_logit").zero_()

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

        q_BHTE, k_BGTE, v_BGTE = (z.transpose(1, 2) for z in (q_BTHE, k_BTGE, v_BTGE))
        if self.clip is not None and self.training:
            self._watch_logits(q_BHTE, k_BGTE)
        o_BHTE = self._attend(q_BHTE, k_BGTE, v_BGTE)
        if self.averaging is not None:
            t_T1 = torch.arange(1, o_BHTE.shape[-2] + 1, device=o_BHTE.device, dtype=torch.float32)[:, None]
            o_BHTE = o_BHTE * (self.averaging * t_T1).sqrt().clamp_min(1.0).to(o_BHTE.dtype)
        return self.o(o_BHTE.transpose(1, 2).flatten(-2))

    def _attend(self, q_BHTE: Tensor, k_BGTE: Tensor, v_BGTE: Tensor) -> Tensor:
        if self.softcap is None:
            return F.scaled_dot_product_attention(
                q_BHTE,
                k_BGTE,
                v_BGTE,
                is_causal=True,
                scale=self.softmax_scale,
                enable_gqa=self.shape.n_kv_heads != self.shape.n_heads,
            )
        share = self.shape.n_heads // self.shape.n_kv_heads
        logits_BHTT = self.softcap * torch.tanh(self._logits(q_BHTE, k_BGTE) / self.softcap)
        weights_BHTT = _causal(logits_BHTT).softmax(-1)
        return weights_BHTT.to(v_BGTE.dtype) @ v_BGTE.repeat_interleave(share, dim=1)

    def _logits(self, q_BHTE: Tensor, k_BGTE: Tensor) -> Tensor:
        """Attention logits before any mask, in fp32 or better."""
        share = self.shape.n_heads // self.shape.n_kv_heads
        exact = torch.promote_types(q_BHTE.dtype, torch.float32)
        with torch.autocast(q_BHTE.device.type, enabled=False):
            q, k = q_BHTE.to(exact), k_BGTE.to(exact).repeat_interleave(share, dim=1)
            return (q @ k.mT) * self.softmax_scale

    @torch.no_grad()
    def _watch_logits(self, q_BHTE: Tensor, k_BGTE: Tensor) -> None:
        """Keeps each head's largest logit since the last step; fused attention does not tell it."""
        largest = self.get_buffer("largest_logit")[self.own_heads]
        largest.copy_(torch.maximum(largest, _causal(self._logits(q_BHTE, k_BGTE)).amax((0, 2, 3))))

    @torch.no_grad()
    def after_step(self) -> None:
        r"""QK-clip: $W_q, W_k \leftarrow \sqrt{\gamma}\,W_q, \sqrt{\gamma}\,W_k$ with
        $\gamma = \min(1, \tau / S_\max)$ per head, the least of a group's with grouped queries; $S_\max$ over all
        processes. Where it is not finite nothing is clipped: no update was made either.
        """
        if self.clip is None:
            return
        largest_H = self.get_buffer("largest_logit")
        max_over(largest_H, self.mesh, "data", "tensor")
        gamma_H = torch.where(largest_H.isfinite(), self.clip / largest_H, 1.0)
        gamma_G = gamma_H.clamp_max(1.0).unflatten(0, (self.shape.n_kv_heads, -1)).amin(1)
        share, head_dim = self.shape.n_heads // self.shape.n_kv_heads, self.shape.head_dim
        for projection, rows in ((self.q, share * head_dim), (self.k, head_dim)):
            factor = gamma_G.sqrt().repeat_interleave(rows)[:, None]
            here(projection.weight).mul_(part_of(factor, like=projection.weight))
        largest_H.zero_()


def _causal(logits_BHTT: Tensor) -> Tensor:
    length = logits_BHTT.shape[-1]
    future = torch.ones(length, length, dtype=torch.bool, device=logits_BHTT.device).triu(1)
    return logits_BHTT.masked_fill(future, float("-inf"))


class HeadNorm(nn.Module):
    """A norm of a (…, heads, features) tensor, per head or over all heads together."""

    def __init__(self, spec: Norm | Frozen) -> None:
        super().__init__()
        self.norm = spec.build()
        self.per_head = spec.axis == "head"

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) if self.per_head else self.norm(x.flatten(-2)).view_as(x)
