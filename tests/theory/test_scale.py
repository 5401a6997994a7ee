"""W → cW: against matrices made of formulas, and a verdict that falls where the law is broken."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.functional import hessian

from gptnorm.norms import DynamicTanh
from gptnorm.theory import draws, scale
from gptnorm.theory.layer import build


def test_numbers_of_a_sweep():
    """‖H‖ and ‖H_vec(W)‖ at every c, with ε, from torch.autograd's dense Hessians."""
    one = scale.layer(0, scale.NORMS["rmsnorm"](0, scale.EPS))
    found = scale.sweep(one, scale.layer(0, scale.NORMS["rmsnorm"](0, 0.0)))
    gain = draws.uniform(0, "gain", 0.5, 2.0, scale.OUT)

    def loss(W, x):
        z = W @ x
        return one.loss(gain * z / (z.square().mean() + scale.EPS).sqrt())

    for at in (0, 3, 6):
        W = scale.FACTORS[at] * one.W
        H = hessian(lambda x, W=W: loss(W, x), one.x)
        assert found.norms["H"][at] == pytest.approx(float(torch.linalg.matrix_norm(H, 2)), rel=1e-10)
        HW = hessian(lambda W: loss(W, one.x), W).reshape(W.numel(), -1)
        assert found.norms["W"][at] == pytest.approx(float(torch.linalg.matrix_norm(HW, 2)), rel=1e-10)


def test_the_bare_map_under_a_quadratic_loss():
    one = scale.layer(1, None, quadratic=True)
    found = scale.sweep(one, one)
    A = draws.semidefinite(1, "A", scale.OUT)
    for c, size in zip(scale.FACTORS, found.norms["H"], strict=True):
        assert size == pytest.approx(float(torch.linalg.matrix_norm(c * c * one.W.mT @ A @ one.W, 2)), rel=1e-10)
    assert found.exponent("H") == pytest.approx(2.0, abs=1e-12)
    assert found.exponent("W") == pytest.approx(0.0, abs=1e-12)
    assert found.norms["C"] == [0.0] * len(scale.FACTORS)


def test_verdicts(monkeypatch):
    monkeypatch.setattr(scale, "FACTORS", (0.01, 1.0, 100.0))
    one = {"rmsnorm": scale.NORMS["rmsnorm"]}
    found = scale.check_scale([0], one)
    assert found.verdict == "holds"
    assert found.numbers["change.rmsnorm"] < 1e-12
    rows = {(row[0], row[1]): row for row in found.tables[0].rows}
    assert rows["rmsnorm", "0"][2:6] == [0, 0, 0, -2]
    broken = {"bare": lambda seed, eps: None}
    assert scale.check_scale([0], one | broken).verdict == "depends"
    found = scale.check_scale([0], {"tanh": lambda seed, eps: build(DynamicTanh(size=scale.OUT, alpha=1.0))})
    assert found.verdict == "depends", "the bare map still has c²"
    assert "tanh: changes by up to" in found.reason
