"""What a run prints where no bar can move."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from gptnorm.train.progress import Lines


@pytest.mark.parametrize("steps", [3, 100, 1234, 10_000])
@pytest.mark.parametrize("every", [1, 10, 30])
@pytest.mark.parametrize("first", [0, 77])
def test_about_twenty_lines_whatever_is_logged(steps: int, every: int, first: int) -> None:
    """Losses come every so many steps, which may not divide a twentieth of the run."""
    file = io.StringIO()
    lines = Lines(Console(file=file, width=200))
    lines.start(first, steps)
    told = [step for step in range(first + 1, steps + 1) if step % every == 0 or step == steps]
    for step in told:
        lines.step(step, 2.0, 1e4)
    printed = file.getvalue().splitlines()
    assert len(printed) <= 21
    assert len(printed) >= min(len(told), 13 * (steps - first) // steps)
    assert not told or printed[-1].startswith(f"step {steps}/{steps} ")
