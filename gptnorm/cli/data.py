"""`gptnorm data …`."""

from __future__ import annotations

from pathlib import Path

import click

from gptnorm.cli.output import console


@click.group()
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
