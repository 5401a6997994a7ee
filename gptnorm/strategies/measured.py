"""What we measured of each strategy at laptop size, from `measured.json`.

`benchmarks/catalogue.py` makes that file from the ledgers in docs/results; no number in it is typed.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from functools import cache
from importlib.resources import files


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One strategy at its own best learning rate."""

    lr: float
    """The best peak learning rate of the screen."""
    losses: tuple[float | None, ...]
    """Validation losses in nats per token at that rate, one for each seed (None: it diverged), none the screen's."""
    screen: dict[float, float | None]
    """Loss of the screen's seed at each rate tried; None where it diverged."""

    @property
    def loss(self) -> str:
        """Mean ± sample standard deviation over the seeds (ddof 1), or how many of them diverged."""
        finished = [loss for loss in self.losses if loss is not None]
        if len(finished) < len(self.losses):
            return f"diverged ({len(self.losses) - len(finished)} of {len(self.losses)})"
        return f"{statistics.fmean(finished):.3f} ± {statistics.stdev(finished):.3f}"

    def __str__(self) -> str:
        tried = [f"{lr:g}: {'diverged' if loss is None else f'{loss:.3f}'}" for lr, loss in self.screen.items()]
        return (
            f"laptop size (d 64, 4 blocks, 400 steps; docs/results/catalogue.md): validation loss {self.loss} over "
            f"{len(self.losses)} seeds at its best rate {self.lr:g}; another seed by rate: {', '.join(tried)}"
        )


@cache
def measurements() -> dict[str, Measured]:
    """Every strategy that has been measured."""
    text = files("gptnorm.strategies").joinpath("measured.json").read_text(encoding="utf-8")
    return {
        name: Measured(
            lr=record["lr"],
            losses=tuple(record["losses"]),
            screen={float(lr): loss for lr, loss in record["screen"].items()},
        )
        for name, record in json.loads(text).items()
    }
