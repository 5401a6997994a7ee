"""Ladders: best rates and shifts against ledgers whose answer is known, and the report as a file."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from ladder_folders import ENTROPY, LRS, make_ladder, make_signal
from report_folders import make_study
from rich.console import Console

from gptnorm.errors import UserError
from gptnorm.report import load_ladder, load_study, markdown_ladder, rich_ladder
from gptnorm.report.html import write_study_report
from gptnorm.report.ladder_page import answer, caveats
from gptnorm.report.optimum import best_rate, largest_stable

SIZES = (8, 16, 64)
HALVING: dict[int, float | None] = {8: 1.6e-2, 16: 8e-3, 64: 2e-3}


@pytest.mark.parametrize("seed", range(20))
def test_best_rate_of_a_parabola_is_its_vertex(seed: int) -> None:
    """Against numpy's least squares, on grids that are not even."""
    draw = np.random.default_rng(seed)
    lrs = np.cumprod(draw.uniform(1.5, 4.0, 6)) * 1e-3
    true = float(np.exp(draw.uniform(np.log(lrs[1]), np.log(lrs[4]))))
    losses = 2 + draw.uniform(0.01, 1) * np.log(lrs / true) ** 2
    found = best_rate([(float(lr), float(loss)) for lr, loss in zip(lrs, losses, strict=True)])
    assert found is not None
    assert found.kind == "fit"
    assert found.lr == pytest.approx(true, rel=1e-9)
    # The same with a little of something else in it: the three points around the lowest, fitted by numpy.
    losses += 0.003 * draw.normal(size=6)
    found = best_rate([(float(lr), float(loss)) for lr, loss in zip(lrs, losses, strict=True)])
    lowest = int(losses.argmin())
    if 0 < lowest < 5:
        here = slice(lowest - 1, lowest + 2)
        c2, c1, _ = np.polyfit(np.log(lrs[here]), losses[here], 2)
        assert found is not None
        assert found.lr == pytest.approx(float(np.exp(-c1 / (2 * c2))), rel=1e-6)


@pytest.mark.parametrize(
    ("losses", "kind", "lr"),
    [
        ([2.0], "only", 1e-3),
        ([2.0, 2.1, 2.2], "lowest", 1e-3),
        ([2.2, 2.1, 2.0], "highest", 1e-2),
        ([2.1, 2.0, None], "beside", 3e-3),
        ([None, 2.0, 2.1], "beside", 3e-3),
        ([None, None, 2.0], "highest", 1e-2),
        ([2.0, 2.0, 2.0], "lowest", 1e-3),
    ],
)
def test_what_is_no_vertex(losses: list[float | None], kind: str, lr: float) -> None:
    found = best_rate([(rate, loss) for rate, loss in zip(LRS, losses, strict=False)])
    assert found is not None
    assert (found.kind, found.lr) == (kind, lr)
    assert found.is_optimum == (kind == "beside")


def test_nothing_stable_is_no_best() -> None:
    assert best_rate([]) is None
    assert best_rate([(1e-3, None)]) is None
    assert largest_stable([(1e-3, None)]) is None


def test_shift_and_slope(tmp_path: Path) -> None:
    ladder = load_ladder(make_ladder(tmp_path, {("a", None): HALVING, ("b", None): dict.fromkeys(SIZES, 1e-2)}))
    moving, still = ladder.climbs
    assert moving.shift == pytest.approx(-3.0)
    assert moving.slope == pytest.approx(-1.0)
    assert (still.shift, still.slope) == (pytest.approx(0.0, abs=1e-9), pytest.approx(0.0, abs=1e-9))
    # At the smallest size's best rate of the grid, 1e-2, the largest (best 2e-3, grid 3e-3) loses this much.
    lost = 0.05 * (math.log(1e-2 / 2e-3) ** 2 - math.log(3e-3 / 2e-3) ** 2)
    assert moving.kept_cost == pytest.approx(lost)
    assert "moves least for b" in answer(ladder)[0]


