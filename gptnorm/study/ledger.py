"""A study's folder: what was asked, and what came of it.

| file | content |
|---|---|
| study.json | what was asked: recipe, strategies, rates, seeds, settings, data; every command and machine |
| cells.jsonl | one line for each run that has ended; of two of the same run the last counts |
| cells/… | the runs' own folders |
| report.html | the same for people |
| lock | held by the process that works on it, gone afterwards |

The same command goes on where it was cut off, and a command that asks for more (strategies, rates, seeds, sizes) adds
to what is there: a run that is in the ledger is never made again. What the runs have in common must be the same: other
settings are another study.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gptnorm.config import Config
from gptnorm.errors import UserError, bad_value
from gptnorm.files import left_half, naming, write_atomic
from gptnorm.lock import Taken, acquire
from gptnorm.recipe import HOW, to_tree
from gptnorm.study.cell import TEXT, text_name
from gptnorm.study.schema import Facts, read_cells, read_facts
from gptnorm.tables import flatten, within

UNIONS = ("strategies", "lrs", "seeds", "commands", "environments")


class OtherStudy(UserError):
    """The folder holds a study with other settings."""


class Ledger:
    """A study folder, locked while it is open.

    Raises:
        UserError: another process works on it, it holds something else, or it cannot be written.
    """

    def __init__(self, folder: Path, beside: Sequence[str] = ()) -> None:
        """Args: beside: names of what may stand in the folder beside a study's own files."""
        self.folder = folder
        self._beside = {"lock", *beside}
        self.earlier: Facts | None = None
        """What was asked before; None in a new folder."""
        self.done: dict[str, dict[str, Any]] = {}
        """The line of each run that has ended, by the run's folder."""

    def __enter__(self) -> Ledger:
        self._refuse_what_is_no_study()
        ancestors = (self.folder, *self.folder.parents)
        self._new = [folder for folder in ancestors if not folder.exists()]
        path = self.folder / "lock"
        try:
            self._lock = acquire(path, wait=False)
        except Taken:
            raise bad_value("--dir", str(self.folder), "another process works on that study") from None
        except OSError as error:
            raise bad_value("--dir", str(self.folder), f"cannot be written: {error.strerror}") from None
        try:
            self._read()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._release()

    def begin(self, facts: Facts) -> list[int]:
        """Records what is asked now, beside what was asked before.

        Returns:
            The place of each environment of `facts` among those of the study.

        Raises:
            OtherStudy: runs of the two would not be comparable.
        """
        facts = json.loads(json.dumps(facts))
        here = facts["environments"]
        if self.earlier is not None:
            refuse_another(self.earlier, facts, self.folder)
            facts = joined(self.earlier, facts)
        else:
            facts["seconds"] = None
        facts["complete"] = False
        self.earlier = facts
        self._write(facts)
        return [facts["environments"].index(environment) for environment in here]

    def add(self, run: str, *, environment: int, **fields: Any) -> None:
        """The line of a run that has ended in that environment, on the disk before it returns."""
        line = {**fields, "run": run, "environment": environment}
        path = self.folder / "cells.jsonl"
        with naming(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.done[run] = line

    def complete(self, whether: bool) -> None:
        """Records whether nothing is missing of what was asked; `begin` takes it back."""
        assert self.earlier is not None
        if self.earlier.get("complete") is not whether:
            self.earlier["complete"] = whether
            self._write(self.earlier)

    def spent(self, seconds: float) -> None:
        """Adds to the time that the study has taken."""
        assert self.earlier is not None
        self.earlier["seconds"] = round((self.earlier["seconds"] or 0.0) + seconds, 3)
        self._write(self.earlier)

    def move_aside(self) -> Path:
        """Renames the folder to the first free NAME.1, NAME.2, …, while nobody else can work in it.

        Returns:
            Where it was, by a name that does not move along as "." does.
        """
        home = self.folder if self.folder.name not in ("", "..") else self.folder.resolve()
        number = 1
        while (aside := home.with_name(f"{home.name}.{number}")).exists():
            number += 1
        try:
            home.rename(aside)
        except OSError as error:
            raise UserError(f"{home}: cannot be moved aside: {error.strerror}") from None
        self.folder = aside
        return home

    def _write(self, facts: Facts) -> None:
        write_atomic(self.folder / "study.json", json.dumps(facts, indent=2) + "\n")

    def _read(self) -> None:
        if (self.folder / "study.json").is_file():
            self.earlier = facts_to_grow(self.folder)
            lines = read_cells(self.folder / "cells.jsonl")
            _end_the_last_line(self.folder / "cells.jsonl")
            self.done = {line["run"]: line for line in lines}
        else:
            self._refuse_what_is_no_study()

    def _refuse_what_is_no_study(self) -> None:
        """Looked at before the lock is taken, too, for that is made and removed: a study's own lock is empty."""
        if not self.folder.is_dir() or (self.folder / "study.json").is_file():
            return
        for path in self.folder.iterdir():
            own = path.name in self._beside or left_half(path, "study.json")
            if path.name == "lock":
                with contextlib.suppress(FileNotFoundError):  # let go of just now
                    own = path.stat().st_size == 0
            if not own and not (self.folder / "study.json").is_file():
                raise bad_value("--dir", str(self.folder), "holds something else than a study; name another folder")

    def _release(self) -> None:
        # Whoever waits for the lock looks whether its file is still there.
        with contextlib.suppress(OSError):
            (self.folder / "lock").unlink()
        self._lock.close()
        with contextlib.suppress(OSError):  # only what nothing was written into
            for folder in self._new:
                folder.rmdir()


def facts_to_grow(folder: Path) -> Facts:
    """A folder's study.json; UserError if it is not there, is a wrong one, or a study that cannot go on."""
    facts = read_facts(folder)
    if "recipe" not in facts["settings"]:
        raise bad_value("--dir", str(folder), "its study.json does not say what its recipe said; name another")
    return facts


def refuse_another(earlier: Facts, facts: Facts, folder: Path) -> None:
    """OtherStudy, with the first thing that differs, if runs of the two would not be comparable."""
    for key, before, now in differences(earlier, facts):
        if key == "data.fingerprint" or key.startswith("the text "):
            text = "its text" if key == "data.fingerprint" else key
            raise OtherStudy(
                f"--dir = {str(folder)!r}: {text} is not what it was when the study in it began; name another folder, "
                "or have it moved aside with --fresh"
            )
        raise OtherStudy(
            f"--dir = {str(folder)!r}: holds a study with {key} = {before!r}, not {now!r}; name another folder, or "
            "have it moved aside with --fresh"
        )


def joined(earlier: Facts, facts: Facts) -> Facts:
    """What was asked before and now, together."""
    found = {**facts, "title": earlier["title"], "seconds": earlier["seconds"]}
    for key in UNIONS:
        found[key] = _union(earlier[key], facts[key])
    found["lrs"] = sorted(found["lrs"])
    if "ladder" in facts:
        before, now = earlier["ladder"], facts["ladder"]
        found["ladder"] = {
            **now,
            "sizes": sorted(_union(before["sizes"], now["sizes"])),
            "rules": _union(before["rules"], now["rules"]),
            "settings": {**before["settings"], **now["settings"]},
        }
    if "tolerance" in facts:
        before, now = earlier["tolerance"], facts["tolerance"]
        found["tolerance"] = {
            **now,
            "tune": _union_of_axes(before["tune"], now["tune"]),
            "places": _union(before["places"], now["places"]),
        }
        if refused := _union(before.get("refused", []), now.get("refused", [])):
            found["tolerance"]["refused"] = refused
    before, now = earlier.get("texts", {}), facts.get("texts", {})
    if texts := {**before, **now}:
        trained = {name for part in (before, now) for name, text in part.items() if text.get("trained")}
        found["texts"] = {name: {**text, "trained": name in trained} for name, text in texts.items()}
    if _maps_texts(earlier):
        # Of the first text of all.
        found |= {key: earlier[key] for key in ("data", "unigram_entropy")}
    by_strategy = {**settings_by_strategy(earlier), **settings_by_strategy(facts)}
    found["settings"] = {**split(by_strategy), "recipe": facts["settings"]["recipe"]}
    return found


MEASURES = ("report", "baseline", "epsilon", "shortlist", "search", "stability")
"""What a tolerance study may ask otherwise the next time, without being another study."""


def measured_as(earlier: Facts | None, facts: Facts) -> Facts:
    """What was asked now, with the measures of before."""
    if earlier is None or "tolerance" not in facts:
        return facts
    kept = {key: earlier["tolerance"][key] for key in MEASURES if key in earlier["tolerance"]}
    return {**facts, "tolerance": {**facts["tolerance"], **kept}}


def split(by_strategy: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The settings that all strategies share, and those that differ, with each strategy's value."""
    keys = dict.fromkeys(key for settings in by_strategy.values() for key in settings)
    values = {key: {name: settings.get(key) for name, settings in by_strategy.items()} for key in keys}
    same = {key for key, by in values.items() if all(value == next(iter(by.values())) for value in by.values())}
    return {
        "shared": {key: next(iter(values[key].values())) for key in keys if key in same},
        "differing": {key: values[key] for key in keys if key not in same},
    }


def settings_by_strategy(facts: Facts) -> dict[str, dict[str, Any]]:
    """Every setting of each strategy, by its dotted key."""
    settings = facts["settings"]
    return {
        name: {**settings["shared"], **{key: by.get(name) for key, by in settings["differing"].items()}}
        for name in facts["strategies"]
    }


def text_of(facts: Mapping[str, Any], settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """What study.json says of the text that runs with these settings train on, which name it where it is mapped; empty
    where nothing is known of it."""
    path = settings.get(TEXT)
    if path is not None:
        return facts.get("texts", {}).get(text_name(path), {})
    return {**facts["data"], "unigram_entropy": facts["unigram_entropy"]}


def differences(earlier: Facts, facts: Facts) -> Iterator[tuple[str, Any, Any]]:
    """What would have to be equal for the runs of two studies to be comparable, and is not: key, value before, now."""
    return ((key, before, now) for key, before, now in _comparable(earlier, facts) if before != now)


def _comparable(earlier: Facts, facts: Facts) -> Iterator[tuple[str, Any, Any]]:
    """What must be equal: key, value before, value now."""
    yield "recipe", earlier["recipe"], facts["recipe"]
    yield "ladder", earlier.get("ladder", {}).get("axis"), facts.get("ladder", {}).get("axis")
    a, b = (part.get("tolerance", {}) for part in (earlier, facts))
    yield "study.pick", a.get("pick"), b.get("pick")
    yield "study.evaluate", sorted(a.get("evaluate", [])), sorted(b.get("evaluate", []))
    before, now = (sorted((part.get("places") or [{}])[0]) for part in (a, b))
    yield "settings mapped", before, now
    before, now = settings_by_strategy(earlier), settings_by_strategy(facts)
    # A setting that the ledger's version did not have yet was what it is by default.
    defaults = flatten(to_tree(Config()))
    pairs = [({**defaults, **before[name]}, {**defaults, **now[name]}) for name in now if name in before]
    for a, b in [*pairs, (earlier["settings"]["recipe"], facts["settings"]["recipe"])]:
        for key in dict.fromkeys([*a, *b]):
            # Where and how a run is computed may change; environments say it.
            if not within(key, HOW):
                yield key, a.get(key), b.get(key)
    if not _maps_texts(earlier):
        yield "data.fingerprint", earlier["data"]["fingerprint"], facts["data"]["fingerprint"]
    a, b = (part.get("texts", {}) for part in (earlier, facts))
    for name in a.keys() & b.keys():
        yield f"the text {name!r}", a[name]["fingerprint"], b[name]["fingerprint"]
    a, b = (part.get("ladder", {}).get("settings", {}) for part in (earlier, facts))
    for label in a.keys() & b.keys():
        yield label, a[label], b[label]


def _maps_texts(facts: Facts) -> bool:
    """Whether each place has a text of its own."""
    return any(TEXT in place for place in facts.get("tolerance", {}).get("places", ()))


def _union_of_axes(before: dict[str, list[Any]], now: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {key: _union(before.get(key, []), now.get(key, [])) for key in dict.fromkeys([*before, *now])}


def _union(before: list[Any], now: list[Any]) -> list[Any]:
    return [*before, *(value for value in now if value not in before)]


def _end_the_last_line(path: Path) -> None:
    """A kill may have left half a line, which is taken out, or a whole one that has no end yet."""
    if not path.exists():
        return
    *_, last = path.read_bytes().rpartition(b"\n")
    if not last:
        return
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        try:
            json.loads(last)
        except ValueError:
            file.truncate(end - len(last))
        else:
            file.write(b"\n")
