"""The texts of a study: what its runs train on, and what their models are evaluated on beside.

Most studies have one. A tolerance study that maps `data.path` has one at each place, and `study.evaluate` names more.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from gptnorm.data import Shards, prepare
from gptnorm.errors import UserError, bad_value, said_as
from gptnorm.train.inputs import check_vocab, refuse_unknown_ids

if TYPE_CHECKING:
    from gptnorm.study.cell import Cell

Texts = Mapping[str, Shards]
"""By their names."""


def prepare_texts(cells: Sequence[Cell]) -> dict[str, Shards]:
    """Every text that the cells train or are evaluated on.

    Raises:
        UserError: a text is no good, or has other tokens than a model that is evaluated on it.
    """
    wanted = {name: replace(cell.config.data, path=name) for cell in cells for name in cell.evaluated}
    own = {cell.text: cell.config.data for cell in cells}
    wanted |= own
    texts: dict[str, Shards] = {}
    for name, data in wanted.items():
        with naming(name, wanted), said_as("data.path" if name in own else "study.evaluate", "data.path"):
            texts[name] = prepare(data)
    for own, name in dict.fromkeys((cell.text, name) for cell in cells for name in cell.evaluated):
        _check_tokens(own, name, texts)
    return texts


def _check_tokens(own: str, name: str, texts: Texts) -> None:
    mine, theirs = texts[own].tokenizer, texts[name].tokenizer
    if own == name or (mine == theirs and mine is not None):
        return
    if mine is None or theirs is None:
        which = own if mine is None else name
        reason = f"{which!r} is shards without a manifest.json, which do not say what tokenizer they are of"
    else:
        reason = f'has other tokens than {own!r}; data.tokenizer must be "bytes" or a tokenizer.json, for all texts'
    raise bad_value("study.evaluate", name, reason)


@contextlib.contextmanager
def naming(name: str, texts: Collection[str]) -> Iterator[None]:
    """Has what is wrong with one of several texts say which."""
    try:
        yield
    except UserError as error:
        if len(texts) == 1 or name in str(error):
            raise
        raise UserError(f"{name}: {error}") from None


def describe_texts(cells: Sequence[Cell], texts: Texts) -> dict[str, dict[str, Any]]:
    """What `study.json` says of each text."""
    found = {}
    for name, config in {name: cell.config for cell in cells for name in (*cell.evaluated, cell.text)}.items():
        shards, vocab = texts[name], check_vocab(config, texts[name])
        entropy = unigram_entropy(shards.train, shards.val, shards.vocab_size or vocab)
        found[name] = {
            "fingerprint": shards.fingerprint,
            "vocab": vocab,
            "train_tokens": len(shards.train),
            "val_tokens": len(shards.val),
            "unigram_entropy": entropy if math.isfinite(entropy) else None,
            "trained": any(cell.text == name for cell in cells),
        }
    return found


def unigram_entropy(train: np.ndarray, val: np.ndarray, vocab: int) -> float:
    """Loss in nats per token on `val` of the best model that knows token frequencies alone.

    Frequencies are counted on `train` with one added to each, so that no token has none.
    """
    counts = _count(train, vocab) + 1.0
    share = _count(val, vocab) / len(val)
    return float(-(share * np.log(counts / counts.sum())).sum())


def _count(tokens: np.ndarray, vocab: int) -> np.ndarray:
    """How often each id occurs; in parts, since bincount makes eight bytes of every token."""
    counts = np.zeros(vocab, np.int64)
    for start in range(0, len(tokens), 1 << 24):
        part = tokens[start : start + (1 << 24)]
        refuse_unknown_ids(part, vocab)
        counts += np.bincount(part, minlength=vocab)
    return counts
