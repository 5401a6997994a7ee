"""Settings tuned beside the rate: which one each seed has, what it gives, and when that can be told."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerance_folders import RATES, Bowl, line, lines_of, make_tolerance, numbers, row_of

from gptnorm.report import load_tolerance, markdown_tolerance
from gptnorm.report.tolerance import ToleranceStudy
from gptnorm.report.tolerance_notes import notes
from gptnorm.report.tolerance_table import grids
from gptnorm.report.tolerance_verdict import answer, caveats
from gptnorm.study.cell import Setup
from gptnorm.study.config import ToleranceConfig
from gptnorm.study.measures import Point
from gptnorm.study.planner import Group, Run, wanted_runs


def tuned_lines(steps: int) -> list[dict[str, Any]]:
    """Tuning gives the baseline 0.08 and the other strategy nothing."""
    place = {"train.steps": steps}
    base = {"base": Bowl(4e-3, edge=3e-2)}
    better = {"base": Bowl(8e-3, bottom=1.92, edge=6e-2)}
    ours = {"ours": Bowl(8e-3, bottom=1.9, edge=6e-2)}
    worse = {"ours": Bowl(8e-3, bottom=1.95, edge=6e-2)}
    variant = {"init.std": 0.02}
    every = range(6)
    return [
        *lines_of(base, RATES, every, place=place),
        *lines_of(better, RATES, every, place=place, variant=variant),
        *lines_of(ours, RATES, every, place=place),
        *lines_of(worse, RATES, [0], place=place, variant=variant),
    ]


def test_what_survives_tuning(tmp_path: Path) -> None:
    lines = [*tuned_lines(100), *tuned_lines(200)]
    asked = {"tune": {"init.std": ["twin", 0.02]}, "places": [{"train.steps": 100}, {"train.steps": 200}]}
    study = load_tolerance(make_tolerance(tmp_path, lines, lrs=RATES, asked=asked))
    text = markdown_tolerance(study)
    here = ": train.steps = 200"
    row = row_of(text, f"Tuned: init.std{here}", "base")
    near = 0.05 * math.log(8e-3 / RATES[3]) ** 2
    assert row[1] == "init.std = 0.02"
    assert [numbers(entry)[0] for entry in row[2:]] == pytest.approx([2.0, 1.92 + near, -0.08], abs=6e-5)
    assert row_of(text, f"Tuned: init.std{here}", "ours")[1:] == [
        "as it comes",
        *[r"1.9000 \[1.9000, 1.9000]"] * 2,
        "–",
    ]
    row = row_of(text, f"Against base, as they come and with init.std tuned for both{here}", "ours")
    assert [numbers(entry)[0] for entry in row[1:]] == pytest.approx([-0.1, -0.02, 2.0, 1.0], abs=6e-5)
    every = f"Every setting at its best rate, on the picking seeds{here}"
    assert [numbers(entry)[0] for entry in row_of(text, every, "as it comes")[1:]] == pytest.approx([2.0, 1.9])
    assert numbers(row_of(text, every, "init.std = 0.02")[1])[0] == pytest.approx(1.92 + near, abs=6e-5)
    # Both places side by side come first.
    title = "Loss minus base's, each at its own best rate"
    assert row_of(text, title, "ours")[1:] == [r"-0.1000 \[-0.1000, -0.1000]"] * 2
    assert text.startswith(f"**{title}**\n\n| strategy | train.steps = 100 | train.steps = 200 |")
    assert answer(study)[0].endswith("ours at 2 of 2 places.")
    assert "ours has a lower loss at 2 of 2 places" in answer(study)[1]
    assert answer(study)[2] == "With init.std tuned for both it has a lower loss at 2 of 2 places."
    row = row_of(text, "Loss minus base's, with init.std tuned for both", "ours")
    assert [numbers(entry)[0] for entry in row[1:]] == pytest.approx([-0.02, -0.02])


def test_a_tuned_value_at_an_end_of_those_tried_is_marked(tmp_path: Path) -> None:
    """With the width 512 "twin" is 0.04: of base the middle is best, of ours the highest, of theirs a decay of 0."""
    settings = {"init.std": "twin", "model.d_model": 512, "optim.weight_decay": 0.1, "options.qk_norm": "none"}
    tune = {
        "init.std": ["published", "twin", 0.08],
        "optim.weight_decay": [0.0, 0.1],
        "options.qk_norm": ["none", "head"],
    }
    stds: list[dict[str, Any]] = [{"init.std": "published"}, {}, {"init.std": 0.08}]
    bottoms = {"base": (2.0, 1.9, 2.0), "ours": (2.0, 1.9, 1.8), "theirs": (2.0, 1.9, 2.0)}
    lines = []
    for name, by_std in bottoms.items():
        for std, bottom in zip(stds, by_std, strict=True):
            for decay in ({"optim.weight_decay": 0.0}, {}):
                lower = -0.05 if decay and name == "theirs" else 0.05 if decay else 0.0
                for heads in ({}, {"options.qk_norm": "head"}):
                    variant = {**std, **decay, **heads}
                    more = {"variant": variant} if variant else {}
                    bowl = {name: Bowl(4e-3, bottom=bottom + lower + (0.01 if heads else 0), edge=6e-2)}
                    lines += lines_of(bowl, RATES, range(6), **more)
    asked = {"tune": tune, "report": "neighbours"}
    shared = {"shared": {**settings, "train.steps": 6}, "differing": {}, "recipe": {}}
    study = load_tolerance(make_tolerance(tmp_path, lines, lrs=RATES, asked=asked, settings=shared))
    (place,) = study.places
    assert {name: dict(track.open_ends) for name, track in place.tuned.items()} == {
        "base": {"optim.weight_decay": "highest"},
        "ours": {"init.std": "highest", "optim.weight_decay": "highest"},
        "theirs": {},
    }
    text = markdown_tolerance(study)
    title = "Tuned: init.std, optim.weight\\_decay, options.qk\\_norm"
    assert row_of(text, title, "ours")[1] == r"init.std = 0.08 (edge: init.std, optim.weight\_decay)"
    assert row_of(text, title, "base")[1] == r"as it comes (edge: optim.weight\_decay)"
    assert row_of(text, title, "theirs")[1] == "optim.weight\\_decay = 0.0"
    both = "Against base, as they come and with init.std, optim.weight\\_decay, options.qk\\_norm tuned for both"
    assert all("edge" in row_of(text, both, name)[2] for name in ("ours", "theirs"))
    assert not any("edge" in row_of(text, both, name)[1] for name in ("ours", "theirs"))
    said = " ".join(answer(study))
    assert "For ours the chosen init.std is the highest tried, so it is no result: a higher one may do better." in said
    assert "For base and ours the chosen optim.weight_decay is the highest tried" in said
    assert any("no interval holds the error of leaving a better setting out" in caveat for caveat in caveats(study))


QK = "options.qk_norm"
RISES = {RATES[2]: 0.1, RATES[3]: 0.0, RATES[4]: 0.1}
"""Above the loss at the best rate."""


def settings_study(
    folder: Path, shortlist: float, losses: dict[Any, list[float | None]], *, key: str = QK, **more: Any
) -> ToleranceStudy:
    """Of "ours", by setting ("": as it comes) the losses of seeds 0, 1, … at its best rate; of "base" 1.5."""
    lines = []
    for setting, of_seeds in losses.items():
        variant = {"variant": {key: setting}} if setting else {}
        for (lr, rise), (seed, loss) in itertools.product(RISES.items(), enumerate(of_seeds)):
            lines.append(line("ours", lr, seed, None if loss is None else loss + rise, **variant))
    seeds = range(1, max(map(len, losses.values())))
    lines += [line("base", lr, seed, 1.5 + rise) for lr, rise in RISES.items() for seed in (0, *seeds)]
    asked = {"tune": {key: [name for name in losses if name]}, "shortlist": shortlist}
    asked |= {"report": "neighbours", "baseline": "base"}
    return load_tolerance(make_tolerance(folder, lines, lrs=RATES[2:5], seeds=list(seeds), asked=asked, **more))


def test_the_setting_is_that_which_all_seeds_pick(tmp_path: Path) -> None:
    """Seed 0 says "a"; all together say "b", though without seed 2 it would be the strategy as it comes."""
    losses = {
        "": [2.00, 1.80, 2.00, 1.80, 1.80],
        "a": [1.70, 2.00, 2.00, 2.00, 2.00],
        "b": [1.90, 1.85, 1.00, 1.85, 1.85],
    }
    assert min(losses, key=lambda name: sum(losses[name])) == "b"
    study = settings_study(tmp_path, 0.25, losses)
    tuned = study.places[0].tuned["ours"]
    assert (tuned.setting, tuned.by_all, study.tuned_by_all) == ("options.qk_norm = b", True, "all")
    assert tuned.losses == dict(enumerate(losses["b"][1:], 1))
    text = markdown_tolerance(study)
    row = row_of(text, "Tuned: options.qk\\_norm", "ours")
    assert row[1] == r"options.qk\_norm = b"
    gains = [ours - own for ours, own in zip(losses["b"][1:], losses[""][1:], strict=True)]
    assert numbers(row[4])[0] == pytest.approx(statistics.fmean(gains), abs=6e-5)
    row = row_of(text, "Every setting that was reported, each at its own best rate", "options.qk\\_norm = a")
    assert numbers(row[1])[0] == pytest.approx(2.0)
    for setting, name in (("as it comes", ""), ("options.qk\\_norm = a", "a"), ("options.qk\\_norm = b", "b")):
        row = row_of(text, "ours's loss minus base's, by ours's setting (rows) and base's (columns)", setting)
        assert numbers(row[1])[0] == pytest.approx(statistics.fmean(losses[name][1:]) - 1.5, abs=6e-5)
    assert "that of the lowest mean loss over all seeds, of those that all tried" in " ".join(
        notes(study, grids(study))
    )
    (said,) = [caveat for caveat in caveats(study) if "the luckier is chosen" in caveat]
    assert "with every setting less than 0.25 nats above the best on seed 0" in said
    assert any("which of two equal settings was taken" in caveat for caveat in caveats(study))


def test_what_the_picking_seed_does_not_shortlist_is_left_out(tmp_path: Path) -> None:
    """ "b" is best on every reported seed, which the ledger holds of another study; "a" gets no such chance either."""
    losses = {"": [1.9, 2.0, 2.0, 2.0], "a": [1.7, 1.9, 1.9, 1.9], "b": [2.0, 1.0, 1.0, 1.0]}
    for shortlist, name in ((0.0, "a"), (0.3, "a"), (0.31, "b")):
        tuned = settings_study(tmp_path / f"{shortlist}", shortlist, losses).places[0].tuned["ours"]
        assert (tuned.setting, tuned.by_all) == (f"options.qk_norm = {name}", True)


def test_until_all_seeds_have_all_the_settings_the_picking_seed_chooses(tmp_path: Path) -> None:
    losses = {"": [1.9, 1.8, 1.8, 1.8], "a": [1.7, 2.0, 2.0, 2.0], "b": [1.8, 1.0, 1.0]}
    study = settings_study(tmp_path, 0.3, losses)
    tuned = study.places[0].tuned["ours"]
    assert (tuned.setting, tuned.by_all, study.tuned_by_all) == ("options.qk_norm = a", False, "some")
    assert set(tuned.losses.values()) == {2.0}
    assert any("Elsewhere the setting was chosen on seed 0 alone" in caveat for caveat in caveats(study))
    losses["b"].append(1.0)
    assert settings_study(tmp_path / "whole", 0.3, losses).places[0].tuned["ours"].setting == "options.qk_norm = b"


def test_a_setting_that_fails_is_no_candidate(tmp_path: Path) -> None:
    """ "a" is picked, but fails on seed 2; the strategy as it comes fails on the picking seed, and goes no further."""
    losses = {"": [None], "a": [1.80, 1.9, None, 1.9, 1.9], "b": [1.81, 1.7, 1.7, 1.7, 1.7]}
    study = settings_study(tmp_path, 0.05, losses)
    tuned = study.places[0].tuned["ours"]
    assert (tuned.setting, tuned.by_all, tuned.failed) == (f"{QK} = b", True, 0)
    assert set(tuned.losses.values()) == {1.7}
    (pair,) = study.places[0].pairs(tuned=True).values()
    assert pair.difference.value == pytest.approx(0.2)
    nothing = settings_study(tmp_path / "none", 0.05, {"": [None], "a": [None]}).places[0].tuned["ours"]
    assert (nothing.best, nothing.by_all, nothing.losses) == (None, False, {})


def test_a_screening_reports_no_setting(tmp_path: Path) -> None:
    study = settings_study(tmp_path, 0.0, {"": [2.0], "a": [1.9], "b": [1.8]})
    assert study.places[0].tuned["ours"].setting == f"{QK} = b"
    assert "Every setting that was reported" not in markdown_tolerance(study)


NAMES = ("", "a", "b")


def a_truth(number: int, mode: str) -> Callable[[Run], Point]:
    """Settings that lie within the noise or far apart, each with an optimum of its own; "flaky": edges that move with
    the seed down to the lowest rates; "dead": the strategy as it comes is stable nowhere."""
    draw = random.Random(number)
    spread, noise, curve = draw.choice((0.01, 0.05)), draw.choice((0.01, 0.03)), draw.choice((0.01, 0.1))
    optima = {name: math.exp(draw.uniform(math.log(2e-3), math.log(3e-2))) for name in NAMES}
    bottoms = {name: draw.gauss(2, spread) for name in NAMES}
    edges = {name: draw.choice((2e-3, 1e-2, 5e-2) if mode == "flaky" else (0.3, 5.0)) for name in NAMES}

    def truth(run: Run) -> Point:
        name = dict(run.setup.variant).get(QK, "")
        edge = edges[name] * math.exp(random.Random(repr((number, name, run.seed))).gauss(0, 0.5))
        loss = bottoms[name] + curve * math.log(run.lr / optima[name]) ** 2
        loss += random.Random(repr((number, name, run.lr, run.seed))).gauss(0, noise)
        stable = run.lr < edge and not (mode == "dead" and not name)
        return Point(run.lr, loss if stable else None, stable)

    return truth


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 10**6),
    st.sampled_from(["plain", "grown", "flaky", "dead"]),
    st.sampled_from(["all", "near", "around", "neighbours"]),
    st.sampled_from([0.0, 0.02, 0.1, 1.0]),
    st.sampled_from([(0,), (0, 9)]),
)
def test_what_is_planned_is_what_the_choice_needs(
    tmp_path: Path, number: int, mode: str, report: str, shortlist: float, pick: tuple[int, ...]
) -> None:
    """Once the planner wants no more, the setting is that which all seeds pick, if any is stable."""
    setups = tuple(Setup(variant=((QK, name),) if name else ()) for name in NAMES)
    group, truth, draw = Group(strategy="ours", setups=setups), a_truth(number, mode), random.Random(number)
    common: dict[str, Any] = {"title": "t", "strategies": ("ours",), "report": report, "pick": pick}
    large = ToleranceConfig(**common, lrs=(1e-3, 3e-3, 1e-2, 3e-2), seeds=(1, 2, 3), shortlist=shortlist)
    small = ToleranceConfig(**common, lrs=(1e-3, 1e-2, 1e-1), seeds=(1, 2)[: draw.randrange(3)])
    ended: dict[Run, Point] = {}
    for asked in (small, large) if mode == "grown" else (large,):
        while runs := wanted_runs(group, ended, asked):
            ended |= {run: truth(run) for run in runs}
    lines = []
    for run, point in ended.items():
        more = {"variant": dict(run.setup.variant)} if run.setup.variant else {}
        lines.append(line("ours", run.lr, run.seed, point.loss, **more))
    asked_for = {"tune": {QK: ["a", "b"]}, "shortlist": shortlist, "report": report}
    folder = make_tolerance(tmp_path, lines, lrs=large.lrs, pick=pick, seeds=large.seeds, asked=asked_for)
    study = load_tolerance(folder)
    tuned = study.places[0].tuned["ours"]
    assert not study.unfinished
    assert tuned.by_all or not any(track.whole for track in study.places[0].tracks)
    losses = {setup.variant: best_of_all(ended, setup, large) for setup in setups}
    candidates = {(), *losses} if shortlist == 1.0 else {(), tuned.variant}
    if tuned.by_all:
        assert losses[tuned.variant] == min(loss for name, loss in losses.items() if name in candidates and loss)


def best_of_all(ended: dict[Run, Point], setup: Setup, asked: ToleranceConfig) -> float | None:
    """The lowest mean loss over all seeds at the rates that all have and at which none fails; None: there is none."""
    seeds = (*asked.pick, *asked.seeds)
    by_seed = {s: {run.lr: p.loss for run, p in ended.items() if (run.setup, run.seed) == (setup, s)} for s in seeds}
    rates = set.intersection(*map(set, by_seed.values()))
    found = [losses for lr in rates if None not in (losses := [by_seed[s][lr] for s in seeds])]
    return min(map(statistics.fmean, found), default=None)


@pytest.mark.parametrize(
    ("gap", "all_seeds", "one_seed"), [(0.015, (0.92, 0.98), (0.72, 0.88)), (0.003, (0.93, 0.99), (0.89, 0.98))]
)
def test_intervals_hold_most_of_the_error_of_choosing_a_setting(
    tmp_path: Path, gap: float, all_seeds: tuple[float, float], one_seed: tuple[float, float]
) -> None:
    """Two hundred times: of three settings one is better, the same for both strategies. Intervals hold 0 if all seeds
    choose; if one does, and a wrong choice costs more than the noise, 0.01, far fewer do."""
    places = [{"optim.eps": float(number)} for number in range(1, 201)]
    choices = {"": 1.6, "a": 1.5, "b": 1.5 + gap, "c": 1.5 + gap}
    for shortlist, (fewest, most) in ((1.0, all_seeds), (0.0, one_seed)):
        draw, lines = random.Random(1), []
        for place, name, (setting, bottom) in itertools.product(places, ("base", "ours"), choices.items()):
            more = {"place": place, **({"variant": {QK: setting}} if setting else {})}
            of_seeds = [bottom + draw.gauss(0, 0.01) for _ in range(6)]
            for lr, rise in RISES.items():
                lines += [line(name, lr, seed, loss + rise, **more) for seed, loss in enumerate(of_seeds)]
        asked = {"tune": {QK: ["a", "b", "c"]}, "places": places, "shortlist": shortlist, "report": "neighbours"}
        folder = make_tolerance(tmp_path / f"{shortlist}", lines, lrs=RATES[2:5], asked=asked)
        found = [place.pairs(tuned=True)["ours"].difference for place in load_tolerance(folder).places]
        held = sum(difference.low <= 0 <= difference.high for difference in found if difference is not None)
        assert fewest * len(places) <= held <= most * len(places)


@pytest.mark.parametrize(("width", "end"), [(512, "lowest"), (2048, None), (32, "highest")])
def test_a_named_std_is_what_it_is_at_the_width_of_the_place(tmp_path: Path, width: int, end: str | None) -> None:
    """ "twin", which is best, is 0.04, 0.02 and 0.16 there, beside 0.06 and 0.09, or 0.01 and 0.09."""
    others = (0.01, 0.09) if end is None else (0.06, 0.09)
    place = {"model.d_model": width}
    lines = lines_of({"base": Bowl(4e-3, edge=6e-2)}, RATES, range(6), place=place)
    for std in others:
        worse = {"base": Bowl(4e-3, bottom=2.1, edge=6e-2)}
        lines += lines_of(worse, RATES, range(6), place=place, variant={"init.std": std})
    asked = {"tune": {"init.std": ["twin", *others]}, "places": [place], "report": "neighbours"}
    settings = {"shared": {"init.std": "twin", "model.d_model": 64}, "differing": {}, "recipe": {}}
    study = load_tolerance(make_tolerance(tmp_path, lines, lrs=RATES, asked=asked, settings=settings))
    assert study.places[0].tuned["base"].open_ends == (() if end is None else (("init.std", end),))
    said = " ".join(answer(study))
    assert (f"the chosen init.std is the {end} tried" in said) is (end is not None)
