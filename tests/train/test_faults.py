"""What disks, people and machines do to a run, done to a real process."""

from __future__ import annotations

import json
import math
import os
import pickle
import resource
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from processes import ended, environment, metrics, numbers, run, start, status, wait_for_step
from safetensors.torch import load_file
from saving import weights_of

from gptnorm.errors import UserError
from gptnorm.files import sha256_file
from gptnorm.train.run_folder import RunFolder

SLOW_HARM = ["flip", *(pytest.param(harm, marks=pytest.mark.slow) for harm in ("cut", "remove"))]

SETTINGS = ("train.steps=60", "checkpoint.every=10", "checkpoint.keep=3", "train.eval_every=20")


@pytest.fixture(scope="module")
def straight(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight") / "run"
    assert run("train", recipe, f"run.dir={folder}", *SETTINGS).returncode == 0
    return folder


@pytest.fixture
def copy(straight, tmp_path):
    """A finished run's folder whose last steps are to be made again; it has the checkpoints 40 and 50."""
    folder = tmp_path / "copy"
    shutil.copytree(straight, folder)
    shutil.rmtree(folder / "checkpoints/step-000060")
    return folder


def refused(done, *words):
    """Exit code 2 and one line."""
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    for word in words:
        assert word in done.stderr
    return True


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB: room for one checkpoint of 130 KB and for half of the next."""
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a file system here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_full_disk(recipe, straight, small_disk, tmp_path):
    """One line; the checkpoint before is whole, and with room the run goes on to the same end."""
    folder = small_disk / "run"
    done = run("train", recipe, f"run.dir={folder}", *SETTINGS, "watch.every=0")
    assert refused(done, str(folder), "No space left on device")
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000010"]
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    assert run("resume", moved).returncode == 0
    assert numbers(moved) == numbers(straight)


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_limit_on_file_size_is_one_line(recipe, tmp_path, asynchronous):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, 16_000))

    folder = tmp_path / "run"
    settings = (*SETTINGS, f"checkpoint.asynchronous={asynchronous}")
    done = run("train", recipe, f"run.dir={folder}", *settings, preexec_fn=limit)
    assert refused(done, str(folder), "File too large")
    assert not list((folder / "checkpoints").iterdir())
    assert status(folder)["status"] == "interrupted"


@pytest.mark.parametrize("harm", SLOW_HARM)
def test_a_damaged_checkpoint(copy, straight, harm):
    """With --auto the run goes on from the checkpoint before, and makes what was lost again."""
    newest = copy / "checkpoints/step-000050"
    damaged = next(newest.glob("*00002.safetensors"))
    content = bytearray(damaged.read_bytes())
    if harm == "cut":
        damaged.write_bytes(content[:100])
    elif harm == "flip":
        content[-5] ^= 8
        damaged.write_bytes(content)
    else:
        damaged.unlink()
    before = numbers(copy)
    assert refused(run("resume", copy), damaged.name, "--auto")
    assert numbers(copy) == before, "a refused resume changes nothing"
    done = run("resume", copy, "--auto")
    assert (done.returncode, done.stderr) == (0, "")
    assert (copy / "checkpoints/aside-step-000050").is_dir(), "it went on from step 40"
    assert numbers(copy) == numbers(straight)
    for step in (50, 60):
        name = f"checkpoints/step-{step:06d}"
        assert weights_of(copy / name) == weights_of(straight / name)


def test_an_earlier_checkpoint_on_demand(copy, straight):
    assert {path.name for path in (copy / "checkpoints").iterdir()} == {"step-000040", "step-000050"}
    assert refused(run("resume", copy, "--step", "30"), "--step", "40, 50")
    assert run("resume", copy, "--step", "40").returncode == 0
    assert numbers(copy) == numbers(straight)


@pytest.mark.parametrize("harm", SLOW_HARM)
def test_damaged_shards(recipe, straight, tmp_path, harm):
    """The text is not what the run was trained on: no resume, no new run, and the file is named."""
    cache = tmp_path / "cache"
    folder = tmp_path / "run"
    where = environment(GPTNORM_CACHE=str(cache))
    assert run("train", recipe, f"run.dir={folder}", *SETTINGS, env=where).returncode == 0
    shutil.rmtree(folder / "checkpoints/step-000060")
    (shards,) = (path.parent for path in cache.glob("*/train.bin"))
    content = bytearray((shards / "train.bin").read_bytes())
    content[len(content) // 2] ^= 1
    if harm == "cut":
        (shards / "train.bin").write_bytes(content[:-2])
    elif harm == "flip":
        (shards / "train.bin").write_bytes(content)
    else:
        (shards / "train.bin").unlink()
    assert refused(run("resume", folder, env=where), "train.bin")
    assert refused(run("train", recipe, f"run.dir={tmp_path / 'new'}", *SETTINGS, env=where), "train.bin")
    assert not (tmp_path / "new").exists()


def test_two_runs_in_one_folder(recipe, tmp_path):
    folder = tmp_path / "run"
    first = start("train", recipe, f"run.dir={folder}", "train.steps=100000", "checkpoint.every=10")
    wait_for_step(folder, 20, first)
    assert refused(run("resume", folder), str(folder), f"process {first.pid}")
    assert refused(run("train", recipe, f"run.dir={folder}"), str(folder))
    assert first.poll() is None, "the first run goes on"
    first.kill()
    ended(first)
    # The lock went with the process, however it ended.
    second = start("resume", folder)
    wait_for_step(folder, 60, second)
    assert second.poll() is None
    second.kill()
    ended(second)


def test_a_strangers_links_are_not_followed(copy, tmp_path):
    """Resuming must not append to, replace or remove what a link in the folder leads to."""
    mine = tmp_path / "mine"
    mine.write_text("precious")
    for name in ("metrics.jsonl", "watch.jsonl", "status.json", "environment.json", "lock"):
        path = copy / name
        before = path.read_bytes() if path.exists() else b""
        path.unlink(missing_ok=True)
        path.symlink_to(mine)
        with pytest.raises(UserError, match=rf"{name}: a symbolic link"):
            RunFolder.open(copy)
        path.unlink()
        path.write_bytes(before)
    for name in ("checkpoints/step-000060", "checkpoints/.step-000060.partial", "checkpoints/aside-step-000060"):
        (tmp_path / "victim").mkdir(exist_ok=True)
        (copy / name).symlink_to(tmp_path / "victim")
        with pytest.raises(UserError, match=r"step-000060.*: a symbolic link"):
            RunFolder.open(copy)
        (copy / name).unlink()
    checkpoints = copy / "checkpoints"
    checkpoints.rename(tmp_path / "elsewhere")
    checkpoints.symlink_to(tmp_path / "elsewhere")
    assert refused(run("resume", copy), "checkpoints: a symbolic link")
    assert mine.read_text() == "precious"


@pytest.mark.parametrize(
    "where",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "TZ": "Pacific/Kiritimati"},
        pytest.param({"LC_ALL": "tr_TR.UTF-8", "LANG": "tr_TR.UTF-8"}, marks=pytest.mark.slow),
    ],
    ids=["C", "tr_TR"],
)
def test_another_locale_and_time_zone(copy, straight, where):
    done = run("resume", copy, env=environment(**where))
    assert (done.returncode, done.stderr) == (0, "")
    assert numbers(copy) == numbers(straight)


def test_a_clock_that_goes_backwards(copy, straight, tmp_path):
    """sitecustomize turns the wall clock: each look at it is a day before the last."""
    (tmp_path / "sitecustomize.py").write_text(
        "import time\nnow = [time.time()]\ndef back():\n    now[0] -= 86400\n    return now[0]\ntime.time = back\n"
    )
    done = run("resume", copy, env=environment(PYTHONPATH=f"{tmp_path}{os.pathsep}{os.getcwd()}"))
    assert (done.returncode, done.stderr) == (0, "")
    assert numbers(copy) == numbers(straight)


def test_verify_names_what_is_damaged(copy, tmp_path):
    done = run("verify", copy)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.rpartition(" ")[2] for line in done.stdout.splitlines()] == ["sound", "sound"]
    damaged = copy / "checkpoints/step-000040/state.json"
    with damaged.open("a") as file:
        file.write(" ")
    done = run("verify", copy)
    assert refused(done, str(damaged))
    assert done.stdout.strip() == f"{copy / 'checkpoints/step-000050'}: sound"
    assert refused(run("verify", tmp_path), "neither a run's folder nor one of shards")


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again_on_demand(recipe, straight, tmp_path):
    folder = tmp_path / "run"
    process = start("train", recipe, f"run.dir={folder}", *SETTINGS, "checkpoint.every=0", "train.steps=60")
    wait_for_step(folder, 5, process)
    process.kill()
    ended(process)
    if status(folder)["status"] == "running":
        assert refused(run("resume", folder), "no checkpoint", "--step 0")
        assert run("resume", folder, "--step", "0").returncode == 0
    assert numbers(folder) == numbers(straight)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.jsonl", "5\n"),
        ("metrics.jsonl", '{"a": 1}\n'),
        ("environment.json", "[]"),
        ("environment.json", "{"),
        ("environment.json", '{"resumed": [3]}'),
    ],
)
def test_a_file_that_no_run_writes_is_one_line(copy, name, content):
    (copy / name).write_text(content)
    with pytest.raises(UserError, match=name):
        RunFolder.open(copy).rewind(50, {"torch": "9"})


def test_no_room_for_a_line_is_one_line(recipe, straight, tmp_path):
    """Not the checkpoint but metrics.jsonl is what no longer fits."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))

    folder = tmp_path / "run"
    done = run("train", recipe, f"run.dir={folder}", *SETTINGS, "checkpoint.every=0", preexec_fn=limit)
    assert refused(done, str(folder), "File too large")


def test_a_loss_that_is_no_longer_finite(recipe, tmp_path):
    """A rate of 30 makes weight decay multiply the weights: exit code 3, and nothing of it in a checkpoint."""
    folder = tmp_path / "run"
    settings = (*SETTINGS, "optim.lr=30", "optim.clip=0", "checkpoint.every=2", "checkpoint.keep=9")
    done = run("train", recipe, f"run.dir={folder}", *settings)
    assert (done.returncode, done.stderr) == (3, "")
    found = status(folder)
    at = found["step"]
    assert found["status"] == "diverged"
    assert 2 < at < 60
    said = f"diverged at step {at}: the {found['reason']} was non-finite first; nothing was updated with it"
    assert done.stdout.splitlines()[-1] == said
    assert [line["step"] for line in metrics(folder)] == list(range(1, at + 1))
    assert all(math.isfinite(number) for line in metrics(folder) for number in (line["loss"], line["grad_norm"]))
    kept = sorted((folder / "checkpoints").iterdir())
    assert [path.name for path in kept] == [f"step-{step:06d}" for step in range(2, at + 1, 2)]
    tensors = [tensor for path in kept[-1].glob("*.safetensors") for tensor in load_file(path).values()]
    assert all(tensor.isfinite().all() for tensor in tensors)
    before = numbers(folder)
    again = run("resume", folder)
    assert (again.returncode, again.stderr, again.stdout.splitlines()[-1]) == (3, "", said)
    assert numbers(folder) == before


def test_spikes_are_left_out_and_counted(recipe, tmp_path):
    """The rule in plain numpy, over what the run wrote; where it leaves an update out no weight or moment moves."""
    folder = tmp_path / "run"
    settings = ("train.steps=40", "guard.sigmas=1.5", "guard.window=16", "checkpoint.every=1", "checkpoint.keep=40")
    done = run("train", recipe, f"run.dir={folder}", *settings)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line for line in metrics(folder) if line["split"] == "train"]
    pairs = np.array([(line["loss"], line["grad_norm"]) for line in lines])
    before = {step: pairs[step - 16 : step] for step in range(16, 40)}
    limits = {step: last.mean(0) + 1.5 * last.std(0, ddof=1) for step, last in before.items()}
    left_out = [step in limits and bool((pairs[step] > limits[step]).any()) for step in range(40)]
    assert 0 < sum(left_out) < 20
    assert [line["skipped"] for line in lines] == np.cumsum(left_out).tolist()
    assert status(folder)["skipped"] == sum(left_out)
    assert f"{sum(left_out)} updates left out as spikes" in done.stdout.splitlines()

    def moved(step):
        before, after = (weights_of(folder / f"checkpoints/step-{number:06d}") for number in (step, step + 1))
        return any(before[name] != after[name] for name in before if "guard/" not in name)

    assert [not moved(step) for step in range(1, 40)] == left_out[1:]


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, at: Path) -> None:
        self.at = at

    def __reduce__(self):
        return os.mkdir, (str(self.at),)


