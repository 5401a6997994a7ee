"""A study as data: which strategy reached which loss at which learning rate.

The unit is the *entry*, one strategy at one learning rate over all seeds. Its mean stands only
where no seed diverged: a mean over the seeds that survived would flatter a learning rate that is
too high. The best learning rate of a strategy is chosen among the entries where every seed
finished. At the lowest or highest learning rate of the grid such a best is no optimum, and
`Row.at_edge` says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from gptnorm.errors import UserError, bad_value
from gptnorm.records import finite
from gptnorm.statistics import sample_sd
from gptnorm.study.schema import Facts, read_cells, read_facts


@dataclass(frozen=True, kw_only=True)
class RunLine:
    """One run of a study: a strategy, a learning rate and a seed."""

    strategy: str
    lr: float
    seed: int
    status: str
    val_loss: float | None
    """Validation loss in nats per token; None where it is missing or not finite."""
    run: str
    """The run's folder, relative to the study's."""
    seconds: float | None
    environment: int
    """Which of the study's environments it ran in."""
    parameters: int | None
    signal: Mapping[str, Any]
    """Of a ladder's cell: signal propagation, see `gptnorm.study.signal`."""

    @classmethod
    def read(cls, line: Mapping[str, Any]) -> RunLine:
        """From a line of `gptnorm.study.schema.read_cells`."""
        return cls(
            strategy=line["strategy"],
            lr=float(line["lr"]),
            seed=line["seed"],
            status=line["status"],
            val_loss=finite(line["val_loss"]),
            run=line["run"],
            seconds=finite(line.get("seconds")),
            environment=line.get("environment", 0),
            parameters=line.get("parameters"),
            signal=line.get("signal") or {},
        )

    @property
    def finished(self) -> bool:
        """Ran to its end with a finite loss."""
        return self.status == "finished" and self.val_loss is not None

    @property
    def diverged(self) -> bool:
        """Stopped as diverged, or ended without a finite loss."""
        return self.status == "diverged" or (self.status == "finished" and self.val_loss is None)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One strategy at one learning rate, over the seeds."""

    lr: float
    planned: int
    """Number of seeds the study asks for."""
    losses: dict[int, float]
    """Validation loss by seed, of the seeds that finished."""
    diverged: frozenset[int]
    """The seeds that diverged."""

    @property
    def seen(self) -> int:
        """Number of seeds with an outcome."""
        return len(self.losses) + len(self.diverged)

    @property
    def complete(self) -> bool:
        """Whether every planned seed finished with a finite loss."""
        return not self.diverged and len(self.losses) == self.planned and self.mean is not None

    @property
    def mean(self) -> float | None:
        """Mean loss over the seeds so far, or None where none finished or any diverged."""
        if self.diverged or not self.losses:
            return None
        return finite(sum(self.losses.values()) / len(self.losses))

    @property
    def sd(self) -> float | None:
        """Seed sd: sample standard deviation (ddof=1), or None for fewer than two seeds."""
        return None if self.mean is None else sample_sd(list(self.losses.values()))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One strategy over the grid of learning rates."""

    strategy: str
    entries: tuple[Entry, ...]
    """One per learning rate, in ascending order."""
    parameters: int | None

    @cached_property
    def best(self) -> Entry | None:
        """The complete entry of lowest mean; of equals, the one of lowest learning rate."""
        complete = [entry for entry in self.entries if entry.complete]
        return min(complete, key=lambda entry: (entry.mean, entry.lr), default=None)

    @property
    def edge(self) -> str | None:
        """ "lowest", "highest" or "only" where the best stands at the edge of the learning rates tried, else None.

        Those tried are the whole grid, but in a partial study, where a best may have no neighbour yet.
        """
        if self.best is None:
            return None
        tried = [entry.lr for entry in self.entries if entry.seen]
        if len(tried) == 1:
            return "only"
        return {tried[0]: "lowest", tried[-1]: "highest"}.get(self.best.lr)

    @property
    def at_edge(self) -> bool:
        """Whether the best stands at the edge of what was tried, and so is no optimum."""
        return self.edge is not None


@dataclass(frozen=True, kw_only=True)
class About:
    """How a study of any kind came about."""

    folder: Path
    title: str
    recipe: str
    strategies: tuple[str, ...]
    seeds: tuple[int, ...]
    data: dict[str, Any]
    texts: dict[str, dict[str, Any]]
    """Where there are several, each by its name, with what `data` says of one."""
    shared: dict[str, Any]
    differing: dict[str, dict[str, Any]]
    environments: tuple[dict[str, Any], ...]
    """Where it ran, one after the other."""
    commands: tuple[str, ...]
    seconds: float | None
    unigram_entropy: float | None
    """Loss in nats of a model that knows only how frequent each token is."""


