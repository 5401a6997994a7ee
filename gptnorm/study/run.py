"""Runs a study of any kind into its folder: what is missing there, cell by cell, in parallel processes."""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from gptnorm.environment import describe_environment
from gptnorm.errors import SharedError
from gptnorm.model import build_gpt
from gptnorm.recipe import Recipe, load_recipe
from gptnorm.study.cell import Cell
from gptnorm.study.config import StudyConfig, said_keys
from gptnorm.study.facts import describe_study
from gptnorm.study.join import Part, part_name
from gptnorm.study.ledger import Ledger, text_of
from gptnorm.study.pool import Outcome, run_cells
from gptnorm.study.schema import Facts
from gptnorm.study.texts import Texts, naming, prepare_texts
from gptnorm.study.workers import Workers, workers_for
from gptnorm.train.inputs import check_vocab, open_batches, open_validation, resolve_device
from gptnorm.train.parallel import launched_size

Lines = Mapping[str, Mapping[str, Any]]
"""The ledger's line of each run that has ended, by the run's folder."""

Entropy = Callable[[Mapping[str, Any]], float | None]
"""Of a line: that of the validation tokens under training frequencies, in nats; None: not known."""


class Plan(Protocol):
    """A study with all its settings resolved."""

    @property
    def study(self) -> StudyConfig:
        """What is asked for."""
        ...

    @property
    def samples(self) -> list[Cell]:
        """Cells that between them have every setting of the study: what is checked, and written down."""
        ...

    def describe(self) -> dict[str, Any]:
        """What `study.json` says beside what it says of every study."""
        ...

    def wanted(self, done: Lines, entropy: Entropy) -> list[Cell]:
        """The cells to run now, given those that have ended; none: the study is done."""
        ...


class Kind(Protocol):
    """What makes one kind of study different from another."""

    @property
    def words(self) -> tuple[str, ...]:
        """The words after `gptnorm` that ask for it."""
        ...

    @property
    def part(self) -> Part:
        """Which part of it is made here."""
        ...

    def read(self, recipe: Recipe, overrides: tuple[str, ...]) -> StudyConfig:
        """What is asked for; UserError if it is not that of such a study."""
        ...

    def grown(self, study: Any, earlier: Facts, said: frozenset[str]) -> StudyConfig:
        """What is asked for now and what was asked before, together.

        Args:
            said: the keys of `[study]` that recipe or command name now.
        """
        ...

    def plan(self, recipe: Recipe, study: Any, overrides: tuple[str, ...]) -> Plan:
        """The study with its settings resolved; UserError where one is wrong."""
        ...


def run_study(
    kind: Kind,
    name: str,
    overrides: tuple[str, ...],
    folder: Path,
    console: Console,
    *,
    command: tuple[str, ...] | None = None,
    fresh: bool = False,
) -> Path:
    """Runs the study of a recipe into `folder`, or what is missing of it there.

    What the folder's study asked for and what is asked now are one study; every run of it that has not ended is made.

    Args:
        name: the recipe, with a `[study]` table.
        overrides: `key=value` arguments; `study.…` sets the study, the rest holds for every cell.
        command: the words after `gptnorm` that ask for this study, for its record; None: the kind's own.
        fresh: begin again; an earlier study there is moved aside.

    Raises:
        UserError: anything wrong with recipe or settings, before anything is written. OtherStudy: the folder holds one
            with other settings.
    """
    if (size := launched_size()) > 1:
        raise SharedError(f"WORLD_SIZE = {size}: a study deals out its runs itself; start it once, without torchrun")
    recipe = load_recipe(name)
    study = kind.read(recipe, overrides)
    with contextlib.ExitStack() as stack:
        ledger = stack.enter_context(Ledger(folder))
        if ledger.earlier is not None and not fresh:
            study = kind.grown(study, ledger.earlier, said_keys(recipe, overrides))
        plan = kind.plan(recipe, study, overrides)
        line = shlex.join(["gptnorm", *(kind.words if command is None else command), name, *overrides])
        with console.status("preparing the text …"):
            ready = _prepare(recipe, plan, overrides, line)
        if fresh and ledger.earlier is not None:
            folder = ledger.move_aside()
            stack.close()
            ledger = stack.enter_context(Ledger(folder))
        _make_what_is_missing(kind.part, plan, ledger, ready, console)
    return folder


@dataclass(frozen=True)
class _Ready:
    """What a plan needs to be run, all of it checked."""

    texts: Texts
    workers: Workers
    facts: Facts
    """What `study.json` says."""


def _prepare(recipe: Recipe, plan: Plan, overrides: tuple[str, ...], line: str) -> _Ready:
    """UserError for whatever can be wrong with texts, models and device."""
    config = plan.samples[0].config
    texts = prepare_texts(plan.samples)
    _check(plan.samples, texts)
    device = resolve_device(config.train.device)
    vocab = max(check_vocab(cell.config, texts[cell.text]) for cell in plan.samples)
    workers = workers_for(plan.samples, device, vocab, plan.study.workers)
    environment = describe_environment(device)
    environment["threads"] = workers.threads or config.train.threads or environment["threads"]
    # Counts every token for the unigram entropy.
    return _Ready(texts, workers, describe_study(recipe, plan, texts, overrides, line, environment))


def _make_what_is_missing(part: Part, plan: Plan, ledger: Ledger, ready: _Ready, console: Console) -> None:
    """Every cell that the plan wants and that has no line yet, each with its line as it ends."""
    (place,) = ledger.begin(ready.facts)

    def entropy(line: Mapping[str, Any]) -> float | None:
        return text_of(ready.facts, line.get("place") or {}).get("unigram_entropy")

    def wanted() -> list[Cell]:
        return plan.wanted(ledger.done, entropy)

    if wanted():
        folders = {name: shards.folder for name, shards in ready.texts.items()}
        spent = _Stopwatch()
        try:
            for cell, outcome in run_cells(wanted, folders, ledger.folder, ready.workers, console):
                ledger.add(cell.folder, environment=place, **cell.facts, **_line(outcome))
                # What a kill takes away is the time since the last run that ended.
                ledger.spent(spent.seconds())
        finally:
            ledger.spent(spent.seconds())
    elif not ledger.done:
        console.print(f"part {part_name(part)}: no run falls to it, the study has fewer shares than that")
    ledger.complete(not wanted() and part == (1, 1))


class _Stopwatch:
    """Seconds since it was last asked."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def seconds(self) -> float:
        before, self._last = self._last, time.monotonic()
        return self._last - before


def _line(outcome: Outcome) -> dict[str, Any]:
    """What the ledger keeps of how a run ended."""
    result, training = outcome.result, outcome.training
    record = {key: getattr(result, key) for key in ("status", "val_loss", "seconds", "parameters", "reason")}
    record |= {"tail_loss": training.tail, "lowest_loss": training.lowest, "spikes": training.spikes}
    return record | outcome.measured


def _check(samples: list[Cell], texts: Texts) -> None:
    """Finds what else can be wrong with the input: the text, the vocabulary, what a strategy or rule refuses."""
    for cell in samples:
        with naming(cell.text, texts):
            open_batches(cell.config, texts[cell.text])
        for name in cell.evaluated:
            with naming(name, texts):
                open_validation(cell.config, texts[name])
        build_gpt(cell.config, vocab=check_vocab(cell.config, texts[cell.text]), device="meta")
