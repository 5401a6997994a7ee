r"""Simulated float8 training: products of numbers that float8 can hold, computed in a wider type.

A tensor is rounded to the nearest multiple of its own scale that the format has, ties to even (torch's own cast):

$$s = \max(\max|x| / m,\, 2^{-126}), \qquad c(x) = \text{float8}(x / s), \qquad Q(x) = s\, c(x)$$

with m the format's largest number: 448 of e4m3fn (3 bits after the point), 57344 of e5m2 (2 bits, a wider range). A
linear map with weight W, input x and incoming gradient g then is

$$y = Q_{43}(x)\, Q_{43}(W)^\top, \qquad dx = Q_{52}(g)\, Q_{43}(W), \qquad dW = Q_{52}(g)^\top Q_{43}(x)$$

so that the rounding itself is passed through unchanged (straight-through). The codes c are exact in bfloat16, which has
7 bits after the point: they are multiplied in autocast's type with sums in fp32, as a float8 product does it, and only
the result is multiplied by the scales. Without autocast all of it is in the input's type. It is the same on a CPU and
on a GPU, and faster on neither.

| choice | source |
|---|---|
| e4m3 forward, e5m2 for gradients | Micikevicius et al. 2022, arXiv 2209.05433; Transformer Engine's "HYBRID" |
| the scale is that of the tensor at hand, no history | Transformer Engine's current scaling; torchao's "tensorwise" |
| embedding, head, router, norms and attention are not rounded | DeepSeek-V3, arXiv 2412.19437, section 3.3.1 |
| weights are kept and updated in fp32 | the same |
| an expert's matrix has a scale of its own, the rows of all experts have one | ours |

DeepSeek-V3 itself has e4m3 everywhere, with a scale for each 1 x 128 or 128 x 128 numbers: finer than what is here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2

SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""Keeps a tensor of zeros, or of numbers near fp32's end, from being divided by 0."""


def encode(x: Tensor, kind: torch.dtype, *, by_matrix: bool = False) -> tuple[Tensor, Tensor]:
    r"""c(x), of the float8 type `kind`, and s: Q(x) is their product.

    Nothing is lost to the format's end, since the largest number falls on it. Where x is not finite s is not, and
    neither is any number of Q(x): torch's cast alone may turn infinity into 448.

    Args:
        x: (…), at most fp32.
        by_matrix: whether each matrix of the last two axes has a scale of its own.

    Returns:
        Codes like x; scales in fp32, 0-d or (…, 1, 1).
    """
    exact = x.float()
    largest = exact.abs().amax((-2, -1), keepdim=True) if by_matrix else exact.abs().amax()
    scale = (largest / torch.finfo(kind).max).clamp_min(SMALLEST_SCALE)
    return (exact / scale).to(kind), scale


def product_dtype(x: Tensor) -> torch.dtype:
    """The type that autocast would multiply x in: its own for x in fp64, that of x where there is no autocast."""
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def float8_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Q(x) Q(W)ᵀ, (…, in) and (out, in) → (…, out) of `product_dtype(x)`; differentiable once."""
    y = _Product.apply(x.flatten(0, -2), weight, None, None)
    return y.unflatten(0, x.shape[:-1])  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]


def float8_experts(x: Tensor, weight: Tensor, expert: Tensor, ends: Tensor | None) -> Tensor:
    """The maps of several experts, W of shape (E, out, in); differentiable once.

    Args:
        x: (P, in), rows sorted by expert; or (N, in) or (E, N, in) where `ends` is None: every expert on every row,
            which all count for the scale.
        expert: which one each row of the result is of: (P,), or (E, 1).
        ends: (E,) in int32, the end of each expert's rows.

    Returns:
        (P, out) or (E, N, out), of `product_dtype(x)`.
    """
    # Function.apply is declared to return anything.
    return _Product.apply(x, weight, expert, ends)  # type: ignore[return-value]


class _Product(torch.autograd.Function):
    """y = Q(x) Q(W)ᵀ; see the module's equations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, expert: Tensor | None, ends: Tensor | None) -> Tensor:
        dtype = product_dtype(x)
        (x_codes, x_scale), (w_codes, w_scale) = encode(x, E4M3), encode(weight, E4M3, by_matrix=True)
        x_codes, w_codes = x_codes.to(dtype), w_codes.to(dtype)
        if expert is not None:
            w_scale = w_scale.flatten()[expert][..., None]
        ctx.save_for_backward(x_codes, w_codes, x_scale, w_scale, ends)
        ctx.dtypes = x.dtype, weight.dtype
        return _scaled(_multiply(x_codes, w_codes.mT, ends), x_scale, w_scale).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_codes, w_codes, x_scale, w_scale, ends = ctx.saved_tensors
        g_codes, g_scale = encode(grads[0], E5M2)
        g_codes = g_codes.to(x_codes.dtype)
        dx = _scaled(_multiply(g_codes, w_codes, ends), g_scale, w_scale).sum_to_size(x_codes.shape)
        dw = _scaled(_multiply(g_codes.mT, x_codes, ends), g_scale, x_scale)
        return dx.to(ctx.dtypes[0]), dw.to(ctx.dtypes[1]), None, None


def _multiply(a: Tensor, b: Tensor, ends: Tensor | None) -> Tensor:
    return a @ b if ends is None else F.grouped_mm(a, b, offs=ends)


def _scaled(y: Tensor, first: Tensor, second: Tensor) -> Tensor:
    # One after the other: the scales' own product may be below fp32's range.
    return y.float() * first * second
