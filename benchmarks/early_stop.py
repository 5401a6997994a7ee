"""What could ending hopeless runs early save? An upper bound from what ledgers say of runs that came to their end.

    python benchmarks/early_stop.py docs/results

For every tolerance study of 60 runs or more in the folder: how many runs ended unstable though finite (one that turns
non-finite ends there anyway), and their share of the time that all runs took: what a rule would save that knew at the
first step which runs will fail. No rule does. One that looks half way saves half as much at most, and takes a run that
would have recovered for a failure, which moves the edge down.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from gptnorm.report import is_tolerance, load_tolerance
from gptnorm.report.track import Track, Trial
from gptnorm.study.measures import judged

RUNS = 60


def failed(track: Track) -> list[Trial]:
    """Its runs that came to their end and were not stable, each seed's judged by that seed's own best."""
    found = []
    for seed in {trial.cell.seed for trial in track.trials}:
        trials = {trial.point.lr: trial for trial in track.trials if trial.cell.seed == seed}
        curve = judged([trials[lr].point for lr in sorted(trials)], track.worse)
        found += [trials[point.lr] for point in curve if not point.stable and trials[point.lr].cell.finished]
    return found


def seconds(trials: list[Trial]) -> float:
    """That they took together."""
    return sum(trial.cell.seconds or 0.0 for trial in trials)


def main() -> None:
    table = Table(title="Runs that ended unstable though finite")
    for head in ("study", "runs", "such", "share of time"):
        table.add_column(head, justify="left" if head == "study" else "right")
    for path in sorted(Path(sys.argv[1]).glob("*/study.json")):
        if not is_tolerance(path.parent):
            continue
        tracks = [track for place in load_tolerance(path.parent).places for track in place.tracks]
        trials = [trial for track in tracks for trial in track.trials]
        if len(trials) >= RUNS:
            lost = [trial for track in tracks for trial in failed(track)]
            share = seconds(lost) / seconds(trials)
            table.add_row(path.parent.name, str(len(trials)), str(len(lost)), f"{100 * share:.0f} %")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
