"""A study that was made in several folders, on several machines, as one."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

from gptnorm.errors import UserError, bad_value
from gptnorm.study.ledger import Ledger, OtherStudy, differences, facts_to_grow, joined, measured_as
from gptnorm.study.schema import Facts, read_cells

Part = tuple[int, int]
"""K of N, from 1."""


def parse_part(text: str) -> Part:
    """ "3/16" as (3, 16); UserError for anything else."""
    left, slash, right = text.partition("/")
    if not slash or not left.isdecimal() or not right.isdecimal() or not 1 <= int(left) <= int(right):
        raise bad_value("--part", text, "must be K/N with 1 <= K <= N, such as 3/16")
    return int(left), int(right)


def part_name(part: Part) -> str:
    """What `parse_part` reads."""
    return f"{part[0]}/{part[1]}"


def part_folder(folder: Path, part: Part) -> Path:
    """Where a part of a study is kept."""
    return folder / f"part-{part[0]}-of-{part[1]}"


def join_studies(parts: Sequence[Path], folder: Path) -> int:
    """Adds the runs of study folders to a study's folder, which is made if there is none.

    A run that is there already is left alone, so that joining again adds what is new. The folders of the runs are
    copied, without checkpoints. What is read off them (`gptnorm.study.ledger.MEASURES`) stays as it is in the folder,
    or in the first part. Whether anything is missing of what was asked in all of them together is not known
    here: the whole counts as complete once its command has been run on it, unless joining has changed nothing.

    Returns:
        How many runs were added.

    Raises:
        UserError: a part is no study. OtherStudy: its runs and those of the others would not be comparable.
    """
    for part in parts:
        if part.resolve() == folder.resolve():
            raise UserError(f"{part}: is joined into itself")
    found = [(part, facts := facts_to_grow(part), _lines_of(part, facts)) for part in parts]
    for part, _, lines in found:
        for line in lines:
            _refuse_links(part / line["run"])
    added = 0
    # The parts' own folders may stand in the folder that they are joined into.
    with Ledger(folder, beside=[part.name for part in parts if part.parent.resolve() == folder.resolve()]) as ledger:
        _refuse_others(ledger.earlier, [(part, facts) for part, facts, _ in found])
        before = ledger.earlier
        for part, facts, lines in found:
            new = [line for line in lines if line["run"] not in ledger.done]
            places = ledger.begin(measured_as(ledger.earlier, facts))
            for line in new:
                run, environment = line.pop("run"), line.pop("environment", 0)
                _copy_run(part, folder, run)
                ledger.add(run, **line, environment=places[environment])
            if new:
                # A part that has grown brings the time of what is new in it.
                ledger.spent((facts["seconds"] or 0.0) * len(new) / len(lines))
            added += len(new)
        assert ledger.earlier is not None
        ledger.complete(
            before is not None and before.get("complete") is True and not added and _ask(before, ledger.earlier)
        )
    return added


def _ask(before: Facts, now: Facts) -> bool:
    """Whether both ask for the same runs."""
    told = {"commands", "environments", "seconds", "complete"}
    return all(before.get(key) == now.get(key) for key in (before.keys() | now.keys()) - told)


def _lines_of(part: Path, facts: Facts) -> list[dict[str, Any]]:
    """The ledger of a part, of two lines of the same run the last.

    Raises:
        UserError: a line names an environment that there is not, or a run that is none: its folder takes the place of
            what is there.
    """
    path, environments = part / "cells.jsonl", len(facts["environments"])
    lines = {line["run"]: line for line in read_cells(path)}
    for run, line in lines.items():
        if line.get("environment", 0) not in range(environments):
            raise UserError(f"{path}: names an environment that study.json lacks: {line['environment']!r}")
        parts = PurePath(run).parts
        if len(parts) not in (3, 4) or parts[0] != "cells" or ".." in parts or not parts[-1].startswith("lr-"):
            raise UserError(f"{path}: names a run that is no folder cells/STRATEGY/…lr-…: {run!r}")
    return list(lines.values())


def _refuse_others(whole: Facts | None, found: Sequence[tuple[Path, Facts]]) -> None:
    """OtherStudy, before anything is written, where the runs of a part are not comparable with all before it."""
    for part, facts in found:
        if whole is None:
            whole = facts
            continue
        for key, before, now in differences(whole, facts):
            raise OtherStudy(f"{part}: cannot be joined, for its {key} = {now!r}, and that of the others is {before!r}")
        whole = joined(whole, facts)


NOT_COPIED = ("checkpoints",)
"""What stays where it is of a run's folder."""


def _refuse_links(run: Path) -> None:
    """UserError where what is to be copied has a link, which may lead anywhere."""
    for path in (run, *(path for path in run.rglob("*") if not {*NOT_COPIED} & {*path.relative_to(run).parts})):
        if path.is_symlink():
            raise UserError(f"{path}: a symbolic link, which is not followed; join whole study folders")


def _copy_run(part: Path, folder: Path, run: str) -> None:
    """UserError where a run's folder cannot be copied."""
    source, target = part / run, folder / run
    if not source.is_dir():
        return
    shutil.rmtree(target, ignore_errors=True)
    try:
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(*NOT_COPIED))
    except shutil.Error as error:
        name, _, reason = error.args[0][0]
        raise UserError(f"{name}: cannot be copied ({reason})") from None
