"""Which checkpoint a run goes on from."""

from __future__ import annotations

from pathlib import Path

from gptnorm.errors import SharedError, UserError
from gptnorm.train.agree import Group, on_first
from gptnorm.train.checkpoint import checkpoint_at, checkpoints_in, sweep_partial, verify_checkpoint


def choose_checkpoint(folder: Path, group: Group | None = None, *, step: int | None = None, auto: bool = False) -> Path:
    """The newest checkpoint, or another one on demand, its files verified. Every process calls it.

    Args:
        folder: with all checkpoints of a run; what a kill left half-written there is removed.
        step: of the one that is wanted.
        auto: take the newest that is not damaged.

    Raises:
        SharedError: there is none, or it is damaged.
    """

    def candidates() -> list[Path]:
        sweep_partial(folder)
        if step is not None:
            return [checkpoint_at(folder, step)]
        return checkpoints_in(folder)[::-1][: None if auto else 1]

    damage = []
    for path in on_first(candidates, group):
        try:
            verify_checkpoint(path, group)
        except UserError as error:
            damage.append(str(error))
        else:
            return path
    if not damage:
        raise SharedError(f"{folder}: no checkpoint to resume from; --step 0 begins the run again")
    other = "" if auto else "; --auto takes the newest sound checkpoint, --step N another"
    raise SharedError("; ".join(damage) + other)
