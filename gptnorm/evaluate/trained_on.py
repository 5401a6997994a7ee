"""Which documents a run was trained on."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b

import numpy as np

from gptnorm.data import Shards, Tokenizer
from gptnorm.data.pieces import cut
from gptnorm.data.progress import Progress, Silent, Watcher
from gptnorm.evaluate.documents import split_documents

DIGEST = 8
"""Bytes of a digest: a million documents against a billion agree by chance once in 20,000 times."""


class TrainedOn:
    """The documents of a training split, by digests of their tokens: 8 bytes each.

    A near copy is not noticed, nor is a document that is part of a longer one.
    """

    def __init__(self, shards: Shards, tokenizer: Tokenizer, watcher: Watcher | None = None) -> None:
        """Reads the whole split.

        Args:
            shards: with a manifest.
        """
        assert shards.end_of_text is not None
        watcher = watcher or Silent()
        watcher.begin("reading the training split")
        size = shards.train.itemsize

        def digests() -> Iterator[int]:
            done = 0
            for tokens in split_documents(shards.train, shards.end_of_text or 0):
                done += len(tokens) + 1
                watcher.update(Progress(share=done / len(shards.train), text_bytes=done * size))
                yield self._digest(tokens)

        self._dtype = shards.train.dtype
        self._digests = np.sort(np.fromiter(digests(), np.uint64))
        self._tokenizer = tokenizer
        self._piece_size = shards.manifest["corpus"]["piece_size"]
        watcher.end()

    def has(self, tokens: np.ndarray, text: str | None = None) -> bool:
        """Whether the run was trained on a document.

        Args:
            text: that of the document. A run of few documents was trained on pieces of them, and has a document if it
                has any piece of it.
        """
        if self._has(tokens):
            return True
        if text is None or self._piece_size is None:
            return False
        return any(map(self._has, self._tokenizer.encode_batch(list(cut([text], self._piece_size)))))

    @property
    def by_pieces(self) -> bool:
        """Whether the run was trained on pieces of documents, so that a document's text has to be known."""
        return self._piece_size is not None

    def _has(self, tokens: np.ndarray) -> bool:
        digest = np.uint64(self._digest(tokens))
        at = int(np.searchsorted(self._digests, digest))
        return at < len(self._digests) and bool(self._digests[at] == digest)

    def _digest(self, tokens: np.ndarray) -> int:
        content = np.ascontiguousarray(tokens, self._dtype)
        return int.from_bytes(blake2b(content.tobytes(), digest_size=DIGEST).digest(), "big")
