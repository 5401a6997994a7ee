"""The feed-forward's activations, and the moments that some strategies compute from them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ActivationName = Literal["silu", "gelu"]

ACTIVATIONS: dict[ActivationName, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu}
"""GELU is the exact one."""

_NODES = 256
"""Gauss-Hermite nodes: both activations are smooth, and the result has converged to 1e-12 for std up to 4."""


@cache
def second_moment(activation: ActivationName, std: float) -> float:
    r"""$\mathrm{E}[\mathrm{act}(\sigma g)^2]$ for $g \sim N(0, 1)$ and $\sigma$ = `std`, by quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(_NODES)
    a = ACTIVATIONS[activation](torch.from_numpy(std * nodes)).numpy()
    return float((weights * a**2).sum() / weights.sum())
