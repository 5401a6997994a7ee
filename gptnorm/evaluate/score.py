"""The log-likelihood of documents under a model, window by window."""

from __future__ import annotations

import contextlib
import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gptnorm.evaluate.documents import Document
from gptnorm.evaluate.numbers import Score, ratio_error
from gptnorm.evaluate.windows import Window, cut_windows

Mode = Literal["separate", "stream"]

AHEAD = 16
"""Batches that are read ahead and sorted by length, so that little is padded."""

ROWS = 512
"""Positions whose logits are computed at once, however many a batch scores."""

CHUNK = 1 << 16
"""Tokens of a document that are cut into windows at once."""


class Model(Protocol):
    """What scoring needs of `gptnorm.model.GPT`."""

    def eval(self) -> Any: ...
    def features(self, tokens_BT: Tensor) -> Tensor: ...
    def read_out(self, h: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Reach:
    """How far scoring has come."""

    documents: int
    """Those that have been begun."""
    tokens: int
    """Those that have been scored."""
    share: float
    """Of the tokens of all documents begun, 0 to 1."""
    text_bytes: int
    """About how much text that is."""


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """How documents are scored."""

    window: int
    """Inputs that the model reads at once."""
    stride: int
    """Inputs from one window to the next; see `cut_windows`."""
    mode: Mode
    """separate: each document x_1 … x_n is the sequence e x_1 … x_n e (e the end-of-text token, which in training
    stands before every document and after it), and all but the first e is scored. stream: the documents are one
    sequence, e x_1 … x_n e y_1 … y_m e …: the same tokens are scored, given whatever precedes them."""
    end_of_text: int | None
    """The id of e; None: it is not known. The tokens are then one sequence as they are, whose first one is not
    scored."""
    batch_size: int
    """Windows in a forward pass."""
    device: torch.device
    bf16: bool = False
    """Whether matrix products are in bfloat16 (autocast)."""

    @torch.inference_mode()
    def score(
        self, model: Model, documents: Iterable[Document], report: Callable[[Reach], None] | None = None
    ) -> Score | None:
        """Score every document. The model is left in evaluation mode.

        Args:
            report: is called after each batch.

        Returns:
            None if there is nothing to score.
        """
        assert self.end_of_text is not None or self.mode == "stream"
        model.eval()
        sums = _Sums(self.end_of_text)
        for batch in _batches(self._windows(documents, sums), self.batch_size):
            nats = self._nats(model, [window for _, window in batch])
            for (owner, window), part in zip(batch, nats, strict=True):
                sums.add(owner, window.tokens[window.first :], part)
            if report is not None:
                report(sums.reach())
        return sums.score(apart=self.mode == "separate")

    def _windows(self, documents: Iterable[Document], sums: _Sums) -> Iterator[tuple[int, Window]]:
        """Windows, each with the number of its document, 0 in a stream."""
        cut = partial(cut_windows, length=self.window, stride=self.stride)
        end = np.array([] if self.end_of_text is None else [self.end_of_text], np.int64)

        def parts(document: Document) -> Iterator[np.ndarray]:
            # Windows are of int64: of a long document not all at once.
            yield from (document.tokens[at : at + CHUNK] for at in range(0, len(document.tokens), CHUNK))
            if document.has_end:
                yield end

        def stream() -> Iterator[np.ndarray]:
            yield end
            for document in documents:
                sums.begin(document)
                yield from parts(document)

        if self.mode == "stream":
            yield from ((0, window) for window in cut(stream()))
            return
        for document in documents:
            number = sums.begin(document)
            yield from ((number, window) for window in cut(chain([end], parts(document))))

    def _nats(self, model: Model, windows: Sequence[Window]) -> list[np.ndarray]:
        """-ln p of the scored targets of each window, float64."""
        length = max(len(window.tokens) for window in windows) - 1
        # Padded on the right: attention is causal, so that no scored target depends on it.
        inputs_BT, targets_BT = np.zeros((2, len(windows), length), np.int64)
        scored_BT = np.zeros((len(windows), length), bool)
        for row, window in enumerate(windows):
            stop = len(window.tokens) - 1
            inputs_BT[row, :stop], targets_BT[row, :stop] = window.tokens[:-1], window.tokens[1:]
            scored_BT[row, window.first - 1 : stop] = True
        targets_M = torch.from_numpy(targets_BT[scored_BT]).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext():
            h_BTD = model.features(torch.from_numpy(inputs_BT).to(self.device))
            h_MD = h_BTD[torch.from_numpy(scored_BT).to(self.device)]
            pairs = zip(h_MD.split(ROWS), targets_M.split(ROWS), strict=True)
            nats_M = torch.cat([_cross_entropies(model.read_out(h), targets) for h, targets in pairs])
        sizes = [window.scored for window in windows]
        return np.split(nats_M.double().cpu().numpy(), np.cumsum(sizes)[:-1])


def _cross_entropies(logits_MV: Tensor, targets_M: Tensor) -> Tensor:
    exact = logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32))
    return F.cross_entropy(exact, targets_M, reduction="none")


def _batches(windows: Iterator[tuple[int, Window]], size: int) -> Iterator[list[tuple[int, Window]]]:
    """Windows of like length together; the longest of those read ahead first."""
    while ahead := list(islice(windows, AHEAD * size)):
        ahead.sort(key=lambda pair: len(pair[1].tokens), reverse=True)
        yield from (ahead[at : at + size] for at in range(0, len(ahead), size))


class _Sums:
    """What is added up: 24 bytes for each document."""

    def __init__(self, end_of_text: int | None) -> None:
        self.nats, self.tokens, self.text_bytes = array("d"), array("q"), array("q")
        self.bytes_read = self.end_tokens = 0
        self._begun = self._scored = 0
        self.end_nats = 0.0
        self._end_of_text = end_of_text
        self._is_counted = True

    def begin(self, document: Document) -> int:
        """The number of a document that is read next."""
        self.nats.append(0.0)
        self.tokens.append(0)
        self.text_bytes.append(document.text_bytes or 0)
        self._begun += len(document.tokens) + document.has_end
        self.bytes_read += document.text_bytes or 0
        self._is_counted &= document.text_bytes is not None
        return len(self.nats) - 1

    def add(self, number: int, targets: np.ndarray, nats: np.ndarray) -> None:
        self.nats[number] += float(nats.sum())
        self.tokens[number] += len(nats)
        self._scored += len(nats)
        if self._end_of_text is not None:
            is_end = targets == self._end_of_text
            self.end_tokens += int(is_end.sum())
            self.end_nats += float(nats[is_end].sum())

    def reach(self) -> Reach:
        share = self._scored / self._begun
        read = round(self.bytes_read * share)
        return Reach(documents=len(self.nats), tokens=self._scored, share=share, text_bytes=read)

    def score(self, *, apart: bool) -> Score | None:
        nats, tokens, text_bytes = (np.array(sums, np.float64) for sums in (self.nats, self.tokens, self.text_bytes))
        if not self._scored:
            return None
        bits_error = ratio_error(nats, text_bytes) if apart and self._is_counted else None
        return Score(
            documents=None if self._end_of_text is None else len(nats),
            tokens=self._scored,
            text_bytes=self.bytes_read if self._is_counted else None,
            nats=math.fsum(self.nats),
            end_tokens=self.end_tokens,
            end_nats=self.end_nats,
            nats_per_token_error=ratio_error(nats, tokens) if apart else None,
            bits_per_byte_error=None if bits_error is None else bits_error / math.log(2),
        )
