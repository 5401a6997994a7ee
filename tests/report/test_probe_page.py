"""The page of a probe and the watch's part of a run's page: complete, safe, and there for odd data too."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from report_folders import make_run
from test_html import EVIL, Page

from gptnorm.report import html as report
from gptnorm.report.panels import Panel, draw
from gptnorm.report.probe_page import probe_page


def record(blocks: int = 3, **changes):
    slot = {"raw": 1.0, "used": 0.5, "grad": 0.25, "weight": 0.125}
    block = {
        "stream": 1.5,
        "attn": 0.5,
        "ffn": 0.75,
        "slots": {role: slot for role in ("q", "k", "v", "o", "up", "down")},
        "norms": {},
        "grad": 3.0,
        "q_over_v": 0.5,
        "k_over_v": None,
        "cosine": 0.9,
        "token_cosine": 0.1,
        "logit_bound": [4.0, None],
        "logit_max": [2.0, 3.0],
    }
    return {
        "source": EVIL,
        "step": 0,
        "text": EVIL,
        "sequences": 2,
        "seq_len": 16,
        "dtype": "fp32",
        "loss": 4.25,
        "max_variance": 2.25,
        "gradient_ratio": None,
        "start": 1.0,
        "start_token_cosine": 0.0,
        "norms": {},
        "ends": {"embed": slot | {"raw": None, "used": None}},
        "blocks": [block | {"grad": 10.0 ** (-4 * i)} for i in range(blocks)],
        "config": {"model": {"strategy": "alpha", "backbone": "llama2"}},
        "environment": {"device": "d", "torch": "2.13.0"},
    } | changes


def write(tmp_path: Path, value) -> Page:
    path = tmp_path / "probe.html"
    path.write_text(probe_page(value), encoding="utf-8")
    return Page(path)


def test_probe_page_is_complete_and_safe(tmp_path: Path) -> None:
    page = write(tmp_path, record())
    assert all(load.startswith("#") or "url(#" in load for load in page.loads)
    assert "script" not in page.tags
    assert len(page.ids) == len(set(page.ids))
    assert EVIL in page.text
    assert "alpha, at initialisation" in page.text
    for number in ("4.2500", "2.25", "1.50", "0.900", "4.00", "1.00e-08"):
        assert number in page.text, number
    assert len(page.images) == 8
    assert all(page.images)
    assert "mathdefault" not in page.raw, "ticks of logarithmic axes are plain text"
    assert probe_page(record()) == page.raw


def test_probe_page_of_one_block_after_training(tmp_path: Path) -> None:
    assert "alpha, after 1,200 steps" in write(tmp_path, record(blocks=1, step=1200)).text


@pytest.mark.parametrize(
    "values", [[1.0, 2.0], [0.0, 0.0], [1e-30, 1e30], [-1.0, 5.0], [None, 1.0], [math.nan, math.inf, 1.0], [0.0, 1e9]]
)
def test_panels_take_what_comes(values) -> None:
    panel = Panel(name="x", title="t", x_label="step", x=range(len(values)), lines={"a": values, "b": [None]}, alt="a")
    assert "<svg" in (draw(panel, "p") or "")


def test_panels_without_a_number_are_left_out() -> None:
    panel = Panel(name="x", title="t", x_label="step", x=[1], lines={"a": [None], "b": [math.nan]}, alt="a")
    assert draw(panel, "p") is None


def reading(step: int, blocks: int = 9):
    column = [float(i + step) for i in range(blocks)]
    keys = ("stream_norm", "stream_rms", "attn_norm", "ffn_norm", "attn_variance", "ffn_variance", "cosine")
    return {
        "step": step,
        **dict.fromkeys((*keys, "token_cosine", "logit_bound", "logit_max"), column),
        "gains": {"attn.q": {"mean": column, "max": [None, *column[1:]]}},
        "update": {"blocks": [1, 9], "ends": {"embed": 1e-3}, "roles": {"q": [1e-3, 2e-3]}},
    }


def test_run_page_shows_the_watch(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", final=3.21)
    plain = Page(report.write_run_report(folder))
    assert "Norms while training" not in plain.text
    lines = [reading(1), reading(50), {"step": 60}, reading(100) | {"gains": {}, "update": {}, "cosine": [None] * 9}]
    (folder / "watch.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 1')
    page = Page(report.write_run_report(folder))
    assert "Norms while training" in page.text
    assert "Every block at step 100" in page.text
    assert "108" in page.text, "block 9 at the last reading"
    assert len(page.images) == len(plain.images) + 5 + 6
    assert len(page.ids) == len(set(page.ids))
    # Six of nine blocks, the first and the last among them.
    alts = [alt for alt in page.images if alt and alt.startswith("Norm of the stream")]
    assert len(alts) == 1
    assert alts[0].count("block ") == 6
    assert "block 1, " in alts[0]
    assert "block 9." in alts[0]


def test_run_page_without_a_whole_reading(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", final=3.21)
    (folder / "watch.jsonl").write_text('{"step": 1, "stream_norm"')
    assert "Norms while training" not in Page(report.write_run_report(folder)).text


def gauged(step: int, **changes: object) -> dict[str, object]:
    numbers = {"hessian": 2e-3, "gauss_newton": 1e-3, "curvature": 4e-3}
    return {
        "step": step,
        "split": "train",
        "loss": 3.0,
        "seconds": 10.0 * step,
        "hessian_max": 12.0,
        "adam_sharpness": 900.0,
        "adam_threshold": 3800.0,
        "slots": {f"blocks.2.{name}": numbers for name in ("attn.q", "ffn.<up>")},
        "gauge_seconds": 2.0,
        "gauge_steps": 8.0,
        **changes,
    }


def test_run_page_shows_the_gauge(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", final=3.21)
    plain = Page(report.write_run_report(folder))
    assert "Curvature while training" not in plain.text
    early = gauged(1)
    del early["adam_sharpness"], early["adam_threshold"], early["gauge_steps"]
    odd = {"step": 4, "split": "train", "loss": 3.0, "gauge_refused": "too <rough>", "gauge_seconds": 2.0}
    broken = gauged(5, slots=7, adam_sharpness="x", hessian_max=1.0)
    lines = [early, gauged(2), gauged(3), odd, broken, gauged(10, slots={"blocks.2.attn.q": None})]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))
    page = Page(report.write_run_report(folder))
    assert "Curvature while training" in page.text
    assert len(page.images) == len(plain.images) + 6
    # Twelve seconds of the 100 of step 10.
    assert "A reading took the time of 8.00 steps on average, all 6 readings 12.0% of training time." in page.text
    assert "No reading at step 4: too <rough>." in page.text
    assert len(page.ids) == len(set(page.ids))


def test_run_page_where_every_reading_was_refused(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", final=3.21)
    plain = Page(report.write_run_report(folder))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 1, "split": "train", "loss": 3.0, "gauge_refused": "no"}) + "\n")
    page = Page(report.write_run_report(folder))
    assert "No reading at step 1: no." in page.text
    assert len(page.images) == len(plain.images)
