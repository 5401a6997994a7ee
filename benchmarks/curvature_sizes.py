"""How ‖C‖ / ‖L‖ goes with width, depth and training time at real activations: docs/results/curvature.md.

    python benchmarks/curvature_sizes.py docs/results [--runs FOLDER] [--write-only]

SimpleNorm, at the best rates of docs/results/fair-baselines.md, three seeds; the slots of the middle block.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from curvature_runs import Subject, fill, header, load, measure, row

from gptnorm.format import MISSING
from gptnorm.report.curvature_tables import slot_ratio
from gptnorm.report.estimates import ratio_text
from gptnorm.study.measures import geometric_mean

RATES = {(32, 4): "3e-2", (64, 4): "1e-2", (128, 4): "5.48e-3", (64, 16): "5.48e-3"}
"""By width and blocks."""
SEEDS = (1, 2, 3)
STEPS = (0, 100, 400)
MEASURED = ("--step", ",".join(map(str, STEPS)), "--what", "slots", "--tolerance", "1e-2", "train.batch_size=2")


def subjects() -> list[Subject]:
    """Size by size, since a size needs all its seeds."""

    def of(width: int, blocks: int, seed: int) -> Subject:
        name = f"d{width}-l{blocks}-{seed}"
        return Subject(
            recipe="laptop/simplenorm",
            seed=seed,
            settings=(
                f"optim.lr={RATES[width, blocks]}",
                f"model.d_model={width}",
                f"model.n_layers={blocks}",
                "checkpoint.every=100",
                "checkpoint.keep=100",
            ),
            measured=(*MEASURED, "--part", f"blocks.{blocks // 2}.attn.q"),
            run=name,
            name=name,
        )

    return [of(*size, seed) for size in RATES for seed in SEEDS]


def tables(readings: Path) -> str:
    """As Markdown, of the sizes whose seeds are all there."""
    lines = []
    for step in STEPS:
        head = header(["slot", *(f"d {width}, L {blocks}" for width, blocks in RATES)])
        lines += [f"**‖C‖ / ‖L‖ at step {step}**\n", head]
        columns = []
        for width, blocks in RATES:
            names = [f"d{width}-l{blocks}-{seed}" for seed in SEEDS]
            found = load(readings, names)
            columns.append(_ratios(list(found.values()), step) if len(found) == len(names) else {})
        slots = list(dict.fromkeys(slot for column in columns for slot in column))
        lines += [row([slot, *(column.get(slot, MISSING) for column in columns)]) for slot in slots]
        lines.append("")
    return "\n".join(lines)


def _ratios(records: list[dict[str, Any]], step: int) -> dict[str, str]:
    """By slot, the mean over seeds of the logarithm with its 95 % t-interval."""
    by_slot: dict[str, list[float]] = {}
    for record in records:
        reading = next(reading for reading in record["readings"] if reading["step"] == step)
        for slot in reading["slots"]:
            if (ratio := slot_ratio(slot)) is not None:
                by_slot.setdefault(slot["name"].split(".", 2)[2], []).append(ratio)
    found = {}
    for slot, ratios in by_slot.items():
        mean = geometric_mean(ratios)
        assert mean.low is not None
        assert mean.high is not None
        found[slot] = rf"{ratio_text(mean.value)} \[{ratio_text(mean.low)}, {ratio_text(mean.high)}]"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs/curvature-sizes"))
    parser.add_argument("--write-only", action="store_true", help="tables of what is there")
    given = parser.parse_args()
    folder = given.results / "curvature-sizes"
    if not given.write_only:
        measure(subjects(), given.runs, folder)
    fill(given.results / "curvature.md", "sizes", tables(folder))


if __name__ == "__main__":
    main()
