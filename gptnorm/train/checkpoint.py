"""Checkpoints: absent or complete, never half, and nothing in them runs when they are read.

A checkpoint is a folder `step-NNNNNN` with

| file | content |
|---|---|
| shard-P-model-00001-of-00002.safetensors | what process P (from 1) holds of the weights and buffers, `model/<name>` |
| shard-P-model-00002-of-00002.safetensors | the same of the optimizer's and the guard's tensors |
| state.json | step, time spent, best loss so far, and which text it is |
| manifest.json | sha256 of the others |

Torch's distributed checkpointing writes the tensors in its Hugging Face format, which has no pickle, and reads them
back for any number of processes. The folder is written aside, synced, and renamed into place by the first process.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from gptnorm.errors import SharedError, UserError, bad_value
from gptnorm.files import sha256_file, sync_folder, write_atomic
from gptnorm.train.agree import Group, merged, on_first, rank_in, size_of

warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)

MANIFEST = "manifest.json"
STATE = "state.json"

_NAME = re.compile(r"step-(\d{6,})")
_FILE = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors|state\.json")


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    group: Group | None = None,
) -> Path:
    """Writes `folder/step-NNNNNN` and returns it. Every process of the group calls it.

    Args:
        tensors: by name, plain ones the same on every process; those of the model begin with "model/".
        state: any JSON, the same on every process.
        group: of the CPU; None: there is one process.

    Raises:
        OSError, SharedError: it could not be written; what there was is left as it was.
    """
    final = folder / f"step-{step:06d}"
    # The same name on every process, and no other write of this step can be under way: a run folder has one owner.
    aside = folder / f".{final.name}.partial"
    rank = rank_in(group)
    try:
        on_first(lambda: _empty(aside), group)
        writer = HuggingFaceStorageWriter(
            str(aside),
            fqn_to_index_mapping={name: 1 if name.startswith("model/") else 2 for name in tensors},
            save_distributed=True,
        )
        save(dict(tensors), storage_writer=writer, process_group=group, no_dist=group is None)
        digests = merged({path.name: sha256_file(path) for path in aside.glob(f"shard-{rank + 1:05d}-*")}, group)
        on_first(lambda: _complete(aside, final, digests, {"step": step, **state}), group)
    except BaseException as error:
        if rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, CheckpointException):
            reason = _system_error(error)
            if group is None:
                raise reason from None
            # All processes learn of it, whichever it happened to.
            raise SharedError(f"{folder}: cannot be written ({reason.strerror or reason})") from None
        raise
    return final


def load_checkpoint(path: Path, tensors: Mapping[str, Tensor], group: Group | None = None) -> dict[str, Any]:
    """Fills the tensors in place, however many processes wrote them, and returns the state.

    It does not compare the files with the manifest; `verify_checkpoint` does.

    Raises:
        UserError: a file is missing, cannot be read, or is of another model.
    """
    try:
        reader = HuggingFaceStorageReader(str(path))
        stored = reader.read_metadata().state_dict_metadata
        prefixes = {name.partition("/")[0] for name in tensors}
        if {name for name in stored if name.partition("/")[0] in prefixes} != set(tensors):
            raise UserError(f"{path}: holds other tensors than this run's {' and '.join(sorted(prefixes))}")
        for name, tensor in tensors.items():
            size = getattr(stored[name], "size", None)
            if size != tensor.shape:
                raise UserError(f"{path}: {name} has shape {tuple(size or ())}, not {tuple(tensor.shape)}")
        load(dict(tensors), storage_reader=reader, process_group=group, no_dist=group is None)
        return read_state(path)
    except CheckpointException as error:
        raise UserError(f"{path}: not a complete checkpoint ({_system_error(error)})") from None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{path}: not a complete checkpoint ({error})") from None


def load_model(path: Path, model: nn.Module) -> dict[str, Any]:
    """Verifies the checkpoint, fills the model alone, in place, and returns the state; UserError as those two."""
    verify_checkpoint(path)
    return load_checkpoint(path, model_tensors(model))


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers by name; `named_parameters` lists a tied weight once."""
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {f"model/{name}": tensor.detach() for name, tensor in found.items()}


