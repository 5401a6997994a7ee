r"""How far the feed-forward of each block is from an affine map: $1 - R^2$.

With $x_t$ what the feed-forward of a block reads for token t and $y_t$ what it returns,

$$1 - R^2 = \frac{\sum_t \lVert y_t - A x_t - b \rVert^2}{\sum_t \lVert y_t - \bar y \rVert^2},$$

where A, b fit $y$ best on one half of the tokens (every second one) and the sums go over the other half, $\bar y$ being
its mean. 0 is an affine map; 1 is a map whose output no affine map of its input tells anything about. Fitted on n
tokens it comes out too high by a factor of about $1 + (d + 1) / n$.

x is what the wiring hands to the feed-forward: after the norm where a strategy norms before the branch, the bare stream
where it does not. A norm inside the branch thus counts as part of its nonlinearity, one before it does not.

Source: ours. SimpleGPT credits part of its gain to more effective nonlinearity (simplegpt.md §5.1) without a measure.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from gptnorm.model import GPT
from gptnorm.probe.measures import exact
from gptnorm.probe.trace import blocks_of, on_input, on_output, watchable

TOKENS_PER_FEATURE = 40
"""Tokens that should be measured for each feature of the stream, half of them for the fit."""


class _Sums:
    """Second moments of (x, 1, y), from which a fit and its error follow without the tokens, in fp64."""

    def __init__(self) -> None:
        self.xx: Tensor | None = None
        self.xy: Tensor | None = None
        self.yy: Tensor | None = None

    def add(self, x: Tensor, y: Tensor) -> None:
        """x (N, d) and y (N, d)."""
        x, y = x.double(), y.double()
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        self.xx = x.mT @ x + (0 if self.xx is None else self.xx)
        self.xy = x.mT @ y + (0 if self.xy is None else self.xy)
        self.yy = y.square().sum() + (0 if self.yy is None else self.yy)


def feedforward_nonlinearity(model: GPT, batches: Sequence[Tensor]) -> list[float] | None:
    """The number of the module for each block, on batches of tokens (B, T + 1).

    Returns:
        None where there are fewer than two tokens for each feature to fit, or a number is not finite.
    """
    fits, tests = [_Sums() for _ in model.blocks], [_Sums() for _ in model.blocks]
    read: dict[int, Tensor] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(watchable(model))
        for layer, block in enumerate(blocks_of(model)):

            def see_input(x: Tensor, layer: int = layer) -> None:
                read[layer] = exact(x).flatten(0, -2)

            def see_output(y: Tensor, layer: int = layer) -> None:
                x, y = read.pop(layer), exact(y).flatten(0, -2)
                fits[layer].add(x[::2], y[::2])
                tests[layer].add(x[1::2], y[1::2])

            on_input(stack, block.ffn, see_input)
            on_output(stack, block.ffn, see_output)
        for tokens_BT in batches:
            model.features(tokens_BT[:, :-1])
    found = [_unexplained(fit, test) for fit, test in zip(fits, tests, strict=True)]
    return found if all(value is not None for value in found) else None  # type: ignore[return-value]


def _unexplained(fit: _Sums, test: _Sums) -> float | None:
    assert fit.xx is not None
    assert fit.xy is not None
    assert test.xx is not None
    assert test.xy is not None
    assert test.yy is not None
    if float(fit.xx[-1, -1]) < 2 * len(fit.xx) or not torch.isfinite(fit.xx).all():
        return None
    # Features may depend on each other (a stream of fixed mean), so the least-squares solution of least norm.
    map_ = torch.linalg.pinv(fit.xx, hermitian=True) @ fit.xy
    error = test.yy - 2 * (map_ * test.xy).sum() + (map_ * (test.xx @ map_)).sum()
    mean = test.xy[-1] / test.xx[-1, -1]
    spread = test.yy - test.xx[-1, -1] * mean.square().sum()
    value = float(error / spread)
    return value if torch.isfinite(torch.tensor(value)) else None
