"""What disks, people and machines do to a run, done to a real process."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess

import pytest
from processes import ended, environment, numbers, run, start, status, wait_for_step

from gptnorm.errors import UserError
from gptnorm.train.run_folder import RunFolder

SLOW_HARM = ["flip", *(pytest.param(harm, marks=pytest.mark.slow) for harm in ("cut", "remove"))]

SETTINGS = ("train.steps=60", "checkpoint.every=10", "train.eval_every=20")


@pytest.fixture(scope="module")
def straight(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight") / "run"
    assert run("train", recipe, f"run.dir={folder}", *SETTINGS).returncode == 0
    return folder


@pytest.fixture
def copy(straight, tmp_path):
    """A finished run's folder whose last steps are to be made again."""
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
    newest = copy / "checkpoints/step-000050"
    shutil.copytree(newest, copy / "checkpoints/step-000040")
    state = copy / "checkpoints/step-000040/state.json"
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
    # What was copied is a sound checkpoint of step 50 under another name: --auto falls back to it.
    assert state.is_file()
    done = run("resume", copy, "--auto")
    assert done.returncode == 0, done.stderr
    assert numbers(copy) == numbers(straight)


def test_an_earlier_checkpoint_on_demand(copy, straight):
    (kept,) = (path.name for path in (copy / "checkpoints").iterdir())
    assert kept == "step-000050"
    assert refused(run("resume", copy, "--step", "40"), "--step", "50")
    assert run("resume", copy, "--step", "50").returncode == 0
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
    shutil.copytree(copy / "checkpoints/step-000050", copy / "checkpoints/step-000040")
    done = run("verify", copy)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.rpartition(" ")[2] for line in done.stdout.splitlines()] == ["sound", "sound"]
    damaged = copy / "checkpoints/step-000040/state.json"
    damaged.write_text(damaged.read_text().replace("40", "41"))
    with damaged.open("a") as file:
        file.write(" ")
    done = run("verify", copy)
    assert refused(done, str(damaged))
    assert done.stdout.strip() == f"{copy / 'checkpoints/step-000050'}: sound"
    assert refused(run("verify", tmp_path), "train.bin")


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
