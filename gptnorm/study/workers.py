"""How many runs a machine carries at once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from gptnorm.plan.memory import cpu_step_bytes
from gptnorm.study.cell import Cell

PROCESS_BYTES = 3 * 2**28
"""What a worker takes beside the step: the interpreter with torch, 0.65 GiB on a Linux CPU, and some room."""


def workers_for(samples: Sequence[Cell], device: torch.device, vocab: int) -> int:
    """One on a GPU; else one per core, but no more than have room in memory, and one at least.

    The step's peak is `gptnorm.plan`'s, of the sample that has the most numbers to keep.
    """
    if device.type == "cuda":
        return 1
    room = memory_available()
    if cores() < 2 or room is None:
        return cores()
    step = cpu_step_bytes(max(samples, key=_step_size).config, vocab)
    return max(1, min(cores(), room // (step + PROCESS_BYTES)))


def cores() -> int:
    """Cores that this process may use, where the system tells (Linux), else all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_available() -> int | None:
    """Bytes that can be had without swapping, where Linux tells; within the limit of a control group, if any."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        kibibytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        found.append(kibibytes["MemAvailable"] * 1024)
    except (OSError, KeyError, ValueError, IndexError):
        return None
    try:
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        found.append(limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no control groups, or no limit ("max")
        pass
    return max(0, min(found))


def _step_size(cell: Cell) -> float:
    """Of the step's memory, up to a factor that all cells share: weights and activations."""
    config = cell.config
    model, train = config.model, config.train
    tokens = train.batch_size // train.accumulate * train.seq_len
    return model.n_layers * model.d_model * (tokens + model.d_model * max(1, config.moe.experts))
