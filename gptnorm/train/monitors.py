"""TensorBoard events, where that extra is installed."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path


class TensorBoard:
    """Writes scalars into the run folder; does nothing without the `tensorboard` package, or if it is off."""

    def __init__(self, folder: Path, step: int, *, off: bool = False) -> None:
        self._writer = None
        if not off and importlib.util.find_spec("tensorboard") is not None:
            # Imported late: it costs a second, and not everybody has it.
            summary = importlib.import_module("torch.utils.tensorboard")
            self._writer = summary.SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def log(self, step: int, split: str, values: Mapping[str, float]) -> None:
        if self._writer is not None:
            for name, value in values.items():
                if math.isfinite(value):
                    self._writer.add_scalar(f"{name}/{split}", value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
