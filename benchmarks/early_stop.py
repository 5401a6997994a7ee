"""What could ending hopeless runs early save? An upper bound from what ledgers say of runs that came to their end.

    python benchmarks/early_stop.py docs/results

For every tolerance study of 60 runs or more in the folder: how many runs ended unstable though finite (one that turns
non-finite ends there anyway), and their share of the time that all runs took: what a rule would save that knew at the
first step which runs will fail. No rule does. One that looks half way saves half as much at most, and takes a run that
would have recovered for a failure, which moves the edge down.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from gptnorm.report import ToleranceStudy, load_any
from gptnorm.report.track import Track, Trial
from gptnorm.study.measures import judged

RUNS = 60


@dataclass(frozen=True, kw_only=True)
class Failures:
    """What a study spent on runs that failed."""

    study: str
    edges: bool
    """Whether it looks for them."""
    runs: int
    failed: int
    share: float
    """Of the time."""


def failed(track: Track) -> list[Trial]:
    """Its runs that came to their end and were not stable, each seed's judged by that seed's own best."""
    found = []
    for seed in {trial.cell.seed for trial in track.trials}:
        trials = {trial.point.lr: trial for trial in track.trials if trial.cell.seed == seed}
        curve = judged([trials[lr].point for lr in sorted(trials)], track.worse)
        found += [trials[point.lr] for point in curve if not point.stable and trials[point.lr].cell.finished]
    return found


def failures(root: Path) -> Iterator[Failures]:
    """Of every study there that is large enough."""
    for path in sorted(root.glob("*/study.json")):
        study = load_any(path.parent)
        if not isinstance(study, ToleranceStudy):
            continue
        tracks = [track for place in study.places for track in place.tracks]
        trials = [trial for track in tracks for trial in track.trials]
        if len(trials) >= RUNS:
            lost = [trial for track in tracks for trial in failed(track)]
            yield Failures(
                study=path.parent.name,
                edges=study.follows_rates,
                runs=len(trials),
                failed=len(lost),
                share=_seconds(lost) / _seconds(trials),
            )


def _seconds(trials: list[Trial]) -> float:
    return sum(trial.cell.seconds or 0.0 for trial in trials)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="where the ledgers are kept: docs/results")
    table = Table(title="Runs that ended unstable though finite")
    for head in ("study", "looks for edges", "runs", "such", "share of time"):
        table.add_column(head, justify="left" if head == "study" else "right")
    for found in failures(parser.parse_args().root):
        edges = "yes" if found.edges else "no"
        table.add_row(found.study, edges, str(found.runs), str(found.failed), f"{100 * found.share:.0f} %")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
