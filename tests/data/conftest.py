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

KILLED = """if True:
    import os, random, shutil, signal, sys, threading, time
    from pathlib import Path
    from gptnorm.config import DataConfig
    from gptnorm.data import build, encoder
    from gptnorm.data.progress import Silent

    # Many commits, many batches: many places to be killed at.
    build.COMMIT_SECONDS, encoder.BATCH_BYTES = 0.0, 12_000
    sources, folder, settings, kills = sys.argv[1:]
    config = DataConfig(path=tuple(sources.split()), **eval(settings))
    if "hf:" in sources:
        import datasets, torch

    events, last, delay = 0, None, 0.0

    def die():
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGKILL)

    def counted(function):
        def wrapper(*arguments, **settings):
            global events
            events += 1
            if events == last:
                # Some time after: in the midst of whatever comes next.
                threading.Thread(target=die).start()
            return function(*arguments, **settings)
        return wrapper

    os.fsync, os.replace, build.Writer.write = map(counted, (os.fsync, os.replace, build.Writer.write))

    def run(folder, seed=None):
        global last, delay
        child = os.fork()
        if child:
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        try:
            if seed is not None:
                draw = random.Random(seed)
                last, delay = draw.randint(1, 30), draw.uniform(0, 0.01)
            build.build_shards(config, Path(folder), Silent(), workers=2)
            os._exit(0)
        except BaseException as error:
            print(type(error), error, flush=True)
            os._exit(1)

    # How far a build gets before it is killed hangs on the machine: kill on until enough were killed midway.
    midway, kill = 0, 0
    while kill < int(kills) or (midway < 3 and kill < 60):
        code = run(folder, kill)
        assert code in (0, -signal.SIGKILL)
        if code == 0:
            shutil.rmtree(folder)
            midway = 0
        journal = Path(folder, ".build", "journal.json")
        midway += journal.exists() and '"documents": 0' not in journal.read_text()
        kill += 1
    assert run(folder) == 0
    print(midway)
"""


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
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"},
        )
        started.append(process)
        return process

    yield popen
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def build_killed(start: Callable[..., subprocess.Popen[str]]) -> Callable[..., None]:
    """Build in processes that are killed at random points, one after the other, and at last in one that is not."""

    def build(sources: list[object], folder: Path, settings: str, kills: int = 10) -> None:
        process = start(KILLED, " ".join(map(str, sources)), folder, settings, kills)
        output, error = process.communicate(timeout=180)
        assert process.returncode == 0, output + error
        assert int(output) > 2, "too few kills met a half-built folder"

    return build
