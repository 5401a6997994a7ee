"""Rotary positions, interleaved pairs (Su et al. 2021, arXiv 2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor


def rotations(length: int, head_dim: int, theta: float, like: Tensor) -> tuple[Tensor, Tensor]:
    r"""cos and sin of $t\,\theta^{-2i/d_h}$ as `rotate` wants them, each (length, 1, head_dim), fp32 or better.

    Made anew at each forward pass: no buffer can then be wiped by deferred initialisation or be
    too short.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    i = torch.arange(0, head_dim, 2, device=like.device, dtype=dtype)
    angle = torch.outer(torch.arange(length, device=like.device, dtype=dtype), theta ** (-i / head_dim))
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((cos, cos), -1).flatten(-2)[:, None], torch.stack((-sin, sin), -1).flatten(-2)[:, None]


def rotate(x_BTHE: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turns the pairs (x_0, x_1), (x_2, x_3), … of every head by their position's angles.

    With the pair's swap as one copy, (x_0, x_1) cos + (x_1, x_0) (-sin, sin): twice as fast on a
    CPU as working on the even and the odd features apart.
    """
    cos_T1E, sin_T1E = rotation
    x = x_BTHE.to(cos_T1E.dtype)
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return (x * cos_T1E + swapped * sin_T1E).to(x_BTHE.dtype)
