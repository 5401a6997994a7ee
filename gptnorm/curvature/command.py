"""The command `gptnorm curvature`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from gptnorm.curvature.activation import slots_of, used_once
from gptnorm.curvature.adam import read_optimizers
from gptnorm.curvature.language import parameters_of
from gptnorm.curvature.reading import (
    AdamReading,
    Extreme,
    Sharpness,
    SlotReading,
    WeightReading,
    measure_adam,
    measure_sharpness,
    measure_slots,
    measure_weights,
    middle,
    weights_of,
)
from gptnorm.environment import describe_environment
from gptnorm.errors import bad_value
from gptnorm.probe.show import plain
from gptnorm.probe.source import DTypeName, Source, find_config, open_source
from gptnorm.recipe import to_tree
from gptnorm.report.estimates import ratio_text
from gptnorm.report.format import MISSING, short_text
from gptnorm.train.inputs import within_memory
from gptnorm.train.schedule import lr_factor

WHAT = ("sharpness", "adam", "weights", "slots")
"""What can be measured."""


UNSURE = 0.1
"""Part of an eigenvalue above which its error is told."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A model at one step."""

    step: int
    sharpness: Sharpness
    adam: AdamReading | None
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
    token: int | None,
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
        token: position whose x is the variable; None: the middle one.
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
    readings, source = [], None
    for step in steps:
        with within_memory(config), console.status("preparing …") as status:

            def say(words: str) -> None:
                status.update(f"{words} …")

            source = open_source(name, config, folder, step=step, dtype=dtype)
            model, tokens = source.model, source.tokens
            names = parameters_of(model, part)
            position = middle(tokens) if token is None else token
            batches = list(tokens.split(rows or len(tokens)))
            middle_block = [slot for slot in slots_of(model) if slot.startswith(_middle_block(model))]
            chosen = list(slots) or used_once(model, tokens[0], middle_block)
            how: dict[str, Any] = {"tolerance": tolerance, "most": most, "say": say}
            weights, found, adam = [], [], None
            # Slots first: a wrong name shows before the long part.
            if "slots" in what:
                found = measure_slots(model, tokens[0], chosen, position, **how)
            sharpness = measure_sharpness(model, batches, names, **how)
            if "adam" in what and source.checkpoint is not None:
                adam = _adam(source, batches, names, **how)
            if "weights" in what:
                weights = measure_weights(model, batches, weights_of(model, names), **how)
            readings.append(Reading(step=source.step, sharpness=sharpness, adam=adam, weights=weights, slots=found))
    assert source is not None
    return Curvature(source=source, dtype=dtype, part=part, tolerance=tolerance, readings=readings)


def _adam(source: Source, batches: Sequence[Tensor], names: Sequence[str], **how: Any) -> AdamReading:
    config = source.config
    assert source.checkpoint is not None
    optimizers = read_optimizers(source.checkpoint, source.model, config.optim)
    lr = config.optim.lr * lr_factor(source.step, config.train.steps, config.optim)
    return measure_adam(source.model, batches, names, optimizers, lr=lr, beta1=config.optim.betas[0], **how)


def parse_steps(text: str | None) -> list[int | None]:
    """ "0,100,400" as numbers; None: the newest checkpoint."""
    if text is None:
        return [None]
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise bad_value("--step", text, "must be whole numbers of steps with commas between, such as 0,100,400")
    return list(dict.fromkeys(map(int, parts)))


def parse_what(text: str) -> list[str]:
    """Names of `WHAT` with commas between."""
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if part not in WHAT:
            raise bad_value("--what", part, f"must be of {', '.join(WHAT)}, with commas between")
    return parts


def print_curvature(found: Curvature, console: Console) -> None:
    """What was measured, a table for each kind, and what the numbers mean."""
    source, model = found.source, found.source.config.model
    batch, length = source.tokens.shape
    first = (
        f"{model.strategy} on {model.backbone}: {found.readings[0].sharpness.parameters:,} parameters ({found.part}), "
        f"{batch} x {length - 1} tokens of {source.text}, {found.dtype}"
    )
    console.print(first, highlight=False, markup=False)
    for table in _tables(found):
        console.print()
        console.print(table)
    slots = [slot for reading in found.readings for slot in reading.slots]
    worst = max([reading.sharpness.difference for reading in found.readings] + [slot.difference for slot in slots])
    notes = [
        "H: Hessian, G: Gauss-Newton matrix; residual: ‖Hv - λv‖, an eigenvalue being no further off, over the "
        "matrix's largest |λ|; the worst of the row.",
        f"*: error above {found.tolerance:g} of the largest modulus, or {UNSURE:g} of itself; the error is r² over the "
        "gap to the other eigenvalues where that is less than the residual r.",
        f"Products differ from finite differences of the gradient by {worst:.1g}, relative.",
    ]
    if slots:
        notes.append(
            f"Slots: spectral norms in what each reads at token {slots[0].token} of the first sequence; H = L + C, "
            "scaled: RMS(x)² ‖H‖."
        )
    console.print()
    for note in notes:
        console.print(note, highlight=False, markup=False)


