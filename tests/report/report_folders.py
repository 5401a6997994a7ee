"""Synthetic run and study folders whose answers are known beforehand."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from gptnorm.config import Config, ModelConfig, OptimConfig
from gptnorm.recipe import dump_toml

Outcome = float | str | None
"""A loss, "diverged", or None for a run that never took place."""

ENVIRONMENT = {
    "gptnorm": "0.1.0",
    "commit": "0123abc",
    "python": "3.11.2",
    "torch": "2.13.0",
    "device": "cpu",
    "threads": 2,
    "platform": "Linux",
    "started": "2025-01-02T03:04:05+00:00",
}


def make_run(
    folder: Path, *, final: float | None, seed: int = 0, steps: int = 60, status: str = "finished", start: float = 6.0
) -> Path:
    """A run folder whose loss falls from `start` to `final`; a diverged one blows up two thirds in."""
    folder.mkdir(parents=True)
    noise = random.Random(seed)
    lines = []
    stop = steps if status == "finished" else 2 * steps // 3
    for step in range(1, stop + 1):
        floor = 4.0 if final is None else final
        loss = floor + (start - floor) * math.exp(-6 * step / steps) + noise.gauss(0, 0.03)
        if status == "diverged":
            loss += math.exp(min(3.0, (step - stop) / 3 + 2.5))
        lr = 1e-3 * min(1.0, step / 10) * (1 - step / (steps + 1))
        lines.append(
            {
                "step": step,
                "split": "train",
                "loss": loss if step < stop or status == "finished" else math.nan,
                "lr": lr,
                "grad_norm": 1.0,
                "tokens": 4096 * step,
                "seconds": 0.5 * step,
            }
        )
        if step % 20 == 0 and status == "finished":
            lines.append({"step": step, "split": "val", "loss": loss})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    reason = "loss is not finite" if status == "diverged" else None
    value = {"status": status, "step": stop, "val_loss": final, "reason": reason}
    (folder / "status.json").write_text(json.dumps(value))
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    (folder / "config.toml").write_text(
        dump_toml(Config(model=ModelConfig(strategy="alpha"), optim=OptimConfig(lr=lr), seed=seed))
    )
    return folder


def make_study(
    folder: Path,
    outcomes: dict[str, dict[float, list[Outcome]]],
    *,
    seeds: list[int] | None = None,
    runs: bool = False,
    steps: int = 60,
    **changes: Any,
) -> Path:
    """A study folder from the outcome of every (strategy, learning rate), one per seed."""
    folder.mkdir(parents=True, exist_ok=True)
    lrs = sorted({lr for row in outcomes.values() for lr in row})
    count = max(len(cell) for row in outcomes.values() for cell in row.values())
    seeds = list(range(count)) if seeds is None else seeds
    study = {
        "title": "Placements on a small corpus",
        "recipe": "laptop",
        "strategies": list(outcomes),
        "lrs": lrs,
        "seeds": seeds,
        "data": {
            "path": "data/corpus",
            "fingerprint": "f00dfeed",
            "tokenizer": "bytes",
            "train_tokens": 1_000_000,
            "val_tokens": 50_000,
        },
        "settings": {
            "shared": {"model.layers": 4, "optim.betas": [0.9, 0.95], "train.steps": steps},
            "differing": {
                "optim.warmup": {name: 100 * index for index, name in enumerate(outcomes)},
                "init.std": {name: 0.02 for name in list(outcomes)[:1]},
            },
        },
        "environments": [ENVIRONMENT],
        "commands": ["gptnorm study recipes/laptop.toml"],
        "seconds": 4321.0,
        "unigram_entropy": 5.0,
    }
    (folder / "study.json").write_text(json.dumps(study | changes))
    with (folder / "cells.jsonl").open("w") as file:
        for strategy, row in outcomes.items():
            for lr, cell in row.items():
                for seed, outcome in zip(seeds, cell, strict=False):
                    if outcome is None:
                        continue
                    status = "diverged" if outcome == "diverged" else "finished"
                    loss = outcome if isinstance(outcome, float) else None
                    run = f"runs/{list(outcomes).index(strategy)}-{lr:g}-{seed}"
                    if runs:
                        make_run(folder / run, final=loss, seed=seed, steps=steps, status=status)
                    line = {
                        "strategy": strategy,
                        "lr": lr,
                        "seed": seed,
                        "status": status,
                        "val_loss": loss,
                        "run": run,
                        "seconds": 12.5,
                        "parameters": 1_234_567,
                    }
                    file.write(json.dumps(line) + "\n")
    return folder
