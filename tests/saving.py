"""A model and its optimizer into a checkpoint and back, and checkpoints compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from gptnorm.model import GPT
from gptnorm.train.checkpoint import load_checkpoint, model_tensors, save_checkpoint
from gptnorm.train.optim import Optimizers


def tensors(model: GPT, optimizer: Optimizers) -> dict[str, Tensor]:
    return model_tensors(model) | {f"optimizer/{name}": value for name, value in optimizer.tensors(model)}


def save(folder: Path, step: int, model: GPT, optimizer: Optimizers, state: Mapping[str, Any] | None = None) -> Path:
    return save_checkpoint(folder, step, tensors(model, optimizer), state or {})


def load(path: Path, model: GPT, optimizer: Optimizers) -> dict[str, Any]:
    optimizer.prime()
    return load_checkpoint(path, tensors(model, optimizer))


def weights_of(checkpoint: Path) -> dict[str, bytes]:
    """Every tensor's bytes, by name and file; the files' own headers come in no fixed order."""
    found = {
        f"{path.name}/{name}": tensor.numpy().tobytes()
        for path in checkpoint.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }
    assert found, f"{checkpoint} holds no tensors"
    return found
