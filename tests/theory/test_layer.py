"""A layer's L, C and H against torch's dense Hessians of formulas written out here, and against the closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd.functional import hessian, jacobian

from gptnorm.norms import DynamicTanh, Norm
from gptnorm.theory import closed, draws
from gptnorm.theory.layer import Layer, build, build_frozen, dense, norm
from gptnorm.theory.losses import Quadratic, softmax_head, sure_head

D, M = 7, 5
GAIN = draws.uniform(0, "gain", 0.5, 2.0, D)


def rms(z, eps):
    return GAIN * z / (z.square().mean() + eps).sqrt()


def centred(z, eps):
    z = z - z.mean()
    return z / (z.square().mean() + eps).sqrt()


BY_HAND = {
    "rmsnorm": rms,
    "layernorm": lambda z, eps: GAIN * centred(z, eps),
    "np_layernorm": centred,
    "l2": lambda z, eps: z / (z.square().sum() + eps).sqrt(),
    "tanh": lambda z, eps: GAIN * torch.tanh(0.75 * z),
    "nothing": lambda z, eps: z,
}


def made(kind, eps=0.0, loss=None):
    W, x = draws.weight(0, D, M), draws.normal(0, "x", M)
    after = None
    if kind == "tanh":
        after = build(DynamicTanh(size=D, alpha=0.75), GAIN)
    elif kind != "nothing":
        after = build(Norm(kind=kind, size=D, eps=eps), GAIN)
    return Layer(W=W, after=after, loss=loss or softmax_head(0, D, 11), x=x)


def cross_entropy(y):
    head = softmax_head(0, D, 11)
    return -torch.log_softmax(head.head @ y, 0)[head.target]


@pytest.mark.parametrize("kind", BY_HAND)
@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.3])
def test_against_dense_hessians(kind, eps):
    one, phi = made(kind, eps), BY_HAND[kind]
    W, x = one.W, one.x
    H = hessian(lambda x: cross_entropy(phi(W @ x, eps)), x)
    y = phi(W @ x, eps)
    J, hyy = jacobian(lambda x: phi(W @ x, eps), x), hessian(cross_entropy, y)
    L = J.mT @ hyy @ J
    scale = float(H.abs().max())
    for found, expected in ((one.hessian(), H), (one.gauss_newton(), L), (one.curvature(), H - L)):
        assert (dense(found) - expected).abs().max() < 1e-10 * scale
    vec = hessian(lambda W: cross_entropy(phi(W @ x, eps)), W).reshape(D * M, D * M)
    assert (dense(one.weight_hessian()) - vec).abs().max() < 1e-10 * vec.abs().max()
    assert (one.y - y).abs().max() < 1e-12


@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.3])
def test_closed_forms(eps):
    one = made("rmsnorm", eps)
    L, C = closed.parts(one.W, one.x, GAIN, one.g(), dense(one.output_hessian()), eps)
    assert (dense(one.gauss_newton()) - L).abs().max() < 1e-10 * norm(L)
    assert (dense(one.curvature()) - C).abs().max() < 1e-10 * norm(C)


def test_closed_form_in_the_weight():
    one = made("rmsnorm")
    # H_zz is the Hessian of a layer whose W is the identity.
    L, C = closed.parts(torch.eye(D, dtype=torch.float64), one.z, GAIN, one.g(), dense(one.output_hessian()))
    expected = torch.kron(L + C, torch.outer(one.x, one.x))
    assert (dense(one.weight_hessian()) - expected).abs().max() < 1e-10 * norm(expected)


@pytest.mark.parametrize("cosine", [-1.0, -0.3, 0.0, 3**-0.5, 1.0])
def test_norm_of_the_bracket(cosine):
    u, v = draws.orthogonal(0, "pair", D)[:, :2].mT
    b = 2.5 * (cosine * u + math.sqrt(1 - cosine**2) * v)
    P = torch.eye(D, dtype=torch.float64) - torch.outer(u, u)
    M = torch.outer(P @ b, u) + torch.outer(u, P @ b) + (u @ b) * P
    assert closed.bracket_norm(u, b) == pytest.approx(float(torch.linalg.matrix_norm(M, 2)), rel=1e-12)
    assert closed.bracket_norm(u, b) <= 2 / math.sqrt(3) * 2.5 * (1 + 1e-12)


def test_estimate_of_the_ratio():
    one = made("rmsnorm")
    u, D_ = one.z / one.z.norm(), torch.diag(GAIN)
    P = torch.eye(D, dtype=torch.float64) - torch.outer(u, u)
    inner = P @ D_ @ dense(one.output_hessian()) @ D_ @ P
    expected = float((GAIN * one.g()).norm()) / (math.sqrt(D) * norm(inner))
    found = closed.estimated_ratio(one.z, GAIN, one.g(), one.output_hessian(), tolerance=1e-12)
    assert found == pytest.approx(expected, rel=1e-10)


def test_estimate_bounds_the_ratio_of_a_square_map():
    """κ² makes it a bound; W has to have full row rank."""
    for seed in range(5):
        W, x = draws.weight(seed, D, D), draws.normal(seed, "x", D)
        one = Layer(W=W, after=build(Norm(kind="rmsnorm", size=D, eps=0.0)), loss=softmax_head(seed, D, 11), x=x)
        ratio = norm(dense(one.curvature())) / norm(dense(one.gauss_newton()))
        estimate = closed.estimated_ratio(one.z, torch.ones_like(one.z), one.g(), one.output_hessian())
        assert ratio <= 2 / math.sqrt(3) * float(torch.linalg.cond(W)) ** 2 * estimate


def test_losses():
    at, g, A = draws.normal(0, "at", D), draws.normal(0, "g", D), draws.semidefinite(0, "A", D)
    one = made("nothing", loss=Quadratic(at=at, g=g, hessian=A))
    assert (one.g() - g - A @ (one.y - at)).abs().max() < 1e-12
    assert (dense(one.output_hessian()) - A).abs().max() < 1e-12
    assert norm(A) == pytest.approx(1.0, rel=1e-12)
    sure = sure_head(0, D, 4096)
    assert sure.bias is not None
    p = torch.softmax(sure.head @ draws.normal(0, "y", D) + sure.bias, 0)
    assert 0.99 < float(p[:8].sum()) < 1
    assert sure.target < 8


def test_a_frozen_norm_is_the_norm_at_its_point_and_does_not_bend():
    live = made("rmsnorm")
    spec = Norm(kind="rmsnorm", size=D, eps=0.0)
    frozen = Layer(W=live.W, after=build_frozen(spec, live.z, GAIN), loss=live.loss, x=live.x)
    assert (frozen.y - live.y).abs().max() < 1e-12
    assert norm(dense(frozen.curvature())) == 0
    assert (dense(frozen.output_hessian()) - dense(live.output_hessian())).abs().max() < 1e-12


def test_draws_are_the_seed_s():
    assert torch.equal(draws.normal(3, "x", 4), draws.normal(3, "x", 4))
    assert not torch.equal(draws.normal(3, "x", 4), draws.normal(4, "x", 4))
    assert not torch.equal(draws.normal(3, "x", 4), draws.normal(3, "y", 4))
    q = draws.orthogonal(1, "q", 6)
    assert (q @ q.mT - torch.eye(6, dtype=torch.float64)).abs().max() < 1e-14
