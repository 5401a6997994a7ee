"""The page of a reading of curvature: complete, safe, and there for odd numbers too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_html import EVIL, Page

from gptnorm.report.curvature_page import curvature_page
from gptnorm.report.curvature_tables import curvature_sheets


def extreme(value: float, residual: float = 0.0) -> dict[str, float]:
    return {"value": value, "residual": residual}


def reading(step: int, **changes: Any) -> dict[str, Any]:
    slot = {
        "name": "blocks.1.attn.q",
        "token": 8,
        "rms": 2.0,
        "hessian": extreme(0.5),
        "gauss_newton": extreme(0.25),
        "curvature": extreme(0.75),
        "difference": 3e-6,
        "scale_free": 2.0,
    }
    return {
        "step": step,
        "sharpness": {
            "parameters": 1234,
            "loss": 4.25,
            "gradient": 1.5,
            "largest": extreme(8.0),
            "smallest": extreme(-2.0),
            "gauss_newton": extreme(7.0),
            "trace": 30.0,
            "trace_error": 4.0,
            "products": 60,
            "difference": 2e-5,
        },
        "adam": None,
        "spectrum": {
            "values": [[-2.0, 0.0, 8.0], [-1.5, 0.1, 7.5]],
            "weights": [[0.1, 0.8, 0.1], [0.1, 0.85, 0.05]],
            "mean": [0.5, 0.1],
            "rms": [2.5, 0.2],
            "above": [12.0, 3.0],
            "below": [5.0, 1.0],
        },
        "weights": [
            {
                "name": "blocks.1.attn.q.weight",
                "norm": 3.0,
                "largest": extreme(2.0),
                "smallest": extreme(-1.0),
                "scale_free": 18.0,
            }
        ],
        "slots": [slot, slot | {"name": "blocks.1.attn.k", "gauss_newton": extreme(0.0)}],
    } | changes


def record(*readings: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "source": EVIL,
        "text": EVIL,
        "sequences": 2,
        "seq_len": 16,
        "dtype": "fp64",
        "part": EVIL,
        "tolerance": 1e-3,
        "readings": list(readings),
        "config": {"model": {"strategy": "alpha", "backbone": "llama2"}},
        "environment": {"device": "d", "torch": "2.13.0"},
    } | changes


def write(tmp_path: Path, value: dict[str, Any]) -> Page:
    path = tmp_path / "curvature.html"
    path.write_text(curvature_page(value), encoding="utf-8")
    return Page(path)


def test_a_run_at_several_steps(tmp_path: Path) -> None:
    critical = {"low": 0.04, "high": 0.09, "passes": 12}
    adam = {"parameters": 5, "lr": 1e-2, "largest": extreme(950.0), "threshold": 3800.0, "critical": critical}
    readings = [reading(0), reading(50, adam=adam), reading(1200, adam=adam | {"lr": 0.0, "threshold": None})]
    page = write(tmp_path, record(*readings))
    assert all(load.startswith("#") or "url(#" in load for load in page.loads)
    assert "script" not in page.tags
    assert len(page.ids) == len(set(page.ids))
    assert EVIL in page.text
    assert "alpha, at steps 0 to 1,200" in page.text
    for words in (
        "8.00",
        "-2.00",
        "30.0 ± 4.00",
        "0.25",
        "12.0 ± 3.00",
        "2e-05",
        "18.0",
        "Slots of blocks.1",
        "attn.q",
    ):
        assert words in page.text, words
    images = [alt.split(" of ")[0].split(" over ")[0] for alt in page.images if alt]
    assert images == [
        "Ends",
        "Loss on these tokens",
        "λ_max as AdamW sees it",
        *["Density"] * 3,
        "Spectral norms",
        "‖C‖ / ‖L‖",
        "RMS(x)² ‖H‖",
    ]
    assert curvature_page(record(*readings)) == page.raw


def test_a_recipe_at_initialisation_has_only_what_was_asked_for(tmp_path: Path) -> None:
    page = write(tmp_path, record(reading(0, spectrum=None, weights=[], slots=[])))
    assert "alpha, at initialisation" in page.text
    assert not page.images
    for words in ("AdamW", "Spectrum", "Slots", "Weights"):
        assert words not in page.text, words


@pytest.mark.parametrize("values", [[[0.0, 0.0]], [[5.0, 5.0]], [[-1e-30, 1e-30]], [[-1e30, 1e30]]])
def test_spectra_take_what_comes(tmp_path: Path, values: list[list[float]]) -> None:
    spectrum = reading(0)["spectrum"] | {"values": values, "weights": [[0.5, 0.5]]}
    ends = {"largest": extreme(values[0][1]), "smallest": extreme(values[0][0])}
    sharpness = reading(0)["sharpness"] | ends
    assert len(write(tmp_path, record(reading(0, spectrum=spectrum, sharpness=sharpness))).images) == 2


def test_a_linear_model_has_no_curvature_to_draw(tmp_path: Path) -> None:
    nothing = dict.fromkeys(("hessian", "gauss_newton", "curvature"), extreme(0.0))
    slots = [reading(0)["slots"][0] | nothing]
    page = write(tmp_path, record(reading(7, slots=slots, spectrum=None)))
    assert "alpha, after 7 steps" in page.text
    assert not page.images


def test_marks_and_residuals() -> None:
    """A residual above the tolerance of the largest modulus, or above a tenth of the value, is marked."""
    ends = {"largest": extreme(8.0, 0.007), "smallest": extreme(-0.05, 0.006), "gauss_newton": extreme(7.0, 0.0071)}
    (row,) = curvature_sheets(record(reading(0, sharpness=reading(0)["sharpness"] | ends)))["sharpness"].rows
    assert row[3:7] == ["8.00", "-0.0500*", "7.00*", "1e-3"]
    (slots, _) = curvature_sheets(record(reading(0)))["slots"].rows
    assert slots == ["0", "attn.q", "2.00", "0.500", "0.250", "0.750", "0", "3.00", "2.00"]
    apart = [reading(0)["slots"][0], reading(0)["slots"][1] | {"name": "blocks.0.attn.k"}]
    sheet = curvature_sheets(record(reading(0, slots=apart)))["slots"]
    assert (sheet.title, [row[1] for row in sheet.rows]) == ("Slots", ["blocks.1.attn.q", "blocks.0.attn.k"])
    assert sheet.rows[1][7] == "–", "‖C‖ over nothing is no number"
