"""The loss by which runs are judged."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from gptnorm.config import Config
from gptnorm.model import GPT
from gptnorm.train.inputs import autocast, to_device
from gptnorm.train.parallel import World, mean_over_data


@torch.no_grad()
def validation_loss(model: GPT, validation: Sequence[np.ndarray], config: Config, world: World, *, vocab: int) -> float:
    """Mean over the fixed validation windows, in nats per token; it need not be finite.

    Args:
        validation: from `open_validation`; the processes of `world` share out the rows of each batch.
        vocab: of the model, which every id must be in.
    """
    total = torch.zeros(2, dtype=torch.float64, device=world.device)
    training = model.training
    model.eval()
    for windows in validation:
        rows = windows[world.data_rank :: world.data_size]
        # Sharded weights want every process in every forward pass, also one for which no row is left.
        tokens = to_device(rows if len(rows) else windows[:1], vocab, world.device)
        with autocast(config, world.device):
            loss = model.loss(tokens).double()
        total += torch.stack((loss * len(rows), loss.new_tensor(len(rows))))
    model.train(training)
    mean = mean_over_data(total, world)
    return float(mean[0] / mean[1])
