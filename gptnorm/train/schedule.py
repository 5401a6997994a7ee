r"""The learning rate as a function of the step.

With s the number of updates done, W the warm-up and T the last step, the factor of the peak is
(s + 1) / (W + 1) for s < W and $f + (1 - f)\,g(t)$ after it, f the floor:

| schedule | g |
|---|---|
| linear | 1 - t,  t = (s - W) / (T - W)  (SimpleGPT's code, with f = 0) |
| cosine | (1 + cos πt) / 2 |
| wsd | 1, then 1 - t' over the last `wsd_decay` T steps |
| constant | 1, and f is not used |
"""

from __future__ import annotations

import math

from gptnorm.config import OptimConfig


def warmup_steps(config: OptimConfig, steps: int) -> int:
    """W: a fraction of the steps if below 1, else a number of steps."""
    return round(config.warmup * steps) if config.warmup < 1 else round(config.warmup)


def lr_factor(step: int, steps: int, config: OptimConfig) -> float:
    """Factor of the peak learning rate for the update after `step` updates, 0 <= step <= steps."""
    warmup = warmup_steps(config, steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    t = (step - warmup) / max(1, steps - warmup)
    match config.schedule:
        case "constant":
            return 1.0
        case "linear":
            shape = 1 - t
        case "cosine":
            shape = (1 + math.cos(math.pi * t)) / 2
        case "wsd":
            shape = min(1.0, (steps - step) / max(1.0, config.wsd_decay * steps))
    return config.floor + (1 - config.floor) * shape
