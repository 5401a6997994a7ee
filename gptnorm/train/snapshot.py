"""A model to look at: a run's at one of its checkpoints, or as its seed draws it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from gptnorm.config import Config
from gptnorm.errors import UserError
from gptnorm.model import GPT, build_gpt
from gptnorm.train.checkpoint import (
    STATE,
    checkpoint_at,
    latest_checkpoint,
    load_checkpoint,
    model_tensors,
    read_state,
    verify_checkpoint,
)
from gptnorm.train.run_folder import RunFolder


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
        state = read_state(checkpoint)
        return Snapshot(config=config, checkpoint=checkpoint, step=int(state["step"]), text=str(state["data"]))
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{checkpoint / STATE}: not the state of a run") from None
