"""Algorithms on matrices whose spectra are known."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptnorm.curvature import Space, hutch_pp, hutchinson, lanczos, power_iteration, ritz_value, spectral_density


class Dense:
    """A matrix as an operator that counts its products."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self.matrix, self.products = matrix, 0
        self.space = Space([matrix[0]])

    def __call__(self, v: torch.Tensor) -> torch.Tensor:
        self.products += 1
        return self.matrix @ v


class Diagonal:
    def __init__(self, values: torch.Tensor) -> None:
        self.values = values
        self.space = Space([values])

    def __call__(self, v: torch.Tensor) -> torch.Tensor:
        return self.values * v


def with_spectrum(values, seed: int = 0) -> Dense:
    values = torch.as_tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64, generator=generator)).Q
    return Dense(q @ torch.diag(values) @ q.mT)


spectra = st.lists(st.floats(-10, 10).map(lambda x: round(x, 3)), min_size=2, max_size=12)


@given(spectra, st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_lanczos_finds_both_ends_of_any_spectrum(values, seed):
    operator = with_spectrum(values, seed)
    exact = sorted(set(values))
    largest, smallest = lanczos(operator, largest=2, smallest=1, tolerance=1e-10, most=40)
    scale = max(map(abs, values)) + 1e-9
    assert largest[0].value == pytest.approx(exact[-1], abs=1e-7 * scale)
    assert smallest[0].value == pytest.approx(exact[0], abs=1e-7 * scale)
    if len(exact) > 1:
        # Of an eigenvalue that is there twice a second copy may come in by rounding.
        second = (
            exact[-1] if values.count(exact[-1]) > 1 and largest[1].value > (exact[-1] + exact[-2]) / 2 else exact[-2]
        )
        assert largest[1].value == pytest.approx(second, abs=1e-6 * scale)
    for pair in (*largest, *smallest):
        assert float(pair.vector.norm()) == pytest.approx(1)
        true = float((operator(pair.vector) - pair.value * pair.vector).norm())
        assert true <= pair.residual + 1e-9 * scale, "the bound holds"


def test_residuals_hold_in_single_precision():
    """Below what rounding leaves, the recurrence's own residual goes on falling."""
    values = torch.linspace(-3, 8, 200)
    operator = with_spectrum(values)
    rounded = Dense(operator.matrix.float())
    (largest,), _ = lanczos(rounded, tolerance=1e-9, most=150)
    true = float((rounded.matrix.double() @ largest.vector.double() - largest.value * largest.vector.double()).norm())
    assert largest.residual == pytest.approx(true, rel=0.5)
    assert largest.residual > 1e-8


def crowded(seed: int) -> torch.Tensor:
    """A bulk around 0 and some large eigenvalues, not far apart."""
    generator = torch.Generator().manual_seed(seed)
    large = 10 * torch.rand(60, generator=generator, dtype=torch.float64)
    return torch.cat([0.3 * torch.randn(600, generator=generator, dtype=torch.float64), large])


def test_where_eigenvalues_crowd_the_largest_is_found_nearly_always():
    """A residual proves that an eigenvalue is near, not that it is the largest: here it is, but for a few starts."""
    missed = 0
    for seed in range(200):
        operator = Diagonal(crowded(seed))
        found = [lanczos(operator, tolerance=1e-3, seed=seed)[0][0], ritz_value(operator, seed=seed)]
        for one in found:
            assert float((operator.values - one.value).abs().min()) <= one.residual, "a theorem"
            missed += one.value < float(operator.values.max()) * (1 - 1e-3)
    assert missed <= 8, "2 % of 400"


@given(spectra, st.integers(0, 5), st.booleans())
@settings(max_examples=60, deadline=None)
def test_ritz_values_of_any_spectrum(values, seed, modulus):
    operator = with_spectrum(values, seed)
    found = ritz_value(operator, modulus=modulus, tolerance=1e-9, most=40)
    exact = max(values, key=abs) if modulus else max(values)
    scale = max(map(abs, values)) + 1e-9
    assert (abs(found.value) if modulus else found.value) == pytest.approx(
        abs(exact) if modulus else exact, abs=1e-6 * scale
    )


def test_a_largest_eigenvalue_that_is_small_beside_the_other_end_is_judged_by_itself():
    values = torch.linspace(-1, 0.1, 300, dtype=torch.float64)
    found = ritz_value(Diagonal(values), tolerance=1e-2, most=300)
    assert found.value == pytest.approx(0.1, rel=1e-2)
    assert found.residual <= 1e-2 * found.value


def test_the_residual_of_a_ritz_value_is_never_below_rounding():
    values = torch.linspace(-0.5, 1, 32)
    found = ritz_value(Diagonal(values), tolerance=1e-6, most=32)
    assert abs(found.value - 1) <= found.residual
    assert found.residual >= torch.finfo(torch.float32).eps


def test_a_start_that_is_an_eigenvector_ends_the_search_at_once():
    operator = with_spectrum([1.0, 5.0, 7.0])
    start = torch.linalg.eigh(operator.matrix).eigenvectors[:, 1]
    assert power_iteration(operator, start=start, tolerance=1e-9).products == 1
    (found,), _ = lanczos(operator, start=3 * start)
    assert found.value == pytest.approx(5.0), "nothing else is in its Krylov space"


def test_an_unlucky_start_does_not_end_the_search():
    """All 1 but for one 1.2, on which a random vector has hardly any weight."""
    values = torch.ones(4000, dtype=torch.float64)
    values[17] = 1.2
    operator = Diagonal(values)
    for seed in range(5):
        (largest,), _ = lanczos(operator, seed=seed)
        assert largest.value == pytest.approx(1.2, rel=1e-6)


@given(spectra, st.integers(0, 5), st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_power_iteration_says_how_sure_it_is(values, seed, most):
    operator = with_spectrum(values, seed)
    found = power_iteration(operator, most=most, tolerance=1e-3, seed=seed)
    assert found.products == operator.products <= most
    true = float((operator(found.vector) - found.value * found.vector).norm())
    assert found.residual == pytest.approx(true, abs=1e-9)
    nearest = min(abs(found.value - value) for value in values)
    assert nearest <= found.residual + 1e-9, "some eigenvalue is within the residual"
    assert found.products == most or found.converged(1e-3) or not any(values)


def test_power_iteration_finds_a_negative_end():
    found = power_iteration(with_spectrum([-5.0, 4.0, 1.0, 0.0]), tolerance=1e-8, most=300)
    assert found.value == pytest.approx(-5.0, rel=1e-10)
    assert found.converged(1e-8)


def test_two_equal_moduli_do_not_converge_and_say_so():
    found = power_iteration(with_spectrum([3.0, -3.0, 1.0]), most=100)
    assert not found.converged(1e-3)
    (largest,), (smallest,) = lanczos(with_spectrum([3.0, -3.0, 1.0]), smallest=1)
    assert (largest.value, smallest.value) == (pytest.approx(3), pytest.approx(-3))


def test_a_large_random_matrix_has_the_edge_of_wigner_s_semicircle():
    """Eigenvalues of (G + Gᵀ) / √(2 n) fill [-2, 2]; the moments of the density are 0, 1, 0, 2."""
    n = 400
    g = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    operator = Dense((g + g.mT) / math.sqrt(2 * n))
    exact = torch.linalg.eigvalsh(operator.matrix)
    (largest,), (smallest,) = lanczos(operator, smallest=1, tolerance=1e-6)
    assert largest.value == pytest.approx(float(exact[-1]), abs=1e-5)
    assert smallest.value == pytest.approx(float(exact[0]), abs=1e-5)
    assert largest.value == pytest.approx(2, abs=0.1)
    density = spectral_density(operator, steps=40, probes=8)
    for power, expected in ((0, 1.0), (1, 0.0), (2, 1.0), (3, 0.0), (4, 2.0)):
        value, error = density.mean(lambda x, power=power: x**power)
        assert abs(value - expected) < 4 * error + 0.05
    grid = torch.linspace(-3, 3, 601, dtype=torch.float64)
    curve = density.on_grid(grid, 0.2)
    assert float(torch.trapezoid(curve, grid)) == pytest.approx(1, abs=1e-3)
    assert float(curve[300]) == pytest.approx(1 / math.pi, abs=0.03), "the semicircle at 0"


def test_the_density_of_a_small_matrix_has_its_moments_exactly():
    """Gauss quadrature is exact up to the degree 2 · steps - 1: a probe's moments are zᵀ Aᵏ z / zᵀ z."""
    operator = with_spectrum([1.0, 2.0, 5.0, 7.0, 7.0])
    density = spectral_density(operator, steps=3, probes=1, seed=4)
    z = operator.space.draw(torch.Generator().manual_seed(4))
    for power in range(6):
        expected = float(z @ torch.linalg.matrix_power(operator.matrix, power) @ z / (z @ z))
        assert density.mean(lambda x, power=power: x**power)[0] == pytest.approx(expected, rel=1e-10)
    exhausted = spectral_density(operator, steps=40, probes=2)
    assert exhausted.weights.sum(1).tolist() == pytest.approx([1, 1])
    assert sorted({round(x, 6) for x in exhausted.values[0][exhausted.weights[0] > 1e-9].tolist()}) == [1, 2, 5, 7]


def test_traces():
    values = [100.0, 50.0, 20.0, *torch.linspace(0.1, 1, 60).tolist()]
    operator, exact = with_spectrum(values), sum(values)
    plain, sketched = hutchinson(operator, probes=60), hutch_pp(operator, probes=60)
    for found in (plain, sketched):
        assert found.error is not None
        assert abs(found.value - exact) < 4 * found.error
    assert sketched.error is not None
    assert plain.error is not None
    assert sketched.error < plain.error / 10, "few large eigenvalues are what Hutch++ is for"
    assert sketched.products == 60
    errors = [abs(hutchinson(operator, probes=30, seed=seed).value - exact) / 1 for seed in range(30)]
    stated = hutchinson(operator, probes=30).error
    assert stated is not None
    assert 0.5 < math.sqrt(sum(error**2 for error in errors) / 30) / stated < 2, "the error is what it says"


def test_a_trace_with_more_probes_than_dimensions_is_exact():
    operator = with_spectrum([3.0, -1.0])
    assert hutch_pp(operator, probes=30).value == pytest.approx(2.0, abs=1e-10)


def test_everything_is_the_same_again():
    operator = with_spectrum(torch.linspace(-1, 3, 30).tolist())
    assert power_iteration(operator, seed=3).value == power_iteration(operator, seed=3).value
    assert lanczos(operator, seed=3)[0][0].value == lanczos(operator, seed=3)[0][0].value
    assert hutch_pp(operator, seed=3) == hutch_pp(operator, seed=3)
