"""What the CPU's allocator gives out, as torch's profiler sees it."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from gptnorm.config import Precision
from gptnorm.model import GPT


def under(precision: Precision) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if precision == "fp32" else torch.autocast("cpu", torch.bfloat16)


def allocated_peak(model: GPT, tokens: Tensor, precision: Precision) -> int:
    """The most that the CPU's allocator has given out during a pass."""

    def one_pass() -> None:
        with under(precision):
            total = model.objective(tokens).total
        total.backward()

    one_pass()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        one_pass()
    events: list[Any] = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # pyright: ignore
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
