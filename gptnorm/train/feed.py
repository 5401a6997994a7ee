"""What a process's share of each step is: its rows of every batch, and the random numbers of its dropout."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from gptnorm.config import Config
from gptnorm.data import Sampler
from gptnorm.train.inputs import to_device
from gptnorm.train.parallel import World


class Feed:
    """Rows follow from step and layout alone, so that a run that is resumed sees what it would have seen."""

    def __init__(self, config: Config, sampler: Sampler, world: World, vocab: int) -> None:
        self._config = config
        self._sampler = sampler
        self._world = world
        self._vocab = vocab

    def micro_batches(self, step: int) -> list[Tensor]:
        """This process's rows of each micro-batch."""
        parts = np.split(self._sampler.batch(step), self._config.train.accumulate)
        return [self._own(part) for part in parts]

    def gauged(self, step: int) -> Tensor:
        """This process's rows of the sequences that the gauge reads: the first ones, whatever the layout."""
        train, size = self._config.train, self._world.data_size
        rows = self._sampler.batch(step)[: train.batch_size // train.accumulate]
        return self._own(rows[: size * -(-self._config.gauge.sequences // size)])

    def seed_dropout(self, step: int, number: int) -> None:
        """Random numbers of a micro-batch follow from the seed and its place, so that no generator has to be saved."""
        if self._config.model.dropout:
            words = f"dropout/{self._config.seed}/{step}/{number}/{self._world.data_rank}"
            torch.manual_seed(int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "little") >> 1)

    def _own(self, rows: np.ndarray) -> Tensor:
        own = np.split(rows, self._world.data_size)[self._world.data_rank]
        return to_device(own, self._vocab, self._world.device)
