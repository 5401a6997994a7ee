"""The reports as files: complete, safe, self-contained and the same each time."""

from __future__ import annotations

import json
import math
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_folders import Outcome, make_run, make_study

from gptnorm.errors import UserError
from gptnorm.report import html as report
from gptnorm.report.run_page import tokens_per_second
from gptnorm.report.shared import environments_pairs

EVIL = '<script>alert("x")</script>&amp;'
CELLS: dict[str, dict[float, list[Outcome]]] = {
    "alpha": {1e-3: [3.31, 3.36], 1e-2: [3.12, 3.17], 1e-1: ["diverged", "diverged"]},
    "beta": {1e-3: [3.41, 3.43], 1e-2: [3.22, 3.21], 1e-1: [3.05, 3.02]},
    EVIL: {1e-3: [3.6, 3.7], 1e-2: [3.5, None], 1e-1: [5.2, 5.1]},
}


class Page(HTMLParser):
    """Reads a page: tags must nest; collects what it loads, its ids, its text and its table cells."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.raw = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.images: list[str | None] = []
        self.feed(self.raw)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = dict(attrs)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster") or "url(" in (value or ""):
                self.loads.append(value or "")
            assert not name.startswith("on")
            if name == "id":
                self.ids.append(value or "")
        if found.get("role") == "img":
            self.images.append(found.get("aria-label"))
        if tag not in ("meta", "br", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "title"):
            self.text += data


@pytest.fixture(scope="module")
def study_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_study(tmp_path_factory.mktemp("study"), CELLS, runs=True, title=f"Title {EVIL}", command=EVIL)
    report.write_study_report(folder)
    return folder


@pytest.fixture(scope="module")
def page(study_folder: Path) -> Page:
    return Page(study_folder / "report.html")


def test_loads_nothing(page: Page) -> None:
    assert page.loads, "the plots refer to their own parts"
    assert all(load.startswith("#") or "url(#" in load for load in page.loads)
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(page.tags)
    style = page.raw[page.raw.index("<style>") : page.raw.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page.raw)
    assert "http://" not in without_namespaces
    assert "https://" not in without_namespaces


def test_names_are_escaped(page: Page) -> None:
    assert page.text.count(EVIL) >= 4
    assert all(f'"{name}"' in page.raw for name in page.ids[:3])


def test_ids_are_unique_and_references_resolve(page: Page) -> None:
    assert len(page.ids) == len(set(page.ids))
    used = {name for load in page.loads for name in re.findall(r"#([\w-]+)", load)}
    assert used <= set(page.ids)


def test_every_number_of_the_table_is_there(page: Page) -> None:
    for row in CELLS.values():
        for cell in row.values():
            losses = [loss for loss in cell if isinstance(loss, float)]
            if "diverged" in cell:
                assert "diverged (2 of 2)" in page.text
                continue
            assert f"{statistics.fmean(losses):.4f}" in page.text
            if len(losses) > 1:
                assert f"± {statistics.stdev(losses):.4f}" in page.text
    gap = [3.12 - 3.05, 3.17 - 3.02]
    half = 12.7062 * statistics.stdev(gap) / 2**0.5
    assert f"{statistics.fmean(gap):.4f}" in page.text
    assert f"{statistics.fmean(gap) - half:.4f} to {statistics.fmean(gap) + half:.4f}" in page.text
    assert not re.search(r"\b(nan|inf)\b", page.text, re.IGNORECASE)


def test_says_what_a_reader_needs(page: Page) -> None:
    for part in (
        "beta reached the lowest validation loss",
        "For beta the best is the highest learning rate tried",
        "partial: 17 of 18",
        "optim.warmup",
        "f00dfeed",
        "0123abc",
        "2.13.0",
        "1 h 12 min",
        "Made by gptnorm",
        "picked on the same seeds",
    ):
        assert part in page.text, part
    headings = [tag for tag in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert headings[0] == "h1"
    assert headings.count("h1") == 1
    assert set(headings) == {"h1", "h2"}
    assert len(page.images) == 2 + len(CELLS)
    assert all(page.images)


def test_same_bytes_again(study_folder: Path) -> None:
    before = (study_folder / "report.html").read_bytes()
    assert report.write_study_report(study_folder).read_bytes() == before
    assert not list(study_folder.glob(".report*")), "nothing is left beside it"


def test_runs_are_linked_where_they_have_a_report(tmp_path: Path) -> None:
    make_study(tmp_path, {"a": {1e-3: [3.0], 1e-2: [2.0]}}, runs=True)
    report.write_run_report(tmp_path / "runs" / "0-0.001-0")
    loads = Page(report.write_study_report(tmp_path)).loads
    assert [load for load in loads if "#" not in load] == ["runs/0-0.001-0/report.html"]


def test_a_study_without_any_outcome_or_run_still_has_a_page(tmp_path: Path) -> None:
    make_study(tmp_path, {"a": {1e-3: [None, None]}, "b": {1e-3: [None, None]}})
    assert "nothing to compare yet" in Page(report.write_study_report(tmp_path)).text


def test_every_cell_diverged(tmp_path: Path) -> None:
    make_study(tmp_path, {"a": {1e-3: ["diverged"], 1e-2: ["diverged"]}}, runs=True)
    assert "2 of 2 runs diverged" in Page(report.write_study_report(tmp_path)).text


def test_run_report(tmp_path: Path) -> None:
    make_run(tmp_path / "run", final=3.21)
    page = Page(report.write_run_report(tmp_path / "run"))
    for part in ("finished", "3.2100 nats", "8,192 tokens per second", "optim.betas", "[0.9, 0.95]", "0123abc"):
        assert part in page.text, part
    assert "diverged" not in page.text
    first = page.raw
    assert report.write_run_report(tmp_path / "run").read_text(encoding="utf-8") == first


def test_diverged_run_tells_why(tmp_path: Path) -> None:
    make_run(tmp_path / "run", final=None, status="diverged")
    text = Page(report.write_run_report(tmp_path / "run")).text
    assert "This run diverged. Reason: loss is not finite" in text
    assert not re.search(r"\bnan\b", text, re.IGNORECASE)


def test_killed_run(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", final=3.0)
    (folder / "status.json").write_text(json.dumps({"status": "running", "step": 40, "val_loss": None, "reason": None}))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "split": "tra')
    text = Page(report.write_run_report(folder)).text
    assert "still going, or it was killed" in text


def test_where_a_run_went_on(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", final=3.0)
    known = json.loads((folder / "environment.json").read_text())
    parts = [
        {"step": 40, **known, "started": "later", "device": "another"},
        {"step": 50, **known, "started": "last", "device": "another", "settings": ["train.accumulate=2"]},
    ]
    (folder / "environment.json").write_text(json.dumps({**known, "resumed": parts}))
    text = Page(report.write_run_report(folder)).text
    assert re.search(
        r"Resumed at step 40(Started: later; Device: another|Device: another; Started: later)Resumed", text
    )
    assert "Resumed at step 50Started: last; settings: train.accumulate=2Made by" in text


def test_bare_run(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    assert "unknown" in Page(report.write_run_report(tmp_path)).text
    with pytest.raises(UserError, match="no run to report"):
        report.write_run_report(tmp_path / "elsewhere")


def test_speed_skips_the_first_line_and_a_restarted_clock() -> None:
    def line(tokens: float, seconds: float) -> dict[str, object]:
        return {"split": "train", "tokens": tokens, "seconds": seconds}

    steady = [line(100, 60.0), line(200, 61.0), line(300, 62.0), line(400, 1.0), line(500, 2.0)]
    assert tokens_per_second(steady) == pytest.approx(100.0)
    assert tokens_per_second(steady[:1]) is None
    assert tokens_per_second([line(1, math.nan), line(2, 1.0)]) is None


def test_of_a_second_environment_what_differs_is_told() -> None:
    first = {"commit": "abc", "python": "3.11", "threads": 1, "train.device": "cpu"}
    pairs = environments_pairs([first, {**first, "commit": "def", "train.compile": True}, first])
    assert pairs == [
        ("Commit", "abc"),
        ("Python", "3.11"),
        ("Threads", "1"),
        ("train.device", "cpu"),
        ("Also made with", "Commit: def; train.compile: true"),
        ("Also made with", ""),
    ]
    assert environments_pairs([]) == []
