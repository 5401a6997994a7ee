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
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptnorm.config import Config
from gptnorm.data import Shards
from gptnorm.files import write_atomic
from gptnorm.model import GPT, build_gpt
from gptnorm.probe import probe
from gptnorm.recipe import dump_toml
from gptnorm.train.checkpoint import latest_checkpoint, load_model
from gptnorm.train.inputs import check_vocab, open_batches, resolve_device
from gptnorm.train.loop import Result, start_run
from gptnorm.train.progress import Watcher

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


def run_with_signal(
    config: Config, shards: Shards, folder: Path, watcher: Watcher
) -> tuple[Result, dict[str, Signal | None]]:
    """A run, and its signal at initialisation ("init") and at its end ("trained", None if it diverged)."""
    # The trained weights pass through a checkpoint, which goes again where the recipe does not ask for it.
    checkpointed = replace(config, checkpoint=replace(config.checkpoint, final=True))
    result = start_run(checkpointed, shards, folder, watcher)

    model = build_gpt(config, vocab=check_vocab(config, shards), device=resolve_device(config.train.device))
    _, validation = open_batches(config, shards)
    tokens_BT = torch.from_numpy(validation[0]).to(model.embed.weight.device)
    signals: dict[str, Signal | None] = {"init": signal(model, tokens_BT), "trained": None}
    checkpoint = latest_checkpoint(folder / "checkpoints")
    if result.status == "finished" and checkpoint is not None:
        load_model(checkpoint, model)
        signals["trained"] = signal(model, tokens_BT)
        every = config.checkpoint.every
        if not config.checkpoint.final and not (every and result.step % every == 0):
            shutil.rmtree(checkpoint)
    write_atomic(folder / "config.toml", dump_toml(config))
    return result, signals


def _short(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None
