"""Training: `gptnorm train` and `gptnorm resume`."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gptnorm.cli.arguments import RECIPE, RUN, SETTINGS
from gptnorm.cli.output import console, say
from gptnorm.errors import EXIT_DIVERGED, UserError

if TYPE_CHECKING:
    from gptnorm.config import Config
    from gptnorm.train.result import Result
    from gptnorm.train.stop import StopWish


@click.command()
@RECIPE
@SETTINGS
def train(recipe: str, settings: tuple[str, ...]) -> None:
    """Train one run.

    RECIPE is a file, or the name of one that ships ('gptnorm recipes' lists them). KEY=VALUE sets
    one thing, such as optim.lr=3e-3 or seed=1 ('gptnorm settings' lists the keys).
    """
    from gptnorm.data import prepare
    from gptnorm.recipe import load_recipe
    from gptnorm.train.progress import make_watcher
    from gptnorm.train.run import start_run
    from gptnorm.train.run_folder import free_run_dir
    from gptnorm.train.stop import StopWish

    found = load_recipe(recipe)
    config = found.resolve(settings)
    path = Path(config.run.dir) if config.run.dir else free_run_dir(found.name, config.model.strategy)
    with console.status("preparing the text …"):
        shards = prepare(config.data)
    say(f"{config.model.strategy} on {config.model.backbone}, into {path}")
    warn(config)
    stop = StopWish()
    with stop.listening():
        result = start_run(config, shards, path, make_watcher(console), stop, finish)
    leave(result, stop)


@click.command()
@RUN
@SETTINGS
@click.option(
    "--step", type=click.IntRange(min=0), help="Go on from this checkpoint; later ones are set aside. 0: begin again."
)
@click.option("--auto", is_flag=True, help="Should the newest checkpoint be damaged, take the newest that is not.")
def resume(run: Path, settings: tuple[str, ...], step: int | None, auto: bool) -> None:
    """Continue the run in folder RUN from its newest complete checkpoint.

    It goes on with its own settings. KEY=VALUE changes how it computes for this part alone: parallel.*,
    train.accumulate, train.compile, train.device, train.recompute or train.threads.
    """
    from gptnorm.data import prepare
    from gptnorm.recipe import adjusted
    from gptnorm.train.progress import make_watcher
    from gptnorm.train.run import resume_run
    from gptnorm.train.run_folder import RunFolder
    from gptnorm.train.stop import StopWish

    with console.status("preparing the text …"):
        config = adjusted(RunFolder.open(run).config(), settings)
        shards = prepare(config.data)
    warn(config)
    stop = StopWish()
    with stop.listening():
        result = resume_run(
            run, shards, make_watcher(console), stop, after=finish, step=step, auto=auto, settings=settings
        )
    leave(result, stop)


def warn(config: Config) -> None:
    """Says before a run what will make it slow."""
    from gptnorm.model.moe import slow_experts

    line = slow_experts(config)
    if line:
        say(f"warning: {line}")


def finish(path: Path, result: Result) -> None:
    """Writes the run's report and says how it ended."""
    from gptnorm.format import plural
    from gptnorm.report.html import write_run_report

    try:
        say(f"report: {write_run_report(path)}")
    except OSError as error:
        raise UserError(f"{path}: the report cannot be written ({error.strerror})") from None
    if result.skipped:
        say(f"{plural(result.skipped, 'update')} left out as spikes")
    if result.status == "interrupted":
        say(f"stopped by {result.reason} at step {result.step}; continue with: gptnorm resume {path}")
    elif result.status == "diverged":
        say(f"diverged at step {result.step}: the {result.reason} was non-finite first; nothing was updated with it")
    else:
        say(f"{result.parameters:,} parameters, {result.step} steps, {result.seconds:.1f} s of training")
        say(f"validation loss {result.val_loss:.4f}")


def leave(result: Result, stop: StopWish) -> None:
    """Exits with the code of the list in gptnorm/cli/__init__.py, unless the run finished."""
    if result.status == "interrupted":
        raise click.exceptions.Exit(128 + (stop.signal or signal.SIGTERM))
    if result.status == "diverged":
        raise click.exceptions.Exit(EXIT_DIVERGED)
