"""What commands say on the terminal and write into files."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console

from gptnorm.errors import bad_value


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


def refuse_missing_folder(option: str, path: Path | None) -> None:
    """What takes long is not to fail at its end."""
    if path is not None and not path.parent.is_dir():
        raise bad_value(option, str(path), "cannot be written: no such folder")
