r"""How far the feed-forward of each block is from an affine map: $1 - R^2$.

With $x_t$ what the feed-forward of a block reads for token t and $y_t$ what it returns, over n tokens,

$$1 - R^2 = \frac{n - 1}{n - r} \cdot
    \frac{\min_{A, b} \sum_t \lVert y_t - A x_t - b \rVert^2}{\sum_t \lVert y_t - \bar y \rVert^2},$$

the adjusted coefficient of determination, r being the rank of $(x_t, 1)$. 0 is an affine map, 1 a map whose output no
affine map of its input tells anything about. Directions in which x varies $10^{-12}$ times as much as in its largest
(second moments) count as none.

x is what the wiring hands to the feed-forward: after the norm where a strategy norms before the branch, the bare stream
where it does not. A norm inside the branch thus counts as part of its nonlinearity, one before it does not.

Source: ours. SimpleGPT credits part of its gain to more effective nonlinearity (arXiv 2602.01212) without a measure.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gptnorm.model import GPT
from gptnorm.probe.measures import exact
from gptnorm.probe.trace import blocks_of, on_input, on_output, watchable

TOKENS_PER_FEATURE = 40
"""Tokens that should be measured for each feature of the stream."""

NEGLIGIBLE = 1e-12
"""Ratio of eigenvalues of the second moments below which a direction counts as none."""


class _Moments:
    """Second moments of (x, 1) and y, from which a fit and its error follow without the tokens, in fp64."""

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

    def unexplained(self) -> float | None:
        """1 - R²; None where it is not finite, or there are fewer than two tokens for each feature."""
        assert self.xx is not None
        assert self.xy is not None
        assert self.yy is not None
        count = float(self.xx[-1, -1])
        if count < 2 * len(self.xx) or not torch.isfinite(self.xx).all():
            return None
        values, vectors = torch.linalg.eigh(self.xx)
        kept = values > NEGLIGIBLE * values[-1]
        projected = (vectors.mT @ self.xy)[kept]
        explained = (projected.square() / values[kept, None]).sum()
        spread = self.yy - self.xy[-1].square().sum() / count
        found = float((self.yy - explained) / spread) * (count - 1) / (count - int(kept.sum()))
        return max(0.0, found) if math.isfinite(found) else None


def feedforward_nonlinearity(model: GPT, batches: Sequence[Tensor]) -> list[float] | None:
    """The number of the module for each block, on batches of tokens (B, T + 1).

    Returns:
        None where there are fewer than two tokens for each feature, or a number is not finite.
    """
    moments = [_Moments() for _ in model.blocks]
    read: dict[int, Tensor] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(watchable(model))
        for layer, block in enumerate(blocks_of(model)):

            def see_input(x: Tensor, layer: int = layer) -> None:
                read[layer] = exact(x).flatten(0, -2)

            def see_output(y: Tensor, layer: int = layer) -> None:
                moments[layer].add(read.pop(layer), exact(y).flatten(0, -2))

            on_input(stack, block.ffn, see_input)
            on_output(stack, block.ffn, see_output)
        for tokens_BT in batches:
            model.features(tokens_BT[:, :-1])
    found = [value for block in moments if (value := block.unexplained()) is not None]
    return found if len(found) == len(moments) else None