def test_slope_is_that_of_least_squares_and_seeds_spread(tmp_path: Path) -> None:
    bests: dict[int, float | None] = {8: 1.5e-2, 16: 1.2e-2, 32: 4e-3, 64: 5e-3}
    ladder = load_ladder(make_ladder(tmp_path, {("a", None): bests}, seeds=6, noise=0.01))
    (climb,) = ladder.climbs
    rates = [level.best.lr for level in climb.levels if level.best]
    assert climb.slope == pytest.approx(np.polyfit(np.log2(list(bests)), np.log2(rates), 1)[0])
    assert climb.slope == pytest.approx(np.polyfit(np.log2(list(bests)), np.log2([*bests.values()]), 1)[0], abs=0.15)
    slopes = [
        np.polyfit(*zip(*[(math.log2(n), math.log2(lr)) for n, lr in p], strict=True), 1)[0] for p in climb.per_seed
    ]
    assert len(slopes) == 6
    assert climb.slope_sd == pytest.approx(np.std(slopes, ddof=1))
    assert 0 < climb.slope_sd < 0.3
    assert f"{climb.slope:+.2f} ± {climb.slope_sd:.2f}" in markdown_ladder(ladder)


def test_an_edge_is_no_optimum(tmp_path: Path) -> None:
    ladder = load_ladder(make_ladder(tmp_path, {("a", None): {8: 1e-2, 16: 1e-2, 64: 2e-1}}))
    (climb,) = ladder.climbs
    assert [level.size for level in climb.usable] == [8, 16]
    assert climb.shift == pytest.approx(0.0, abs=1e-9)
    text = markdown_ladder(ladder)
    assert "| a | 64 | 1e-1 edge |" in text
    assert "| a | 8 → 16 |" in text
    assert "left out of shift and slope" in text
    assert climb.kept_cost is None, "against an end of what was tried"
    (first,) = load_ladder(make_ladder(tmp_path / "first", {("a", None): {8: 2e-1, 16: 1e-2, 64: 1e-2}})).climbs
    assert first.kept_cost is None, "an end of what was tried, kept"


@pytest.mark.parametrize("unstable", ["diverged", "collapsed"])
def test_divergence_and_collapse_bound_the_stable_rate(tmp_path: Path, unstable: str) -> None:
    bests: dict[int, float | None] = {8: 1e-2, 16: 3e-3, 64: None}
    ladder = load_ladder(make_ladder(tmp_path, {("a", None): bests}, unstable_from=3.0, unstable=unstable))
    first, second, third = ladder.climbs[0].levels
    assert first.stable is not None
    assert second.stable is not None
    assert (first.stable.lr, second.stable.lr, third.stable) == (1e-2, 3e-3, None)
    assert first.best is not None
    assert (first.best.kind, first.best.lr, third.best) == ("beside", 1e-2, None)
    text = markdown_ladder(ladder)
    assert "| a | 64 | none | – | none |" in text
    assert "1e-2 ‡" in text
    assert "-1.74 ‡" in text
    # Not at the largest size, where nothing is stable, is there a shift of the stable rate.
    assert ladder.climbs[0].kept_cost is None


def test_a_rate_that_is_not_stable_at_the_largest_size(tmp_path: Path) -> None:
    ladder = load_ladder(
        make_ladder(tmp_path, {("a", None): {8: 3e-2, 16: 1e-2, 64: 3e-3}}, unstable_from=2.0, unstable="collapsed")
    )
    assert ladder.climbs[0].kept_cost == math.inf
    assert "not stable" in markdown_ladder(ladder)


