"""Writing checkpoints while the run goes on."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptnorm.config import CheckpointConfig
from gptnorm.train.agree import cpu_group, on_first
from gptnorm.train.checkpoint import prune_checkpoints, save_checkpoint, staged


class Saver:
    """Saves and prunes the checkpoints of a run, one at a time.

    An asynchronous save costs the loop a copy of the tensors into CPU memory; hashing, writing and syncing go on in a
    thread. Old checkpoints are removed after the new one is complete.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, device: torch.device) -> None:
        self.folder = folder
        self.config = config
        # Apart from the training's groups: its collectives come from another thread.
        self._group = cpu_group()
        own: dict[str, Any] = {}
        if device.type == "cuda":
            # A new thread's GPU is the first, whichever the process has, and torch's writer makes a stream there.
            index = torch.cuda.current_device() if device.index is None else device.index
            own = {"initializer": torch.cuda.set_device, "initargs": (index,)}
        self._thread = ThreadPoolExecutor(1, "checkpoint", **own)
        self._running: Future[None] | None = None

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], best: int | None) -> None:
        """Begins to write a checkpoint; waits for the one before it.

        Args:
            best: step of the checkpoint to be kept beside the newest.

        Raises:
            OSError: this one, or the one before it, could not be written.
        """
        self.wait()
        if not self.config.asynchronous:
            self._write(step, tensors, state, best)
            return
        self._running = self._thread.submit(self._write, step, staged(tensors), dict(state), best)

    def failed(self) -> bool:
        """Whether the last write has failed by now, on this process; it waits for nothing."""
        return self._running is not None and self._running.done() and self._running.exception() is not None

    def wait(self) -> None:
        """Returns when nothing is being written; OSError if the last write failed."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def close(self) -> None:
        """Waits, and lets the thread go."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _write(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], best: int | None) -> None:
        save_checkpoint(self.folder, step, tensors, state, self._group)
        on_first(lambda: prune_checkpoints(self.folder, self.config.keep, best), self._group)
