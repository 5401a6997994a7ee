"""What commands say on the terminal and write into files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from gptnorm.errors import UserError, bad_value


def is_first() -> bool:
    """Whether this process speaks to the person: the only one, or the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


console = Console(quiet=not is_first())


def say(line: str) -> None:
    """A plain line, never wrapped or coloured."""
    console.print(line, soft_wrap=True, highlight=False, markup=False)


def write(option: str, path: Path, text: str) -> None:
    """A file that an option names; UserError if it cannot be written."""
    from gptnorm.files import write_atomic

    try:
        write_atomic(path, text)
    except OSError as error:
        raise bad_value(option, str(path), f"cannot be written: {error.strerror}") from None


def write_all(*files: tuple[str, Path | None, Callable[[], str]]) -> None:
    """Those of the files that were asked for, by option, path and text; one that cannot be written stops no other."""
    failed = None
    for option, path, text in files:
        try:
            if path is not None:
                write(option, path, text())
        except UserError as error:
            failed = failed or error
    if failed is not None:
        raise failed


def refuse_unwritable(option: str, path: Path | None) -> None:
    """What takes long is not to fail at its end."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise bad_value(option, str(path), "cannot be written: no such folder")
    if not os.access(path.parent, os.W_OK):
        raise bad_value(option, str(path), "cannot be written: the folder is not writable")
