"""What is inspected: a recipe's model at initialisation, or a run's at one of its checkpoints, and a batch for it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from gptnorm.config import Config
from gptnorm.data import Sampler, prepare
from gptnorm.errors import bad_value
from gptnorm.model import GPT
from gptnorm.recipe import changed, load_recipe
from gptnorm.train.inputs import check_vocab, resolve_device, to_device
from gptnorm.train.run_folder import RunFolder
from gptnorm.train.snapshot import Snapshot, open_snapshot

DTypeName = Literal["fp32", "fp64"]
DTYPES: dict[DTypeName, torch.dtype] = {"fp32": torch.float32, "fp64": torch.float64}

OF_THE_BATCH = ("data", "train.batch_size", "train.accumulate", "train.seq_len", "train.device", "train.threads")
"""What may be set for a run: its model is measured as it was trained."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model and a batch, ready to be measured."""

    name: str
    """The recipe or run folder, as it was given."""
    step: int
    """Updates that the weights have seen; 0 at initialisation."""
    config: Config
    text: str
    """Where the tokens come from."""
    model: GPT
    checkpoint: Path | None
    """Where its weights are from; None: its seed."""
    tokens: Tensor
    """(B, T + 1): the first micro-batch of training, or uniform random ids."""


def find_config(name: str, settings: Iterable[str] = ()) -> tuple[Config, RunFolder | None]:
    """The settings of a recipe or of a run, and the run's folder.

    Raises:
        UserError: neither, a setting that does not fit, or one that would change a run's model.
    """
    path = Path(name)
    if not path.is_dir():
        return load_recipe(name).resolve(settings), None
    folder = RunFolder.open(path)
    return changed(folder.config(), settings, OF_THE_BATCH, "a run is measured as it was trained"), folder


def open_source(
    name: str,
    config: Config,
    folder: RunFolder | None,
    *,
    step: int | None = None,
    random_tokens: bool = False,
    dtype: DTypeName = "fp32",
) -> Source:
    """Builds the model and takes the batch.

    Args:
        config, folder: from `find_config`.
        step: of the checkpoint; None: the newest. 0: the run's initialisation, which needs no checkpoint.
        random_tokens: uniform ids instead of text, drawn from the seed. Each target is the next token, and so as
            random as if it had been drawn apart.
    """
    if folder is None and step:
        raise bad_value("--step", step, "needs a run folder; a recipe is measured at initialisation")
    snapshot = Snapshot(config=config) if folder is None else open_snapshot(folder, config, step)
    train = config.train
    if train.threads:
        torch.set_num_threads(train.threads)
    device = resolve_device(train.device)
    batch_size = train.batch_size // train.accumulate
    vocab = config.model.vocab_size
    if random_tokens and vocab is not None:
        text = None
    else:
        shards = prepare(config.data)
        vocab, text = check_vocab(config, shards), Sampler(shards.train, batch_size, train.seq_len, config.seed)
    if random_tokens or text is None:
        generator = torch.Generator().manual_seed(config.seed)
        tokens = torch.randint(0, vocab, (batch_size, train.seq_len + 1), generator=generator)
    else:
        tokens = to_device(text.batch(0), vocab, device)
    model, tokens = snapshot.model(vocab=vocab, device=device), tokens.to(device)
    if snapshot.checkpoint is None:
        model.calibrate(tokens)
    return Source(
        name=name,
        step=snapshot.step,
        config=config,
        text="uniform random tokens" if random_tokens else _text_name(config),
        model=model.to(DTYPES[dtype]),
        checkpoint=snapshot.checkpoint,
        tokens=tokens,
    )


def _text_name(config: Config) -> str:
    path = config.data.path
    return path if isinstance(path, str) else ", ".join(path)
