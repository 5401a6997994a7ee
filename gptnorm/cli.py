"""The command `gptnorm`.

Exit codes: 0 done, 2 bad input (one line on stderr says what), 3 the run diverged, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

import gptnorm
from gptnorm.errors import EXIT_DIVERGED, EXIT_USER_ERROR, UserError

if TYPE_CHECKING:
    from gptnorm.train.loop import Result

EXIT_INTERRUPTED = 130

console = Console()

RECIPE = click.argument("recipe", metavar="RECIPE")
RUN = click.argument("run", metavar="RUN", type=click.Path(path_type=Path))
SETTINGS = click.argument("settings", metavar="[KEY=VALUE]...", nargs=-1)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(gptnorm.__version__, message="%(version)s")
def app() -> None:
    """Choose, train and understand how a GPT is normalised."""


@app.command()
@RECIPE
@SETTINGS
def train(recipe: str, settings: tuple[str, ...]) -> None:
    """Train one run.

    RECIPE is a file, or the name of one that ships ('gptnorm recipes' lists them). KEY=VALUE sets
    one thing, such as optim.lr=3e-3 or seed=1 ('gptnorm settings' lists the keys).
    """
    # Imports that bring torch stand inside the commands, so that --help is quick.
    from gptnorm.data import prepare
    from gptnorm.recipe import load_recipe
    from gptnorm.train.loop import start_run
    from gptnorm.train.progress import make_watcher
    from gptnorm.train.run_folder import free_run_dir

    found = load_recipe(recipe)
    config = found.resolve(settings)
    path = Path(config.run.dir) if config.run.dir else free_run_dir(found.name, config.model.strategy)
    with console.status("preparing the text …"):
        shards = prepare(config.data)
    say(f"{config.model.strategy} on {config.model.backbone}, into {path}")
    finish(path, start_run(config, shards, path, make_watcher(console)))


@app.command()
@RUN
def resume(run: Path) -> None:
    """Continue the run in folder RUN from its newest complete checkpoint."""
    from gptnorm.data import prepare
    from gptnorm.train.loop import resume_run
    from gptnorm.train.progress import make_watcher
    from gptnorm.train.run_folder import RunFolder

    with console.status("preparing the text …"):
        shards = prepare(RunFolder.open(run).config().data)
    finish(run, resume_run(run, shards, make_watcher(console)))


@app.command()
@SETTINGS
def quickstart(settings: tuple[str, ...]) -> None:
    """Compare three strategies over learning rates, in minutes on a laptop."""
    from gptnorm.report import load_study, rich_table
    from gptnorm.report.html import write_study_report
    from gptnorm.study.grid import run_study

    folder = run_study("quickstart", settings, Path("runs/quickstart"), console)
    report = write_study_report(folder)
    console.print(rich_table(load_study(folder)))
    say(f"report: {report}")


@app.command()
@click.argument("name", required=False)
def strategies(name: str | None) -> None:
    """List the strategies, or show the card and the options of NAME."""
    from gptnorm.strategies.catalogue import show_all, show_one

    if name is None:
        show_all(console)
    else:
        show_one(name, console)


@app.command()
def recipes() -> None:
    """List the recipes that ship with the package."""
    from gptnorm.recipe import shipped_recipes

    for name in shipped_recipes():
        say(name)


@app.command("settings")
def settings_() -> None:
    """List every setting, its default and its meaning."""
    from gptnorm.reference import settings_table

    console.print(settings_table())


def say(line: str) -> None:
    """A plain line, never wrapped or coloured."""
    console.print(line, soft_wrap=True, highlight=False, markup=False)


def finish(path: Path, result: Result) -> None:
    """Writes the run's report and says how it ended."""
    from gptnorm.report.html import write_run_report

    say(f"report: {write_run_report(path)}")
    if result.status == "diverged":
        say(f"diverged at step {result.step}: the {result.reason} was non-finite first; nothing was updated with it")
        raise click.exceptions.Exit(EXIT_DIVERGED)
    say(f"{result.parameters:,} parameters, {result.step} steps, {result.seconds:.1f} s")
    say(f"validation loss {result.val_loss:.4f}")


def main() -> None:
    """Runs the command; every error that a person can mend is one line and exit code 2."""
    try:
        code = app(prog_name="gptnorm", standalone_mode=False)
    except UserError as error:
        code = complain(str(error))
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
        code = EXIT_USER_ERROR
    except click.ClickException as error:
        code = complain(error.format_message())
    except (KeyboardInterrupt, click.Abort):
        print("gptnorm: interrupted", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has left (`gptnorm settings | head`).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)


def complain(message: str) -> int:
    print(f"gptnorm: {' '.join(message.split())}", file=sys.stderr)
    return EXIT_USER_ERROR


if __name__ == "__main__":
    main()
