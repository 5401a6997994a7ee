"""`gptnorm plan`."""

from __future__ import annotations

from pathlib import Path

import click

from gptnorm.cli.arguments import JSON, RECIPE, SETTINGS
from gptnorm.cli.output import console, write


@click.command()
@RECIPE
@SETTINGS
@click.option("--gpus", type=click.IntRange(1, 2**20), required=True, help="How many there are.")
@click.option("--memory", metavar="SIZE", required=True, help="Of one GPU, such as 80GiB.")
@click.option("--gpu", default="h100", help="Whose peak rate: a100, h100, h100-pcie, h200, b200, mi300x, …")
@click.option("--peak-tflops", type=float, help="Or that rate, dense bf16.")
@click.option("--mfu", type=float, default=0.4, help="Model FLOPs utilisation; 0.4.")
@JSON
def plan(
    recipe: str,
    settings: tuple[str, ...],
    gpus: int,
    memory: str,
    gpu: str,
    peak_tflops: float | None,
    mfu: float,
    json_path: Path | None,
) -> None:
    """Say what a run will take: parameters, FLOPs, memory per GPU, the largest micro-batch, days.

    Nothing is trained, and no GPU and no text are needed. KEY=VALUE as in 'gptnorm train', such as
    parallel.param_dtype=bf16 or train.recompute=full. See docs/plan.md for how each number is found.
    """
    import json

    from gptnorm.plan.hardware import peak_flops
    from gptnorm.plan.planner import make_plan
    from gptnorm.plan.sizes import parse_size
    from gptnorm.plan.table import print_plan
    from gptnorm.recipe import load_recipe

    room = parse_size(memory, "--memory")
    peak = peak_flops(gpu, peak_tflops)
    config = load_recipe(recipe).resolve(settings)
    with console.status("tracing …"):
        found = make_plan(config, gpus=gpus, memory=room, mfu=mfu, peak=peak)
    if json_path is not None:
        write("--json", json_path, json.dumps(found.record(), indent=2) + "\n")
    print_plan(found, console)
