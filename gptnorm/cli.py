"""The command `gptnorm`.

Exit codes: 0 done, 2 bad input (one line on stderr says what), 3 the run diverged, 130, 143 and 129 stopped by
Ctrl-C, SIGTERM and SIGHUP (a training run writes a checkpoint first).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click
from rich.console import Console

import gptnorm
from gptnorm.errors import EXIT_DIVERGED, EXIT_USER_ERROR, SharedError, UserError, bad_value

if TYPE_CHECKING:
    from gptnorm.config import Config
    from gptnorm.study.run import Kind
    from gptnorm.train.loop import Result
    from gptnorm.train.stop import StopWish

EXIT_INTERRUPTED = 130

console = Console(quiet=os.environ.get("RANK", "0") != "0")

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


@app.command()
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
    from gptnorm.train.loop import resume_run
    from gptnorm.train.progress import make_watcher
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


@app.command()
@click.argument("folders", metavar="RUN|SHARDS...", nargs=-1, required=True, type=click.Path(path_type=Path))
def verify(folders: tuple[Path, ...]) -> None:
    """Compare checkpoints of runs, and shards of text, with the hashes in their manifests."""
    from gptnorm.data import Shards
    from gptnorm.train.checkpoint import checkpoints_in, verify_checkpoint
    from gptnorm.train.run_folder import RunFolder

    damage = []
    for folder in folders:
        try:
            if not (folder / "config.toml").is_file():
                names = Shards.open(folder).verify()
                say(f"{folder}: sound ({', '.join(names)})" if names else f"{folder}: has no manifest to compare with")
                continue
            checkpoints = checkpoints_in(RunFolder.open(folder).checkpoints)
        except UserError as error:
            damage.append(str(error))
            continue
        if not checkpoints:
            say(f"{folder}: has no checkpoint")
        for checkpoint in checkpoints:
            try:
                verify_checkpoint(checkpoint)
                say(f"{checkpoint}: sound")
            except UserError as error:
                damage.append(str(error))
    if damage:
        raise UserError("; ".join(damage))


@app.command()
@click.argument("source", metavar="RECIPE|RUN")
@SETTINGS
@click.option("--step", type=click.IntRange(min=0), help="Checkpoint of a run; default: the newest, 0: initialisation.")
@click.option("--tokens", type=click.Choice(["text", "random"]), default="text", help="First training batch, or noise.")
@click.option("--dtype", type=click.Choice(["fp32", "fp64"]), default="fp32", help="What is computed in.")
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write every number here.")
@click.option("--report", "page_path", type=click.Path(path_type=Path, dir_okay=False), help="Write a page with plots.")
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

    config, folder = find_config(source, settings)
    with within_memory(config), console.status("measuring …"):
        found = open_source(source, config, folder, step=step, random_tokens=tokens == "random", dtype=dtype)
        reading = probe(found.model, found.tokens)
    record = make_record(found, reading, dtype)
    for option, path, text in (
        ("--json", json_path, lambda: dump(record)),
        ("--report", page_path, lambda: probe_page(record)),
    ):
        if path is not None:
            write(option, path, text())
    print_probe(found, reading, dtype, console)


@app.command("eval")
@RUN
@SETTINGS
@click.option("--data", "texts", metavar="SOURCE", multiple=True, help="Text to score; several give a row each.")
@click.option("--step", type=click.IntRange(min=0), help="Checkpoint; default: the newest, 0: initialisation.")
@click.option("--documents", type=click.Choice(["separate", "stream"]), default="separate", help="What is context.")
@click.option("--window", type=click.IntRange(1, 2**31), help="Tokens read at once; default: train.seq_len.")
@click.option("--stride", type=click.IntRange(min=1), help="Tokens from window to window; default: half a window.")
@click.option("--tokens", metavar="COUNT", help="Score so many of each text at most, such as 250k or 10M.")
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write every number here.")
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

    if json_path is not None and not json_path.parent.is_dir():
        raise bad_value("--json", str(json_path), "cannot be written: no such folder")
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
    print_evaluation(found, console)
    if json_path is not None:
        write("--json", json_path, dump(found.record()))


@app.command()
@RECIPE
@SETTINGS
@click.option("--gpus", type=click.IntRange(1, 2**20), required=True, help="How many there are.")
@click.option("--memory", metavar="SIZE", required=True, help="Of one GPU, such as 80GiB.")
@click.option("--gpu", default="h100", help="Whose peak rate: a100, h100, h100-pcie, h200, b200, mi300x, …")
@click.option("--peak-tflops", type=float, help="Or that rate, dense bf16.")
@click.option("--mfu", type=float, default=0.4, help="Model FLOPs utilisation; 0.4.")
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write every number here.")
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


@app.command()
@SETTINGS
def quickstart(settings: tuple[str, ...]) -> None:
    """Compare three strategies over learning rates, in minutes on a laptop."""
    from gptnorm.study.grid import Grid
    from gptnorm.study.ledger import OtherStudy
    from gptnorm.study.run import run_study

    folder = Path("runs/quickstart")
    ask = partial(run_study, Grid(), "quickstart", settings, console=console, command=())
    try:
        ask(folder)
    except OtherStudy:
        ask(folder, fresh=True)
    tell(folder)


@app.group()
def study() -> None:
    """Compare strategies over learning rates, at one size or along a ladder of widths or depths."""


STUDY_DIR = click.option(
    "--dir", "folder", type=click.Path(path_type=Path), help="Study folder. A study that is there is added to."
)
FRESH = click.option("--fresh", is_flag=True, help="Begin again; an earlier study in the folder is moved aside.")
PART = click.option("--part", metavar="K/N", help="Only every Nth run, into a folder of its own; see 'study join'.")


@study.command()
@RECIPE
@SETTINGS
@STUDY_DIR
@FRESH
@PART
def grid(recipe: str, settings: tuple[str, ...], folder: Path | None, fresh: bool, part: str | None) -> None:
    """Every strategy at every learning rate with every seed, such as 'study/catalogue'.

    RECIPE has a [study] table.
    """
    from gptnorm.study.grid import Grid

    which, folder = share(part, folder or Path("runs/study-grid"))
    run_and_tell(Grid(part=which), recipe, settings, folder, fresh)


@study.command()
@RECIPE
@SETTINGS
@STUDY_DIR
@FRESH
@PART
def width(recipe: str, settings: tuple[str, ...], folder: Path | None, fresh: bool, part: str | None) -> None:
    """A ladder of widths (study.widths) under each width rule (study.rules), such as 'study/width'.

    RECIPE has a [study] table. Heads keep their width; the feed-forward's follows by the backbone's rule.
    """
    climb("width", recipe, settings, folder, fresh, part)


@study.command()
@RECIPE
@SETTINGS
@STUDY_DIR
@FRESH
@PART
def depth(recipe: str, settings: tuple[str, ...], folder: Path | None, fresh: bool, part: str | None) -> None:
    """A ladder of depths (study.depths), such as 'study/depth', with gradients and cosines block by block.

    RECIPE has a [study] table.
    """
    climb("depth", recipe, settings, folder, fresh, part)


@study.command()
@RECIPE
@SETTINGS
@click.option("--strategies", metavar="A,B,…", help="Which strategies; default: the recipe's.")
@click.option("--lrs", metavar="LOW:HIGH", help="Peak rates to begin with: two a decade between them, or a list A,B,….")
@click.option("--seeds", type=click.IntRange(min=0), help="How many seeds are reported; five tell something.")
@STUDY_DIR
@FRESH
@PART
def tolerance(
    recipe: str,
    settings: tuple[str, ...],
    strategies: str | None,
    lrs: str | None,
    seeds: int | None,
    folder: Path | None,
    fresh: bool,
    part: str | None,
) -> None:
    """How far each strategy's learning rate can be pushed, such as 'study/tolerance'.

    RECIPE has a [study] table. Rates are added where they matter: around each strategy's best, and at the edge where
    training fails. The best is picked on other seeds than those reported. study.tune and study.map set what is tuned
    beside the rate, and where strategies are compared; see docs/tolerance.md.
    """
    from gptnorm.recipe import load_recipe
    from gptnorm.study.asked import as_settings
    from gptnorm.study.tolerance import Tolerance

    asked = as_settings(load_recipe(recipe), settings, strategies=strategies, lrs=lrs, seeds=seeds)
    which, folder = share(part, folder or Path("runs/study-tolerance"))
    run_and_tell(Tolerance(part=which), recipe, asked, folder, fresh)


@study.command()
@click.argument("folder", metavar="STUDY", type=click.Path(path_type=Path))
@click.option("--markdown", is_flag=True, help="Print the tables as Markdown, and write nothing.")
def show(folder: Path, markdown: bool) -> None:
    """Print the tables of the study in folder STUDY, complete or not, and write its report."""
    from gptnorm.report import markdown_study

    if markdown:
        click.echo(markdown_study(folder), nl=False)
    else:
        tell(folder)


@study.command()
@click.argument("parts", metavar="STUDY...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--dir", "folder", type=click.Path(path_type=Path), required=True, help="Folder of the whole study.")
def join(parts: tuple[Path, ...], folder: Path) -> None:
    """Put studies together that were made in several folders, such as the parts of a job array.

    Their runs must be comparable: the same recipe, settings and text.
    """
    from gptnorm.report.format import plural
    from gptnorm.study.join import join_studies

    added = join_studies(parts, folder)
    tell(folder)
    say(f"{plural(added, 'run')} added")


def climb(
    axis: Literal["depth", "width"],
    recipe: str,
    settings: tuple[str, ...],
    folder: Path | None,
    fresh: bool,
    part: str | None,
) -> None:
    """Runs a ladder."""
    from gptnorm.study.grid import Grid

    which, folder = share(part, folder or Path("runs") / f"study-{axis}")
    run_and_tell(Grid(axis, which), recipe, settings, folder, fresh)


def share(part: str | None, folder: Path) -> tuple[tuple[int, int], Path]:
    """Which part of a study is to be run, and its folder."""
    from gptnorm.study.join import parse_part, part_folder

    if part is None:
        return (1, 1), folder
    which = parse_part(part)
    return which, part_folder(folder, which)


def run_and_tell(kind: Kind, recipe: str, settings: tuple[str, ...], folder: Path, fresh: bool) -> None:
    """Runs a study, prints its tables and writes its report."""
    from gptnorm.study.run import run_study

    tell(run_study(kind, recipe, settings, folder, console, fresh=fresh))


def tell(folder: Path) -> None:
    """Prints a study's tables and writes its report."""
    from gptnorm.report import rich_study
    from gptnorm.report.html import write_study_report

    report = write_study_report(folder)
    console.print(rich_study(folder))
    say(f"report: {report}")


