"""What can go wrong with one of several processes, done to real ones."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess

import pytest
from processes import (
    PATIENCE,
    kill_all,
    launch,
    metrics,
    numbers,
    run,
    start_many,
    status,
    told,
    told_once,
    wait_for_step,
    workers,
)
from safetensors.torch import load_file
from saving import weights_of

SETTINGS = (
    *("train.steps=20", "train.eval_every=10", "checkpoint.every=5", "checkpoint.keep=4"),
    *("model.n_layers=2", "model.dropout=0.1"),
)
LONG = (*SETTINGS, "train.steps=300")


@pytest.fixture(scope="module")
def straight(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight") / "run"
    assert launch(2, "train", recipe, f"run.dir={folder}", *SETTINGS).returncode == 0
    return folder


@pytest.fixture
def copy(straight, tmp_path):
    """A finished run's folder with its checkpoints of steps 5, 10, 15 and 20."""
    folder = tmp_path / "copy"
    shutil.copytree(straight, folder)
    return folder


@pytest.fixture(scope="module")
def long(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("long") / "run"
    assert launch(2, "train", recipe, f"run.dir={folder}", *LONG).returncode == 0
    return folder


def same(folder, other, step):
    name = f"checkpoints/step-{step:06d}"
    return numbers(folder) == numbers(other) and weights_of(folder / name) == weights_of(other / name)


def test_a_damaged_file_of_the_second_process(copy, straight):
    damaged = copy / "checkpoints/step-000020/shard-00002-model-00001-of-00002.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 8
    damaged.write_bytes(content)
    line = told_once(launch(2, "resume", copy))
    assert f"{damaged}: damaged" in line
    assert "--auto" in line
    assert numbers(copy) == numbers(straight), "a refused resume changes nothing"
    done = launch(2, "resume", copy, "--auto")
    assert done.returncode == 0, done.stderr
    assert (copy / "checkpoints/aside-step-000020").is_dir(), "it went on from step 15"
    assert same(copy, straight, 20)


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["cut", "remove"])
def test_a_file_of_the_second_process_cut_or_gone(copy, harm):
    damaged = copy / "checkpoints/step-000020/shard-00002-model-00002-of-00002.safetensors"
    content = damaged.read_bytes()
    damaged.unlink()
    if harm == "cut":
        damaged.write_bytes(content[:100])
    assert str(damaged) in told_once(launch(2, "resume", copy))


@pytest.mark.slow
def test_a_second_run_in_the_folder(recipe, tmp_path):
    """Be it of one process or of two."""
    folder = tmp_path / "run"
    first = start_many(2, "train", recipe, f"run.dir={folder}", *SETTINGS, "train.steps=100000")
    try:
        wait_for_step(folder, 10, first)
        at_work = f"{folder}: another run is at work there (process {workers(first)[0]})"
        assert at_work in told_once(launch(2, "resume", folder))
        assert at_work in told_once(run("resume", folder))
        assert str(folder) in told_once(launch(2, "train", recipe, f"run.dir={folder}", *SETTINGS))
        assert first.poll() is None, "the first run goes on"
        step = metrics(folder)[-1]["step"]
        wait_for_step(folder, step + 10, first)
    finally:
        kill_all(first)


