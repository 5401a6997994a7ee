"""Whether Hessian products can be believed: some kernels have right gradients and wrong second derivatives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gptnorm.curvature.operators import FiniteDifference, Operator
from gptnorm.errors import UserError

TOLERANCE = {torch.float32: 0.01, torch.float64: 1e-4}
"""Relative difference to central differences, beyond twice their own doubt, that is still taken for theirs."""

UNSURE = 0.1
"""Relative doubt of the differences above which they prove nothing: a wrong kernel may be off by as little."""

NEGLIGIBLE = 1e-3
"""Share of the whole product below which a leaf's own is measured against the whole: it may be 0."""


def refuse_wrong_products(
    operator: Operator, differences: FiniteDifference, scales: Sequence[Tensor], *, what: str, seed: int = 0
) -> float:
    """Compares a Hessian with finite differences of the gradient on a random vector, leaf by leaf.

    Each leaf moves by as large a part of its own size, and each leaf's part of the product is compared by itself: one
    wrong kernel among many would be lost in the whole.

    Args:
        operator: by differentiating twice.
        differences: the same, extrapolated.
        scales: the leaves, for their sizes.
        what: is measured, for the message.

    Returns:
        The largest relative difference of any leaf.

    Raises:
        UserError: it is above `TOLERANCE` and twice the differences' own doubt, or not a number; that doubt is above
            `UNSURE`; or the dtype is none of these.
    """
    dtype = operator.space.dtype
    if dtype not in TOLERANCE:
        raise UserError(f"curvature: is measured in fp32 or fp64, not in {str(dtype).removeprefix('torch.')}")
    sizes = [leaf.detach().square().mean().sqrt() for leaf in scales]
    least = 1e-2 * max(sizes)
    parts = operator.space.split(operator.space.draw(torch.Generator().manual_seed(seed)))
    v = operator.space.join([part * size.clamp_min(least) for part, size in zip(parts, sizes, strict=True)])
    found, expected = operator(v), differences(v)
    assert differences.doubt is not None, "the differences are extrapolated"
    floor = NEGLIGIBLE * expected.norm()
    worst = 0.0
    for a, b, doubt in zip(*map(operator.space.split, (found, expected, differences.doubt)), strict=True):
        size = b.norm().clamp_min(floor).clamp_min(torch.finfo(dtype).tiny)
        unsure, error = float(doubt.norm() / size), float((a - b).norm() / size)
        if not unsure <= UNSURE:
            raise UserError(
                f"curvature: {what}: finite differences of the gradient are too rough to check the products by "
                f"({unsure:.0%}); --dtype fp64 has finer ones"
            )
        if not error - 2 * unsure <= TOLERANCE[dtype]:
            raise UserError(
                f"curvature: {what}: a Hessian product differs from finite differences of the gradient by {error:.1%}; "
                "some kernel cannot be differentiated twice, so nothing is reported"
            )
        worst = max(worst, error)
    return worst
