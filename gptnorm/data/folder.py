"""The folder that shards are built in: half built, or complete.

While it is built, a folder holds `.build/` alone, and there the files, a journal that says how much of them is safely
on disk, and a lock. When all is done the files move up, the manifest last: a folder with a manifest is complete.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptnorm.data.card import DATA_CARD_FILE
from gptnorm.data.shards import MANIFEST_FILE, SPLITS
from gptnorm.data.tokenizer import CARD_FILE, TOKENIZER_FILE
from gptnorm.errors import UserError, bad_value
from gptnorm.files import sync_folder, write_atomic

WORK = ".build"
"""The half-built part of a folder."""

JOURNAL = "journal.json"

Journal = dict[str, Any]
"""Where a build stands: `plan` (what it was asked for), `revisions`, `place`, `is_read`, `tally`."""


@dataclass(frozen=True)
class Target:
    """A folder, and on whose behalf shards are built there."""

    folder: Path
    option: str
    """The setting that names it."""
    wait: bool
    """Whether to wait for another process that builds there."""
    keep: bool
    """Whether a build that failed stays, to go on with once the reason is mended."""

    @property
    def work(self) -> Path:
        """The half-built part."""
        return self.folder / WORK

    @property
    def lock(self) -> Path:
        """The file that a builder holds locked."""
        return self.work / "lock"

    def refuse(self, what: str) -> UserError:
        """The error for a folder that cannot be used."""
        return bad_value(self.option, str(self.folder), what)

    def sweep(self) -> None:
        """Removes what a build left that was killed before its first journal: it may have been another one."""
        for path in self.work.iterdir():
            if path != self.lock:
                path.unlink()

    def is_complete(self) -> bool:
        """Whether the shards are all there."""
        return (self.folder / MANIFEST_FILE).exists()

    def is_foreign(self) -> bool:
        """Whether it holds anything that was not built here.

        Raises:
            OSError: it is no folder, or may not be read.
        """
        if not self.folder.exists() or self.work.is_dir() or not any(self.folder.iterdir()):
            return False
        return not (self.is_complete() and (self.folder / CARD_FILE).is_file())

    def journal(self) -> Journal | None:
        """The journal, None before the first.

        Raises:
            UserError: it cannot be read.
        """
        try:
            return json.loads((self.work / JOURNAL).read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError):
            raise self.refuse(f"its journal cannot be read; delete {self.work}") from None

    def write_journal(self, journal: Journal) -> None:
        """Replace the journal: after a crash there is the new one or the old one.

        Raises:
            OSError: it cannot be written.
        """
        write_atomic(self.work / JOURNAL, json.dumps(journal))

    def holds_documents(self) -> bool:
        """Whether a build got so far that going on is worth something."""
        tally = (self.journal() or {}).get("tally")
        return tally is not None and tally["train"]["documents"] + tally["val"]["documents"] > 0

    def publish(self) -> None:
        """Move the finished files up, the manifest last; does what is left of it if it was cut off.

        Raises:
            OSError: a file cannot be moved.
        """
        files = (CARD_FILE, TOKENIZER_FILE, DATA_CARD_FILE, *(f"{split}.bin" for split in SPLITS), MANIFEST_FILE)
        for name in files:
            if name == MANIFEST_FILE:
                sync_folder(self.folder)
            with contextlib.suppress(FileNotFoundError):
                os.replace(self.work / name, self.folder / name)
        sync_folder(self.folder)
        sync_folder(self.folder.parent)

    def clear(self, *, whole: bool) -> None:
        """Forget the half-built part, and with `whole` the folder too, unless there is more in it."""
        shutil.rmtree(self.work, ignore_errors=True)
        if whole:
            with contextlib.suppress(OSError):
                self.folder.rmdir()


def is_half_built(folder: Path) -> bool:
    """Whether a build began there and has not ended."""
    return (folder / WORK).is_dir() and not (folder / MANIFEST_FILE).exists()


def is_empty(folder: Path) -> bool:
    """Whether there is nothing there, nor anything half built."""
    return not folder.exists() or not any(folder.iterdir())
