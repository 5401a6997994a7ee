"""A reading of curvature as tables of text, the same in the terminal and on the page."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gptnorm.format import MISSING, loss_text, lr_text, short_text
from gptnorm.records import finite
from gptnorm.report.estimates import ratio_text

UNSURE = 0.1
"""Part of an eigenvalue above which its residual is told."""

Extreme = dict[str, float]
"""`value` and `residual`: a record of `gptnorm.curvature.reading.Extreme`."""


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """One table, and what its columns mean."""

    title: str
    head: list[str]
    rows: list[list[str]]
    notes: list[str]
    words: frozenset[str] = frozenset()
    """Columns of text."""


def curvature_sheets(record: dict[str, Any]) -> dict[str, Sheet]:
    """By what was measured, of a record as `gptnorm.curvature.command.Curvature.record` makes it."""
    tolerance = record["tolerance"]
    makers = {"sharpness": _sharpness, "adam": _adam, "spectrum": _spectrum, "slots": _slots, "weights": _weights}
    found = {}
    for key, make in makers.items():
        entries = [(str(reading["step"]), reading[key]) for reading in record["readings"] if reading[key]]
        if entries:
            found[key] = make(entries, tolerance)
    return found


def general_notes(record: dict[str, Any]) -> list[str]:
    """What holds for every table."""
    readings = record["readings"]
    worst = max(
        [reading["sharpness"]["difference"] for reading in readings]
        + [row["difference"] for reading in readings for row in reading["slots"]]
    )
    return [
        "residual: ‖Hv - λv‖ over the matrix's largest |λ|, the worst of the row; an eigenvalue is no further off.",
        f"*: residual above {record['tolerance']:g} of that, or {UNSURE:g} of the eigenvalue itself.",
        f"Products differ from finite differences of the gradient by {worst:.1g}, relative.",
    ]


def number_text(value: object) -> str:
    """Three digits, with the sign of a negative number."""
    number = finite(value)
    return MISSING if number is None else f"{'-' if number < 0 else ''}{ratio_text(abs(number))}"


def slot_ratio(row: dict[str, Any]) -> float | None:
    """‖C‖ / ‖L‖."""
    below = row["gauss_newton"]["value"]
    return row["curvature"]["value"] / below if below else None


Entries = list[tuple[str, Any]]
"""Step and what was read there."""


def _sharpness(entries: Entries, tolerance: float) -> Sheet:
    rows = []
    for step, s in entries:
        error = "" if s["trace_error"] is None else f" ± {number_text(s['trace_error'])}"
        ends = _ends([s["largest"], s["smallest"]], tolerance) + _ends([s["gauss_newton"]], tolerance)
        residual = _residual([s["largest"], s["smallest"]], [s["gauss_newton"]])
        trace = f"{number_text(s['trace'])}{error}"
        rows.append([step, loss_text(finite(s["loss"])), number_text(s["gradient"]), *ends, residual, trace])
    return Sheet(
        title="Sharpness",
        head=["step", "loss", "‖grad‖", "λ_max H", "λ_min H", "λ_max G", "residual", "trace H"],
        rows=rows,
        notes=["H: Hessian of the loss; G: its Gauss-Newton matrix. Trace ± standard error over random vectors."],
    )


def _adam(entries: Entries, tolerance: float) -> Sheet:
    rows = []
    for step, a in entries:
        limit = [MISSING, MISSING]
        if a["threshold"] is not None:
            limit = [number_text(a["threshold"]), number_text(a["largest"]["value"] / a["threshold"])]
        rate = short_text(a["lr"]) if a["lr"] else "0"
        seen = [*_ends([a["largest"]], tolerance), _residual([a["largest"]])]
        rows.append([step, rate, *seen, *limit, _critical(a["critical"])])
    return Sheet(
        title="As AdamW sees it",
        head=["step", "rate", "λ_max P^-½ H P^-½", "residual", "threshold", "share", "critical rate"],
        rows=rows,
        notes=[
            "P: √v̂ + ε, over the group's factor of the rate, of the update that AdamW would make on these tokens. "
            "Above the threshold, (2 + 2β₁) / ((1 - β₁) rate), a quadratic loss is unstable with P held still; share: "
            "λ_max over it.",
            "critical rate: where that update, without weight decay and with weights put back where the strategy wants "
            "them, no longer lowers their loss; from forward passes.",
        ],
    )


def _critical(found: dict[str, float | None]) -> str:
    """The middle of the bracket, or what is known of it."""
    low, high = found["low"] or 0.0, found["high"]
    if high is None:
        return f"> {short_text(low)}"
    return short_text(math.sqrt(low * high)) if low else f"< {short_text(high)}"


def _spectrum(entries: Entries, tolerance: float) -> Sheet:
    rows = [
        [
            step,
            *(f"{number_text(s[key][0])} ± {number_text(s[key][1])}" for key in ("mean", "rms", "above", "below")),
        ]
        for step, s in entries
    ]
    return Sheet(
        title="Spectrum of H",
        head=["step", "mean λ", "rms λ", "λ > 0.1 max", "λ < -0.1 max"],
        rows=rows,
        notes=[
            "Spectrum: of all eigenvalues λ the mean, the root mean square, and how many lie beyond a tenth of the "
            "largest modulus on either side; ± standard error over random vectors."
        ],
    )


def _slots(entries: Entries, tolerance: float) -> Sheet:
    rows = []
    block = _common_block([s["name"] for _, slots in entries for s in slots])
    for step, slots in entries:
        for s in slots:
            parts = [s[key] for key in ("hessian", "gauss_newton", "curvature")]
            norms = [_ends([part], tolerance)[0] for part in parts]
            unsure = ["*" if norm.endswith("*") else "" for norm in norms]
            ratio = f"{number_text(slot_ratio(s))}{unsure[1] or unsure[2]}"
            scaled = f"{number_text(s['scale_free'])}{unsure[0]}"
            residual = _residual(*([part] for part in parts))
            rows.append([step, s["name"].removeprefix(block), number_text(s["rms"]), *norms, residual, ratio, scaled])
    token = entries[0][1][0]["token"]
    where = "over the whole of the first sequence" if token is None else f"at token {token} of the first sequence"
    return Sheet(
        title=f"Slots of {block.removesuffix('.')}" if block else "Slots",
        head=["step", "slot", "RMS(x)", "‖H‖", "‖L‖", "‖C‖", "residual", "‖C‖/‖L‖", "scaled"],
        rows=rows,
        notes=[
            f"Slots: spectral norms in what each reads {where}; H = L + C, L the Gauss-Newton part, C the curvature of "
            "what follows the linear map. scaled: RMS(x)² ‖H‖."
        ],
        words=frozenset({"slot"}),
    )


def _common_block(names: Sequence[str]) -> str:
    """ "blocks.2." where that begins all of them, else nothing."""
    blocks = {match[0] if (match := re.match(r"blocks\.\d+\.", name)) else "" for name in names}
    return blocks.pop() if len(blocks) == 1 else ""


def _weights(entries: Entries, tolerance: float) -> Sheet:
    rows = []
    for step, weights in entries:
        for w in weights:
            ends, name = [w["largest"], w["smallest"]], w["name"].removesuffix(".weight")
            shown = _ends(ends, tolerance)
            numbers = [
                *shown,
                _residual(ends),
                f"{number_text(w['scale_free'])}{'*' if shown[0].endswith('*') else ''}",
            ]
            rows.append([step, name, number_text(w["norm"]), *numbers])
    return Sheet(
        title="Weights, each by itself",
        head=["step", "weight", "‖W‖", "λ_max H", "λ_min H", "residual", "‖W‖² λ_max"],
        rows=rows,
        notes=["W → cW leaves ‖W‖² λ_max alone where the length of W has no effect."],
        words=frozenset({"weight"}),
    )


def _ends(extremes: Sequence[Extreme], tolerance: float) -> list[str]:
    """Those of one matrix, each with a mark where it has not converged."""
    limit = tolerance * max(abs(extreme["value"]) for extreme in extremes)

    def unsure(extreme: Extreme) -> bool:
        # Small beside the other end, its own sign may not be known.
        return extreme["residual"] > limit or extreme["residual"] > UNSURE * abs(extreme["value"])

    return [f"{number_text(extreme['value'])}{'*' if unsure(extreme) else ''}" for extreme in extremes]


def _residual(*matrices: Sequence[Extreme]) -> str:
    """The worst of the residuals, each over the largest modulus of its matrix."""
    found = [
        max(extreme["residual"] for extreme in extremes) / scale
        for extremes in matrices
        if (scale := max(abs(extreme["value"]) for extreme in extremes))
    ]
    return lr_text(float(f"{max(found):.0e}")) if found else MISSING
