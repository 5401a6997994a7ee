"""Which document goes where: splits, repeats, limits, and what of them is safely on disk.

A document is held out if the first eight bytes of its text's SHA-256, read as a big-endian number, are below a
threshold: val_fraction x 2^64 at first. Where more than `val_tokens` tokens would be held out, the held-out document
of the largest hash goes over to the training split and its hash becomes the threshold, until they fit. At the end
the held-out documents are those below the threshold, wherever in the corpus they stood, and no equal text is in the
other split.

Memory: the held-out documents' digests, at most those of `val_tokens` tokens; with `deduplicate` one digest of 16
bytes for every document of the corpus besides, about 100 bytes in a Python set.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from gptnorm.data.encoder import Batch, Tokens
from gptnorm.data.shards import DTYPES

DIGEST = 16
"""Bytes of a SHA-256 by which documents are told apart: two of a trillion documents agree with chance 1e-15."""

HELD = struct.Struct(f"<{DIGEST}sQQ")
"""A held-out document in val.index: its digest, its tokens, the bytes of its text."""

TRAIN, VAL, INDEX, SEEN = "train.bin", "val.log", "val.index", "seen.bin"
"""Training tokens; tokens of all documents that ever were held out; their index; the digests of all documents."""

COPY = 1 << 24
"""Bytes copied at once."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What decides where documents go; see `DataConfig`."""

    dtype: str
    val_fraction: float
    val_tokens: int
    max_tokens: int | None
    max_documents: int | None
    deduplicate: bool


@dataclass
class Counts:
    """What a split holds."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    repeats: int = 0
    """Documents left out because their text was there already."""

    def add(self, tokens: int, text_bytes: int, documents: int = 1) -> None:
        """Count a document, or take it back with -1."""
        self.documents += documents
        self.tokens += documents * tokens
        self.text_bytes += documents * text_bytes


@dataclass
class Tally:
    """All that a writer needs to go on from a place: JSON-able, made by `Writer.commit`."""

    below: int
    """The threshold."""
    train: Counts = field(default_factory=Counts)
    val: Counts = field(default_factory=Counts)
    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes of each file up to that place."""

    @classmethod
    def from_json(cls, table: dict[str, Any]) -> Tally:
        """What `to_json` gave."""
        return cls(table["below"], Counts(**table["train"]), Counts(**table["val"]), table["sizes"])

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class _Held:
    """A held-out document: where its tokens stand in val.log."""

    offset: int
    tokens: int
    text_bytes: int