def test_one_unstable_seed_makes_a_rate_unstable(tmp_path: Path) -> None:
    folder = make_ladder(tmp_path, {("a", None): {8: 1e-2, 16: 1e-2}}, seeds=2)
    lines = [json.loads(line) for line in (folder / "cells.jsonl").read_text().splitlines()]
    for line in lines:
        if line["size"] == 8 and line["lr"] == 1e-1 and line["seed"] == 1:
            line["val_loss"] = ENTROPY - 0.09
    (folder / "cells.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    stable = [level.stable for level in load_ladder(folder).climbs[0].levels]
    assert [(s.lr, s.open) for s in stable if s] == [(3e-2, False), (1e-1, True)]


def test_stopped_midway(tmp_path: Path) -> None:
    ladder = load_ladder(make_ladder(tmp_path, {("a", None): HALVING, ("b", None): HALVING}, keep=7))
    assert (ladder.done, ladder.planned) == (7, 30)
    assert "Partial: 7 of 30 runs ended." in markdown_ladder(ladder)
    assert "only" not in markdown_ladder(ladder)
    ladder = load_ladder(make_ladder(tmp_path, {("a", None): HALVING}, keep=0))
    assert "nothing to compare yet" in answer(ladder)[0]
    assert "A ladder" in write_study_report(tmp_path).read_text(encoding="utf-8")


@pytest.mark.parametrize("ended", [17, 10])
def test_a_run_to_come_has_not_failed(tmp_path: Path, ended: int) -> None:
    """A ledger has one seed after the other, so of its first half the second seed is missing everywhere."""
    bests: dict[int, float | None] = {8: 1e-2, 64: 3e-3}
    folder = make_ladder(tmp_path, {("a", None): bests}, seeds=2)
    lines = (folder / "cells.jsonl").read_text().splitlines(keepends=True)
    whole = markdown_ladder(load_ladder(folder))
    assert "‡" not in whole
    lines.sort(key=lambda line: json.loads(line)["seed"])
    (folder / "cells.jsonl").write_text("".join(lines[:ended]))
    (climb,) = load_ladder(folder).climbs
    text = " ".join([*answer(load_ladder(folder)), markdown_ladder(load_ladder(folder))])
    assert "‡" not in text
    assert "none" not in text
    assert "not stable" not in text
    assert all(level.stable is None or level.stable.open for level in climb.levels)
    if ended == 10:
        assert "nothing to compare yet" in text
        assert "is any rate stable" not in text
    # One seed that has failed says enough.
    failed = {**json.loads(lines[0]), "status": "diverged", "val_loss": None}
    (folder / "cells.jsonl").write_text("".join([json.dumps(failed) + "\n", *lines[1:ended]]))
    level = next(lv for lv in load_ladder(folder).climbs[0].levels if lv.size == failed["size"])
    assert (failed["lr"], None) in level.points


def test_no_spread_of_the_seeds_that_moved_least(tmp_path: Path) -> None:
    folder = make_ladder(tmp_path, {("a", None): {8: 1.5e-2, 64: 5e-3}}, seeds=3, noise=0.01)
    (climb,) = load_ladder(folder).climbs
    assert climb.shift_sd is not None
    lines = [json.loads(line) for line in (folder / "cells.jsonl").read_text().splitlines()]
    for line in lines:
        if line["size"] == 64 and line["lr"] == min(LRS) and line["seed"] == 2:
            line["val_loss"] = 1.95
    (folder / "cells.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (climb,) = load_ladder(folder).climbs
    assert len(climb.per_seed) == 2
    assert (climb.shift_sd, climb.slope_sd) == (None, None)


def test_rules_stand_apart(tmp_path: Path) -> None:
    flat: dict[int, float | None] = dict.fromkeys((32, 64, 128), 1e-2)
    bests = {
        ("a", "none"): {32: 2e-2, 64: 1e-2, 128: 5e-3},
        ("a", "mup"): flat,
        ("b", "none"): flat,
        ("b", "mup"): flat,
    }
    ladder = load_ladder(make_ladder(tmp_path, bests, axis="width"))
    assert [(t.strategy, t.rule) for t in ladder.climbs] == list(bests)
    assert ladder.climbs[0].slope == pytest.approx(-1.0)
    assert markdown_ladder(ladder).splitlines()[0].startswith("| strategy | rule | d |")
    assert "a -1.00 without a rule, +0.00 under mup; b +0.00 without" in answer(ladder)[0]
    assert any("width of a head" in note for note in caveats(ladder))


def test_signals_are_means_over_seeds(tmp_path: Path) -> None:
    folder = make_ladder(tmp_path, {("a", None): {4: 1e-2, 8: 1e-2}}, seeds=2)
    lines = [json.loads(line) for line in (folder / "cells.jsonl").read_text().splitlines()]
    for line in lines:
        if line["seed"] == 1:
            line["signal"]["trained"] = {**make_signal(line["size"], 1000.0), "token_cosine": None}
    (folder / "cells.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    signal = load_ladder(folder).climbs[0].levels[1].signal("trained")
    assert signal is not None
    assert signal.grad_ratio == pytest.approx(100.0)  # of 10 and 1000, geometric
    assert signal.top_cosine == pytest.approx(1 - (0.4 / 8 + 0.4 / 9) / 2)
    assert signal.token_cosine is None
    assert "| a | 8 | 100 → 100 | 0.953 → 0.953 | 0.250 → – |" in markdown_ladder(load_ladder(folder))


def test_terminal_fits(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(rich_ladder(load_ladder(make_ladder(tmp_path, {("[b]e|ta", None): HALVING}))))
    text = console.file.getvalue()
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "[b]e|ta" in text
    assert "1.6e-2" in text


@pytest.mark.parametrize("axis", ["depth", "width"])
def test_page(tmp_path: Path, axis: str) -> None:
    rule = None if axis == "depth" else "align"
    evil = '<script>alert("x")</script>'
    folder = make_ladder(
        tmp_path, {("a", rule): {**HALVING, 64: None}, (evil, rule): HALVING}, axis=axis, seeds=2, unstable_from=9.0
    )
    raw = write_study_report(folder).read_text(encoding="utf-8")
    assert write_study_report(folder).read_text(encoding="utf-8") == raw
    assert "<script" not in raw
    assert not re.search(r'(?:src|href)="(?!#)(?!cells/)', raw)
    assert not re.search(r"\b(nan|inf)\b", re.sub(r"<svg.*?</svg>", "", raw, flags=re.DOTALL), re.IGNORECASE)
    ids = re.findall(r'\bid="([^"]+)"', raw)
    assert len(ids) == len(set(ids))
    assert raw.count("<figure>") == 2 + 2 + 2 * 2
    # Two seeds at 1e-1 of both strategies' middle size, and at 3e-2 and 1e-1 of the other's largest.
    for part in ("1.6e-2", "Best and largest stable rate", "8 of 60 runs", "f00d", f"gptnorm study {axis} ladder"):
        assert part in raw, part


def test_without_signals(tmp_path: Path) -> None:
    folder = make_ladder(tmp_path, {("a", None): HALVING}, signals=False)
    assert "token cosine" not in markdown_ladder(load_ladder(folder))
    assert "Signal" not in write_study_report(folder).read_text(encoding="utf-8")


def test_what_is_no_ladder(tmp_path: Path) -> None:
    grid = make_study(tmp_path / "grid", {"a": {1e-3: [2.0]}})
    with pytest.raises(UserError, match="names no ladder"):
        load_ladder(grid)
    folder = make_ladder(tmp_path / "ladder", {("a", None): HALVING})
    with pytest.raises(UserError, match="a ladder of models"):
        load_study(folder)
    with pytest.raises(UserError, match=r"study\.json"):
        write_study_report(tmp_path)
    study = json.loads((folder / "study.json").read_text())
    study["ladder"]["sizes"] = ["8"]
    (folder / "study.json").write_text(json.dumps(study))
    with pytest.raises(UserError, match=r"ladder\.sizes"):
        load_ladder(folder)
