"""Which tokens a model reads together, and which of them it is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Window:
    """T + 1 tokens of a sequence: T inputs and, shifted by one, their targets."""

    tokens: np.ndarray
    """Token ids, (T + 1,)."""
    first: int
    """Index in `tokens` of the first target that is scored here, from 1; the later ones are, too. Those before it were
    scored by earlier windows and are context."""

    @property
    def scored(self) -> int:
        """How many targets are scored."""
        return len(self.tokens) - self.first


def cut_windows(chunks: Iterable[np.ndarray], length: int, stride: int) -> Iterator[Window]:
    """Slide a window of `length` inputs over a sequence s_0, s_1, …, s_n and score each of s_1 … s_n once.

    With W = length and S = stride, window k reads s_{kS} … s_{kS+W-1}, and the last one as many as there are. It scores
    what no earlier window did: s_1 … s_W for k = 0, else s_{(k-1)S+W+1} … s_{kS+W}. So s_j is predicted from

        j tokens                              if j <= W,
        W - S + 1 + (j - W - 1) mod S tokens  otherwise, which is from W - S + 1 to W.

    With S = W no two windows share an input, as in training; with S = 1 every target has all the context there is.

    Args:
        chunks: the sequence in any division, one-dimensional arrays of ids; the windows do not depend on it. Of it no
            more than a chunk and a window stand in memory.
        length, stride: 1 <= stride <= length.

    Returns:
        Windows in order, their tokens int64. None if there is nothing to predict (n = 0).
    """
    assert 1 <= stride <= length, (stride, length)
    held = np.empty(0, np.int64)
    first = 1
    for chunk in chunks:
        held = np.concatenate((held, chunk.astype(np.int64)))
        start = 0
        while len(held) - start > length:
            yield Window(held[start : start + length + 1], first)
            start += stride
            first = length + 1 - stride
        held = held[start:]
    if len(held) > first:
        yield Window(held, first)
