"""Curvature through training at laptop size: docs/results/curvature.md.

    python benchmarks/curvature_training.py docs/results [--runs FOLDER] [--write-only]

Five strategies, each at the best rate of docs/results/tolerance.md, five seeds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from curvature_runs import Subject, measure

RATES = {
    "prenorm": "1e-2",
    "prenorm_qknorm": "1e-2",
    "simplenorm": "1.73e-2",
    "spannorm": "1e-2",
    "angpt": "5.48e-2",
}
SEEDS = (1, 2, 3, 4, 5)
STEPS = (0, 50, 100, 200, 400)
MEASURED = (
    "--step",
    ",".join(map(str, STEPS)),
    "--what",
    "sharpness,adam,slots",
    "--dtype",
    "fp64",
    "--tolerance",
    "1e-2",
    "train.batch_size=4",
)


def subjects() -> list[Subject]:
    """Seed by seed, so that what is there at any time is balanced."""
    return [
        Subject(
            recipe=f"laptop/{strategy}",
            seed=seed,
            settings=(f"optim.lr={rate}", "checkpoint.every=50", "checkpoint.keep=100"),
            measured=MEASURED,
            name=f"{strategy}-{seed}",
        )
        for seed in SEEDS
        for strategy, rate in RATES.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs/curvature"))
    parser.add_argument("--write-only", action="store_true")
    given = parser.parse_args()
    readings = given.results / "curvature"
    if not given.write_only:
        measure(subjects(), given.runs, readings)


if __name__ == "__main__":
    main()
