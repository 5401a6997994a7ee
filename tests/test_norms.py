"""Norms against their formulas and against torch's own layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gptnorm.model.rope import rotate, rotations
from gptnorm.norms import LearnedScale, Norm

N = 12


def z(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(4, 5, N, dtype=dtype, generator=torch.Generator().manual_seed(0)) + 0.3


@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_against_torch(eps: float) -> None:
    theirs = {
        "rmsnorm": nn.RMSNorm(N, eps=eps),
        "layernorm": nn.LayerNorm(N, eps=eps, bias=False),
        "np_layernorm": nn.LayerNorm(N, eps=eps, elementwise_affine=False),
    }
    for kind, layer in theirs.items():
        ours = Norm(kind=kind, size=N, eps=eps).build().double()
        layer.double()
        if ours.gain is not None:
            with torch.no_grad():
                ours.gain.copy_(torch.linspace(0.5, 2, N))
                layer.weight.copy_(ours.gain)
        torch.testing.assert_close(ours(z()), layer(z()), rtol=1e-12, atol=1e-12)


def test_l2_has_unit_length_and_no_gain() -> None:
    norm = Norm(kind="l2", size=N, eps=1e-12).build()
    assert list(norm.parameters()) == []
    assert torch.allclose(norm(z()).norm(dim=-1), torch.ones(4, 5, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm", "np_layernorm", "l2"])
def test_twice_differentiable(kind: str) -> None:
    norm = Norm(kind=kind, size=N, eps=1e-5).build().double()
    x = z()[0, :2].clone().requires_grad_()
    assert torch.autograd.gradcheck(norm, (x,))
    assert torch.autograd.gradgradcheck(norm, (x,))


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm", "np_layernorm", "l2"])
def test_zero_is_harmless(kind: str) -> None:
    norm = Norm(kind=kind, size=N, eps=1e-5).build()
    x = torch.zeros(2, N, requires_grad=True)
    y = norm(x)
    y.sum().backward()
    assert x.grad is not None
    assert (y == 0).all()
    assert x.grad.isfinite().all()


def test_bf16_statistics_are_exact_to_rounding() -> None:
    norm = Norm(kind="rmsnorm", size=N, eps=1e-5).build()
    x = z(torch.bfloat16)
    y = norm(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, norm(x.float()).bfloat16(), rtol=0, atol=0)


def test_learned_scale_moves_by_its_ratio() -> None:
    """angpt.md section 2.1: under Adam with a gradient of constant sign, |Δs| per step is lr · init / scale."""
    scale = LearnedScale(size=3, init=0.05, scale=1 / 32).build()
    assert torch.allclose(scale.value(), torch.full((3,), 0.05))
    optimizer = torch.optim.Adam(scale.parameters(), lr=1e-3)
    before = scale.value().detach()
    scale(torch.ones(3)).sum().backward()
    optimizer.step()
    assert torch.allclose(before - scale.value().detach(), torch.full((3,), 1e-3 * 0.05 * 32), rtol=1e-4)


def test_rope_is_a_rotation_that_sees_relative_positions_only() -> None:
    q, k = z()[0, :1, :8], z()[1, :1, :8]
    length = 30
    turn = rotations(length, 8, 1e4, like=q)
    qs = rotate(q.expand(1, length, 1, 8), turn)[0, :, 0]
    ks = rotate(k.expand(1, length, 1, 8), turn)[0, :, 0]
    assert torch.allclose(qs.norm(dim=-1), q.norm().expand(length))
    scores = qs @ ks.T
    for offset in range(-5, 6):
        diagonal = scores.diagonal(offset)
        assert diagonal.max() - diagonal.min() < 1e-12
    assert torch.equal(qs[0], q[0])
