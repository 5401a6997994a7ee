"""Alignments: against what was derived for them, and verdicts that fall with the bounds."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from gptnorm.theory import alignment, closed
from gptnorm.theory.alignment import CASES, WIDTH, Case, Frame, identity, measure, turned
from gptnorm.theory.layer import dense, norm


@pytest.mark.parametrize("cosine", [-1.0, -0.4, 0.0, 0.7, 1.0])
def test_turning_g(cosine):
    """With equal singular values ‖C‖ = (√d/r²) f(cos), and along u H is (d/r²) (1 - u·g/√d) WᵀPW."""
    one = Frame.of(2, 1.0).layer(torch.arange(1.0, WIDTH + 1, dtype=torch.float64), turned(2, cosine), identity, 0.0)
    z, g = one.z, one.g()
    r, u = float(z.norm()), z / z.norm()
    assert float(u @ g) == pytest.approx(cosine, abs=1e-12)
    assert float(g.norm()) == pytest.approx(1.0)
    f = (abs(cosine) + math.sqrt(4 - 3 * cosine**2)) / 2
    found = measure(one)
    assert found.curvature == pytest.approx(math.sqrt(WIDTH) / r**2 * f, rel=1e-10)
    assert found.within_bounds
    if abs(cosine) == 1:
        P = torch.eye(WIDTH, dtype=torch.float64) - torch.outer(u, u)
        H = WIDTH / r**2 * (1 - cosine / math.sqrt(WIDTH)) * one.W.mT @ P @ one.W
        assert (dense(one.hessian()) - H).abs().max() < 1e-10
        assert found.floor < 1e-12, "the gradient is nothing where C is not"


@pytest.mark.parametrize("case", [case for case in CASES if not case.eps], ids=lambda case: case.name)
def test_sizes_by_the_closed_forms(case):
    one = case.layer(1, 10.0)
    L, C = closed.parts(one.W, one.x, torch.ones(WIDTH, dtype=torch.float64), one.g(), dense(one.output_hessian()))
    found = measure(one)
    assert found.gauss_newton == pytest.approx(norm(L), rel=1e-10)
    assert found.curvature == pytest.approx(norm(C), rel=1e-10)
    assert found.hessian == pytest.approx(norm(L + C), rel=1e-10)
    assert float(torch.linalg.cond(one.W)) == pytest.approx(10.0)
    assert float(one.x.norm()) == pytest.approx(math.sqrt(WIDTH))


def test_the_failure_mode_in_numbers():
    """By hand: r² = d/κ², so L is κ² with H_yy = I and 1 with a weak one, C is κ²/√d along u and κ/√d across."""
    kappa = 30.0
    sizes = {
        (case.g, case.hyy): measure(case.layer(0, kappa)) for case in CASES if case.x == "weakest" and not case.eps
    }
    root = math.sqrt(WIDTH)
    assert sizes["along u", "I"].gauss_newton == pytest.approx(kappa**2, rel=1e-9)
    assert sizes["along u", "I"].curvature == pytest.approx(kappa**2 / root, rel=1e-9)
    assert sizes["against u", "I"].hessian == pytest.approx(kappa**2 * (1 + 1 / root), rel=1e-9)
    assert sizes["across u", "I"].curvature == pytest.approx(kappa / root, rel=1e-9)
    assert sizes["against u", "weak"].gauss_newton == pytest.approx(1.0, rel=1e-9)
    assert sizes["against u", "weak"].ratio == pytest.approx(kappa**2 / root, rel=1e-9)


@pytest.mark.parametrize("cosine", [0.0, 0.9, 1.0])
def test_leaning_towards_the_weakest_direction(cosine):
    """r² = d (1 - c² + c²/κ²), and H = (d/r²) (1 + 1/√d) WᵀPW, whose norm is that of W's other strong directions."""
    found = measure(alignment._leaning(0, cosine))
    L = 1 / (1 - cosine**2 + cosine**2 / alignment.LEANT**2)
    assert found.gauss_newton == pytest.approx(L, rel=1e-9)
    assert found.hessian == pytest.approx(L * (1 + 1 / math.sqrt(WIDTH)), rel=1e-9)


def test_the_finding(monkeypatch):
    monkeypatch.setattr(alignment, "COSINES", (-1.0, 1.0))
    monkeypatch.setattr(alignment, "KAPPAS", (1.0, 10.0, 100.0))
    found = alignment.check_alignment([0])
    assert found.verdict == "depends"
    assert found.numbers["bounds broken"] == 0
    assert found.numbers["exponent error"] < 0.05
    assert found.numbers["largest ratio"] == pytest.approx(100.0**2 / math.sqrt(WIDTH), rel=1e-6)
    # Gentle alignments alone: nothing is above 1.
    monkeypatch.setattr(alignment, "TURNS", (0.0,))
    assert alignment.check_alignment([0], [case for case in CASES if case.hyy == "I"][:3]).verdict == "holds"


def test_without_a_norm_the_bounds_are_broken(monkeypatch):
    """A bare map does not bend, whatever its gradient."""

    class Bare(Case):
        def layer(self, seed, kappa):
            return replace(super().layer(seed, kappa), after=None)

    monkeypatch.setattr(alignment, "COSINES", (0.0,))
    monkeypatch.setattr(alignment, "KAPPAS", (1.0, 3.0))
    monkeypatch.setattr(alignment, "TURNS", (0.0,))
    found = alignment.check_alignment([0, 1], [Bare(x="random", g="random", hyy="I", derived=None)])
    assert found.verdict == "does not hold"
    assert found.numbers["bounds broken"] == 4
    assert "broken in 4 of" in found.reason
