"""One run at a time in a folder."""

from __future__ import annotations

import contextlib
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
            self._file = acquire(path, wait=False)
            self._file.truncate(0)
            self._file.write(f"{os.getpid()}\n".encode())
            self._file.flush()
        except Taken:
            owner = path.read_text(encoding="utf-8").strip()
            by = f" (process {owner})" if owner else ""
            raise UserError(f"{self.folder}: another run is at work there{by}") from None
        except OSError as error:
            with contextlib.suppress(OSError):  # what could not be written is tried again
                self.release()
            raise UserError(f"{self.folder}: cannot be written: {error.strerror}") from None

    def release(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()
