"""One run from its beginning, or from a checkpoint, to its end: what is around the loop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from gptnorm.config import Config
from gptnorm.data import Shards
from gptnorm.environment import describe_environment
from gptnorm.errors import SharedError
from gptnorm.recipe import adjusted
from gptnorm.train.agree import on_first
from gptnorm.train.inputs import within_memory
from gptnorm.train.loop import Trainer
from gptnorm.train.parallel import World, close_world, open_world
from gptnorm.train.progress import Silent, Watcher
from gptnorm.train.result import Result
from gptnorm.train.resume import choose_checkpoint
from gptnorm.train.run_folder import RunFolder
from gptnorm.train.stop import StopWish

After = Callable[[Path, Result], None]


@contextlib.contextmanager
def _opened_world(config: Config) -> Iterator[World]:
    world = open_world(config)
    try:
        yield world
    except SharedError:
        close_world(world)
        raise
    except BaseException:
        # NCCL's groups wait for all processes before they close, and the others know nothing of this error.
        if world.device.type != "cuda":
            close_world(world)
        raise
    close_world(world)


def start_run(
    config: Config,
    shards: Shards,
    path: Path,
    watcher: Watcher | None = None,
    stop: StopWish | None = None,
    after: After | None = None,
) -> Result:
    """Trains a new run into `path`; everything that can be wrong with the input is found before it is made.

    Args:
        stop: looked at after every step; once it names a signal, a checkpoint is written and the run ends.
        after: what the first process does with the folder and the result while the others wait.
    """
    with _opened_world(config) as world, within_memory(config):
        trainer = Trainer(config, shards, world, watcher or Silent(), stop)
        # Each process may have found another free folder.
        folder = RunFolder(on_first(lambda: path, trainer.group), writes=world.main)
        on_first(lambda: folder.begin(config, describe_environment(trainer.device)), trainer.group)
        return _finished(trainer, folder, after)


def resume_run(
    path: Path,
    shards: Shards,
    watcher: Watcher | None = None,
    stop: StopWish | None = None,
    *,
    after: After | None = None,
    step: int | None = None,
    auto: bool = False,
    settings: Sequence[str] = (),
) -> Result:
    """Continues a run from its newest checkpoint.

    Args:
        settings: `key=value` arguments that hold for this part of the run; see `gptnorm.recipe.HOW`.
        after: as for `start_run`.
        step: of another checkpoint; the later ones are set aside. 0: the beginning, which needs none.
        auto: if the newest is damaged, take the newest that is not, and set the later ones aside.

    Raises:
        UserError: there is no checkpoint, or it is damaged, or another process is at work; nothing was changed.
    """
    config = adjusted(RunFolder.open(path).config(), settings)
    with _opened_world(config) as world, within_memory(config):
        trainer = Trainer(config, shards, world, watcher or Silent(), stop)
        folder = RunFolder.open(path, writes=world.main)
        on_first(folder.lock, trainer.group)
        try:
            if step != 0:
                trainer.restore(choose_checkpoint(folder.checkpoints, trainer.group, step=step, auto=auto))
            here = describe_environment(trainer.device)
            on_first(lambda: folder.rewind(trainer.step, here, settings), trainer.group)
        except OSError as error:
            folder.close()
            raise folder.unwritable(error) from None
        except BaseException:
            folder.close()
            raise
        return _finished(trainer, folder, after)


def _finished(trainer: Trainer, folder: RunFolder, after: After | None) -> Result:
    result = trainer.run(folder)
    if after is not None:
        # Nobody leaves before the first process has written its report: torchrun ends all once one has gone.
        on_first(lambda: after(folder.path, result), trainer.group)
    return result
