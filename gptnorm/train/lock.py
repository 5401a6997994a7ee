"""One run at a time in a folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

from gptnorm.errors import UserError
from gptnorm.lock import Taken, acquire

LOCK_FILE = "lock"


class FolderLock:
    """A run folder's lock, which names its holder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: IO[bytes] | None = None

    def acquire(self) -> None:
        """Takes the lock; UserError if another process holds it, or if it cannot be made."""
        path = self.folder / LOCK_FILE
        try:
            file = acquire(path, wait=False)
        except Taken:
            owner = path.read_text(encoding="utf-8").strip()
            by = f" (process {owner})" if owner else ""
            raise UserError(f"{self.folder}: another run is at work there{by}") from None
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written: {error.strerror}") from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n".encode())
        file.flush()
        self._file = file

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
