"""How many runs a machine carries at once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gptnorm.limits import cores, memory_available
from gptnorm.plan.memory import cpu_step_bytes
from gptnorm.study.cell import Cell

PROCESS_BYTES = 3 * 2**28
"""What a worker takes beside the step: the interpreter with torch, 0.65 GiB on a Linux CPU, and some room."""


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Processes that run cells."""

    count: int
    threads: int | None = None
    """CPU threads of each; None: as recipe or OMP_NUM_THREADS say."""
    gpus: tuple[str, ...] = ()
    """What CUDA_VISIBLE_DEVICES calls those that are dealt out; empty: each process sees what this one sees."""


def workers_for(samples: Sequence[Cell], device: torch.device, vocab: int, asked: int = 0) -> Workers:
    """One per GPU, or one where `train.device` names one; on a CPU as many as have cores and memory, and one at least.

    Each has as many threads as the recipe says, or OMP_NUM_THREADS; where neither does, one, or its share of the cores
    where GPUs, memory or `asked` leave more to each. The step's peak is `gptnorm.plan`'s, of the sample that has the
    most numbers to keep.

    Args:
        asked: how many; 0: as many as that.
    """
    threads = samples[0].config.train.threads or (torch.get_num_threads() if "OMP_NUM_THREADS" in os.environ else 0)
    if device.type == "cuda":
        gpus = visible_gpus() if device.index is None else ()
        count = asked or max(1, len(gpus))
    else:
        gpus, count = (), asked or max(1, min(cores() // max(1, threads), _fit_in_memory(samples, vocab)))
    return Workers(count=count, threads=None if threads else max(1, cores() // count), gpus=gpus)


def visible_gpus() -> tuple[str, ...]:
    """What CUDA_VISIBLE_DEVICES calls each GPU that this process sees."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return tuple(map(str, range(count))) if named is None else tuple(named.split(",")[:count])


def _fit_in_memory(samples: Sequence[Cell], vocab: int) -> int:
    room = memory_available()
    if cores() < 2 or room is None:
        return cores()
    step = cpu_step_bytes(max(samples, key=_step_size).config, vocab)
    return room // (step + PROCESS_BYTES)


def _step_size(cell: Cell) -> float:
    """Of the step's memory, up to a factor that all cells share: weights and activations."""
    config = cell.config
    model, train = config.model, config.train
    tokens = train.batch_size // train.accumulate * train.seq_len
    return model.n_layers * model.d_model * (tokens + model.d_model * max(1, config.moe.experts))
