"""Synthetic tolerance studies whose best rates, edges and losses are known beforehand."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report_folders import ENVIRONMENT, make_run

ENTROPY = 3.0
RATES = tuple(1e-3 * 2**k for k in range(9))
VOCAB = 256


@dataclass(frozen=True)
class Bowl:
    """ℓ(η) = bottom + curve · ln²(η / best), diverged from `edge` on."""

    best: float
    bottom: float = 2.0
    curve: float = 0.05
    edge: float = math.inf
    noise: float = 0.0
    """Seed sd of the loss."""
    blur: float = 0.0
    """Seed sd of ln(edge)."""

    def outcome(self, lr: float, seed: int) -> float | None:
        """The loss; None: diverged."""
        draw = random.Random(f"{self} {seed}")
        shift, factor = draw.gauss(0, self.noise), math.exp(draw.gauss(0, self.blur))
        if lr >= self.edge * factor:
            return None
        return self.bottom + shift + self.curve * math.log(lr / self.best) ** 2


def line(strategy: str, lr: float, seed: int, loss: float | None, **more: Any) -> dict[str, Any]:
    """A line of the ledger; `loss` None: diverged."""
    label = "".join(f"{key}={value}," for part in ("place", "variant") for key, value in more.get(part, {}).items())
    return {
        "strategy": strategy,
        "lr": lr,
        "seed": seed,
        "status": "diverged" if loss is None else "finished",
        "val_loss": loss,
        "seconds": 12.0,
        "parameters": 1000,
        "tail_loss": None if loss is None else loss - 0.25,
        "lowest_loss": None if loss is None else loss - 0.25,
        "spikes": 0,
        "nonlinearity": None if loss is None else [0.1, 0.3],
        "run": f"cells/{strategy}/{label}lr-{lr!r}-seed-{seed}",
        "environment": 0,
        **more,
    }


def lines_of(bowls: dict[str, Bowl], lrs: Sequence[float], seeds: Iterable[int], **more: Any) -> list[dict[str, Any]]:
    """Every strategy at every rate with every seed."""
    return [
        line(name, lr, seed, bowl.outcome(lr, seed), **more)
        for (name, bowl), lr, seed in itertools.product(bowls.items(), lrs, seeds)
    ]


def make_tolerance(
    folder: Path,
    lines: Sequence[dict[str, Any]],
    *,
    strategies: Sequence[str] | None = None,
    lrs: Sequence[float],
    pick: Sequence[int] = (0,),
    seeds: Sequence[int] = (1, 2, 3, 4, 5),
    asked: dict[str, Any] | None = None,
    runs: int = 0,
    **changes: Any,
) -> Path:
    """A study folder with those lines.

    Args:
        asked: changes to the "tolerance" table of study.json.
        runs: steps of run folders to make, one for each line; 0: none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    strategies = list(strategies or dict.fromkeys(entry["strategy"] for entry in lines))
    study = {
        "title": "How far?",
        "recipe": "tolerance",
        "commands": ["gptnorm study tolerance study/tolerance"],
        "strategies": strategies,
        "lrs": list(lrs),
        "seeds": list(seeds),
        "tolerance": {
            "pick": list(pick),
            "report": "all",
            "baseline": strategies[0],
            "epsilon": 0.05,
            "tune": {},
            "shortlist": 0.0,
            "places": [],
            "search": {"optimum": 2.0, "edge": 1.5, "reach": 4},
            "stability": {"rise": 0.5, "margin": 0.1},
            **(asked or {}),
        },
        "data": {
            "path": "text",
            "tokenizer": "bytes",
            "fingerprint": "f00d",
            "vocab": VOCAB,
            "train_tokens": 9,
            "val_tokens": 9,
        },
        "settings": {"shared": {"train.steps": 6}, "differing": {}, "recipe": {}},
        "environments": [ENVIRONMENT],
        "unigram_entropy": ENTROPY,
        "seconds": 10.0,
        **changes,
    }
    (folder / "study.json").write_text(json.dumps(study))
    (folder / "cells.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    for entry in lines if runs else ():
        final = entry["val_loss"]
        make_run(folder / entry["run"], final=final, seed=entry["seed"], steps=runs, status=entry["status"])
    return folder


def row_of(text: str, title: str, strategy: str) -> list[str]:
    """The entries of a row of the Markdown table below a title."""
    table = text.split(f"**{title}**\n\n", 1)[1].split("\n\n", 1)[0]
    (row,) = [entry for entry in table.splitlines() if entry.startswith(f"| {strategy} |")]
    return [entry.strip() for entry in row.strip("|").split("|")]


def numbers(entry: str) -> tuple[float, ...]:
    return tuple(map(float, re.findall(r"[-+]?\d[\d.]*(?:e-?\d+)?", entry)))