def verify_checkpoint(path: Path, group: Group | None = None) -> None:
    """Compares every file with the manifest; the processes of a group share the work.

    Raises:
        SharedError: names the first file that is missing, changed or not listed, or the folder if its name is wrong.
    """
    try:
        found = _first_damage(path, group)
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        found = f"{path}: not a complete checkpoint ({error})"
    for word in merged({"": found} if found else {}, group).values():
        raise SharedError(word)


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints, by step. Each was complete once, and may be damaged by now (`verify_checkpoint`)."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name)), key=step_of)


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest step."""
    return next(reversed(checkpoints_in(folder)), None)


def checkpoint_at(folder: Path, step: int) -> Path:
    """The checkpoint of a step; UserError, with those that there are, if there is none."""
    found = {step_of(path): path for path in checkpoints_in(folder)}
    if step not in found:
        there = ", ".join(map(str, sorted(found))) or "none"
        raise bad_value("--step", step, f"{folder} holds the steps: {there}")
    return found[step]


def set_aside_beyond(folder: Path, step: int) -> None:
    """Renames the checkpoints of later steps to `aside-step-NNNNNN`; a run that goes on from `step` writes new ones."""
    # The newest first: after a kill in between, what is left is still the older ones.
    for path in reversed(checkpoints_in(folder)):
        if step_of(path) > step:
            aside = path.with_name(f"aside-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def prune_checkpoints(folder: Path, keep: int, best: int | None = None) -> None:
    """Removes all but the newest `keep` and that of step `best`; call it after the new one is complete."""
    for path in checkpoints_in(folder)[:-keep]:
        if step_of(path) != best:
            # Renamed first: a kill halfway must not leave a damaged folder under a checkpoint's name.
            doomed = path.with_name(f".{path.name}.partial")
            shutil.rmtree(doomed, ignore_errors=True)
            path.rename(doomed)
            shutil.rmtree(doomed)


def sweep_partial(folder: Path) -> None:
    """Removes what a kill left half-written or half-removed."""
    for leftover in folder.glob(".step-*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)


def read_state(path: Path) -> dict[str, Any]:
    """The state.json of a complete checkpoint."""
    return json.loads((path / STATE).read_text(encoding="utf-8"))


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _empty(folder: Path) -> None:
    """Makes the folder, which must not be what a kill, or a stranger, left under its name."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    sync_folder(folder.parent.parent)


def _complete(aside: Path, final: Path, digests: dict[str, str], state: dict[str, Any]) -> None:
    """Makes a checkpoint of what all processes have written."""
    write_atomic(aside / STATE, json.dumps(state, indent=2) + "\n")
    hashes = {**digests, STATE: sha256_file(aside / STATE)}
    write_atomic(aside / MANIFEST, json.dumps(hashes, indent=2) + "\n")
    os.rename(aside, final)
    sync_folder(final.parent)


def _first_damage(path: Path, group: Group | None) -> str | None:
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    for name in manifest:
        if not _FILE.fullmatch(name):
            return f"{path / MANIFEST}: names {name!r}, which is no file of a checkpoint"
    there = {p.name for p in path.iterdir() if p.name == STATE or p.suffix == ".safetensors"}
    for name in sorted(there.symmetric_difference(manifest)):
        return f"{path / name}: {'missing' if name in manifest else 'not in the manifest'}"
    for name in sorted(manifest)[rank_in(group) :: size_of(group)]:
        if (path / name).is_symlink() or sha256_file(path / name) != manifest[name]:
            return f"{path / name}: damaged (its sha256 is not the manifest's)"
    step = read_state(path)["step"]
    if step != step_of(path):
        return f"{path}: holds step {step}, so it has been renamed"
    return None


def _system_error(error: CheckpointException) -> OSError:
    """What stopped distributed checkpointing, as far as the system said it."""
    for cause, _ in error.failures.values():
        seen: BaseException | None = cause
        while seen is not None:
            if isinstance(seen, OSError):
                return seen
            seen = seen.__cause__ or seen.__context__
    first = next(iter(error.failures.values()))[0]
    return OSError(f"{type(first).__name__}: {first}")


def staged(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in CPU memory, which the next step does not change; a DTensor keeps its shard alone."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
