"""Curves and figures: smoothing against a direct sum, averages, and figures that survive odd data."""

from __future__ import annotations

import numpy as np
import pytest

from gptnorm.report.curves import Curve, mean_curve, series, smooth, thin
from gptnorm.report.figure import look
from gptnorm.report.run_plot import run_curves


def curve(values: list[float], steps: list[float] | None = None) -> Curve:
    return Curve(np.array(steps or range(len(values)), dtype=np.float64), np.array(values))


def test_smoothing_is_a_normalised_two_sided_exponential() -> None:
    values = np.random.default_rng(0).normal(size=30)
    window = 4.0
    weights = (1 - 1 / window) ** np.abs(np.subtract.outer(np.arange(30), np.arange(30)))
    expected = weights @ values / weights.sum(axis=1)
    np.testing.assert_allclose(smooth(curve(values.tolist()), window).values, expected, rtol=1e-12)


def test_smoothing_keeps_a_constant_and_short_curves() -> None:
    np.testing.assert_allclose(smooth(curve([2.0] * 500)).values, 2.0)
    assert smooth(curve([1.0, 5.0])).values.tolist() == [1.0, 5.0]


def test_series_leaves_out_what_is_not_finite_and_takes_the_last_of_a_step() -> None:
    rows = [
        {"step": 1, "split": "train", "loss": 3.0},
        {"step": 2, "split": "train", "loss": float("nan")},
        {"step": 1, "split": "val", "loss": 9.0},
        {"step": 3, "split": "train", "loss": 1.0},
        {"step": 1, "split": "train", "loss": 2.0},
        {"split": "train", "loss": 7.0},
    ]
    found = series(rows, "train")
    assert (found.steps.tolist(), found.values.tolist()) == ([1.0, 3.0], [2.0, 1.0])


def test_mean_over_seeds_ends_where_the_first_ends() -> None:
    mean = mean_curve([curve([1.0, 2.0, 3.0]), curve([3.0, 4.0])])
    assert (mean.steps.tolist(), mean.values.tolist()) == ([0.0, 1.0], [2.0, 3.0])
    assert len(mean_curve([])) == 0
    assert len(mean_curve([curve([1.0], [1.0]), curve([1.0], [2.0])])) == 0


@pytest.mark.parametrize("count", [1, 400, 401, 12345])
def test_thinning_keeps_the_last_point(count: int) -> None:
    thinned = thin(curve([float(index) for index in range(count)]))
    assert len(thinned) <= 402
    assert thinned.values[-1] == count - 1


def test_looks_differ_in_colour_or_marker() -> None:
    assert len({(look(index).colour, look(index).marker) for index in range(56)}) == 56
    assert len({(look(index).marker, str(look(index).dash)) for index in range(32)}) == 32


@pytest.mark.parametrize(
    "rows",
    [
        [{"step": 1, "split": "val", "loss": 3.0}],
        [{"step": 1, "split": "train", "loss": 3.0, "lr": 0.0}],
        [{"step": step, "split": "train", "loss": 3.0, "lr": 1e-3} for step in range(1, 5)],
    ],
)
def test_a_run_with_little_in_it_can_be_drawn(rows: list[dict[str, object]]) -> None:
    svg = run_curves(rows)
    assert svg is not None
    assert svg.startswith("<svg")
    assert svg.endswith("</svg>")


def test_a_run_without_losses_has_no_plot() -> None:
    assert run_curves([]) is None