@app.group()
def data() -> None:
    """Turn text into token shards."""


@data.command()
@click.argument("arguments", metavar="SOURCE... [KEY=VALUE]...", nargs=-1)
@click.option("--dir", "folder", type=click.Path(path_type=Path), required=True, help="Folder of the shards.")
@click.option("--tokens", metavar="COUNT", help="Stop after so many tokens, such as 10B or 250M.")
@click.option("--documents", metavar="COUNT", help="Stop after so many documents.")
@click.option("--deduplicate", is_flag=True, help="Leave repeated training texts out, too (100 bytes of memory each).")
@click.option("--workers", type=click.IntRange(1, 1024), help="Processes that tokenise; default: one for each core.")
def build(
    arguments: tuple[str, ...],
    folder: Path,
    tokens: str | None,
    documents: str | None,
    deduplicate: bool,
    workers: int | None,
) -> None:
    """Build shards from text, for 'gptnorm train RECIPE data.path=FOLDER'.

    SOURCE is a file or a folder (.txt, .md, .py, .jsonl, .jsonl.gz, .parquet), a dataset of the Hugging Face Hub that
    is streamed (c4, openwebtext, slimpajama, fineweb, fineweb-10BT, or hf:OWNER/NAME:CONFIG:SPLIT), 'sotu' or 'stdlib'.
    KEY=VALUE sets one thing of data, such as data.tokenizer=bpe ('gptnorm settings' lists the keys).

    A build that was cut off goes on where it was when the same command is given again.
    """
    from gptnorm.data.command import run_build

    run_build(
        arguments,
        folder,
        tokens=tokens,
        documents=documents,
        workers=workers,
        deduplicate=deduplicate,
        console=console,
    )


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


