"""What may follow a linear map or stand in the wiring: norms and scales, first as data, then as modules.

A strategy hands out the immutable descriptions (`Norm`, `Frozen`, `DynamicTanh`, `Constant`, `LearnedScale`); a
backbone calls `build()` on them and owns what comes out. A description says nothing of experts: the
backbone builds it for so many, and each then has gains of its own. Everything here is
differentiable twice, and `eps` is always explicit (its default depends on the dtype in torch, and is
wrong for bf16).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptnorm.sharding import Sharers, enter, here, leave, sum_over

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

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

    def build(self, experts: int | None = None) -> NormModule:
        return NormModule(self, experts)


FREEZABLE = ("rmsnorm", "l2")
"""Kinds of norm that are nothing but a factor per token; a layernorm also takes the mean away."""


@dataclass(frozen=True, kw_only=True)
class Frozen:
    r"""What is left of a norm whose scale is a constant: $\gamma \odot c z$, linear in z.

    c is one number, the norm's own factor at the mean square of its inputs z on one batch, over tokens and features:

    | kind | c |
    |---|---|
    | rmsnorm | $1 / \sqrt{\mathrm{mean}(z^2) + \epsilon}$ |
    | l2 | $1 / \sqrt{\mathrm{mean}\lVert z\rVert_2^2 + \epsilon}$, never with a gain |

    On that batch it is the norm itself, if all its tokens have one RMS.
    """

    norm: Norm

    def __post_init__(self) -> None:
        assert self.norm.kind in FREEZABLE, f"{self.norm.kind} cannot be frozen"

    @property
    def size(self) -> int:
        return self.norm.size

    @property
    def axis(self) -> Axis:
        return self.norm.axis

    def build(self, experts: int | None = None) -> FrozenModule:
        return FrozenModule(self, experts)


@dataclass(frozen=True, kw_only=True)
class DynamicTanh:
    r"""$\gamma \odot \tanh(\alpha z)$ with one learned $\alpha$; it stands where a norm would.

    Zhu et al. 2025 (arXiv 2503.10622), in the form without bias that its Llama code uses.
    """

    size: int
    alpha: float
    """Initial slope."""

    def build(self, experts: int | None = None) -> DynamicTanhModule:
        return DynamicTanhModule(self, experts)


@dataclass(frozen=True, kw_only=True)
class Constant:
    """Multiplication by a number that follows from the shapes."""

    value: float

    def build(self, experts: int | None = None) -> ConstantModule:
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

    def build(self, experts: int | None = None) -> LearnedScaleModule:
        return LearnedScaleModule(self, experts)


After = Norm | Frozen | DynamicTanh | Constant | LearnedScale
"""One step that follows a linear map's raw output."""