@dataclass(frozen=True, kw_only=True)
class Study(About):
    """A study folder, read. `rows` is the table; the other fields say how it came about."""

    lrs: tuple[float, ...]
    cells: tuple[RunLine, ...]
    """Outcomes inside the grid, one per strategy, learning rate and seed, in the grid's order."""
    outside: int
    """Number of recorded outcomes that the grid of the study does not name."""

    @property
    def planned(self) -> int:
        """Number of runs in the whole grid."""
        return len(self.strategies) * len(self.lrs) * len(self.seeds)

    @property
    def done(self) -> int:
        """Number of runs with an outcome; below `planned` the study is partial."""
        return sum(cell.finished or cell.diverged for cell in self.cells)

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """One row per strategy, in the order of the study."""
        return tuple(self._row(strategy) for strategy in self.strategies)

    @cached_property
    def ranked(self) -> tuple[Row, ...]:
        """The rows that have a best, lowest loss first; equals keep the order of the study."""
        with_best = [row for row in self.rows if row.best is not None]
        return tuple(sorted(with_best, key=best_loss))

    def _row(self, strategy: str) -> Row:
        cells = [cell for cell in self.cells if cell.strategy == strategy]
        entries = []
        for lr in self.lrs:
            here = [cell for cell in cells if cell.lr == lr]
            losses = {cell.seed: cell.val_loss for cell in here if cell.finished and cell.val_loss is not None}
            entries.append(
                Entry(
                    lr=lr,
                    planned=len(self.seeds),
                    losses=losses,
                    diverged=frozenset(cell.seed for cell in here if cell.diverged),
                )
            )
        parameters = next((cell.parameters for cell in cells if cell.parameters is not None), None)
        return Row(strategy=strategy, entries=tuple(entries), parameters=parameters)

    @property
    def pooled_sd(self) -> float | None:
        """The seed sd of all cells together, √(Σ(n−1)·sd² / Σ(n−1)): steadier than that of one cell."""
        spreads = [(len(e.losses) - 1, e.sd) for row in self.rows for e in row.entries if e.complete]
        degrees = sum(n for n, sd in spreads if sd is not None)
        return math.sqrt(sum(n * sd**2 for n, sd in spreads if sd is not None) / degrees) if degrees else None

    def no_better_than_frequencies(self, entry: Entry) -> bool:
        """Whether a finite mean is at or above the unigram entropy: a run that collapsed, not one that learned."""
        return entry.mean is not None and self.unigram_entropy is not None and entry.mean >= self.unigram_entropy

    def highest_trained(self, row: Row) -> float | None:
        """The highest learning rate where every seed finished and learned more than token frequencies."""
        trained = [entry.lr for entry in row.entries if entry.complete and not self.no_better_than_frequencies(entry)]
        return max(trained, default=None)


def best_loss(row: Row) -> float:
    """The mean loss of a row's best entry; the row must have one."""
    assert row.best is not None
    assert row.best.mean is not None
    return row.best.mean


def load_study(folder: str | Path, rung: Mapping[str, Any] | None = None) -> Study:
    """Read a study folder; one that was stopped midway gives a partial study.

    Args:
        rung: of a ladder, the fields that mark a rung's lines in the ledger; its grid is then the study.

    Raises UserError where `study.json` is missing or wrong, names no seed, or is a ladder's and no rung is asked for.
    """
    folder = Path(folder)
    path = folder / "study.json"
    facts = read_facts(folder)
    if facts.get("ladder") and rung is None:
        raise UserError(f"{path}: a ladder of models, not one grid")
    about = about_of(folder, facts)
    lrs = tuple(sorted(float(lr) for lr in facts["lrs"]))
    if not about.seeds:
        raise bad_value(f"{path}: seeds", [], "must not be empty")
    cells, outside = _read_cells(folder / "cells.jsonl", about.strategies, lrs, about.seeds, rung or {})
    return Study(**vars(about), lrs=lrs, cells=cells, outside=outside)


def about_of(folder: Path, facts: Facts) -> About:
    """What a `study.json` says, whatever the kind of the study."""
    settings = facts["settings"]
    return About(
        folder=folder,
        title=facts["title"] or folder.resolve().name,
        recipe=facts["recipe"],
        strategies=tuple(facts["strategies"]),
        seeds=tuple(facts["seeds"]),
        data=facts["data"],
        texts=facts.get("texts", {}),
        shared=settings["shared"],
        differing=settings["differing"],
        environments=tuple(facts["environments"]),
        commands=tuple(facts["commands"]),
        seconds=finite(facts["seconds"]),
        unigram_entropy=finite(facts["unigram_entropy"]),
    )


def _read_cells(
    path: Path,
    strategies: tuple[str, ...],
    lrs: tuple[float, ...],
    seeds: tuple[int, ...],
    rung: Mapping[str, Any],
) -> tuple[tuple[RunLine, ...], int]:
    """The outcomes of the grid and the number of those outside it; of a repeated run the last counts."""
    found: dict[tuple[str, float, int], RunLine] = {}
    outside: set[tuple[Any, ...]] = set()
    for raw in read_cells(path):
        if any(raw.get(key) != value for key, value in rung.items()):
            continue
        cell = RunLine.read(raw)
        # A learning rate may have been printed and read back on its way here.
        cell = replace(cell, lr=next((lr for lr in lrs if math.isclose(lr, cell.lr, rel_tol=1e-9)), cell.lr))
        key = (cell.strategy, cell.lr, cell.seed)
        if cell.strategy in strategies and cell.lr in lrs and cell.seed in seeds:
            found[key] = cell
        else:
            outside.add(key)
    order = [(strategy, lr, seed) for strategy in strategies for lr in lrs for seed in seeds]
    return tuple(found[key] for key in order if key in found), len(outside)
