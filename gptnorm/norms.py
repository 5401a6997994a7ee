"""What may follow a linear map or stand in the wiring: norms and scales, first as data, then as modules.

A strategy hands out the frozen descriptions (`Norm`, `Constant`, `LearnedScale`); a backbone calls
`build()` on them and owns what comes out. Everything here is differentiable twice, and `eps` is
always explicit (its default depends on the dtype in torch, and is wrong for bf16).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Axis = Literal["width", "head"]
"""What a norm runs over: the whole feature vector, or the features of one head."""


@dataclass(frozen=True, kw_only=True)
class Norm:
    r"""A norm of the last axis, z of length n = `size`, with gain $\gamma$ (no bias).

    | kind | output |
    |---|---|
    | rmsnorm | $\gamma \odot z / \sqrt{\mathrm{mean}(z^2) + \epsilon}$ |
    | layernorm | $\gamma \odot (z - \bar z) / \sqrt{\mathrm{var}(z) + \epsilon}$ |
    | np_layernorm | the same without $\gamma$ |
    | l2 | $z / \sqrt{\lVert z\rVert_2^2 + \epsilon}$, never with a gain |
    """

    kind: Literal["rmsnorm", "layernorm", "np_layernorm", "l2"]
    size: int
    eps: float
    axis: Axis = "width"

    def build(self) -> NormModule:
        return NormModule(self)


@dataclass(frozen=True, kw_only=True)
class Constant:
    """Multiplication by a number that follows from the shapes."""

    value: float

    def build(self) -> ConstantModule:
        return ConstantModule(self)


@dataclass(frozen=True, kw_only=True)
class LearnedScale:
    r"""Elementwise scale $s = (s_\text{init} / s_\text{scale})\,\hat s$ with $\hat s$ trained from $s_\text{scale}$.

    The stored numbers are then all of one size, so that one Adam learning rate suits them
    (Loshchilov et al. 2024, arXiv 2410.01131, section 2.5). `absolute` uses $|s|$.
    """

    size: int
    init: float
    scale: float
    absolute: bool = False

    def build(self) -> LearnedScaleModule:
        return LearnedScaleModule(self)


After = Norm | Constant | LearnedScale
"""One step that follows a linear map's raw output."""


class NormModule(nn.Module):
    """`Norm`, built. Statistics and gain are in fp32 or better; the output has the input's dtype."""

    def __init__(self, spec: Norm) -> None:
        super().__init__()
        self.spec = spec
        has_gain = spec.kind in ("rmsnorm", "layernorm")
        self.gain = nn.Parameter(torch.empty(spec.size)) if has_gain else None
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        if self.gain is not None:
            self.gain.fill_(1.0)

    def forward(self, z: Tensor) -> Tensor:
        spec, z_exact = self.spec, z.to(torch.promote_types(z.dtype, torch.float32))
        if spec.kind in ("layernorm", "np_layernorm"):
            return F.layer_norm(z_exact, (spec.size,), self.gain, None, spec.eps).to(z.dtype)
        if spec.kind == "rmsnorm":
            return F.rms_norm(z_exact, (spec.size,), self.gain, spec.eps).to(z.dtype)
        return (z_exact * torch.rsqrt(z_exact.square().sum(-1, keepdim=True) + spec.eps)).to(z.dtype)

    def extra_repr(self) -> str:
        return f"{self.spec.kind}, size={self.spec.size}, eps={self.spec.eps}, axis={self.spec.axis}"


class ConstantModule(nn.Module):
    """`Constant`, built."""

    def __init__(self, spec: Constant) -> None:
        super().__init__()
        self.spec = spec

    def reset(self) -> None:
        """A constant has no state."""

    def forward(self, z: Tensor) -> Tensor:
        return z * self.spec.value


class LearnedScaleModule(nn.Module):
    """`LearnedScale`, built."""

    def __init__(self, spec: LearnedScale) -> None:
        super().__init__()
        self.spec = spec
        self.stored = nn.Parameter(torch.empty(spec.size))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        self.stored.fill_(self.spec.scale)

    def value(self) -> Tensor:
        """The scale itself, shape (size,)."""
        s = self.stored * (self.spec.init / self.spec.scale)
        return s.abs() if self.spec.absolute else s

    def forward(self, z: Tensor) -> Tensor:
        return z * self.value().to(z.dtype)


def build_all(steps: tuple[After, ...]) -> nn.ModuleList:
    """The modules of an `after`, in order."""
    return nn.ModuleList(step.build() for step in steps)
