from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gptnorm.config import DataConfig
from gptnorm.errors import UserError

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def configure(tmp_path: Path) -> Callable[..., DataConfig]:
    """DataConfig with a cache of the test's own."""

    def build(path: object, **settings: Any) -> DataConfig:
        path = tuple(map(str, path)) if isinstance(path, list | tuple) else str(path)
        return DataConfig(path=path, **{"cache": str(tmp_path / "cache"), **settings})

    return build


@pytest.fixture
def refused() -> Callable[..., None]:
    """Assert that a call raises a UserError of one line that holds all the given words."""

    def check(words: list[str], function: Callable[..., object], *arguments: object) -> None:
        with pytest.raises(UserError) as caught:
            function(*arguments)
        message = str(caught.value)
        assert "\n" not in message
        for word in words:
            assert word in message, message

    return check


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start Python on a script, with gptnorm importable; what still runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def popen(script: str, *arguments: object) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", script, *map(str, arguments)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )
        started.append(process)
        return process

    yield popen
    for process in started:
        process.kill()
        process.communicate()
