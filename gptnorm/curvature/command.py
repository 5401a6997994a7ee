"""The command `gptnorm curvature`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import Console
from torch import Tensor

from gptnorm.curvature.activation import slots_of, used_once
from gptnorm.curvature.adam import read_optimizers
from gptnorm.curvature.language import parameters_of
from gptnorm.curvature.reading import (
    AdamReading,
    Sharpness,
    SlotReading,
    SpectrumReading,
    WeightReading,
    measure_adam,
    measure_sharpness,
    measure_slots,
    measure_spectrum,
    measure_weights,
    middle,
    weights_of,
)
from gptnorm.environment import describe_environment
from gptnorm.errors import bad_value
from gptnorm.probe.show import plain
from gptnorm.probe.source import DTypeName, Source, find_config, open_source
from gptnorm.recipe import to_tree
from gptnorm.train.checkpoint import checkpoint_at
from gptnorm.train.inputs import within_memory
from gptnorm.train.schedule import lr_factor

DIGITS = 10
"""A number on the command line has fewer."""

WHAT = ("sharpness", "adam", "weights", "slots", "spectrum")
"""What can be measured."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A model at one step."""

    step: int
    sharpness: Sharpness
    adam: AdamReading | None
    spectrum: SpectrumReading | None
    weights: list[WeightReading]
    slots: list[SlotReading]


@dataclass(frozen=True, kw_only=True)
class Curvature:
    """A run at several steps, or a recipe's model at initialisation."""

    source: Source
    """At the last of the steps."""
    dtype: DTypeName
    part: str
    tolerance: float
    readings: list[Reading]

    def record(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        source = self.source
        return {
            "source": source.name,
            "text": source.text,
            "sequences": source.tokens.shape[0],
            "seq_len": source.tokens.shape[1] - 1,
            "dtype": self.dtype,
            "part": self.part,
            "tolerance": self.tolerance,
            "readings": [_reading_record(reading) for reading in self.readings],
            "config": to_tree(source.config),
            "environment": describe_environment(source.tokens.device),
        }


def run_curvature(
    name: str,
    settings: Sequence[str],
    *,
    steps: Sequence[int | None],
    what: Sequence[str],
    part: str,
    slots: Sequence[str],
    token: int | Literal["all", "middle"],
    rows: int | None,
    dtype: DTypeName,
    tolerance: float,
    most: int,
    console: Console,
) -> Curvature:
    """Measures a recipe's model at initialisation, or a run's at some of its checkpoints.

    Args:
        settings: `key=value` arguments; for a run only what concerns the batch.
        steps: checkpoints; None: the newest.
        what: of `WHAT`.
        part: whose parameters; see `parameters_of`.
        slots: names; none: those of the middle block.
        token: position whose x is the variable, or the whole sequence.
        rows: sequences in memory at once; None: all of the batch.
        tolerance, most: of eigenvalues; see `lanczos`.

    Raises:
        UserError: something of it is no good, or a Hessian product is not to be trusted.
    """
    config, folder = find_config(name, settings)
    if folder is None and any(steps):
        raise bad_value(
            "--step", max(filter(None, steps)), "needs a run folder; a recipe is measured at initialisation"
        )
    if "adam" in what and (folder is None or all(step == 0 for step in steps)):
        raise bad_value("--what", "adam", "needs a checkpoint of a run: at initialisation AdamW has no second moments")
    if folder is not None:
        for step in filter(None, steps):  # one that is missing shows before the first is measured
            checkpoint_at(folder.checkpoints, step)
    readings, source = [], None
    for step in steps:
        with within_memory(config), console.status("preparing …") as status:

            def say(words: str) -> None:
                status.update(f"{words} …")

            source = open_source(name, config, folder, step=step, dtype=dtype)
            model, tokens = source.model, source.tokens
            names = parameters_of(model, part)
            position = {"middle": middle(tokens), "all": None}[token] if isinstance(token, str) else token
            batches = list(tokens.split(min(rows or len(tokens), len(tokens))))
            middle_block = [slot for slot in slots_of(model) if slot.startswith(_middle_block(model))]
            chosen = list(slots) or used_once(model, tokens[0], middle_block)
            how: dict[str, Any] = {"tolerance": tolerance, "most": most, "say": say}
            weights, found, adam, spectrum = [], [], None, None
            # Slots first: a wrong name shows before the long part.
            if "slots" in what:
                found = measure_slots(model, tokens[0], chosen, position, **how)
            sharpness = measure_sharpness(model, batches, names, **how)
            if "adam" in what and source.checkpoint is not None:
                adam = _adam(source, batches, names, **how)
            if "weights" in what:
                weights = measure_weights(model, batches, weights_of(model, names), **how)
            if "spectrum" in what:
                spectrum = measure_spectrum(model, batches, names, say=say)
            readings.append(
                Reading(
                    step=source.step, sharpness=sharpness, adam=adam, spectrum=spectrum, weights=weights, slots=found
                )
            )
    assert source is not None
    return Curvature(source=source, dtype=dtype, part=part, tolerance=tolerance, readings=readings)


def _adam(source: Source, batches: Sequence[Tensor], names: Sequence[str], **how: Any) -> AdamReading:
    config = source.config
    assert source.checkpoint is not None
    optimizers = read_optimizers(source.checkpoint, source.model, config.optim)
    lr = config.optim.lr * lr_factor(source.step, config.train.steps, config.optim)
    return measure_adam(source.model, batches, names, optimizers, lr=lr, config=config.optim, **how)


def parse_steps(text: str | None) -> Sequence[int | None]:
    """ "0,100,400" as numbers; None: the newest checkpoint."""
    if text is None:
        return [None]
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < DIGITS for part in parts):
        raise bad_value("--step", text, "must be whole numbers of steps with commas between, such as 0,100,400")
    return sorted(set(map(int, parts)))


def parse_token(text: str) -> int | Literal["all", "middle"]:
    """A position, or which."""
    if text == "all":
        return "all"
    if text == "middle":
        return "middle"
    if not text.isdecimal() or len(text) >= DIGITS:
        raise bad_value("--token", text, "must be a position of the sequence, middle or all")
    return int(text)


def parse_what(text: str) -> list[str]:
    """Names of `WHAT` with commas between."""
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if part not in WHAT:
            raise bad_value("--what", part, f"must be of {', '.join(WHAT)}, with commas between")
    return parts


def _middle_block(model: Any) -> str:
    return f"blocks.{len(model.blocks) // 2}."


def _reading_record(reading: Reading) -> dict[str, Any]:
    record = asdict(reading)
    for key in ("weights", "slots"):
        for row, entry in zip(record[key], getattr(reading, key), strict=True):
            row["scale_free"] = entry.scale_free
    return plain(record)
