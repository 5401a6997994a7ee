"""‖C‖/‖L‖ against width: ratios from dense matrices, and verdicts of laws that are known."""

from __future__ import annotations

import math

import pytest
import torch

from gptnorm.theory import closed, draws, width
from gptnorm.theory.layer import dense, norm


@pytest.mark.parametrize("name", width.REGIMES)
def test_ratio_against_dense_matrices(name, monkeypatch):
    monkeypatch.setattr(width, "TOLERANCE", 1e-12)
    d = 24
    one = width.layer(3, d, width.REGIMES[name])
    found = width.measure(one)
    hyy = dense(one.output_hessian())
    L, C = closed.parts(one.W, one.x, torch.ones(d, dtype=torch.float64), one.g(), hyy)
    assert found.measured == pytest.approx(norm(C) / norm(L), rel=1e-8)
    assert found.hyy == pytest.approx(norm(hyy), rel=1e-8)
    if name[0] in "AB":
        assert found.g == pytest.approx(math.sqrt(d) if name == "B" else 1.0)
        assert found.hyy == pytest.approx(1.0)
    else:
        y = one.y
        head, bias = (width.sure_head if name == "D" else width.softmax_head)(3, d, width.VOCAB), 0.0
        bias = 0.0 if head.bias is None else head.bias
        p = torch.softmax(head.head @ y + bias, 0)
        expected = head.head.mT @ (torch.diag(p) - torch.outer(p, p)) @ head.head
        assert found.hyy == pytest.approx(norm(expected), rel=1e-8)


def test_the_default_tolerance_is_enough():
    one = width.layer(0, 48, width.REGIMES["A"])
    exact = norm(dense(one.curvature())) / norm(dense(one.gauss_newton()))
    assert width.measure(one).measured == pytest.approx(exact, rel=2e-3)


def growing(power):
    """g of a length that makes the ratio go as d^(power - 1/2) on an isotropic H_yy."""
    return width.quadratic(lambda d: d**power, isotropic=True)


def test_verdicts():
    seeds, widths = range(5), (16, 64)
    falls, grows = {"falls": growing(0.0)}, {"grows": growing(1.5)}
    found = width.check_width(seeds, widths, falls)
    assert found.verdict == "holds"
    assert found.numbers["exponent.falls"] == pytest.approx(-0.5, abs=0.3)
    assert width.check_width(seeds, widths, grows).verdict == "does not hold"
    both = width.check_width(seeds, widths, falls | grows)
    assert both.verdict == "depends"
    assert both.numbers["exponent.grows"] - both.numbers["exponent.falls"] == pytest.approx(1.5, abs=0.01)
    assert "grows: grows, exponent" in both.reason


def test_a_slope_that_seeds_leave_open_is_no_fall():
    flat = width.check_width(range(3), (16, 64), {"B": width.REGIMES["B"]})
    assert flat.verdict == "does not hold"
    assert "neither falls nor grows" in flat.reason


def test_the_regimes_are_those_of_the_docs():
    """C and D at d = 32: ‖H_yy‖ near 1/d and 1/4, g near 1."""
    c, d = (width.measure(width.layer(0, 32, width.REGIMES[name])) for name in "CD")
    assert 0.5 < c.g < 1.5
    assert 1 / 32 < c.hyy < 2 / 32
    assert 0.05 < d.hyy < 0.6
    assert not torch.equal(draws.normal(0, "x", 32), draws.normal(1, "x", 32))
