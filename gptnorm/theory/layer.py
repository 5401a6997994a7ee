r"""One linear map with something after it and a loss on top: ℓ(φ(x)), φ(x) = N(W x).

With y = φ(x), J = ∂y/∂x and g = ∂ℓ/∂y, the Hessian in x is

$$H = L + C, \qquad L = J^\top H_{yy} J, \qquad C = \sum_k g_k\, \nabla^2_x y_k,$$

L the Gauss-Newton part and C the curvature of φ itself. Everything is in fp64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from gptnorm.curvature.activation import SlotGaussNewton
from gptnorm.curvature.operators import Hessian, Jacobian, Operator
from gptnorm.curvature.vectors import Space
from gptnorm.norms import AfterModule, DynamicTanh, Frozen, FrozenModule, Norm, calibration

NormName = Literal["rmsnorm", "layernorm", "np_layernorm", "l2"]
"""The kinds of `gptnorm.norms.Norm`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """ℓ(N(W x)) at a point."""

    W: Tensor
    """(d, m)."""
    after: AfterModule | None
    """N; None: y = W x."""
    loss: Callable[[Tensor], Tensor]
    """ℓ of y, (d,) → a scalar."""
    x: Tensor
    """(m,)."""

    def forward(self, x: Tensor, W: Tensor | None = None) -> Tensor:
        """y."""
        z = F.linear(x, self.W if W is None else W)
        return z if self.after is None else self.after(z)

    def scaled(self, c: float) -> Layer:
        """W → cW."""
        return replace(self, W=c * self.W)

    @property
    def z(self) -> Tensor:
        """W x."""
        return self.W @ self.x

    @property
    def y(self) -> Tensor:
        return self.forward(self.x)

    def output_hessian(self) -> Hessian:
        """H_yy."""
        y = self.y.clone().requires_grad_()
        return Hessian([lambda: self.loss(y)], [y])

    def g(self) -> Tensor:
        """∂ℓ/∂y."""
        return self.output_hessian().gradient()

    def hessian(self) -> Hessian:
        """H in x."""
        x = self.x.clone().requires_grad_()
        return Hessian([lambda: self.loss(self.forward(x))], [x])

    def gradient(self) -> Tensor:
        """∂ℓ/∂x."""
        return self.hessian().gradient()

    def gauss_newton(self) -> SlotGaussNewton:
        """L."""
        x = self.x.clone().requires_grad_()
        return SlotGaussNewton(Jacobian(self.forward(x), [x]), self.output_hessian(), Space([x]))

    def curvature(self) -> Hessian:
        """C."""
        g, x = self.g(), self.x.clone().requires_grad_()
        return Hessian([lambda: g @ self.forward(x)], [x])

    def weight_hessian(self) -> Hessian:
        """H in vec(W), along the rows of W."""
        W = self.W.clone().requires_grad_()
        return Hessian([lambda: self.loss(self.forward(self.x, W))], [W])


def dense(operator: Operator) -> Tensor:
    """The matrix of an operator, column by column, made symmetric to the last bit."""
    eye = torch.eye(operator.space.size, dtype=operator.space.dtype)
    found = torch.stack([operator(column) for column in eye])
    return (found + found.mT) / 2


def norm(matrix: Tensor) -> float:
    """The spectral norm of a symmetric matrix."""
    return float(torch.linalg.eigvalsh(matrix).abs().max())


def build(spec: Norm | DynamicTanh, gain: Tensor | None = None) -> AfterModule:
    """A norm of the package in fp64, with a gain if it has one."""
    return _ready(spec.build(), gain)


def build_frozen(spec: Norm, z: Tensor, gain: Tensor | None = None) -> FrozenModule:
    """The constant that a norm is at z."""
    # In fp64 before it measures: its constant would else be the norm's to seven digits only.
    module = Frozen(norm=spec).build().double()
    with calibration([module]), torch.no_grad():
        module(z)
    _ready(module, gain)
    return module


def _ready(module: AfterModule, gain: Tensor | None) -> AfterModule:
    module = module.double().requires_grad_(False)
    own = getattr(module, "gain", None)
    if gain is not None and own is not None:
        own.copy_(gain)
    return module
