"""Kinds of norm: sizes against torch's dense Hessians, and claims that are not kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.autograd.functional import hessian

from gptnorm.theory import draws, kinds
from gptnorm.theory.kinds import KINDS, WIDTH

BY_NAME = {kind.name: kind for kind in KINDS}


@pytest.mark.parametrize("name", ["rmsnorm", "np_layernorm", "tanh", "nothing"])
def test_sizes_against_dense_hessians(name):
    one = kinds.layer(0, BY_NAME[name])
    gain, x, W = draws.uniform(0, "gain", 0.5, 2.0, WIDTH), one.x, one.W

    def y(x):
        z = W @ x
        if name == "rmsnorm":
            return gain * z / z.square().mean().sqrt()
        if name == "np_layernorm":
            z = z - z.mean()
            return z / z.square().mean().sqrt()
        return gain * torch.tanh(z) if name == "tanh" else z

    H = hessian(lambda x: one.loss(y(x)), x)
    g = torch.autograd.functional.jacobian(one.loss, y(x))
    C = hessian(lambda x: g @ y(x), x)
    found = kinds.measure(one)
    assert found.hessian == pytest.approx(float(torch.linalg.matrix_norm(H, 2)), rel=1e-10)
    assert found.curvature == pytest.approx(float(torch.linalg.matrix_norm(C, 2)), rel=1e-10)
    assert found.gauss_newton == pytest.approx(float(torch.linalg.matrix_norm(H - C, 2)), rel=1e-10)
    assert found.y == pytest.approx(float(y(x).norm()), rel=1e-12)


def test_identities():
    found = {name: kinds.measure(kinds.layer(1, kind)) for name, kind in BY_NAME.items()}
    for name in ("rmsnorm", "layernorm", "np_layernorm", "l2"):
        assert found[name].euler < 1e-12
        assert (found[name].Hw < 1e-12) == ("layernorm" in name), "a layernorm does not see the mean"
    for name in ("frozen rmsnorm", "nothing"):
        assert found[name].curvature == 0
        assert found[name].Cx == pytest.approx(1.0)
    assert found["frozen rmsnorm"].y == pytest.approx(found["rmsnorm"].y)
    # Of degree 0, ε aside: what is missing is about ε / mean(z²).
    assert 1e-7 < found["rmsnorm (ε 1e-5)"].euler < 1e-3


def test_l2_is_rmsnorm_with_gain_over_the_root_of_d():
    a, b = kinds.layer(0, BY_NAME["l2"]), kinds.layer(0, BY_NAME["rmsnorm (γ 1)"])
    assert (a.y - b.y / WIDTH**0.5).abs().max() < 1e-12


def test_verdicts():
    rms, bare = BY_NAME["rmsnorm"], BY_NAME["nothing"]
    assert kinds.check_kinds([0, 1], [rms, bare]).verdict == "holds"
    found = kinds.check_kinds([0, 1], [rms, replace(bare, degree=0)])
    assert found.verdict == "depends"
    assert "not as claimed: nothing" in found.reason
    assert kinds.check_kinds([0, 1], [replace(bare, degree=0)]).verdict == "does not hold"
    assert kinds.check_kinds([0, 1], [replace(rms, degree=1)]).verdict == "does not hold"
