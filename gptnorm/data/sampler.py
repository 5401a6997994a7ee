"""Which tokens stand in which batch: a function of the seed and the step, nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from gptnorm.errors import UserError, bad_value

EPOCHS_KEPT = 2
"""Permutations held at once: a batch may cross from one epoch into the next."""


class Sampler:
    """Batches of windows of T + 1 tokens (T inputs and their targets) out of N tokens.

    Epoch e takes the windows

        tokens[phase_e + i T : phase_e + i T + T + 1],   i = 0 ... n - 1,

    each once, in an order permuted per epoch. Neighbours share one token, the last
    target of one being the first input of the next, so no target comes twice in an
    epoch. Every epoch has the same number of windows, so that the epoch of a step is
    arithmetic: n = max(1, floor((N - T) / T)), and phase_e is drawn from
    [0, min(T, N - n T)), which is all of [0, T) as soon as N >= 2 T.

    A batch that crosses an epoch's end takes the rest from the next one. The state
    is empty: any step can be asked for at any time, and gives the same on every
    machine and numpy version, since only raw words of Philox are drawn, never the
    distributions that numpy may change.
    """

    def __init__(self, tokens: np.ndarray, batch_size: int, seq_len: int, seed: int) -> None:
        """Over the training split's `tokens`, one-dimensional.

        Raises:
            UserError: there are too few tokens for one window.
        """
        if len(tokens) <= seq_len:
            raise _too_short(seq_len, "training", len(tokens))
        self.tokens = tokens
        self.batch_size = batch_size
        self.seq_len = seq_len
        self.seed = seed
        self.windows_per_epoch = max(1, (len(tokens) - seq_len) // seq_len)
        self._phases = min(seq_len, len(tokens) - self.windows_per_epoch * seq_len)
        self._epoch = lru_cache(maxsize=EPOCHS_KEPT)(self._draw_epoch)

    def starts(self, step: int) -> np.ndarray:
        """Where each window of the step's batch begins: int64 of shape (batch_size,)."""
        number = step * self.batch_size + np.arange(self.batch_size, dtype=np.int64)
        epochs, places = np.divmod(number, self.windows_per_epoch)
        starts = np.empty(self.batch_size, np.int64)
        for epoch in np.unique(epochs):
            phase, order = self._epoch(int(epoch))
            here = epochs == epoch
            starts[here] = phase + order[places[here]] * self.seq_len
        return starts

    def batch(self, step: int) -> np.ndarray:
        """The batch of a step (from 0): int64 of shape (batch_size, seq_len + 1)."""
        return _gather(self.tokens, self.starts(step), self.seq_len)

    def _draw_epoch(self, epoch: int) -> tuple[int, np.ndarray]:
        source = np.random.Philox(np.random.SeedSequence(self.seed, spawn_key=(epoch,)))
        phase = int(source.random_raw()) % self._phases
        return phase, np.argsort(source.random_raw(self.windows_per_epoch), kind="stable")


def validation_windows(tokens: np.ndarray, batch_size: int, seq_len: int, most: int) -> Iterator[np.ndarray]:
    """The same windows at each call: at most `most`, in arrays of int64 of shape (<= batch_size, seq_len + 1).

    The windows lie on a grid of stride seq_len, spread evenly over the split, none
    twice, the same ones for every batch_size. In a short split there are fewer: each once.

    Raises:
        UserError: at the call, if there are too few tokens for one window.
    """
    if len(tokens) <= seq_len:
        raise _too_short(seq_len, "validation", len(tokens))
    available = (len(tokens) - 1) // seq_len
    taken = min(available, most)
    starts = np.arange(taken, dtype=np.int64) * available // taken * seq_len
    return (_gather(tokens, starts[at : at + batch_size], seq_len) for at in range(0, taken, batch_size))


def _gather(tokens: np.ndarray, starts: np.ndarray, seq_len: int) -> np.ndarray:
    return tokens[starts[:, None] + np.arange(seq_len + 1)].astype(np.int64)


def _too_short(seq_len: int, split: str, tokens: int) -> UserError:
    return bad_value("train.seq_len", seq_len, f"the {split} split holds {tokens} tokens, so at most {tokens - 1}")
