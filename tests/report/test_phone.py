"""The page of a study in a real browser as narrow as a phone; skipped where there is no Chromium."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from tolerance_folders import RATES, Bowl, lines_of, make_tolerance

from gptnorm.report.html import write_study_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MEASURE = """<script>
document.querySelectorAll("details").forEach(part => part.open = true);
parent.postMessage(`${document.documentElement.scrollWidth} of ${window.innerWidth}`, "*");
</script>"""
FRAME = """<title>nothing</title><script>onmessage = event => document.title = event.data;</script>
<iframe src="measured.html" width={width} height=844 style="border: 0"></iframe>"""
"""A window of its own is never narrower than 500 pixels."""


SHIPPED = Path(__file__).parents[2] / "docs" / "results"


def long_names(place: Path) -> Path:
    """A study of one place, one of its strategies with a name that no line breaks."""
    names = ("prenorm", "prenorm_qknorm", "simplenorm", "a_strategy_whose_name_is_rather_long")
    bowls = {name: Bowl(4e-3, bottom=2.0 - 0.01 * k, edge=3e-2 * 2**k) for k, name in enumerate(names)}
    return make_tolerance(place, lines_of(bowls, RATES, range(6)), lrs=RATES)


def shipped(name: str, place: Path) -> Path:
    """A copy of a ledger of docs/results."""
    for file in ("study.json", "cells.jsonl"):
        shutil.copy(SHIPPED / name / file, place)
    return place


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize(
    ("study", "width"),
    [
        (None, 390),
        (None, 1200),
        *((name, 390) for name in ("tolerance", "width-depth-map-tuned", "scaling", "texts", "width")),
    ],
)
def test_nothing_stands_out_at_the_side(tmp_path: Path, study: str | None, width: int) -> None:
    """With every part open; tables that are wider scroll by themselves."""
    page = write_study_report(long_names(tmp_path) if study is None else shipped(study, tmp_path))
    (tmp_path / "measured.html").write_text(page.read_text().replace("</body>", MEASURE + "</body>"))
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(width=width))
    assert CHROMIUM is not None
    words = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    words += ["--window-size=1400,900", "--virtual-time-budget=5000", "--dump-dom", frame.as_uri()]
    shown = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120).stdout
    found = re.search(r"<title>(\d+) of (\d+)</title>", shown)
    assert found is not None
    assert int(found[2]) == width
    assert int(found[1]) <= width
