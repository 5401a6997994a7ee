"""Documents as tokens: out of shards, and cut short."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from gptnorm.data.tokenizer import ByteTokenizer, Tokenizer

CHUNK = 1 << 22
"""Tokens of a shard looked at at once."""

PARTIAL = 16
"""At most so many tokens are given up to end a cut between two characters."""

SAMPLE = " Édouard\u00a0e\u0301 ﬁn½\r\n\t  İSTANBUL  ''quoted'' 한국어 😀\u200d. "
"""Text that a tokenizer gives back unchanged only if it normalises nothing."""


@dataclass(frozen=True, eq=False)
class Document:
    """A text as tokens, without the one that ends it."""

    tokens: np.ndarray
    """Ids, one-dimensional, of an unsigned type."""
    text_bytes: int | None
    """Bytes of the text in UTF-8; None: nobody knows."""
    has_end: bool = True
    """Whether an end-of-text token follows; a document that was cut short has none."""


def split_documents(tokens: np.ndarray, end_of_text: int) -> Iterator[np.ndarray]:
    """The documents of a shard, each without its end-of-text token, as views."""
    start = 0
    for at in range(0, len(tokens), CHUNK):
        for end in np.flatnonzero(tokens[at : at + CHUNK] == end_of_text):
            yield tokens[start : at + end]
            start = at + int(end) + 1
    if start < len(tokens):
        yield tokens[start:]


def count_bytes(tokenizer: Tokenizer, tokens: np.ndarray) -> int:
    """UTF-8 bytes of the text that tokens stand for; exact where the tokenizer is lossless."""
    return len(tokens) if isinstance(tokenizer, ByteTokenizer) else len(tokenizer.decode(tokens).encode("utf-8"))


def is_lossless(tokenizer: Tokenizer) -> bool:
    """Whether a text of accents, spaces, line ends and rare scripts comes back from its tokens unchanged."""
    return tokenizer.decode(tokenizer.encode_batch([SAMPLE])[0]) == SAMPLE


def limit(documents: Iterable[Document], most: int, tokenizer: Tokenizer | None) -> Iterator[Document]:
    """The first documents, as many as have `most` tokens together, their ends included.

    The last one is cut between two characters, so that its bytes are still counted exactly: it may be a few tokens
    short. Where the tokenizer does not give the text back unchanged it is left out; if it is the first one, it is cut
    and its bytes are unknown.

    Args:
        tokenizer: None: there are no texts, only tokens.
    """
    left = most
    for document in documents:
        size = len(document.tokens) + document.has_end
        if size > left:
            # A cut of a text that does not come back from its tokens would leave the bytes of all unknown.
            if left == most or tokenizer is None or is_lossless(tokenizer):
                yield from _shortened(document, left, tokenizer)
            return
        yield document
        left -= size
        if not left:
            return


def _shortened(document: Document, most: int, tokenizer: Tokenizer | None) -> Iterator[Document]:
    if tokenizer is None:
        yield Document(document.tokens[:most], None, has_end=False)
        return
    if not is_lossless(tokenizer):
        yield replace(document, tokens=document.tokens[:most], text_bytes=None, has_end=False)
        return
    text = tokenizer.decode(document.tokens[: most + PARTIAL]).encode("utf-8")
    for count in range(min(most, len(document.tokens)), max(0, most - PARTIAL), -1):
        beginning = tokenizer.decode(document.tokens[:count]).encode("utf-8")
        if beginning and text.startswith(beginning):
            yield replace(document, tokens=document.tokens[:count], text_bytes=len(beginning), has_end=False)
            return