class Writer:
    """Appends documents to the files of a half-built folder."""

    def __init__(self, folder: Path, rules: Rules, tally: Tally | None = None) -> None:
        """Open the files, cut off what was written after the tally was taken, and go on from there.

        Raises:
            OSError: a file cannot be written, or is shorter than the tally says.
        """
        self._folder = folder
        self.rules = rules
        self._item = DTYPES[rules.dtype].itemsize
        self.tally = tally or Tally(below=round(rules.val_fraction * 2**64))
        names = (TRAIN, VAL, INDEX) + ((SEEN,) if rules.deduplicate else ())
        self._files: dict[str, BinaryIO] = {}
        for name in names:
            self._files[name] = _open_at(folder / name, self.tally.sizes.get(name, 0))
        self._log = (folder / VAL).open("rb")
        self._held: dict[bytes, _Held] = dict(self._read_index())
        self._heap = [(-_hash(digest), digest) for digest in self._held]
        heapq.heapify(self._heap)
        self._seen = set(_records(folder / SEEN, DIGEST)) if rules.deduplicate else set()

    def close(self) -> None:
        """Close the files; what was not committed may be lost."""
        for file in (*self._files.values(), self._log):
            # A full disk was told of when it was met; a buffer that still cannot be flushed is no news.
            with contextlib.suppress(OSError):
                file.close()

    def write(self, batch: Batch, tokens: Tokens) -> int:
        """Sort the documents of a batch into the splits.

        Returns:
            How many of them were taken: fewer than there are if a limit was met.

        Raises:
            OSError: the disk is full, or whatever else is wrong with it.
        """
        view = memoryview(tokens.ids)
        end = 0
        documents = zip(batch.digests, batch.texts, tokens.counts, strict=True)
        for number, (digest, text, count) in enumerate(documents):
            if self.is_full():
                return number
            start, end = end, end + count * self._item
            self._place(digest[:DIGEST], view[start:end], count, len(text))
        return len(batch.digests)

    def is_full(self) -> bool:
        """Whether a limit was met: no further document is taken."""
        train, val, rules = self.tally.train, self.tally.val, self.rules
        return (rules.max_tokens is not None and train.tokens + val.tokens >= rules.max_tokens) or (
            rules.max_documents is not None and train.documents + val.documents >= rules.max_documents
        )

    def commit(self) -> Tally:
        """Bring all that was written safely to disk.

        Returns:
            From where a later writer goes on.

        Raises:
            OSError: the disk is full, or whatever else is wrong with it.
        """
        for name, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            self.tally.sizes[name] = file.tell()
        return self.tally

    def write_val(self, path: Path) -> None:
        """Write the held-out documents, in the order of the corpus, into a file of their own.

        Raises:
            OSError: the disk is full, or whatever else is wrong with it.
        """
        self._files[VAL].flush()
        with path.open("wb") as file:
            for held in self._held.values():
                for chunk in self._logged(held):
                    file.write(chunk)
            file.flush()
            os.fsync(file.fileno())

    def _place(self, digest: bytes, ids: memoryview, count: int, text_bytes: int) -> None:
        is_held = _hash(digest) < self.tally.below
        split = self.tally.val if is_held else self.tally.train
        if digest in self._seen or (is_held and digest in self._held):
            split.repeats += 1
            return
        if self.rules.deduplicate:
            self._seen.add(digest)
            self._files[SEEN].write(digest)
        split.add(count, text_bytes)
        if is_held:
            self._held[digest] = _Held(self._files[VAL].tell(), count, text_bytes)
            heapq.heappush(self._heap, (-_hash(digest), digest))
            self._files[VAL].write(ids)
            self._files[INDEX].write(HELD.pack(digest, count, text_bytes))
            self._fit()
        else:
            self._files[TRAIN].write(ids)

    def _fit(self) -> None:
        """Let held-out documents go until no more than `val_tokens` are left, or only one."""
        tally = self.tally
        while tally.val.tokens > self.rules.val_tokens and len(self._held) > 1:
            _, digest = heapq.heappop(self._heap)
            held = self._held.pop(digest)
            tally.below = _hash(digest)
            tally.val.add(held.tokens, held.text_bytes, -1)
            tally.train.add(held.tokens, held.text_bytes)
            self._files[VAL].flush()
            for chunk in self._logged(held):
                self._files[TRAIN].write(chunk)

    def _logged(self, held: _Held) -> Iterator[bytes]:
        self._log.seek(held.offset)
        left = held.tokens * self._item
        while left:
            chunk = self._log.read(min(left, COPY))
            left -= len(chunk)
            yield chunk

    def _read_index(self) -> Iterator[tuple[bytes, _Held]]:
        offset = 0
        for record in _records(self._folder / INDEX, HELD.size):
            digest, tokens, text_bytes = HELD.unpack(record)
            if _hash(digest) < self.tally.below:
                yield digest, _Held(offset, tokens, text_bytes)
            offset += tokens * self._item


def _hash(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "big")


def _open_at(path: Path, size: int) -> BinaryIO:
    file = path.open("ab")
    if file.tell() < size:
        file.close()
        raise OSError(None, f"{path.name} is shorter than when it was last synced", str(path))
    file.truncate(size)
    file.seek(size)
    return file


def _records(path: Path, size: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        while len(record := file.read(size)) == size:
            yield record
