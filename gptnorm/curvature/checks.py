"""Whether a Hessian product can be believed: some kernels have right gradients and wrong second derivatives."""

from __future__ import annotations

import torch

from gptnorm.curvature.operators import Operator
from gptnorm.errors import UserError

TOLERANCE = {torch.float32: 0.05, torch.float64: 1e-4}
"""Relative difference to central differences that is still taken for their own error; wrong kernels are off by far
more."""


def refuse_wrong_products(operator: Operator, differences: Operator, *, seed: int = 0) -> float:
    """Compares a Hessian with finite differences of the gradient on a random vector.

    Args:
        operator: by differentiating twice.
        differences: the same by `gptnorm.curvature.operators.FiniteDifference`.

    Returns:
        ‖a - b‖ / ‖b‖ of the two products.

    Raises:
        UserError: it is above `TOLERANCE`, or not a number.
    """
    v = operator.space.draw(torch.Generator().manual_seed(seed))
    expected = differences(v)
    found = float((operator(v) - expected).norm() / expected.norm().clamp_min(torch.finfo(v.dtype).tiny))
    if not found <= TOLERANCE[v.dtype]:
        raise UserError(
            f"curvature: a Hessian product differs from finite differences of the gradient by {found:.1%}; some kernel "
            "of this model cannot be differentiated twice, or the loss is too rough, so nothing is reported"
        )
    return found
