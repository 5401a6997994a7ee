"""One process at a time in a folder."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

WAIT = 0.2
"""Seconds between two looks at a lock that is taken."""


class Taken(Exception):
    """Another process holds the lock."""


class Unlockable(OSError):
    """The file system has no locks."""


@contextlib.contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[None]:
    """Hold the lock file `path`, making it and its folder where they are missing.

    The system lets go of a lock whose process has died, however it died.

    Args:
        wait: whether to wait for a lock that is taken.

    Raises:
        Taken: it is taken, and `wait` is false.
        OSError: the file cannot be made, or not be locked (`Unlockable`).
    """
    file = acquire(path, wait=wait)
    try:
        yield
    finally:
        file.close()


def acquire(path: Path, *, wait: bool) -> IO[bytes]:
    """As `locked`; the lock is held until the file is closed."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = path.open("ab")
        except FileNotFoundError:
            continue  # its folder was removed just now by whoever held it
        if not _try(file):
            file.close()
            if not wait:
                raise Taken
            time.sleep(WAIT)
        elif _is_still(path, file):
            return file
        else:
            file.close()


def _is_still(path: Path, file: IO[bytes]) -> bool:
    """Whether the file that was locked is the one of that name: the last holder may have removed it."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


try:
    import fcntl

    def _try(file: IO[bytes]) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise Unlockable(error.errno, "its file system has no locks (flock); use another") from None
            raise
        return True

except ImportError:  # Windows
    import msvcrt

    def _try(file: IO[bytes]) -> bool:
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # pyright: ignore[reportAttributeAccessIssue]
        except OSError:
            return False
        return True
