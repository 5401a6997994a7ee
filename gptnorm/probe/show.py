"""A probe as a JSON record and as terminal tables."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from gptnorm.environment import describe_environment
from gptnorm.format import digits_text, evenly_chosen, plural
from gptnorm.probe.reading import Probe
from gptnorm.probe.source import DTypeName, Source
from gptnorm.recipe import to_tree

SHOWN_BLOCKS = 12
"""Blocks in a terminal table; the JSON has all."""


def make_record(source: Source, found: Probe, dtype: DTypeName) -> dict[str, Any]:
    """Everything as plain JSON values, with where and of what it was measured; blocks[0] is block 1."""
    batch, length = source.tokens.shape
    return {
        "source": source.name,
        "step": source.step,
        "text": source.text,
        "sequences": batch,
        "seq_len": length - 1,
        "dtype": dtype,
        **plain(asdict(found)),
        "config": to_tree(source.config),
        "environment": describe_environment(source.tokens.device),
    }


def plain(value: Any) -> Any:
    """The same with None for what JSON cannot hold: nan and infinities."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def dump(record: dict[str, Any]) -> str:
    """The record as the text of a JSON file."""
    return json.dumps(record, indent=1, allow_nan=False) + "\n"


def print_probe(source: Source, found: Probe, dtype: DTypeName, console: Console) -> None:
    """A few numbers, then tables over evenly chosen blocks."""
    when = f"after {source.step} steps" if source.step else "at initialisation"
    batch, length = source.tokens.shape
    model, blocks = source.config.model, plural(len(found.blocks), "block")
    for line in (
        f"{model.strategy} on {model.backbone}, {when}: {blocks} of width {source.model.shape.d}; "
        f"{batch} x {length - 1} tokens of {source.text}, {dtype}",
        f"loss {found.loss:.4f}, largest variance {digits_text(found.max_variance)}, gradient of x_1 over that of x_L "
        f"{digits_text(found.gradient_ratio)}, stream before block 1: RMS {digits_text(found.start)}",
    ):
        console.print(line, highlight=False, markup=False)
    shown = evenly_chosen(len(found.blocks), SHOWN_BLOCKS)
    roles = list(found.blocks[0].slots)

    signal = _table(
        "Signal", ["block", "stream", "attn", "ffn", "dL/dx", "q/v", "k/v", "cos", "token cos", "bound", "logit"]
    )
    for layer in shown:
        b = found.blocks[layer]
        values = (b.stream, b.attn, b.ffn, b.grad, b.q_over_v, b.k_over_v, b.cosine, b.token_cosine)
        signal.add_row(str(layer + 1), *map(digits_text, (*values, max(b.logit_bound), max(b.logit_max))))
    tables, raw = [signal], []
    for title, key in (
        ("RMS of W x", "raw"),
        ("RMS after norms and scales", "used"),
        ("Gradient norms of the weights", "grad"),
    ):
        rows = [[digits_text(getattr(found.blocks[layer].slots[role], key)) for role in roles] for layer in shown]
        if key == "used" and rows == raw:
            # Nothing follows the linear maps.
            continue
        raw = rows
        tables.append(_table(title, ["block", *roles]))
        for layer, row in zip(shown, rows, strict=True):
            tables[-1].add_row(str(layer + 1), *row)
    for table in tables:
        console.print()
        console.print(table)
    ends = ", ".join(f"{role} {digits_text(slot.grad)}" for role, slot in found.ends.items())
    console.print(f"\ngradient norms at the ends: {ends}", highlight=False)


def _table(title: str, columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table
