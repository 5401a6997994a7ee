"""Lines of a run that were damaged, locks that cannot be had, and runs that go on with other settings."""

from __future__ import annotations

import errno
import json

import pytest
from saving import weights_of
from stopping import Stop, StopAt, train

from gptnorm import lock
from gptnorm.data import prepare
from gptnorm.errors import UserError
from gptnorm.recipe import adjusted, load_recipe
from gptnorm.train.lock import FolderLock
from gptnorm.train.run import resume_run, start_run
from gptnorm.train.run_folder import RunFolder


def folder_with(tmp_path, text):
    (tmp_path / "config.toml").touch()
    (tmp_path / "metrics.jsonl").write_text(text)
    return RunFolder.open(tmp_path)


@pytest.mark.parametrize("damage", ['{"step": 2, "lo', "", "\0\0\0", "[]", '{"step": "2"}'])
def test_a_damaged_line_is_named_and_nothing_is_dropped(tmp_path, damage):
    text = f'{{"step": 1}}\n{damage}\n{{"step": 3}}\n'
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 ") as caught:
        folder_with(tmp_path, text).rewind(3, {})
    assert "\n" not in str(caught.value)
    assert (tmp_path / "metrics.jsonl").read_text() == text


@pytest.mark.parametrize("tail", ["", '{"step": 3, "lo', "\0\0\0", '{"step"'])
def test_half_a_last_line_is_what_a_kill_leaves(tmp_path, tail):
    folder = folder_with(tmp_path, f'{{"step": 1}}\n{{"step": 2}}\n{tail}')
    assert [line["step"] for line in folder.metrics()] == [1, 2]
    folder.rewind(2, {})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(tmp_path, monkeypatch, number):
    fcntl = pytest.importorskip("fcntl")

    def flock(*args):
        raise OSError(number, "told by the system")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match=r"its file system has no locks \(flock\)"):
        FolderLock(tmp_path).acquire()
    with pytest.raises(lock.Unlockable), lock.locked(tmp_path / "lock", wait=True):
        pass


def test_a_full_disk_lets_go_of_the_lock(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("gptnorm.train.lock.os.getpid", full)
        with pytest.raises(UserError, match="No space left"):
            FolderLock(tmp_path).acquire()
    second = FolderLock(tmp_path)
    second.acquire()
    second.release()


def test_a_run_goes_on_in_another_way(recipe, tmp_path):
    """Two micro-batches and full recomputation from step 6 on: the same losses to rounding, and it is on record."""
    settings = ("train.steps=12", "checkpoint.every=3")
    train(recipe, tmp_path / "straight", *settings)
    config = load_recipe(str(recipe)).resolve(settings)
    shards = prepare(config.data)
    with pytest.raises(Stop):
        start_run(config, shards, tmp_path / "cut", StopAt(7))
    other = ("train.accumulate=2", "train.recompute=full")
    assert resume_run(tmp_path / "cut", shards, settings=other).status == "finished"
    cut, straight = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("cut", "straight")
    )
    assert [line["step"] for line in cut] == [line["step"] for line in straight]
    assert [line["loss"] for line in cut] == pytest.approx([line["loss"] for line in straight], abs=1e-5)
    names = [f"{name}/checkpoints/step-000012" for name in ("cut", "straight")]
    assert weights_of(tmp_path / names[0]) != weights_of(tmp_path / names[1]), "another order of sums was to be seen"
    (part,) = json.loads((tmp_path / "cut/environment.json").read_text())["resumed"]
    assert (part["step"], part["settings"]) == (6, list(other))
    assert RunFolder.open(tmp_path / "cut").config() == config


@pytest.mark.parametrize(
    "setting", ["optim.lr=1", "seed=3", "train.steps=99", "parallel=3", "train", "model.dropout=0"]
)
def test_what_a_run_computes_is_kept(recipe, setting):
    config = load_recipe(str(recipe)).resolve()
    with pytest.raises(UserError) as caught:
        adjusted(config, [setting])
    assert str(caught.value).strip("'").startswith(setting.partition("=")[0])


def test_another_layout_takes_back_the_old_one(recipe):
    config = load_recipe(str(recipe)).resolve(["parallel.data=4", "parallel.tensor=2"])
    assert adjusted(config, ["parallel.tensor=1"]).parallel.data is None
    assert adjusted(config, ["parallel.reshard=false"]).parallel.data == 4
    assert adjusted(config, ["parallel.tensor=1", "parallel.data=2"]).parallel.data == 2
    with pytest.raises(UserError, match=r"parallel\.tensor = 0"):
        adjusted(config, ["parallel.tensor=0"])


@pytest.mark.parametrize("name", ["study.json", "metrics.jsonl", "report.html", "status.json"])
def test_what_is_no_run_is_left_as_it_is(recipe, tmp_path, name):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / name).write_text("precious")
    config = load_recipe(str(recipe)).resolve([f"run.dir={folder}"])
    with pytest.raises(UserError, match="holds something else than a run"):
        RunFolder(folder).begin(config, {})
    assert {path.name: path.read_text() for path in folder.iterdir()} == {name: "precious"}


def test_what_is_left_of_a_run_that_had_not_begun_is_no_hindrance(recipe, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    # And what a job left that made the folder for it: recipes/cluster/slurm.sbatch does.
    for name in ("lock", "environment.json", ".config.toml.ab12", ".job-x1", "slurm-17.out"):
        (folder / name).write_text("{}")
    (folder / "metrics.jsonl").touch()
    run = RunFolder(folder)
    run.begin(load_recipe(str(recipe)).resolve(), {})
    run.close()
    assert (folder / "config.toml").is_file()


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "names no model.strategy"), ("[model", "not a TOML file"), ("[optim]\nlr = 'a'", "optim.lr = 'a'")],
)
def test_a_damaged_config_is_named(tmp_path, text, words):
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(UserError) as caught:
        RunFolder.open(tmp_path).config()
    assert str(caught.value).startswith(f"{tmp_path / 'config.toml'}: ")
    assert words in str(caught.value)