def _tables(found: Curvature) -> list[Table]:
    sharpness = _table(
        "Sharpness", ["step", "loss", "‖grad‖", "λ_max H", "λ_min H", "λ_max G", "residual", "trace H"], words=0
    )
    for reading in found.readings:
        s = reading.sharpness
        error = "" if s.trace_error is None else f" ± {_digits(s.trace_error)}"
        values = [*_ends(s.largest, s.smallest, found.tolerance), *_ends(s.gauss_newton, None, found.tolerance)]
        trace = f"{_digits(s.trace)}{error}"
        sharpness.add_row(
            str(reading.step),
            f"{s.loss:.4f}",
            _digits(s.gradient),
            *values,
            _residual([s.largest, s.smallest], [s.gauss_newton]),
            trace,
        )
    tables = [sharpness]
    adam = _table(
        "As AdamW sees it", ["step", "rate", "λ_max P^-½ H P^-½", "residual", "threshold", "of the threshold"], words=0
    )
    for reading in found.readings:
        if (a := reading.adam) is not None:
            (end,) = _ends(a.largest, None, found.tolerance)
            limit = [MISSING, MISSING]
            if a.threshold is not None:
                limit = [_digits(a.threshold), f"{a.largest.value / a.threshold:.2f}"]
            adam.add_row(str(reading.step), short_text(a.lr) if a.lr else "0", end, _residual([a.largest]), *limit)
    if adam.row_count:
        tables.append(adam)
    if any(reading.weights for reading in found.readings):
        head = ["step", "weight", "‖W‖", "λ_max H", "λ_min H", "residual", "‖W‖² λ_max"]
        weights = _table("Weights, each by itself", head, words=2)
        for reading in found.readings:
            for w in reading.weights:
                ends = _ends(w.largest, w.smallest, found.tolerance)
                name = w.name.removesuffix(".weight")
                weights.add_row(
                    str(reading.step),
                    name,
                    _digits(w.norm),
                    *ends,
                    _residual([w.largest, w.smallest]),
                    _digits(w.scale_free),
                )
        tables.append(weights)
    if any(reading.slots for reading in found.readings):
        head = ["step", "slot", "RMS(x)", "‖H‖", "‖L‖", "‖C‖", "residual", "‖C‖/‖L‖", "scaled"]
        slots = _table("Slots", head, words=2)
        for reading in found.readings:
            for s in reading.slots:
                slots.add_row(str(reading.step), s.name, *_slot_cells(s, found.tolerance))
        tables.append(slots)
    return tables


def _slot_cells(s: SlotReading, tolerance: float) -> list[str]:
    norms = [_ends(norm, None, tolerance)[0] for norm in (s.hessian, s.gauss_newton, s.curvature)]
    ratio = MISSING
    if s.gauss_newton.value:
        mark = "*" if any(norm.endswith("*") for norm in norms[1:]) else ""
        ratio = f"{_digits(s.curvature.value / s.gauss_newton.value)}{mark}"
    scaled = f"{_digits(s.scale_free)}{'*' if norms[0].endswith('*') else ''}"
    return [_digits(s.rms), *norms, _residual([s.hessian], [s.gauss_newton], [s.curvature]), ratio, scaled]


def _residual(*operators: Sequence[Extreme]) -> str:
    """The worst of the residuals, each over the largest modulus of its operator."""
    found = [
        max(extreme.residual for extreme in extremes) / scale
        for extremes in operators
        if (scale := max(abs(extreme.value) for extreme in extremes))
    ]
    return f"{max(found):.0e}" if found else MISSING


def _ends(largest: Extreme, smallest: Extreme | None, tolerance: float) -> list[str]:
    """Each with a mark where it has not converged."""
    ends = [extreme for extreme in (largest, smallest) if extreme is not None]
    limit = tolerance * max(abs(extreme.value) for extreme in ends)

    def unsure(extreme: Extreme) -> bool:
        # Small beside the other end, its own sign may not be known.
        return extreme.error > limit or extreme.error > UNSURE * abs(extreme.value)

    return [f"{_digits(extreme.value)}{'*' if unsure(extreme) else ''}" for extreme in ends]


def _reading_record(reading: Reading) -> dict[str, Any]:
    record = asdict(reading)
    for key in ("weights", "slots"):
        for row, entry in zip(record[key], getattr(reading, key), strict=True):
            row["scale_free"] = entry.scale_free
    return plain(record)


def _middle_block(model: Any) -> str:
    return f"blocks.{len(model.blocks) // 2}."


def _digits(value: float) -> str:
    """Three of them, with the sign of a negative number."""
    return f"{'-' if value < 0 else ''}{ratio_text(abs(value))}"


def _table(title: str, columns: Sequence[str], *, words: int) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < words else "right", no_wrap=True)
    return table