class AfterModule(nn.Module):
    """An `After`, built: z (…, size) to the same.

    Built for several experts, its parameters have a leading axis of them, and `forward` is told the
    expert of each vector: an index whose shape broadcasts against that of z without the last axis.
    """

    sharers: Sharers | None = None
    """The processes that share the features of z (tensor parallelism); None: z has them all."""

    def reset(self) -> None:
        """Back to the values at initialisation."""

    def forward(self, z: Tensor, expert: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    def _here(self, parameter: Tensor) -> Tensor:
        """What of a parameter meets z on this process."""
        return here(parameter, on_part=self.sharers is not None)


def _per_expert(parameter: Tensor, expert: Tensor | None) -> Tensor:
    return parameter if expert is None else parameter[expert]


def _sizes(size: int, experts: int | None) -> tuple[int, ...]:
    return (size,) if experts is None else (experts, size)


class NormModule(AfterModule):
    """`Norm`, built. Statistics and gain are in fp32 or better; the output has the input's dtype."""

    def __init__(self, spec: Norm, experts: int | None = None) -> None:
        super().__init__()
        self.spec = spec
        has_gain = spec.kind in ("rmsnorm", "layernorm")
        self.gain = nn.Parameter(torch.empty(_sizes(spec.size, experts))) if has_gain else None
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        if self.gain is not None:
            self.gain.fill_(1.0)

    def forward(self, z: Tensor, expert: Tensor | None = None) -> Tensor:
        spec, z_exact = self.spec, z.to(torch.promote_types(z.dtype, torch.float32))
        gain = None if self.gain is None else self._here(self.gain).to(z_exact.dtype)
        if self.sharers is not None and spec.axis == "width":
            y = self._over_all_parts(z_exact, self.sharers)
        else:
            inside = gain if expert is None else None
            if spec.kind in ("layernorm", "np_layernorm"):
                y = F.layer_norm(z_exact, (spec.size,), inside, None, spec.eps)
            elif spec.kind == "rmsnorm":
                y = F.rms_norm(z_exact, (spec.size,), inside, spec.eps)
            else:
                y = z_exact * torch.rsqrt(z_exact.square().sum(-1, keepdim=True) + spec.eps)
            gain = gain if inside is None else None
        if gain is not None:
            y = y * _per_expert(gain, expert)
        return y.to(z.dtype)

    def _over_all_parts(self, z: Tensor, sharers: Sharers) -> Tensor:
        """The norm without its gain, of vectors whose features are spread: statistics are summed over the parts."""

        def total(x: Tensor) -> Tensor:
            return enter(leave(x.sum(-1, keepdim=True), sharers), sharers)

        spec = self.spec
        if spec.kind in ("layernorm", "np_layernorm"):
            z = z - total(z) / spec.size
        squares = total(z.square())
        return z * torch.rsqrt((squares if spec.kind == "l2" else squares / spec.size) + spec.eps)

    def extra_repr(self) -> str:
        return f"{self.spec.kind}, size={self.spec.size}, eps={self.spec.eps}, axis={self.spec.axis}"


class FrozenModule(AfterModule):
    """`Frozen`, built. Its constant, one for all experts, is not a number until a `calibration` has measured it."""

    mesh: DeviceMesh | None = None
    """The processes of the run, if there are several: all their tokens are measured."""
    measures: bool = False
    """Whether the next input sets the constant."""

    def __init__(self, spec: Frozen, experts: int | None = None) -> None:
        super().__init__()
        self.spec = spec
        has_gain = spec.norm.kind == "rmsnorm"
        self.gain = nn.Parameter(torch.empty(_sizes(spec.size, experts))) if has_gain else None
        # A buffer: it belongs to the initial weights, which a checkpoint no longer has.
        self.register_buffer("factor", torch.empty((), dtype=torch.float32))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        if self.gain is not None:
            self.gain.fill_(1.0)
        self.get_buffer("factor").fill_(math.nan)

    @property
    def known(self) -> bool:
        """Whether there is a constant; the device is waited for."""
        return not self.get_buffer("factor").isnan().item()

    def forward(self, z: Tensor, expert: Tensor | None = None) -> Tensor:
        z_exact = z.to(torch.promote_types(z.dtype, torch.float32))
        if self.measures:
            self._measure(z_exact)
        factor = self.get_buffer("factor").to(z_exact.dtype)
        if self.gain is not None:
            # Constant and gain first: the activations are gone through once.
            factor = factor * _per_expert(self._here(self.gain).to(z_exact.dtype), expert)
        return (z_exact * factor).to(z.dtype)

    def _measure(self, z: Tensor) -> None:
        assert not self.known, "one constant cannot stand for a norm that is used in two places"
        norm, z = self.spec.norm, z.detach()
        # Features that every process has count as often in the sum as in the number.
        total = torch.stack((z.square().sum(dtype=torch.float64), z.new_tensor(z.numel(), dtype=torch.float64)))
        sum_over(total, self.mesh, "data", "tensor")
        square = total[0] / total[1] * (norm.size if norm.kind == "l2" else 1)
        self.get_buffer("factor").copy_(torch.rsqrt(square + norm.eps))

    def extra_repr(self) -> str:
        return f"frozen {self.spec.norm.kind}, size={self.spec.size}, axis={self.spec.axis}"


@contextlib.contextmanager
def calibration(modules: Iterable[FrozenModule]) -> Iterator[None]:
    """The forward pass in here measures the constants: each module's from its own input, and its output has it already.

    A module that meets no token has 1.
    """
    modules = list(modules)
    for module in modules:
        module.get_buffer("factor").fill_(math.nan)
        module.measures = True
    try:
        yield
    finally:
        for module in modules:
            module.measures = False
    for module in modules:
        module.get_buffer("factor").nan_to_num_(nan=1.0)


class DynamicTanhModule(AfterModule):
    """`DynamicTanh`, built."""

    def __init__(self, spec: DynamicTanh, experts: int | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.alpha = nn.Parameter(torch.empty(_sizes(1, experts)))
        self.gain = nn.Parameter(torch.empty(_sizes(spec.size, experts)))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        self.alpha.fill_(self.spec.alpha)
        self.gain.fill_(1.0)

    def forward(self, z: Tensor, expert: Tensor | None = None) -> Tensor:
        z_exact = z.to(torch.promote_types(z.dtype, torch.float32))
        gain, alpha = self._here(self.gain), self._here(self.alpha)
        y = _per_expert(gain, expert) * torch.tanh(_per_expert(alpha, expert) * z_exact)
        return y.to(z.dtype)

    def extra_repr(self) -> str:
        return f"size={self.spec.size}, alpha={self.spec.alpha}"


class ConstantModule(AfterModule):
    """`Constant`, built; the same for every expert."""

    def __init__(self, spec: Constant) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, z: Tensor, expert: Tensor | None = None) -> Tensor:
        return z * self.spec.value

    def extra_repr(self) -> str:
        return f"{self.spec.value:.6g}"


class LearnedScaleModule(AfterModule):
    """`LearnedScale`, built."""

    def __init__(self, spec: LearnedScale, experts: int | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.stored = nn.Parameter(torch.empty(_sizes(spec.size, experts)))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        self.stored.fill_(self.spec.scale)

    def value(self) -> Tensor:
        """The scale itself, shape (size,) or (experts, size), fp32 or better; this process's part of it."""
        stored = self._here(self.stored)
        s = stored.to(torch.promote_types(stored.dtype, torch.float32)) * (self.spec.init / self.spec.scale)
        return s.abs() if self.spec.absolute else s

    def forward(self, z: Tensor, expert: Tensor | None = None) -> Tensor:
        return z * _per_expert(self.value(), expert).to(z.dtype)

    def extra_repr(self) -> str:
        return f"size={self.spec.size}, init={self.spec.init:.6g}, scale={self.spec.scale:.6g}"


def build_all(steps: tuple[After, ...], experts: int | None = None) -> nn.ModuleList:
    """The modules of an `after`, in order."""
    return nn.ModuleList(step.build(experts) for step in steps)
