"""Synthetic ladder folders whose best rates and shifts are known beforehand."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from report_folders import ENVIRONMENT

LRS = [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
ENTROPY = 3.0


def parabola(best: float, lr: float, *, depth: float = 2.0, width: float = 0.05) -> float:
    """A loss with its minimum `depth` at `best`."""
    return depth + width * math.log(lr / best) ** 2


def make_signal(blocks: int, ratio: float) -> dict[str, Any]:
    """A gradient that falls from `ratio` to 1 geometrically, and cosines that rise to 1."""
    share = [layer / max(1, blocks - 1) for layer in range(blocks)]
    return {
        "grad": [ratio ** (1 - x) for x in share],
        "cosine": [1 - 0.4 / (layer + 2) for layer in range(blocks)],
        "token_cosine": 0.25,
    }


def make_ladder(
    folder: Path,
    bests: dict[tuple[str, str | None], dict[int, float | None]],
    *,
    axis: str = "depth",
    lrs: list[float] | None = None,
    seeds: int = 1,
    noise: float = 0.0,
    unstable_from: float = math.inf,
    unstable: str = "diverged",
    keep: int | None = None,
    signals: bool = True,
) -> Path:
    """A ladder folder from the best rate of every (strategy, rule) at every size.

    Args:
        bests: None for a size at which every rate collapses.
        noise: seed sd of the loss.
        unstable_from: rates from this many times the best end as `unstable` says: "diverged" or "collapsed".
        keep: how many lines the ledger has; the study was then stopped midway.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lrs, draw = lrs or LRS, random.Random(0)
    sizes = sorted({size for climb in bests.values() for size in climb})
    lines = []
    for (strategy, rule), climb in bests.items():
        for size, best in climb.items():
            for lr in lrs:
                for seed in range(seeds):
                    gone = best is not None and lr >= unstable_from * best * (1 - 1e-9)
                    diverged = gone and unstable == "diverged"
                    loss = ENTROPY + 0.01 if best is None or gone else parabola(best, lr) + draw.gauss(0, noise)
                    line = {
                        "strategy": strategy,
                        "lr": lr,
                        "seed": seed,
                        "status": "diverged" if diverged else "finished",
                        "val_loss": None if diverged else loss,
                        "run": f"cells/{strategy}/{axis}-{size}/{lr}-{seed}",
                        "seconds": 1.5,
                        "parameters": 1000 * size,
                        "size": size,
                        "rule": rule,
                    }
                    if signals:
                        trained = None if diverged else make_signal(size, 10.0)
                        line["signal"] = {"init": make_signal(size, 100.0), "trained": trained}
                    lines.append(line)
    study = {
        "title": "A ladder",
        "recipe": "ladder",
        "strategies": list(dict.fromkeys(strategy for strategy, _ in bests)),
        "lrs": lrs,
        "seeds": list(range(seeds)),
        "ladder": {
            "axis": axis,
            "sizes": sizes,
            "rules": list(dict.fromkeys(rule for _, rule in bests if rule)),
            "settings": {},
        },
        "data": {"path": "text", "tokenizer": "bytes", "fingerprint": "f00d", "train_tokens": 9, "val_tokens": 9},
        "settings": {"shared": {"train.steps": 6}, "differing": {}},
        "environments": [ENVIRONMENT],
        "unigram_entropy": ENTROPY,
        "commands": [f"gptnorm study {axis} ladder"],
        "seconds": 10.0,
    }
    (folder / "study.json").write_text(json.dumps(study))
    (folder / "cells.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:keep]))
    return folder
