"""Cutting text into pieces, for corpora of too few documents to hold some out whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

PIECES = 200
"""About how many pieces a corpus is cut into."""

SMALLEST = 256
"""No piece is shorter (in characters), unless the whole document is."""

LARGEST = 1 << 16
"""No piece is longer (in characters)."""

BREAKS = (("\n\n", "\n\r\n"), ("\n",))
"""Where to cut, best first: at a blank line, at a line's end."""


def piece_size(characters: int) -> int:
    """The size to aim at for a corpus of that many characters in all."""
    return min(max(characters // PIECES, 2 * SMALLEST), LARGEST - SMALLEST)


def cut(chunks: Iterable[str], size: int) -> Iterator[str]:
    """Cut one document into pieces of size/2 to size characters that concatenate back to it exactly.

    Each cut falls at the last blank line in that range, else at the last line end,
    else anywhere. Only the last piece may be longer, by less than `SMALLEST`.
    `chunks` is the document in any division; the pieces do not depend on it.
    """
    buffer = ""
    for chunk in chunks:
        buffer += chunk
        start = 0
        while len(buffer) - start >= size + SMALLEST:
            end = _cut_point(buffer, start + size // 2, start + size)
            yield buffer[start:end]
            start = end
        buffer = buffer[start:]
    if buffer:
        yield buffer


def _cut_point(text: str, low: int, high: int) -> int:
    for breaks in BREAKS:
        ends = [at + len(mark) for mark in breaks if (at := text.rfind(mark, low, high)) >= 0]
        if ends:
            return max(ends)
    return high
