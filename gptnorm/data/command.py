"""The command `gptnorm data build`."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal, DecimalException
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gptnorm.config import DataConfig
from gptnorm.data.build import build_shards
from gptnorm.data.card import DATA_CARD_FILE, bytes_per_token
from gptnorm.data.names import expand
from gptnorm.data.progress import make_watcher
from gptnorm.data.shards import MANIFEST_FILE, Shards, read_manifest
from gptnorm.errors import UserError, bad_value
from gptnorm.recipe import parse_overrides
from gptnorm.typed import field_names, read_table, unknown_key

SETTING = re.compile(r"[a-z_]+(\.[a-z0-9_]+)+=.*", re.DOTALL)
"""What is a setting and not a path."""

COUNT = re.compile(r"([0-9][0-9_]*(?:\.[0-9]+)?(?:e[0-9]+)?)([kmbt]?)", re.IGNORECASE)
SCALE = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def run_build(
    arguments: Sequence[str],
    folder: Path,
    *,
    tokens: str | None,
    documents: str | None,
    workers: int | None,
    deduplicate: bool,
    console: Console,
) -> None:
    """Build shards and say what is in them.

    Args:
        arguments: sources and `data.KEY=VALUE` settings, in any order.
        tokens, documents: where the corpus ends, such as "10B".

    Raises:
        UserError: see `build_shards`; an argument is no good.
    """
    config = read_arguments(arguments, tokens=tokens, documents=documents, deduplicate=deduplicate)
    watcher = make_watcher(console)
    if (folder / MANIFEST_FILE).is_file():
        console.print("these shards were built before", highlight=False)
    try:
        shards = build_shards(config, folder, watcher, workers)
    finally:
        watcher.end()
    console.print(_table(shards))
    for line in (f"card: {folder / DATA_CARD_FILE}", f"train on it: gptnorm train RECIPE data.path={folder}"):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def read_arguments(
    arguments: Sequence[str], *, tokens: str | None = None, documents: str | None = None, deduplicate: bool = False
) -> DataConfig:
    """The settings that the command line says.

    Raises:
        UserError: there is no source, a setting is none of `data`, or a value is wrong.
    """
    sources = [argument for argument in arguments if not SETTING.fullmatch(argument)]
    tree = parse_overrides(argument for argument in arguments if SETTING.fullmatch(argument))
    for name in tree.keys() - {"data"}:
        raise UserError(f"{name}: 'gptnorm data build' takes settings of data alone, such as data.tokenizer=bpe")
    table: dict[str, Any] = tree.get("data", {})
    for key in table.keys() - set(field_names(DataConfig)):
        raise unknown_key(f"data.{key}", field_names(DataConfig))
    if "path" in table:
        raise bad_value("data.path", table["path"], "give it as an argument: gptnorm data build SOURCE... --dir FOLDER")
    for source in sources:
        if "=" in source and not expand(source).exists():
            raise UserError(
                f"{source!r}: no such file; a setting is written data.KEY=VALUE, such as data.tokenizer=bpe"
            )
    if not sources:
        raise UserError("SOURCE: name a file, a folder or a dataset, such as: gptnorm data build texts/ --dir shards")
    config = read_table(DataConfig, table, key="data")
    limits = {"max_tokens": ("--tokens", tokens), "max_documents": ("--documents", documents)}
    for key, (option, text) in limits.items():
        if text is not None:
            if key in table:
                raise bad_value(option, text, f"data.{key} says the same; give one of them")
            config = replace(config, **{key: read_count(option, text)})
    path = sources[0] if len(sources) == 1 else tuple(sources)
    return replace(config, path=path, deduplicate=deduplicate or config.deduplicate)


def read_count(option: str, text: str) -> int:
    """A whole number such as "250_000", "1e9", "1.5M" or "10B".

    Raises:
        UserError: it is none, or none above 0.
    """
    found = COUNT.fullmatch(text)
    # Exact: in binary 4.1 million is no whole number.
    number = Decimal(0)
    if found:
        with contextlib.suppress(DecimalException):
            number = Decimal(found[1].replace("_", "")) * SCALE[found[2].lower()]
    if not 1 <= number < 2**63 or number != int(number):
        raise bad_value(option, text, "must be a whole number above 0, such as 250_000, 1.5M or 10B")
    return int(number)


def _table(shards: Shards) -> Table:
    manifest = read_manifest(shards.folder)
    assert manifest is not None
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in ("documents", "tokens", "bytes of text", "bytes/token", "repeats left out"):
        table.add_column(name, justify="right")
    for name, split in (("training", manifest.train), ("validation", manifest.val)):
        counts = [f"{n:,}" for n in (split.documents, split.tokens, split.text_bytes)]
        table.add_row(name, *counts, bytes_per_token(split), f"{split.repeats:,}")
    return table
