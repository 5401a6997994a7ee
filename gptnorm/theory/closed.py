r"""Closed forms for RMSNorm after a linear map, to check against (ours: docs/theory.md).

With z = Wx, s = √(‖z‖²/d + ε), D = diag(γ), g = ∂ℓ/∂y, b = D g:

$$J = \tfrac1s D \left(I - \tfrac{z z^\top}{d s^2}\right) W, \qquad L = J^\top H_{yy} J,$$
$$C = -\tfrac{1}{d s^3} W^\top
\left[ b z^\top + z b^\top + (b \cdot z) I - 3 (b \cdot z) \tfrac{z z^\top}{d s^2} \right] W.$$

Without ε, with r = ‖z‖, u = z/r and P = I - u uᵀ, the second is $-(\sqrt d / r^2)\, W^\top M W$ with the bracket
$M = (P b) u^\top + u (P b)^\top + (u \cdot b) P$.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gptnorm.curvature.operators import Operator
from gptnorm.curvature.reading import spectral_norm
from gptnorm.curvature.vectors import Space


def parts(W: Tensor, x: Tensor, gain: Tensor, g: Tensor, hyy: Tensor, eps: float = 0.0) -> tuple[Tensor, Tensor]:
    """L and C, (m, m) each."""
    z, d = W @ x, len(W)
    s2 = z @ z / d + eps
    s, b, eye = s2.sqrt(), gain * g, torch.eye(d, dtype=W.dtype)
    J = gain[:, None] * (W - torch.outer(z, z @ W) / (d * s2)) / s
    inner = torch.outer(b, z) + torch.outer(z, b) + (b @ z) * (eye - 3 * torch.outer(z, z) / (d * s2))
    return J.mT @ hyy @ J, -W.mT @ inner @ W / (d * s**3)


def bracket_norm(u: Tensor, b: Tensor) -> float:
    """‖M‖ = (|u·b| + √((u·b)² + 4 ‖Pb‖²)) / 2, at most (2/√3) ‖b‖, which it is where u·b = ‖b‖ / √3."""
    along = float(u @ b)
    across = float((b - along * u).square().sum())
    return (abs(along) + math.sqrt(along**2 + 4 * across)) / 2


class ProjectedHessian:
    """P D H_yy D P, known by its products."""

    def __init__(self, hyy: Operator, u: Tensor, gain: Tensor) -> None:
        self.space = Space([u])
        self._hyy, self._u, self._gain = hyy, u, gain

    def __call__(self, v: Tensor) -> Tensor:
        return self._project(self._gain * self._hyy(self._gain * self._project(v)))

    def _project(self, v: Tensor) -> Tensor:
        return v - (self._u @ v) * self._u


def estimated_ratio(z: Tensor, gain: Tensor, g: Tensor, hyy: Operator, *, tolerance: float = 1e-4) -> float:
    """‖b‖ / (√d ‖P D H_yy D P‖): what ‖C‖ / ‖L‖ is up to the shape of W.

    With κ the condition number of W, ‖C‖ / ‖L‖ is at most (2/√3) κ² times this.
    """
    projected = ProjectedHessian(hyy, z / z.norm(), gain)
    largest = spectral_norm(projected, tolerance=tolerance, most=400).value
    return float((gain * g).norm()) / (math.sqrt(len(z)) * largest)
