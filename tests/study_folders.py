"""What tests look at in study folders."""

from __future__ import annotations

import json

from gptnorm.study import pool

SMALL = ("train.steps=4", "watch.every=0", "train.eval_sequences=4", "checkpoint.final=false")


def cells_in_process(wanted, texts, folder, workers, console):
    """Cells one after the other in this process, in place of `gptnorm.study.pool.run_cells`."""
    while cells := wanted():
        cell = cells[0]
        yield cell, pool._run_cell(cell, texts, folder)


def lines(folder):
    """The ledger."""
    return [json.loads(line) for line in (folder / "cells.jsonl").read_text().splitlines()]


def everything(folder):
    """Every file's bytes."""
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def outcomes(folder):
    """What each run came to, whenever it was made."""
    rows = lines(folder)
    assert len({row["run"] for row in rows}) == len(rows), "a run was made twice"
    return {row["run"]: {k: v for k, v in row.items() if k not in ("seconds", "environment")} for row in rows}
