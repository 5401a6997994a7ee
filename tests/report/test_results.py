"""The table logic, against answers known beforehand or worked out another way."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from report_folders import Outcome, make_study

from gptnorm.errors import UserError
from gptnorm.report.gaps import may_be_chance, paired_gaps
from gptnorm.report.results import load_study
from gptnorm.report.verdict import caveats, verdict
from gptnorm.statistics import t_quantile


def test_mean_sd_and_best(tmp_path: Path) -> None:
    study = load_study(make_study(tmp_path, {"a": {1e-3: [3.0, 3.2], 1e-2: [2.9, 2.7], 1e-1: [3.5, 3.5]}}))
    (row,) = study.rows
    assert [entry.mean for entry in row.entries] == pytest.approx([3.1, 2.8, 3.5])
    assert [entry.sd for entry in row.entries] == pytest.approx([0.2 / math.sqrt(2), 0.2 / math.sqrt(2), 0.0])
    assert row.best is not None
    assert row.best.lr == 1e-2
    assert not row.at_edge
    assert row.parameters == 1_234_567


@pytest.mark.parametrize(
    ("losses", "edge"), [([1.0, 2.0, 3.0], "lowest"), ([3.0, 2.0, 1.0], "highest"), ([2.0, 1.0, 2.0], None)]
)
def test_edge_of_the_grid(tmp_path: Path, losses: list[float], edge: str | None) -> None:
    cells: dict[float, list[Outcome]] = {lr: [loss] for lr, loss in zip([1e-3, 1e-2, 1e-1], losses, strict=True)}
    (row,) = load_study(make_study(tmp_path, {"a": cells})).rows
    assert (row.edge, row.at_edge) == (edge, edge is not None)


def test_a_best_without_a_neighbour_yet_stands_at_the_edge(tmp_path: Path) -> None:
    study = load_study(make_study(tmp_path, {"a": {1e-3: [3.0], 1e-2: [2.0], 1e-1: [None]}}))
    assert study.rows[0].edge == "highest"


def test_a_grid_of_one_learning_rate_has_no_optimum(tmp_path: Path) -> None:
    study = load_study(make_study(tmp_path, {"a": {1e-3: [2.0]}}))
    assert study.rows[0].edge == "only"
    assert any("only one learning rate" in sentence for sentence in verdict(study))


def test_one_diverged_seed_takes_the_mean_away(tmp_path: Path) -> None:
    study = load_study(make_study(tmp_path, {"a": {1e-3: [3.0, 3.0], 1e-2: [1.0, "diverged"]}}))
    low, high = study.rows[0].entries
    assert (high.mean, high.sd, len(high.diverged), high.planned) == (None, None, 1, 2)
    assert study.rows[0].best is low


def test_a_cell_with_seeds_missing_is_shown_and_never_the_best(tmp_path: Path) -> None:
    study = load_study(make_study(tmp_path, {"a": {1e-3: [3.0, 3.0], 1e-2: [1.0, None], 1e-1: [None, None]}}))
    first, second, third = study.rows[0].entries
    assert (second.mean, second.complete, third.mean, third.seen) == (1.0, False, None, 0)
    assert study.rows[0].best is first
    assert (study.done, study.planned) == (3, 6)
    assert any("partial: 3 of 6" in sentence for sentence in verdict(study))


def test_nothing_finished(tmp_path: Path) -> None:
    study = load_study(make_study(tmp_path, {"a": {1e-3: ["diverged"]}, "b": {1e-3: [None]}}))
    assert study.ranked == ()
    assert paired_gaps(study) == {}
    assert "nothing to compare" in verdict(study)[0]


def test_ties_go_to_the_lower_learning_rate_and_the_earlier_strategy(tmp_path: Path) -> None:
    study = load_study(make_study(tmp_path, {"b": {1e-3: [2.0], 1e-2: [2.0]}, "a": {1e-3: [2.0], 1e-2: [2.0]}}))
    assert [row.strategy for row in study.ranked] == ["b", "a"]
    assert [row.best.lr for row in study.ranked if row.best] == [1e-3, 1e-3]
    (gap,) = paired_gaps(study).values()
    assert gap.value == 0
    assert may_be_chance(gap)


def test_pooled_spread(tmp_path: Path) -> None:
    # Variances 0.02 (one degree of freedom) and 1 (two): a diverged cell has no part in it.
    cells: dict[str, dict[float, list[Outcome]]] = {
        "a": {1e-3: [2.0, 2.2, None], 1e-2: [1.0, 2.0, 3.0], 1e-1: ["diverged", 9.0, 1.0]}
    }
    assert load_study(make_study(tmp_path, cells)).pooled_sd == pytest.approx(1.0)
    even = load_study(make_study(tmp_path / "even", {"a": {1e-3: [2.0, 2.2], 1e-2: [1.0, 3.0]}}))
    assert even.pooled_sd == pytest.approx(math.sqrt((0.02 + 2.0) / 2))


def test_one_seed_has_no_spread(tmp_path: Path) -> None:
    study = load_study(make_study(tmp_path, {"a": {1e-3: [2.0]}, "b": {1e-3: [1.0]}}))
    (gap,) = paired_gaps(study).values()
    assert (gap.value, gap.low, gap.high, may_be_chance(gap)) == (1.0, None, None, True)
    assert any("cannot be told from chance" in sentence for sentence in verdict(study))
    assert any("One seed" in note for note in caveats(study))


def test_gaps_are_paired_by_seed(tmp_path: Path) -> None:
    # Seeds move both strategies together: the losses spread by 1, the differences by 0.01.
    study = load_study(
        make_study(
            tmp_path, {"a": {1e-3: [2.0, 3.0, 4.0]}, "b": {1e-3: [2.1, 3.09, 4.11]}, "c": {1e-3: [9.0, 2.0, 1.0]}}
        )
    )
    gaps = paired_gaps(study)
    assert list(gaps) == ["b", "c"]
    half = 4.3027 * statistics.stdev([0.1, 0.09, 0.11]) / math.sqrt(3)
    assert (gaps["b"].low, gaps["b"].high) == pytest.approx((0.1 - half, 0.1 + half), abs=1e-6)
    assert not may_be_chance(gaps["b"])
    assert may_be_chance(gaps["c"])
    said = " ".join(verdict(study))
    assert "more than chance explains" in said
    assert "The lead over c may be chance." in said


@pytest.mark.parametrize(
    ("nu", "expected"),
    # Printed tables of Student's t, two-sided 95 %.
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (5, 2.5706), (9, 2.2622), (30, 2.0423), (1000, 1.9623)],
)
def test_t_quantile(nu: int, expected: float) -> None:
    assert t_quantile(nu) == pytest.approx(expected, abs=1e-4)


def test_collapsed_runs_are_named(tmp_path: Path) -> None:
    study = load_study(make_study(tmp_path, {"a": {1e-3: [3.0], 1e-2: [5.0]}, "b": {1e-3: [5.2], 1e-2: [5.1]}}))
    first, second = study.rows
    assert (study.highest_trained(first), study.highest_trained(second)) == (1e-3, None)
    assert any(sentence.startswith("b learned nothing beyond token frequencies") for sentence in verdict(study))


def test_verdict_names_winner_edges_and_divergence(tmp_path: Path) -> None:
    cells: dict[str, dict[float, list[Outcome]]] = {
        "a": {1e-3: [3.0, 3.01], 1e-2: ["diverged", 3.0]},
        "b": {1e-3: [2.5, 2.52], 1e-2: [2.0, 2.01]},
    }
    text = " ".join(verdict(load_study(make_study(tmp_path, cells))))
    assert text.startswith("b reached the lowest validation loss")
    assert "2.0050 ± 0.0071 nats at 1e-2" in text
    assert "Next is a with 3.0050 at 1e-3, 1.0000 higher seed by seed (95 % interval" in text
    assert "For b the best is the highest learning rate tried" in text
    assert "For a the best is the lowest learning rate tried" in text
    assert "1 of 8 runs diverged: a at 1e-2." in text


def test_files_cut_or_repeated(tmp_path: Path) -> None:
    make_study(tmp_path, {"a": {1e-3: [3.0], 1e-2: [2.0]}})
    again = {"strategy": "a", "lr": 1e-3 * (1 + 1e-13), "seed": 0, "status": "finished", "val_loss": 1.5, "run": ""}
    stray = again | {"strategy": "z"}
    with (tmp_path / "cells.jsonl").open("a") as file:
        file.write(json.dumps(again) + "\n" + json.dumps(stray) + "\n" + '{"strategy": "a", "lr": 0.0')
    study = load_study(tmp_path)
    assert [entry.mean for entry in study.rows[0].entries] == [1.5, 2.0]
    assert study.outside == 1


def test_no_cells_yet(tmp_path: Path) -> None:
    make_study(tmp_path, {"a": {1e-3: [3.0]}})
    (tmp_path / "cells.jsonl").unlink()
    assert load_study(tmp_path).done == 0


@pytest.mark.parametrize(
    "broken", ["", "[]", "{}", '{"strategies": ["a"], "lrs": [0.0], "seeds": [1]}', '{"strategies": ["a", "a"]}']
)
def test_bad_study_is_told_in_one_line(tmp_path: Path, broken: str) -> None:
    (tmp_path / "study.json").write_text(broken)
    with pytest.raises(UserError) as caught:
        load_study(tmp_path)
    assert "study.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_study(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_study(tmp_path)


OUTCOMES = st.one_of(st.none(), st.just("diverged"), st.floats(allow_nan=True, allow_infinity=True))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(OUTCOMES, min_size=2, max_size=2), min_size=3, max_size=3))
def test_the_best_is_the_lowest_of_the_complete(tmp_path: Path, grid: list[list[Outcome]]) -> None:
    cells = dict(zip([1e-3, 1e-2, 1e-1], grid, strict=True))
    (row,) = load_study(make_study(tmp_path, {"a": cells})).rows
    whole: dict[float, float] = {}
    for lr, cell in cells.items():
        losses = [loss for loss in cell if isinstance(loss, float) and math.isfinite(loss)]
        if len(losses) == len(cell) and math.isfinite(sum(losses)):
            whole[lr] = statistics.fmean(losses)
    for entry in row.entries:
        assert entry.mean is None or math.isfinite(entry.mean)
        assert entry.sd is None or math.isfinite(entry.sd)
        if entry.lr in whole:
            assert entry.mean == pytest.approx(whole[entry.lr])
    if not whole:
        assert row.best is None
        return
    assert row.best is not None
    assert row.best.lr in whole
    assert row.best.mean == pytest.approx(min(whole.values()))
