"""Errors that a person can mend, told in one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

EXIT_USER_ERROR = 2
"""Exit code of bad input: nothing was written or lost."""

EXIT_DIVERGED = 3
"""Exit code of a run that met a non-finite loss or gradient."""


class UserError(Exception):
    """Bad input. The message is one line: the key, the value, what is allowed.

    The command line prints it without a traceback and exits with 2.
    """


class SharedError(UserError):
    """The same on every process of a run; the first one alone says it."""


def bad_value(key: str, value: object, allowed: str) -> UserError:
    """The error for `key = value` where only `allowed` would do."""
    return UserError(f"{key} = {value!r}: {allowed}")


@contextlib.contextmanager
def said_as(said: str, key: str) -> Iterator[None]:
    """Has an error of `key` name what the person wrote instead of it."""
    try:
        yield
    except UserError as error:
        message = str(error)
        if not message.startswith(key) or message[len(key) :][:1] not in (" ", ":"):
            raise
        raise type(error)(said + message[len(key) :]) from None
