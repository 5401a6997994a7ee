"""From a config to a device and batches; whatever is wrong with them is found here, before a run is made."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptnorm.config import Config
from gptnorm.data import Sampler, Shards, validation_windows
from gptnorm.errors import SharedError, UserError, bad_value
from gptnorm.recipe import to_tree
from gptnorm.tables import flatten
from gptnorm.train.agree import Group, gathered

VERIFIED_BYTES = 1 << 28
"""Shards of at most this size are compared with their hashes at every start; `gptnorm verify` does it at any size."""


def resolve_device(name: str) -> torch.device:
    """The device that a config means; UserError if this machine has none such."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise bad_value("train.device", name, "must be 'auto', 'cpu', 'cuda' or 'cuda:N'")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise bad_value("train.device", name, f"this machine has {count} CUDA devices that torch can use")
    return device


def check_vocab(config: Config, shards: Shards) -> int:
    """Rows of the embedding; UserError if the tokenizer has more ids than that."""
    wanted = config.model.vocab_size
    if wanted is None and shards.vocab_size is None:
        raise UserError("model.vocab_size: the shards have no manifest, so it must be set (GPT-2's tokens: 50257)")
    ids = np.iinfo(shards.train.dtype).max + 1
    if wanted is not None and shards.vocab_size is None and wanted > ids:
        # Without a manifest uint32 would be read as twice as many uint16.
        raise bad_value("model.vocab_size", wanted, f"at most {ids}, what the shards' {shards.train.dtype} can hold")
    if wanted is not None and shards.vocab_size is not None and wanted < shards.vocab_size:
        raise bad_value("model.vocab_size", wanted, f"at least {shards.vocab_size}, the tokenizer's vocabulary")
    return wanted or shards.vocab_size or 0


def verify_small(shards: Shards) -> None:
    """UserError where shards are not what their hashes say, if that is looked up at once."""
    if shards.train.nbytes + shards.val.nbytes <= VERIFIED_BYTES:
        shards.verify()


def same_everywhere(config: Config, fingerprint: str, vocab: int, group: Group | None) -> None:
    """SharedError where processes would train on different texts, or with different settings."""
    # Where a text lies may differ from machine to machine; what it holds is its fingerprint's.
    mine = {key: repr(value) for key, value in flatten(to_tree(config)).items() if not key.startswith("data.")}
    mine["data.path"] = f"a text with fingerprint {fingerprint[:12]} and a vocabulary of {vocab}"
    for key, values in gathered(mine, group).items():
        if others := set(values) - {values[0]}:
            raise SharedError(f"{key}: {values[0]} on the first process of the run, {min(others)} on another")


def open_batches(config: Config, shards: Shards) -> tuple[Sampler, list[np.ndarray]]:
    """The training batches and the validation windows; UserError if the text is too short for them.

    The first of each is looked at here, so that ids beyond the embedding show before a run is made.
    """
    train = config.train
    sampler = Sampler(shards.train, train.batch_size, train.seq_len, config.seed)
    refuse_unknown_ids(sampler.batch(0), check_vocab(config, shards))
    return sampler, open_validation(config, shards)


def open_validation(config: Config, shards: Shards) -> list[np.ndarray]:
    """The validation windows; UserError if the split is too short for one."""
    train = config.train
    # A micro-batch at once, which fits; which windows they are does not hang on it, so that runs with other batches are
    # judged by the same text.
    micro = train.batch_size // train.accumulate
    validation = list(validation_windows(shards.val, micro, train.seq_len, train.eval_sequences))
    vocab = check_vocab(config, shards)
    for tokens in validation:
        refuse_unknown_ids(tokens, vocab)
    return validation


def autocast(config: Config, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """In what a step's products are computed: bf16, but with train.precision = "fp32"."""
    if config.train.precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


@contextlib.contextmanager
def within_memory(config: Config) -> Iterator[None]:
    """Tells in one line that a model or a batch does not fit."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # The CPU allocator of torch has no exception of its own.
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        size = config.train.batch_size
        raise bad_value(
            "train.batch_size", size, "out of memory; lower it, raise train.accumulate, or take a smaller model"
        ) from None


def refuse_unknown_ids(tokens: np.ndarray, vocab: int) -> None:
    """A token id outside the embedding would be a crash on a GPU."""
    largest = int(tokens.max())
    if largest >= vocab:
        raise bad_value("model.vocab_size", vocab, f"the shards hold the token id {largest}, so more are needed")


def to_device(rows: np.ndarray, vocab: int, device: torch.device) -> Tensor:
    """Rows of a batch on the device, their ids known to the embedding; the device is not waited for."""
    refuse_unknown_ids(rows, vocab)
    tokens = torch.from_numpy(np.ascontiguousarray(rows))
    if device.type != "cuda":
        return tokens.to(device)
    # From memory that may be paged out a copy would wait for all the work before it.
    return tokens.pin_memory().to(device, non_blocking=True)
