"""Random weights, inputs and gains, each from (seed, name, sizes) alone."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def normal(seed: int, name: str, *sizes: int) -> Tensor:
    """Independent standard normal numbers, fp64."""
    return torch.randn(*sizes, generator=_generator(seed, name, sizes), dtype=torch.float64)


def uniform(seed: int, name: str, low: float, high: float, size: int) -> Tensor:
    """Independent uniform numbers, fp64."""
    return low + (high - low) * torch.rand(size, generator=_generator(seed, name, (size,)), dtype=torch.float64)


def direction(seed: int, name: str, size: int) -> Tensor:
    """A vector of length 1, uniform on the sphere."""
    v = normal(seed, name, size)
    return v / v.norm()


def index(seed: int, name: str, count: int) -> int:
    """One of 0 … count - 1."""
    return int(torch.randint(count, (), generator=_generator(seed, name, (count,))))


def weight(seed: int, d: int, m: int) -> Tensor:
    """W, (d, m), with entries of variance 1 / m: W x has the RMS of x."""
    return normal(seed, "weight", d, m) / m**0.5


def orthogonal(seed: int, name: str, size: int) -> Tensor:
    """A rotation or reflection, uniform (Haar)."""
    q, r = torch.linalg.qr(normal(seed, name, size, size))
    return q * r.diagonal().sign()


def semidefinite(seed: int, name: str, size: int) -> Tensor:
    """G Gᵀ of a square normal G, scaled to spectral norm 1."""
    g = normal(seed, name, size, size)
    a = g @ g.mT
    return a / torch.linalg.matrix_norm(a, 2)


def _generator(seed: int, name: str, sizes: tuple[int, ...]) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}/{sizes}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
