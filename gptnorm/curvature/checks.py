"""Whether Hessian products can be believed: some kernels have right gradients and wrong second derivatives."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gptnorm.curvature.operators import Operator
from gptnorm.errors import UserError

TOLERANCE = {torch.float32: 0.05, torch.float64: 1e-4}
"""Relative difference to central differences that is still taken for their own error."""

NEGLIGIBLE = 1e-3
"""Share of the whole product below which a leaf's own is measured against the whole: it may be 0."""


def refuse_wrong_products(
    operator: Operator, differences: Operator, scales: Sequence[Tensor], *, what: str, seed: int = 0
) -> float:
    """Compares a Hessian with finite differences of the gradient on a random vector, leaf by leaf.

    Each leaf moves by as large a part of its own size, and each leaf's part of the product is compared by itself: one
    wrong kernel among many would be lost in the whole.

    Args:
        operator: by differentiating twice.
        differences: the same by `gptnorm.curvature.operators.FiniteDifference`.
        scales: the leaves, for their sizes.
        what: is measured, for the message.

    Returns:
        The largest relative difference of any leaf.

    Raises:
        UserError: it is above `TOLERANCE`, or not a number; or the dtype is none of these.
    """
    dtype = operator.space.dtype
    if dtype not in TOLERANCE:
        raise UserError(f"curvature: is measured in fp32 or fp64, not in {str(dtype).removeprefix('torch.')}")
    sizes = [leaf.detach().square().mean().sqrt() for leaf in scales]
    least = 1e-2 * max(sizes)
    parts = operator.space.split(operator.space.draw(torch.Generator().manual_seed(seed)))
    v = operator.space.join([part * size.clamp_min(least) for part, size in zip(parts, sizes, strict=True)])
    found, expected = operator(v), differences(v)
    floor = NEGLIGIBLE * expected.norm()
    errors = [
        float((a - b).norm() / b.norm().clamp_min(floor).clamp_min(torch.finfo(dtype).tiny))
        for a, b in zip(operator.space.split(found), operator.space.split(expected), strict=True)
    ]
    worst = max(errors) if not any(map(math.isnan, errors)) else math.nan
    if not worst <= TOLERANCE[dtype]:
        raise UserError(
            f"curvature: {what}: a Hessian product differs from finite differences of the gradient by {worst:.1%}; "
            "some kernel cannot be differentiated twice, or the loss is too rough (--dtype fp64 tells), so nothing is "
            "reported"
        )
    return worst
