r"""Losses of a layer's output y.

| loss | ℓ(y) | H_yy |
|---|---|---|
| `Quadratic` | $\langle g, y - y_0 \rangle + \tfrac12 (y - y_0)^\top A (y - y_0)$ | A everywhere, and ∂ℓ/∂y = g at y₀ |
| `Softmax` | $-\log \mathrm{softmax}(U y + a)_t$ | $U^\top (\mathrm{diag}\, p - p p^\top) U$, moves with y |
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gptnorm.theory import draws


@dataclass(frozen=True, kw_only=True, eq=False)
class Quadratic:
    """With a given gradient and a given Hessian at a point."""

    at: Tensor
    """y₀, (d,)."""
    g: Tensor
    """(d,)."""
    hessian: Tensor
    """A, (d, d), symmetric."""

    def __call__(self, y: Tensor) -> Tensor:
        moved = y - self.at
        return self.g @ moved + moved @ self.hessian @ moved / 2


@dataclass(frozen=True, kw_only=True, eq=False)
class Softmax:
    """Cross-entropy of a linear head."""

    head: Tensor
    """U, (V, d)."""
    target: int
    """t."""
    bias: Tensor | None = None
    """a, (V,)."""

    def __call__(self, y: Tensor) -> Tensor:
        logits = self.head @ y
        if self.bias is not None:
            logits = logits + self.bias
        return logits.logsumexp(0) - logits[self.target]


def softmax_head(seed: int, d: int, vocab: int) -> Softmax:
    """As at initialisation: entries of U of variance 1 / d, so that logits of a y of RMS 1 have variance 1; any token
    is the target."""
    head = draws.normal(seed, "head", vocab, d) / d**0.5
    return Softmax(head=head, target=draws.index(seed, "target", vocab))


def sure_head(seed: int, d: int, vocab: int, *, tokens: int = 8, logit: float = 12.0) -> Softmax:
    """The same head when it has learned which few tokens can come: a bias on the first `tokens`, of which one is the
    target. Of V = 4096 they have more than 99 % of the mass."""
    head = softmax_head(seed, d, vocab)
    bias = head.head.new_zeros(vocab)
    bias[:tokens] = logit
    return Softmax(head=head.head, target=draws.index(seed, "target", tokens), bias=bias)
