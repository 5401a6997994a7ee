"""A run that ends between two steps, and one that does not."""

from __future__ import annotations

from pathlib import Path

from gptnorm.data import prepare
from gptnorm.recipe import load_recipe
from gptnorm.train.result import Result
from gptnorm.train.run import start_run


class Stop(Exception):
    """Stands for whatever ends a process between two steps."""


class StopAt:
    """A watcher that ends the run after a step."""

    def __init__(self, at: int) -> None:
        self.at = at

    def start(self, step: int, steps: int) -> None: ...
    def validation(self, step: int, loss: float) -> None: ...
    def note(self, step: int, words: str) -> None: ...
    def stop(self) -> None: ...

    def step(self, step: int, loss: float, tokens_per_second: float) -> None:
        if step == self.at:
            raise Stop


def train(recipe: Path, path: Path, *settings: str) -> Result:
    """A run of `recipe` into `path`."""
    config = load_recipe(str(recipe)).resolve(settings)
    return start_run(config, prepare(config.data), path)
