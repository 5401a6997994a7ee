"""What the processes of a run tell each other outside the training: small things, over CPU tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from gptnorm.errors import SharedError, UserError

T = TypeVar("T")

Group = dist.ProcessGroup
"""All processes of a run; None stands for a single one."""


def cpu_group() -> Group | None:
    """A new group of all processes for CPU tensors; None: there is one process. Every process has to call it."""
    if not dist.is_initialized():
        return None
    group = dist.new_group(backend="gloo")
    assert isinstance(group, Group)
    return group


def rank_in(group: Group | None) -> int:
    """This process's number among those of the group; 0 where there is none."""
    return 0 if group is None else dist.get_rank(group)


def size_of(group: Group | None) -> int:
    """How many processes the group has; 1 where there is none."""
    return 1 if group is None else dist.get_world_size(group)


def largest(number: int, group: Group | None) -> int:
    """The largest of all processes' numbers."""
    if group is None:
        return number
    word = torch.tensor(number)
    dist.all_reduce(word, dist.ReduceOp.MAX, group)
    return int(word)


def merged(words: dict[str, str], group: Group | None) -> dict[str, str]:
    """All processes' words together."""
    return {key: value for part in _of_all(words, group) for key, value in part.items()}


def gathered(words: dict[str, str], group: Group | None) -> dict[str, list[str]]:
    """Every process's word for each key, in the order of their ranks; all have the same keys."""
    parts = _of_all(words, group)
    return {key: [part[key] for part in parts] for key in words}


def _of_all(words: dict[str, str], group: Group | None) -> list[dict[str, str]]:
    if group is None:
        return [words]
    found: list[dict[str, str]] = [{} for _ in range(size_of(group))]
    dist.all_gather_object(found, words, group=group)
    return found


@contextlib.contextmanager
def together(group: Group | None) -> Iterator[None]:
    """What keeps one process from going on keeps all: a UserError of any within becomes one SharedError.

    No process may wait for another within.
    """
    own: UserError | None = None
    try:
        yield
    except UserError as error:
        own = error
    words = gathered({"": "" if own is None else str(own)}, group)[""]
    if group is None and own is not None:
        raise own
    if any(words):
        rank = next(rank for rank, word in enumerate(words) if word)
        where = "" if len(set(words)) == 1 else f" (process {rank})"
        raise SharedError(words[rank] + where) from None


def is_loss_of_another(error: BaseException) -> bool:
    """Whether the error is what a process sees of another one that has died: gloo's has no type of its own."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def on_first(action: Callable[[], T], group: Group | None) -> T:
    """The first process acts, and all get what came of it: the value, or a SharedError.

    A process by itself (`group` None) has the action's own errors.
    """
    if group is None:
        return action()
    word: list[Any] = [None, None]
    if rank_in(group) == 0:
        try:
            word = [action(), None]
        except UserError as error:
            word = [None, str(error)]
        except OSError as error:
            word = [None, f"{error.filename or 'the run folder'}: cannot be written ({error.strerror or error})"]
    dist.broadcast_object_list(word, group_src=0, group=group)
    if word[1] is not None:
        raise SharedError(word[1])
    return word[0]
