r"""What a cell of a ladder leaves beside its loss: signal propagation on one batch, before and after training.

| field | of the stream $x_l$ after block l = 1 … L |
|---|---|
| grad | $\lVert \partial\,\mathrm{loss} / \partial x_l \rVert$ per block |
| cosine | $\mathrm{mean}_t \cos(x_{l-1}, x_l)$ per block |
| token_cosine | mean cosine of two tokens of a sequence in $x_L$ |

The formulas are `gptnorm.probe`'s. The batch is the first of the validation windows, the same for every cell
whose batches have the same size.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from gptnorm.model import GPT
from gptnorm.probe import probe

Signal = dict[str, Any]
"""The module's table as JSON; None stands for a number that is not finite."""


def signal(model: GPT, tokens_BT: Tensor) -> Signal:
    """Measures `model` on tokens (B, T + 1); four digits, since a ledger holds many of these."""
    found = probe(model, tokens_BT)
    return {
        "grad": [_short(block.grad) for block in found.blocks],
        "cosine": [_short(block.cosine) for block in found.blocks],
        "token_cosine": _short(found.blocks[-1].token_cosine),
    }


def _short(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None
