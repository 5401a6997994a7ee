"""What a model is worth and how signals pass through it: `gptnorm eval` and `gptnorm inspect`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import click

from gptnorm.cli.arguments import JSON, REPORT, RUN, SETTINGS
from gptnorm.cli.output import console, refuse_unwritable, write_all
from gptnorm.errors import bad_value


@click.command()
@click.argument("source", metavar="RECIPE|RUN")
@SETTINGS
@click.option("--step", type=click.IntRange(min=0), help="Checkpoint of a run; default: the newest, 0: initialisation.")
@click.option("--tokens", type=click.Choice(["text", "random"]), default="text", help="First training batch, or noise.")
@click.option("--dtype", type=click.Choice(["fp32", "fp64"]), default="fp32", help="What is computed in.")
@JSON
@REPORT
def inspect(
    source: str,
    settings: tuple[str, ...],
    step: int | None,
    tokens: str,
    dtype: Literal["fp32", "fp64"],
    json_path: Path | None,
    page_path: Path | None,
) -> None:
    """Measure signal propagation: activations and gradients, block by block.

    RECIPE is measured at initialisation, RUN (a run folder) at its newest checkpoint. KEY=VALUE as in 'gptnorm train';
    for a run only what concerns the batch, such as train.batch_size=4. See docs/inspect.md for every number.
    """
    from gptnorm.probe import probe
    from gptnorm.probe.show import dump, make_record, print_probe
    from gptnorm.probe.source import find_config, open_source
    from gptnorm.report.probe_page import probe_page
    from gptnorm.train.inputs import within_memory

    refuse_unwritable("--json", json_path)
    refuse_unwritable("--report", page_path)
    config, folder = find_config(source, settings)
    with within_memory(config), console.status("measuring …"):
        found = open_source(source, config, folder, step=step, random_tokens=tokens == "random", dtype=dtype)
        reading = probe(found.model, found.tokens)
    record = make_record(found, reading, dtype)
    write_all(("--json", json_path, lambda: dump(record)), ("--report", page_path, lambda: probe_page(record)))
    print_probe(found, reading, dtype, console)


@click.command("eval")
@RUN
@SETTINGS
@click.option("--data", "texts", metavar="SOURCE", multiple=True, help="Text to score; several give a row each.")
@click.option("--step", type=click.IntRange(min=0), help="Checkpoint; default: the newest, 0: initialisation.")
@click.option("--documents", type=click.Choice(["separate", "stream"]), default="separate", help="What is context.")
@click.option("--window", type=click.IntRange(1, 2**31), help="Tokens read at once; default: train.seq_len.")
@click.option("--stride", type=click.IntRange(min=1), help="Tokens from window to window; default: half a window.")
@click.option("--tokens", metavar="COUNT", help="Score so many of each text at most, such as 250k or 10M.")
@JSON
def evaluate(
    run: Path,
    settings: tuple[str, ...],
    texts: tuple[str, ...],
    step: int | None,
    documents: Literal["separate", "stream"],
    window: int | None,
    stride: int | None,
    tokens: str | None,
    json_path: Path | None,
) -> None:
    """Perplexity and bits per byte of the run in folder RUN, on its validation split or on any text.

    SOURCE is anything that data.path takes; the run's own tokenizer reads it. Of the text that the run was trained on
    only the validation split is scored. KEY=VALUE sets how it is computed, such as train.device=cpu or
    train.batch_size=8. See docs/evaluate.md for every number.
    """
    from gptnorm.evaluate.command import print_evaluation, run_eval
    from gptnorm.probe.show import dump

    refuse_unwritable("--json", json_path)
    found = run_eval(
        run,
        settings,
        texts,
        step=step,
        mode=documents,
        window=window,
        stride=stride,
        tokens=tokens,
        console=console,
    )
    write_all(("--json", json_path, lambda: dump(found.record())))
    print_evaluation(found, console)


@click.command()
@click.argument("source", metavar="RECIPE|RUN")
@SETTINGS
@click.option("--step", "steps", metavar="STEPS", help="Checkpoints of a run, such as 0,100,400; default: the newest.")
@click.option(
    "--what", default="sharpness,slots", show_default=True, help="Of sharpness, adam, weights, slots, spectrum."
)
@click.option("--part", default="all", show_default=True, help="Whose parameters: all, blocks.2, blocks.0.attn.q, ….")
@click.option("--slot", "slots", metavar="NAME", multiple=True, help="Default: all of the middle block.")
@click.option(
    "--token",
    default="middle",
    show_default=True,
    help="Position whose activation is the variable; all: the sequence's.",
)
@click.option("--rows", type=click.IntRange(min=1), help="Sequences in memory at once; default: all of the batch.")
@click.option(
    "--dtype", type=click.Choice(["fp64", "fp32"]), default="fp64", show_default=True, help="fp32: half the memory."
)
@click.option(
    "--tolerance",
    type=click.FloatRange(0, 1, min_open=True),
    default=1e-3,
    show_default=True,
    help="Error of an eigenvalue.",
)
@click.option("--most", type=click.IntRange(min=2), default=200, show_default=True, help="Products per eigenvalue.")
@JSON
@REPORT
def curvature(
    source: str,
    settings: tuple[str, ...],
    steps: str | None,
    what: str,
    part: str,
    slots: tuple[str, ...],
    token: str,
    rows: int | None,
    dtype: Literal["fp32", "fp64"],
    tolerance: float,
    most: int,
    json_path: Path | None,
    page_path: Path | None,
) -> None:
    """Measure the curvature of the loss: sharpness, and what a norm adds to it.

    RECIPE is measured at initialisation, RUN (a run folder) at its checkpoints, on the first training batch. KEY=VALUE
    as in 'gptnorm train'; for a run only what concerns the batch, such as train.batch_size=4. See docs/curvature.md.
    """
    from gptnorm.curvature.command import parse_steps, parse_token, parse_what, run_curvature
    from gptnorm.curvature.show import print_curvature
    from gptnorm.probe.show import dump
    from gptnorm.report.curvature_page import curvature_page

    refuse_unwritable("--json", json_path)
    refuse_unwritable("--report", page_path)
    if math.isnan(tolerance):  # which click lets through
        raise bad_value("--tolerance", tolerance, "must be above 0 and at most 1")
    found = run_curvature(
        source,
        settings,
        steps=parse_steps(steps),
        what=parse_what(what),
        part=part,
        slots=slots,
        token=parse_token(token),
        rows=rows,
        dtype=dtype,
        tolerance=tolerance,
        most=most,
        console=console,
    )
    record = found.record()
    # First: whoever reads what is printed may leave.
    write_all(
        ("--json", json_path, lambda: dump(record)),
        ("--report", page_path, lambda: curvature_page(record)),
    )
    print_curvature(record, console)
