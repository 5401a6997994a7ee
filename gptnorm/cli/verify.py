"""`gptnorm verify`."""

from __future__ import annotations

from pathlib import Path

import click

from gptnorm.cli.output import say
from gptnorm.errors import UserError


@click.command()
@click.argument("folders", metavar="RUN|SHARDS...", nargs=-1, required=True, type=click.Path(path_type=Path))
def verify(folders: tuple[Path, ...]) -> None:
    """Compare checkpoints of runs, and shards of text, with the hashes in their manifests."""
    from gptnorm.data import Shards
    from gptnorm.train.checkpoint import checkpoints_in, verify_checkpoint
    from gptnorm.train.run_folder import RunFolder

    damage = []
    for folder in folders:
        try:
            if not any((folder / name).exists() for name in ("config.toml", "manifest.json", "train.bin", "val.bin")):
                raise UserError(f"{folder}: neither a run's folder nor one of shards")
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