@pytest.mark.slow
def test_spikes_are_left_out_by_both(recipe, tmp_path):
    """The same updates as on one process; had one of the two kept another, losses would part."""
    settings = (*SETTINGS, "model.dropout=0", "train.steps=40", "guard.sigmas=1.5", "guard.window=16")
    one, two = tmp_path / "one", tmp_path / "two"
    assert run("train", recipe, f"run.dir={one}", *settings).returncode == 0
    done = launch(2, "train", recipe, f"run.dir={two}", *settings)
    assert done.returncode == 0, done.stderr
    skipped, expected = ([line.get("skipped") for line in metrics(folder)] for folder in (two, one))
    assert skipped == expected
    assert status(two)["skipped"] == status(one)["skipped"] > 0
    for a, b in zip(metrics(two), metrics(one), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


@pytest.mark.slow
def test_a_loss_that_is_no_longer_finite(recipe, tmp_path):
    """Both end at the same step, with no checkpoint of what came after; that is no error, so no line on stderr."""
    folder = tmp_path / "run"
    settings = (*SETTINGS, "train.steps=60", "optim.lr=30", "optim.clip=0", "checkpoint.every=2")
    done = launch(2, "train", recipe, f"run.dir={folder}", *settings)
    assert done.returncode != 0
    assert "gptnorm:" not in done.stderr
    assert "gptnorm/cli/" not in done.stderr, done.stderr
    at = status(folder)["step"]
    assert status(folder)["status"] == "diverged"
    assert 2 < at < 60
    said = f"diverged at step {at}: the loss or norm of the gradient was non-finite first; nothing was updated with it"
    assert done.stdout.splitlines()[-1] == said
    assert [line["step"] for line in metrics(folder) if line["split"] == "train"] == list(range(1, at + 1))
    newest = max((folder / "checkpoints").iterdir())
    assert newest.name == f"step-{at - at % 2:06d}"
    tensors = [tensor for path in newest.glob("*.safetensors") for tensor in load_file(path).values()]
    assert all(tensor.isfinite().all() for tensor in tensors)


@pytest.mark.slow
@pytest.mark.parametrize("who", ["all", "first", "second"])
def test_kill_9_and_resume_is_bit_identical(recipe, long, tmp_path, who):
    """One process killed ends the whole job. Dropout is on: its masks follow from step and process."""
    folder = tmp_path / "run"
    job = start_many(2, "train", recipe, f"run.dir={folder}", *LONG)
    wait_for_step(folder, 28, job)
    if who == "all":
        kill_all(job)
        assert status(folder)["status"] == "running"
    else:
        os.kill(workers(job)[who == "second"], signal.SIGKILL)
        out, err = job.communicate(timeout=PATIENCE)
        for line in told(subprocess.CompletedProcess(job.args, job.returncode, out, err)):
            assert f"{folder}: another process of the run has gone" in line
    assert metrics(folder)[-1]["step"] < 300
    assert run("verify", folder).returncode == 0, "half a checkpoint"
    done = launch(2, "resume", folder)
    assert done.returncode == 0, done.stderr
    assert same(folder, long, 300)


# Which process, the newest checkpoint that there is, and whether the next one is written while the run goes on.
NO_ROOM = {
    "second": (1, 5, "true"),
    "first": (0, 5, "true"),
    "at the end": (1, 15, "true"),
    "synchronous": (1, 5, "false"),
}


@pytest.mark.parametrize(
    "name", ["second", *(pytest.param(name, marks=pytest.mark.slow) for name in list(NO_ROOM)[1:])]
)
def test_no_room_for_the_part_of_one_process(copy, straight, tmp_path, name):
    """A limit on the size of its files, set where Python starts, stands for its full disk."""
    rank, newest, asynchronous = NO_ROOM[name]
    for step in range(newest + 5, 25, 5):
        shutil.rmtree(copy / f"checkpoints/step-{step:06d}")
    config = copy / "config.toml"
    config.write_text(config.read_text().replace("asynchronous = true", f"asynchronous = {asynchronous}"))
    assert f"asynchronous = {asynchronous}" in config.read_text()
    (tmp_path / "sitecustomize.py").write_text(
        "import os, resource\n"
        f"if os.environ.get('RANK') == '{rank}':\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, 16_000))\n"
    )
    line = told_once(launch(2, "resume", copy, PYTHONPATH=f"{tmp_path}{os.pathsep}{os.getcwd()}"))
    assert f"{copy}/checkpoints: cannot be written (File too large)" in line
    kept = {path.name for path in (copy / "checkpoints").iterdir()}
    assert kept == {f"step-{step:06d}" for step in range(5, newest + 5, 5)}
    assert status(copy)["status"] == "interrupted"
    done = launch(2, "resume", copy)
    assert done.returncode == 0, done.stderr
    assert same(copy, straight, 20)
