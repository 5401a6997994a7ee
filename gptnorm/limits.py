"""What of this machine a process may use: cores and memory, within the limits of its control groups.

A limit may stand anywhere on the way from the process's own group to the root of the hierarchy (a job, its step, a
container); the tightest counts. Linux only; elsewhere there is none that is known.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")


def cores(root: Path = ROOT) -> int:
    """Cores that this process may use, where the system tells (Linux), else all; a share of one counts as one."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.floor(min([allowed, *_quotas(root)])))


def memory_available(root: Path = ROOT) -> int | None:
    """Bytes that can be had without swapping, where Linux tells."""
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        kibibytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        free = kibibytes["MemAvailable"] * 1024
    except (OSError, KeyError, ValueError, IndexError):
        return None
    return max(0, min([free, *_rooms(root)]))


def _quotas(root: Path) -> Iterator[float]:
    """Cores that each group grants."""
    for folder in _groups(root, "cpu"):
        with contextlib.suppress(OSError, ValueError):
            quota, period = (folder / "cpu.max").read_text().split()
            yield int(quota) / int(period)
        with contextlib.suppress(OSError, ValueError):
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if int(quota) > 0:
                yield int(quota) / int(period)


def _rooms(root: Path) -> Iterator[int]:
    """Bytes that each group has left. What it holds of files it gives back when it has to."""
    for folder in _groups(root, "memory"):
        for limit, used, files in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            with contextlib.suppress(OSError, ValueError):
                most = int((folder / limit).read_text())
                yield most - int((folder / used).read_text()) + _stat(folder / "memory.stat").get(files, 0)


def _stat(path: Path) -> dict[str, int]:
    with contextlib.suppress(OSError, ValueError):
        return {name: int(value) for name, value in map(str.split, path.read_text().splitlines())}
    return {}


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's groups that have a say in `controller`, from its own to the hierarchy's root.

    /proc/self/cgroup has a line number:controllers:path for each hierarchy, without controllers for version 2. In a
    container the path may be one that only its host has; then what is there of the way is looked at.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, names, path = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        for mounted in (names, controller) if names else ("", "unified"):
            top = root / "sys/fs/cgroup" / mounted
            own = top / path.lstrip("/")
            yield from (folder for folder in (own, *own.parents) if folder == top or top in folder.parents)
