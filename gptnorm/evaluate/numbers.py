"""From sums over scored tokens to perplexity and bits per byte."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Score:
    """How well a model predicts a text. With -ln p summed over every scored token:

        nats per token = nats / tokens,   perplexity = exp(nats / tokens),   bits per byte = nats / (ln 2 · text_bytes).

    The token that ends a document is scored like any other, so `nats` and `tokens` hold it and `nats` is the length of
    a code for the documents and their ends; it has no bytes. Without the ends, bits per byte would be
    (nats - end_nats) / (ln 2 · text_bytes).
    """

    documents: int | None
    """None: the shards do not say where documents end."""
    tokens: int
    """Tokens scored, each once."""
    text_bytes: int | None
    """Bytes of the scored text in UTF-8; None: nobody knows."""
    nats: float
    """Sum of -ln p(token | context)."""
    end_tokens: int
    """How many of the scored tokens end a document."""
    end_nats: float
    """Their part of `nats`."""
    nats_per_token_error: float | None
    """Standard error over documents; see `ratio_error`. None: there are fewer than two, or they were not scored
    apart."""
    bits_per_byte_error: float | None
    """Likewise; None, too, where the bytes of single documents are not known."""

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """Infinite where a float cannot hold it."""
        try:
            return math.exp(self.nats_per_token)
        except OverflowError:
            return math.inf

    @property
    def bits_per_byte(self) -> float | None:
        return self.nats / (math.log(2) * self.text_bytes) if self.text_bytes else None


def ratio_error(y: np.ndarray, x: np.ndarray) -> float | None:
    r"""Standard error of R = Σ y_i / Σ x_i over n documents, taken as independent draws:

    $$\mathrm{se}(R) = \frac{1}{\sum_i x_i} \sqrt{\frac{n}{n-1} \sum_i (y_i - R\,x_i)^2},$$

    the linearised variance of a ratio estimator (Cochran, Sampling Techniques, section 2.11), without a correction for
    a finite population.

    Args:
        y, x: (n,), the sums of each document.

    Returns:
        None for fewer than two documents.
    """
    n = len(y)
    if n < 2:
        return None
    residuals = y - y.sum() / x.sum() * x
    return float(np.sqrt(n / (n - 1) * np.square(residuals).sum()) / x.sum())
