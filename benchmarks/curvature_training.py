"""Curvature through training at laptop size: the tables and figures of docs/results/curvature.md.

    python benchmarks/curvature_training.py docs/results [--runs FOLDER] [--write-only]

Five strategies, each at the best rate of docs/results/tolerance.md, three seeds; spectra of the first seed.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from curvature_runs import Subject, fill, header, load, measure, row

from gptnorm.files import write_atomic
from gptnorm.format import MISSING
from gptnorm.report.curvature_plots import spectrum
from gptnorm.report.curvature_tables import curvature_sheets, slot_ratio
from gptnorm.report.estimates import ratio_text
from gptnorm.report.panels import Panel, draw
from gptnorm.study.measures import Estimate, geometric_mean, mean_of

RATES = {
    "prenorm": "1e-2",
    "prenorm_qknorm": "1e-2",
    "simplenorm": "1e-2",
    "spannorm": "1e-2",
    "angpt": "5.48e-2",
}
SEEDS = (1, 2, 3)
STEPS = (0, 50, 100, 200, 400)
LOSSES = (2.6, 2.4, 2.2, 2.0, 1.8)
"""At which strategies are compared, in nats."""
HOW = ("--dtype", "fp64", "--tolerance", "1e-2", "train.batch_size=4")
MEASURED = ("--step", ",".join(map(str, STEPS)), "--what", "sharpness,adam,slots", *HOW)
SPECTRA = (0, 100, 400)

Reading = dict[str, Any]
Value = Callable[[Reading], float | None]


def subjects() -> list[Subject]:
    """Seed by seed, so that what is there at any time is balanced."""

    def of(strategy: str, seed: int, name: str, measured: tuple[str, ...]) -> Subject:
        settings = (f"optim.lr={RATES[strategy]}", "checkpoint.every=50", "checkpoint.keep=100")
        recipe, run = f"laptop/{strategy}", f"{strategy}-{seed}"
        return Subject(recipe=recipe, seed=seed, settings=settings, measured=measured, run=run, name=name)

    every = [of(strategy, seed, f"{strategy}-{seed}", MEASURED) for seed in SEEDS for strategy in RATES]
    steps = ("--step", ",".join(map(str, SPECTRA)))
    spectra = [
        of(strategy, SEEDS[0], f"{strategy}-spectrum", (*steps, "--what", "spectrum", *HOW)) for strategy in RATES
    ]
    return every + spectra


def tables(found: dict[str, dict[str, list[Reading]]]) -> str:
    """By strategy and seed the readings, as Markdown."""
    values: dict[str, Value] = {
        "λ_max of H": lambda r: r["sharpness"]["largest"]["value"],
        "-λ_min of H": lambda r: -r["sharpness"]["smallest"]["value"],
        "λ_max of G": lambda r: r["sharpness"]["gauss_newton"]["value"],
        "λ_max of P^-½ H P^-½": lambda r: r["adam"]["largest"]["value"] if r["adam"] else None,
    }
    lines, head = [], header(["strategy", *(f"at {loss} nats" for loss in LOSSES)])
    for title, value in values.items():
        lines += [f"**{title}, at equal loss**\n", head]
        for strategy, seeds in found.items():
            cells = [_cell([_at_loss(readings, value, loss) for readings in seeds.values()]) for loss in LOSSES]
            lines.append(row([_name(strategy), *cells]))
        lines.append("")
    for baseline in ("prenorm", "prenorm_qknorm"):
        lines += [f"**λ_max of H over {_name(baseline)}'s, at equal loss, paired by seed**\n", head]
        for strategy, seeds in found.items():
            pairs = list(zip(seeds.values(), found[baseline].values(), strict=True))
            cells = [
                _cell([_ratio(ours, theirs, values["λ_max of H"], loss) for ours, theirs in pairs]) for loss in LOSSES
            ]
            if strategy != baseline:
                lines.append(row([_name(strategy), *cells]))
        lines.append("")
    lines += ["**λ_max as AdamW sees it, over its threshold**\n", header(["strategy", *_steps(STEPS[1:])])]
    for strategy, seeds in found.items():
        cells = [_cell([_share(_at(readings, step)) for readings in seeds.values()]) for step in STEPS[1:]]
        lines.append(row([_name(strategy), *cells]))
    lines += ["", "**Loss on the tokens measured**\n", header(["strategy", *_steps(STEPS)])]
    for strategy, seeds in found.items():
        means = [mean_of([_at(readings, step)["sharpness"]["loss"] for readings in seeds.values()]) for step in STEPS]
        lines.append(row([_name(strategy), *(f"{mean.value:.3f}" for mean in means)]))
    by_slot: list[tuple[str, Value, Sequence[int]]] = [
        ("‖C‖ / ‖L‖", slot_ratio, STEPS),
        ("RMS(x)² ‖H‖", lambda slot: slot["scale_free"], (STEPS[0], STEPS[-1])),
    ]
    for title, value, steps in by_slot:
        lines += ["", f"**{title} of each slot of block 2**\n", header(["strategy", "slot", *_steps(steps)], words=2)]
        for strategy, seeds in found.items():
            for slot in [slot["name"] for slot in next(iter(seeds.values()))[0]["slots"]]:
                cells = [_cell([_of_slot(_at(r, step), slot, value) for r in seeds.values()]) for step in steps]
                if set(cells) != {MISSING}:
                    lines.append(row([_name(strategy), _name(slot.removeprefix("blocks.2.")), *cells]))
    return "\n".join(lines) + "\n"


def spectrum_table(spectra: dict[str, dict[str, Any]]) -> str:
    """As Markdown."""
    lines = []
    for strategy, record in spectra.items():
        sheet = curvature_sheets(record)["spectrum"]
        lines = lines or [header(["strategy", *sheet.head])]
        lines += [row([_name(strategy), *cells]) for cells in sheet.rows]
    return "\n".join(lines) + "\n"


def figures(found: dict[str, dict[str, list[Reading]]], spectra: dict[str, dict[str, Any]]) -> dict[str, str]:
    """SVG by name of the file."""

    def panel(name: str, title: str, lines: dict[str, list[float | None]], steps: Sequence[int]) -> str:
        return draw(Panel(name=name, title=title, x_label="step", x=steps, lines=lines, alt=title), "c") or ""

    def middle(value: Value, steps: Sequence[int]) -> dict[str, list[float | None]]:
        return {
            strategy: [_middle([value(_at(r, step)) for r in seeds.values()]) for step in steps]
            for strategy, seeds in found.items()
        }

    def largest(reading: Reading) -> float:
        return reading["sharpness"]["largest"]["value"]

    drawn = {
        "sharpness": panel("s", "λ_max of the Hessian", middle(largest, STEPS), STEPS),
        "adam": panel("a", "λ_max as AdamW sees it, over its threshold", middle(_share, STEPS[1:]), STEPS[1:]),
    }
    for strategy, seeds in found.items():
        slots = [slot["name"] for slot in next(iter(seeds.values()))[0]["slots"]]
        lines = {
            slot.removeprefix("blocks.2."): [
                _middle([_of_slot(_at(r, step), slot, slot_ratio) for r in seeds.values()]) for step in STEPS
            ]
            for slot in slots
        }
        drawn[f"ratio-{strategy}"] = panel("r", f"‖C‖ / ‖L‖: {strategy}", lines, STEPS)
    for strategy, record in spectra.items():
        for reading in record["readings"]:
            drawn[f"spectrum-{strategy}-{reading['step']}"] = spectrum(reading, "p")
    return {name: svg for name, svg in drawn.items() if svg}


def _at(readings: Sequence[Reading], step: int) -> Reading:
    return next(reading for reading in readings if reading["step"] == step)


def _ratio(ours: Sequence[Reading], theirs: Sequence[Reading], value: Value, loss: float) -> float | None:
    our, their = (_at_loss(readings, value, loss) for readings in (ours, theirs))
    return our / their if our is not None and their else None


def _at_loss(readings: Sequence[Reading], value: Value, loss: float) -> float | None:
    """Where the loss first falls to that, ln(value) being a line in the loss from one checkpoint to the next."""
    for before, after in itertools.pairwise(readings):
        high, low = before["sharpness"]["loss"], after["sharpness"]["loss"]
        if high >= loss >= low:
            first, second = value(before), value(after)
            if first is None or second is None or first <= 0 or second <= 0:
                return None
            part = (high - loss) / (high - low)
            return math.exp((1 - part) * math.log(first) + part * math.log(second))
    return None


def _share(reading: Reading) -> float | None:
    seen = reading["adam"]
    return seen["largest"]["value"] / seen["threshold"] if seen and seen["threshold"] else None


def _of_slot(reading: Reading, name: str, value: Value) -> float | None:
    return next((value(slot) for slot in reading["slots"] if slot["name"] == name), None)


def _middle(values: Sequence[float | None]) -> float | None:
    found = _estimate(values)
    return None if found is None else found.value


def _estimate(values: Sequence[float | None]) -> Estimate | None:
    """Of all seeds or none: those that have a value would flatter."""
    known = [value for value in values if value is not None and value > 0]
    return geometric_mean(known) if known and len(known) == len(values) else None


def _cell(values: Sequence[float | None]) -> str:
    found = _estimate(values)
    if found is None:
        return MISSING
    if found.low is None or found.high is None:
        return ratio_text(found.value)
    return rf"{ratio_text(found.value)} \[{ratio_text(found.low)}, {ratio_text(found.high)}]"


def _steps(steps: Sequence[int]) -> list[str]:
    return [f"step {step}" for step in steps]


def _name(strategy: str) -> str:
    return strategy.replace("_", r"\_")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs/curvature"))
    parser.add_argument("--write-only", action="store_true", help="tables and figures of what is there")
    given = parser.parse_args()
    folder = given.results / "curvature"
    if not given.write_only:
        measure(subjects(), given.runs, folder)
    records = {strategy: load(folder, [f"{strategy}-{seed}" for seed in SEEDS]) for strategy in RATES}
    complete = min(map(len, records.values()))
    found = {
        strategy: {name: record["readings"] for name, record in list(seeds.items())[:complete]}
        for strategy, seeds in records.items()
    }
    spectra = {strategy: record for strategy in RATES for record in load(folder, [f"{strategy}-spectrum"]).values()}
    print(f"{complete} seeds")
    fill(given.results / "curvature.md", "training", tables(found))
    fill(given.results / "curvature.md", "spectrum", spectrum_table(spectra))
    for name, svg in figures(found, spectra).items():
        write_atomic(folder / f"{name}.svg", svg + "\n")


if __name__ == "__main__":
    main()
