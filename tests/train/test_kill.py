"""A process that is killed for real, again and again, or asked to stop."""

from __future__ import annotations

import json
import random
import signal
import time

import pytest
from processes import ended, numbers, run, start, status, stop_beyond
from saving import weights_of

SETTINGS = ("train.steps=400", "checkpoint.every=20", "train.eval_every=50")


@pytest.fixture(scope="module")
def straight(recipe, tmp_path_factory):
    """The same run, undisturbed."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    done = run("train", recipe, f"run.dir={folder}", *SETTINGS)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == f"validation loss {numbers(folder)[-1][2]:.4f}"
    return folder


def same(cut, straight):
    name = "checkpoints/step-000400"
    return numbers(cut) == numbers(straight) and weights_of(cut / name) == weights_of(straight / name)


def test_kill_9_twice_then_resume_is_bit_identical(recipe, straight, tmp_path):
    cut = tmp_path / "cut"
    for at, arguments in ((45, ("train", recipe, f"run.dir={cut}", *SETTINGS)), (130, ("resume", cut))):
        assert stop_beyond(cut, at, arguments).returncode == -signal.SIGKILL
        for path in (cut / "checkpoints").glob("step-*"):
            assert (path / "manifest.json").is_file(), "half a checkpoint"
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"step": 14')
    done = run("resume", cut)
    assert (done.returncode, done.stderr) == (0, "")
    assert same(cut, straight)


@pytest.mark.parametrize("asynchronous", ["true", pytest.param("false", marks=pytest.mark.slow)])
def test_kill_9_while_saving(recipe, straight, tmp_path, asynchronous):
    """With a checkpoint at each step the process is nearly always in one, or removing an old one."""
    cut = tmp_path / "cut"
    settings = (*SETTINGS, "checkpoint.every=1", f"checkpoint.asynchronous={asynchronous}")
    dice = random.Random(1)
    arguments = ("train", recipe, f"run.dir={cut}", *settings)
    for step in (3, 20, 60):
        process = start(*arguments)
        while process.poll() is None and not (cut / f"checkpoints/step-{step:06d}").exists():
            time.sleep(0.001)
        time.sleep(dice.uniform(0, 0.05))
        process.kill()
        assert ended(process).returncode == -signal.SIGKILL
        arguments = ("resume", cut)
    done = run(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert same(cut, straight)
    left = {path.name for path in (cut / "checkpoints").iterdir()}
    assert left == {"step-000399", "step-000400"}, "what a kill left half-written is swept away"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_asked_to_stop_it_writes_a_checkpoint_first(recipe, straight, tmp_path, number, code):
    cut = tmp_path / "cut"
    arguments = ("train", recipe, f"run.dir={cut}", *SETTINGS, "checkpoint.every=0")
    stopped = stop_beyond(cut, 30, arguments, number)
    at = status(cut)["step"]
    assert (stopped.returncode, stopped.stderr.strip()) == (code, "")
    word = f"stopped by {signal.Signals(number).name} at step {at}; continue with: gptnorm resume {cut}"
    assert stopped.stdout.splitlines()[-1] == word
    assert status(cut)["status"] == "interrupted"
    assert [path.name for path in (cut / "checkpoints").iterdir()] == [f"step-{at:06d}"]
    assert run("resume", cut).returncode == 0
    assert same(cut, straight)


def test_the_end_says_it_is_finished_after_all(recipe, straight, tmp_path):
    """A second run in the folder of a finished one only repeats its result."""
    before = numbers(straight)
    done = run("resume", straight)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == f"validation loss {before[-1][2]:.4f}"
    assert numbers(straight) == before
    assert json.loads((straight / "status.json").read_text())["status"] == "finished"