def write(option: str, path: Path, text: str) -> None:
    """A file that an option names; UserError if it cannot be written."""
    from gptnorm.files import write_atomic

    try:
        write_atomic(path, text)
    except OSError as error:
        raise bad_value(option, str(path), f"cannot be written: {error.strerror}") from None


def say(line: str) -> None:
    """A plain line, never wrapped or coloured."""
    console.print(line, soft_wrap=True, highlight=False, markup=False)


def warn(config: Config) -> None:
    """Says before a run what will make it slow."""
    from gptnorm.model.moe import slow_experts

    line = slow_experts(config)
    if line:
        say(f"warning: {line}")


def finish(path: Path, result: Result) -> None:
    """Writes the run's report and says how it ended."""
    from gptnorm.report.format import plural
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
        say(f"{result.parameters:,} parameters, {result.step} steps, {result.seconds:.1f} s")
        say(f"validation loss {result.val_loss:.4f}")


def leave(result: Result, stop: StopWish) -> None:
    """Exits with the code of the module's list, unless the run finished."""
    if result.status == "interrupted":
        raise click.exceptions.Exit(128 + (stop.signal or signal.SIGTERM))
    if result.status == "diverged":
        raise click.exceptions.Exit(EXIT_DIVERGED)


def is_first() -> bool:
    """Whether this process speaks to the person: the only one, or the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def main() -> None:
    """Runs the command; every error that a person can mend is one line and exit code 2."""
    threading.excepthook = thread_failed
    try:
        code = app(prog_name="gptnorm", standalone_mode=False)
    except SharedError as error:
        code = complain(str(error)) if is_first() else EXIT_USER_ERROR
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


def thread_failed(failure: threading.ExceptHookArgs) -> None:
    """Says nothing of a full disk in TensorBoard's own thread: the run meets it too, and says it in one line."""
    if not issubclass(failure.exc_type, OSError):
        threading.__excepthook__(failure)


def complain(message: str) -> int:
    # Of several processes any may be the one that fails, and torchrun ends the others.
    who = "gptnorm" if is_first() else f"gptnorm (process {os.environ['RANK']})"
    print(f"{who}: {' '.join(message.split())}", file=sys.stderr)
    return EXIT_USER_ERROR


if __name__ == "__main__":
    main()
