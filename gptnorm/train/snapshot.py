"""A model to look at: a run's at one of its checkpoints, or as its seed draws it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gptnorm.config import Config
from gptnorm.errors import UserError, bad_value
from gptnorm.model import GPT, build_gpt
from gptnorm.recipe import parse_overrides, to_tree
from gptnorm.tables import flatten, merge
from gptnorm.train.checkpoint import (
    STATE,
    checkpoint_at,
    latest_checkpoint,
    load_checkpoint,
    model_tensors,
    verify_checkpoint,
)
from gptnorm.train.run_folder import RunFolder
from gptnorm.typed import read_table


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Settings and weights."""

    config: Config
    checkpoint: Path | None = None
    """A verified one; None: the weights are those of the config's seed."""
    step: int = 0
    """Updates that the weights have seen."""
    text: str | None = None
    """Fingerprint of the shards that the run is trained on; None: no checkpoint says."""

    def model(self, *, vocab: int, device: torch.device) -> GPT:
        """The model with its weights.

        Args:
            vocab: see `build_gpt`.

        Raises:
            UserError: the checkpoint is of another model.
        """
        model = build_gpt(self.config, vocab=vocab, device=device)
        if self.checkpoint is not None:
            load_checkpoint(self.checkpoint, model_tensors(model))
        return model


def open_snapshot(folder: RunFolder, config: Config, step: int | None = None) -> Snapshot:
    """A run as it was after `step` updates; None: at its newest checkpoint, 0: at its initialisation.

    Raises:
        UserError: there is no such checkpoint, or it is damaged.
    """
    if step == 0:
        return Snapshot(config=config)
    checkpoint = checkpoint_at(folder.checkpoints, step) if step else latest_checkpoint(folder.checkpoints)
    if checkpoint is None:
        raise UserError(f"{folder.path}: has no checkpoint; --step 0 takes its initialisation")
    verify_checkpoint(checkpoint)
    try:
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        return Snapshot(config=config, checkpoint=checkpoint, step=int(state["step"]), text=str(state["data"]))
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{checkpoint / STATE}: not the state of a run") from None


def run_config(config: Config, settings: Iterable[str], allowed: Sequence[str], reason: str) -> Config:
    """A run's settings with some of them changed.

    Args:
        settings: `key=value` arguments.
        allowed: keys and tables of keys that may be changed.
        reason: why no other may be.

    Raises:
        UserError: another key, or a wrong value.
    """
    overrides = parse_overrides(settings)
    for key, value in flatten(overrides).items():
        if not any(key == one or key.startswith(f"{one}.") for one in allowed):
            raise bad_value(key, value, f"{reason}; may be set: {', '.join(allowed)}")
    tree = to_tree(config)
    merge(tree, overrides)
    return read_table(Config, tree)