def pickled(checkpoint, outside):
    """Both in the place of the tensors, under a true manifest, and where torch's own format has its pickle."""
    pickle.loads(pickle.dumps(Bomb(outside / "proof")))
    assert (outside / "proof").is_dir(), "it does go off"
    (outside / "proof").rmdir()
    shard = next(checkpoint.glob("*00001-of-00002.safetensors"))
    shard.write_bytes(pickle.dumps(Bomb(outside / "ran")))
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Bomb(outside / "ran")))
    listed(checkpoint, {shard.name: sha256_file(shard)})


def listed(checkpoint, names):
    manifest = checkpoint / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | names))


def linked(path, outside):
    target = outside / path.name
    path.rename(target)
    path.symlink_to(target)


NO_FILE = "precious', which is no file of a checkpoint"
STRANGE = {
    "pickle": (pickled, "step-000050"),
    "manifest leads out": (lambda c, o: listed(c, {f"../../../{o.name}/precious": "0" * 64}), NO_FILE),
    "manifest has a root": (lambda c, o: listed(c, {str(o / "precious"): "0" * 64}), NO_FILE),
    "linked log": (lambda c, o: linked(c.parents[1] / "metrics.jsonl", o), "metrics.jsonl: a symbolic link"),
    "linked checkpoint": (linked, "step-000050: a symbolic link"),
    "linked shard": (lambda c, o: linked(next(c.glob("*.safetensors")), o), ".safetensors: damaged"),
}


def everything(*folders):
    """Every path with its bytes, or where it leads; the lock's file holds a number that changes."""
    return {
        path: path.readlink() if path.is_symlink() else path.read_bytes() if path.is_file() else None
        for folder in folders
        for path in folder.rglob("*")
        if path.name != "lock"
    }


@pytest.mark.parametrize("name", STRANGE)
def test_a_strangers_folder(copy, tmp_path, name):
    """Refused in one line; nothing in it was run, and nothing in it or outside was changed."""
    harm, words = STRANGE[name]
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("precious")
    harm(copy / "checkpoints/step-000050", outside)
    before = everything(copy, outside)
    assert refused(run("resume", copy), words)
    assert everything(copy, outside) == before
