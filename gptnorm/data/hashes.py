"""SHA-256 of the files of a corpus, remembered from one start to the next."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gptnorm.data.progress import Progress, Silent, Watcher
from gptnorm.data.readers import unreadable
from gptnorm.files import sha256_file, write_atomic

SETTLED = 10.0
"""Seconds for which a file must have lain unchanged before its hash is remembered. A change within the same tick of
the file system's clock as the one before it would leave no trace."""

THREADS = min(8, os.cpu_count() or 1)
"""Files hashed at once; the hashing itself needs no interpreter."""

Stamp = list[int]
"""What the file system says of a file without reading it."""


def hash_files(paths: Sequence[Path], memory: Path | None = None, watcher: Watcher | None = None) -> list[str]:
    """The SHA-256 of each file's bytes, in hex.

    A file is read only if its size, its times or its inode are not those at which it was last hashed. The
    change time is among them, which no program can set back: an edit that keeps size and modification time is
    noticed.

    Args:
        memory: the folder in which hashes are remembered, made if need be; None: they are not. Where it cannot
            be written, nothing is remembered and nothing else changes.
        watcher: is told how many bytes have been hashed.

    Raises:
        UserError: a file cannot be read.
    """
    watcher = watcher or Silent()
    place = memory and memory / f"{_name(paths)}.json"
    known = _recall(place)
    now = time.time_ns()
    stamps = [_stamp(path) for path in paths]
    hashes = [_known(known, path, stamp) for path, stamp in zip(paths, stamps, strict=True)]
    missing = [i for i, found in enumerate(hashes) if found is None]
    total = sum(stamps[i][0] for i in missing)
    watcher.begin("hashing the files")
    done = 0
    with ThreadPoolExecutor(THREADS) as pool:
        for i, found in zip(missing, pool.map(lambda i: _hash(paths[i]), missing), strict=True):
            hashes[i] = found
            done += stamps[i][0]
            watcher.update(Progress(share=done / max(1, total), text_bytes=done))
    watcher.end()
    if place is not None and missing:
        settled = {
            str(path.absolute()): [*stamp, found]
            for path, stamp, found in zip(paths, stamps, hashes, strict=True)
            if now - max(stamp[1:3]) > SETTLED * 1e9 and _stamp(path) == stamp
        }
        _remember(place, settled)
    return [found or "" for found in hashes]


def _name(paths: Sequence[Path]) -> str:
    return hashlib.sha256(
        "\0".join(str(path.absolute()) for path in paths).encode(errors="surrogateescape")
    ).hexdigest()


def _stamp(path: Path) -> Stamp:
    try:
        found = path.stat()
    except OSError as error:
        raise unreadable(path, error) from None
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _known(known: dict[str, list], path: Path, stamp: Stamp) -> str | None:
    *then, found = known.get(str(path.absolute()), [None])
    return found if then == stamp and isinstance(found, str) else None


def _hash(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        raise unreadable(path, error) from None


def _recall(place: Path | None) -> dict[str, list]:
    # Whatever is wrong with what was remembered, the files themselves can be read.
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = json.loads(place.read_bytes()) if place else {}
        if isinstance(found, dict) and all(isinstance(entry, list) and entry for entry in found.values()):
            return found
    return {}


def _remember(place: Path, entries: dict[str, list]) -> None:
    with contextlib.suppress(OSError, ValueError):
        if entries:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(place, json.dumps(entries))
