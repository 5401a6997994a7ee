"""What a study measures of a run's model beside its loss.

| measured | what the ledger gets |
|---|---|
| signal | `signal`: `gptnorm.study.signal`, at initialisation ("init") and the end ("trained", None if it diverged) |
| nonlinearity | `nonlinearity`: `gptnorm.probe.linearity`, a number per block, at the end; None if it diverged |
| | `flops`: of the whole run as it was planned, `gptnorm.plan.flops` |
| | `memory`: most bytes that tensors took at once: of the run on a GPU, of a step on a CPU, as planned |
| | `elsewhere`: loss on the validation windows of each of `Cell.evaluated`, as on the run's own; None if it diverged |
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gptnorm.config import Config
from gptnorm.data import Shards
from gptnorm.files import write_atomic
from gptnorm.model import GPT, build_gpt
from gptnorm.plan.flops import count_flops
from gptnorm.plan.memory import cpu_step_bytes
from gptnorm.probe.linearity import TOKENS_PER_FEATURE, feedforward_nonlinearity
from gptnorm.recipe import dump_toml
from gptnorm.records import finite
from gptnorm.study.cell import Cell
from gptnorm.study.signal import signal
from gptnorm.train.blocks import prepare_blocks
from gptnorm.train.checkpoint import latest_checkpoint, load_model, prune_checkpoints, read_state, step_of
from gptnorm.train.inputs import check_vocab, open_batches, open_validation, resolve_device
from gptnorm.train.parallel import World
from gptnorm.train.progress import Watcher
from gptnorm.train.result import Result
from gptnorm.train.run import start_run
from gptnorm.train.validation import validation_loss


def run_and_measure(
    cell: Cell, texts: Mapping[str, Shards], folder: Path, watcher: Watcher
) -> tuple[Result, dict[str, Any]]:
    """A run, and the fields of the module's table."""
    config, shards = cell.config, texts[cell.text]
    if cell.measured is None:
        return start_run(config, shards, folder, watcher), {}
    # The trained weights pass through a checkpoint, which goes again where the recipe does not ask for it, and has no
    # other removed meanwhile.
    asked = config.checkpoint
    more = asked if asked.final else replace(asked, final=True, keep=asked.keep + 1)
    checkpointed = replace(config, checkpoint=more)
    if cell.measured == "signal":
        result, found = _with_signal(checkpointed, shards, folder, watcher)
    else:
        result, found = _with_nonlinearity(checkpointed, cell.evaluated, shards, texts, folder, watcher)
    _remove_what_was_not_asked(config, folder)
    return result, found


def _with_signal(config: Config, shards: Shards, folder: Path, watcher: Watcher) -> tuple[Result, dict[str, Any]]:
    result = start_run(config, shards, folder, watcher)
    model = _untrained(config, shards)
    device = model.embed.weight.device
    sampler, _ = open_batches(config, shards)
    # As the run did before its first step.
    model.calibrate(torch.from_numpy(np.split(sampler.batch(0), config.train.accumulate)[0]).to(device))
    tokens = torch.from_numpy(open_validation(config, shards)[0]).to(device)
    init = signal(model, tokens)
    trained = signal(model, tokens) if _load_trained(model, folder, result) else None
    return result, {"signal": {"init": init, "trained": trained}}


def _with_nonlinearity(
    config: Config,
    evaluated: Sequence[str],
    shards: Shards,
    texts: Mapping[str, Shards],
    folder: Path,
    watcher: Watcher,
) -> tuple[Result, dict[str, Any]]:
    result, found = _train(config, shards, folder, watcher)
    model, train = _untrained(config, shards), config.train
    found["nonlinearity"] = None
    found["flops"] = count_flops(model, train.seq_len).model * train.steps * train.batch_size * train.seq_len
    elsewhere: dict[str, float | None] = dict.fromkeys(evaluated)
    if _load_trained(model, folder, result):
        found["nonlinearity"] = _nonlinearity(model, config, shards)
        prepare_blocks(model, "none", compiled=False, float8=train.precision == "fp8")
        elsewhere = {name: _loss(model, config, texts[name]) for name in evaluated}
    return result, {**found, **({"elsewhere": elsewhere} if elsewhere else {})}


def _untrained(config: Config, shards: Shards) -> GPT:
    return build_gpt(config, vocab=check_vocab(config, shards), device=resolve_device(config.train.device))


def _load_trained(model: GPT, folder: Path, result: Result) -> bool:
    """Gives the model the run's last weights, and says whether there are any: of a diverged run there are not."""
    checkpoint = latest_checkpoint(folder / "checkpoints")
    if result.status != "finished" or checkpoint is None:
        return False
    load_model(checkpoint, model)
    return True


def _remove_what_was_not_asked(config: Config, folder: Path) -> None:
    """Removes the checkpoint that the measuring alone needed, and writes the recipe's own settings back."""
    asked, checkpoint = config.checkpoint, latest_checkpoint(folder / "checkpoints")
    if checkpoint is not None and not asked.final:
        best = read_state(checkpoint)["best"]
        best_step = int(best[1]) if best and asked.best else None
        step = step_of(checkpoint)
        if best_step == step or (asked.every and step % asked.every == 0):
            prune_checkpoints(checkpoint.parent, asked.keep, best_step)
        else:
            shutil.rmtree(checkpoint)
    write_atomic(folder / "config.toml", dump_toml(config))


def _train(config: Config, shards: Shards, folder: Path, watcher: Watcher) -> tuple[Result, dict[str, Any]]:
    """A run, and how much memory it took; what is measured afterwards may take more."""
    device = resolve_device(config.train.device)
    if device.type != "cuda":
        # Not measured, for a CPU's allocator keeps more than tensors take. What cannot be traced fails untrained.
        memory = cpu_step_bytes(config, check_vocab(config, shards))
        return start_run(config, shards, folder, watcher), {"memory": memory}
    torch.cuda.init()  # a process that has not used the device yet has no statistics to reset
    torch.cuda.reset_peak_memory_stats(device)
    result = start_run(config, shards, folder, watcher)
    return result, {"memory": torch.cuda.max_memory_allocated(device)}


def _loss(model: GPT, config: Config, shards: Shards) -> float | None:
    """The validation loss on a text as on the run's own; None: not finite."""
    world, vocab = World(device=model.embed.weight.device), check_vocab(config, shards)
    return finite(validation_loss(model, open_validation(config, shards), config, world, vocab=vocab))


def _nonlinearity(model: GPT, config: Config, shards: Shards) -> list[float] | None:
    """On as many validation windows as a fit needs."""
    validation = open_validation(config, shards)
    tokens = validation[0].shape[0] * config.train.seq_len
    batches = validation[: math.ceil(TOKENS_PER_FEATURE * config.model.d_model / tokens)]
    found = feedforward_nonlinearity(model, [torch.from_numpy(b).to(model.embed.weight.device) for b in batches])
    return None if found is None else [float(f"{value:.4g}") for value in found]
