"""Checkpoints: absent or complete, never half, and nothing in them runs when they are read.

A checkpoint is a folder `step-NNNNNN` with `model.safetensors`, `optimizer.safetensors` (Adam's
moments and step counts, by parameter name), `state.json`, and last `manifest.json` with the sha256
of the others. It is written aside, synced, and renamed into place.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gptnorm.errors import UserError, bad_value
from gptnorm.files import sha256_file, sync_folder, write_atomic

_NAME = re.compile(r"step-(\d{6,})")


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> Path:
    """Writes `folder/step-NNNNNN` and returns it; `state` is any JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:06d}"
    aside = Path(tempfile.mkdtemp(dir=folder, prefix=f".{final.name}."))
    try:
        _save(_model_tensors(model), aside / "model.safetensors")
        _save(_optimizer_tensors(model, optimizer), aside / "optimizer.safetensors")
        write_atomic(aside / "state.json", json.dumps({"step": step, **state}, indent=2) + "\n")
        digests = {path.name: sha256_file(path) for path in sorted(aside.iterdir())}
        write_atomic(aside / "manifest.json", json.dumps(digests, indent=2) + "\n")
        os.chmod(aside, 0o755)
        if final.exists():
            shutil.rmtree(final)
        os.rename(aside, final)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    sync_folder(folder)
    return final


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Fills model and optimizer in place and returns the state.

    Raises:
        UserError: a file is missing, changed, or of another model.
    """
    try:
        _verify(path, "optimizer.safetensors")
        state = load_model(path, model)
        _restore_optimizer(model, optimizer, load_file(path / "optimizer.safetensors"), path / "optimizer.safetensors")
        return state
    except (OSError, json.JSONDecodeError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{path}: not a complete checkpoint ({error})") from None


def load_model(path: Path, model: nn.Module) -> dict[str, Any]:
    """Fills the model alone, in place, and returns the state; errors as `load_checkpoint`."""
    try:
        _verify(path, "model.safetensors", "state.json")
        _fill(_model_tensors(model), load_file(path / "model.safetensors"), path / "model.safetensors")
        return json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{path}: not a complete checkpoint ({error})") from None


def latest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step."""
    return max(_complete(folder), key=_step, default=None)


def checkpoint_at(folder: Path, step: int) -> Path:
    """The complete checkpoint of a step; UserError, with those that there are, if there is none."""
    found = {_step(path): path for path in _complete(folder)}
    if step not in found:
        there = ", ".join(map(str, sorted(found))) or "none"
        raise bad_value("--step", step, f"{folder} holds the steps: {there}")
    return found[step]


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Removes all but the newest `keep`, and what a kill left half-written; call it after the new one is complete."""
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for path in sorted(_complete(folder), key=_step)[:-keep]:
        shutil.rmtree(path)


def _complete(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [p for p in folder.iterdir() if _NAME.fullmatch(p.name) and (p / "manifest.json").is_file()]


def _verify(path: Path, *names: str) -> None:
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    for name in names:
        if sha256_file(path / name) != manifest[name]:
            raise UserError(f"{path / name}: damaged (its sha256 is not the manifest's)")


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    # named_parameters lists a tied weight once, as safetensors needs it.
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{key}/{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
        if isinstance(value, Tensor)
    }


def _restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, stored: dict[str, Tensor], path: Path
) -> None:
    names = {f"{key}/{name}" for name, _ in model.named_parameters() for key in ("step", "exp_avg", "exp_avg_sq")}
    if names != set(stored):
        raise UserError(f"{path}: holds other tensors than this run's optimizer")
    for name, parameter in model.named_parameters():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            value = stored[f"{key}/{name}"]
            if key != "step" and value.shape != parameter.shape:
                raise UserError(f"{path}: {key}/{name} has shape {tuple(value.shape)}, not {tuple(parameter.shape)}")
            optimizer.state[parameter][key] = value.to(parameter.device)


@torch.no_grad()
def _fill(tensors: dict[str, Tensor], stored: dict[str, Tensor], path: Path) -> None:
    if set(tensors) != set(stored):
        raise UserError(f"{path}: holds other tensors than this run's model")
    for name, tensor in tensors.items():
        if tensor.shape != stored[name].shape:
            raise UserError(f"{path}: {name} has shape {tuple(stored[name].shape)}, not {tuple(tensor.shape)}")
        tensor.copy_(stored[name])
