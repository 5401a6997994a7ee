"""Studies that are killed, that grow, and that are something else than what is asked."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from study_folders import SMALL, everything, lines, outcomes

from gptnorm.data import prepare
from gptnorm.errors import UserError
from gptnorm.lock import locked
from gptnorm.recipe import HOW, load_recipe
from gptnorm.report import load_study
from gptnorm.study import run
from gptnorm.study.grid import Grid
from gptnorm.study.join import join_studies
from gptnorm.study.ledger import Ledger, OtherStudy
from gptnorm.study.run import run_study
from gptnorm.study.tolerance import Tolerance
from gptnorm.train.progress import Silent
from gptnorm.train.run import start_run

pytestmark = pytest.mark.usefixtures("in_process")

STUDY = '\n[study]\ntitle = "t"\nstrategies = ["prenorm"]\nlrs = [0.01, 0.001]\nseeds = [3]\nworkers = 1\n'


def ask(study, folder, *settings, ladder=None, **more):
    return run_study(Grid(ladder), str(study), (*SMALL, *settings), folder, Console(quiet=True), **more)


def test_a_study_that_is_done_is_left_alone(study, tmp_path):
    folder = ask(study, tmp_path / "out")
    before = everything(folder)
    assert ask(study, folder) == folder
    assert everything(folder) == before
    assert not (folder / "lock").exists()


def test_a_study_grows(study, tmp_path):
    """More of each; what was there is not touched, and the grid of both is made."""
    folder = ask(study, tmp_path / "out")
    before = everything(folder)
    ask(study, folder, 'study.strategies=["ngpt"]', "study.seeds=[4]", "study.lrs=[0.003]")
    assert len(outcomes(folder)) == 2 * 2 * 3
    after = everything(folder)
    for path, content in before.items():
        if path.parts[0] == "cells":
            assert after[path] == content
    assert after[Path("cells.jsonl")].startswith(before[Path("cells.jsonl")])
    facts = json.loads((folder / "study.json").read_text())
    assert facts["strategies"] == ["prenorm", "ngpt"]
    assert (facts["lrs"], facts["seeds"]) == ([0.001, 0.003, 0.01], [3, 4])
    assert facts["settings"]["differing"]["optim.weight_decay"] == {"prenorm": 0.1, "ngpt": 0.0}
    assert len(facts["commands"]) == 2
    assert len(facts["environments"]) == 1
    whole = ask(study, tmp_path / "whole", 'study.strategies=["prenorm","ngpt"]', "study.seeds=[3,4]",
                "study.lrs=[0.01,0.003,0.001]")  # fmt: skip
    assert outcomes(folder) == outcomes(whole)


def test_a_ladder_grows(study, tmp_path):
    ladder = ("study.lrs=[0.01]", "study.depths=[1,2]")
    folder = ask(study, tmp_path / "out", *ladder, ladder="depth")
    ask(study, folder, "study.lrs=[0.01]", "study.depths=[2,3]", ladder="depth")
    assert sorted(row["size"] for row in lines(folder)) == [1, 2, 3]
    assert json.loads((folder / "study.json").read_text())["ladder"]["sizes"] == [1, 2, 3]
    with pytest.raises(OtherStudy, match="ladder = 'depth', not None"):
        ask(study, folder)


@pytest.mark.parametrize(
    ("setting", "word"),
    [
        ("train.steps=5", "train.steps = 4, not 5"),
        ("optim.weight_decay=0.3", "optim.weight_decay = 0.1, not 0.3"),
        ("strategy.eps=1e-3", "strategy.eps = "),
        ("data.val_fraction=0.2", "data.val_fraction = "),
    ],
)
@pytest.mark.parametrize("strategy", ["prenorm", "ngpt"])
def test_other_settings_are_another_study(study, tmp_path, setting, word, strategy):
    """Also if no strategy is common to both: the recipe would have meant something else."""
    folder = ask(study, tmp_path / "out")
    before = everything(folder)
    with pytest.raises(OtherStudy) as caught:
        ask(study, folder, setting, f'study.strategies=["{strategy}"]')
    assert (word if strategy == "prenorm" else word.partition(" = ")[0]) in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert everything(folder) == before


def test_how_a_run_is_computed_may_change(study, tmp_path):
    folder = ask(study, tmp_path / "out")
    ask(study, folder, "train.threads=2", "study.seeds=[4]")
    assert len(lines(folder)) == 4
    facts = json.loads((folder / "study.json").read_text())
    first, second = facts["environments"]
    assert second == {**first, "threads": 2, "train.threads": 2}
    assert [line["environment"] for line in lines(folder)] == [0, 0, 1, 1]
    assert not [key for part in facts["settings"].values() for key in part if key.startswith(HOW)]


def test_other_text_is_another_study(study, tmp_path):
    text = tmp_path / "text.txt"
    settings = (f"data.path={text}", "data.val_fraction=0.5")
    text.write_text("".join(f"Line {i} of some text.\n" for i in range(2000)))
    folder = ask(study, tmp_path / "out", *settings)
    text.write_text("".join(f"Line {i} of other text.\n" for i in range(2000)))
    with pytest.raises(OtherStudy, match="its text is not what it was when the study in it began"):
        ask(study, folder, *settings)


@pytest.mark.parametrize("what", ["notes", "a lock alone", "a run"])
def test_what_is_no_study_is_left_as_it_is(study, tmp_path, what):
    folder = tmp_path / "mine"
    if what == "a run":
        start_run(
            load_recipe(str(study)).resolve(SMALL), prepare(load_recipe(str(study)).resolve().data), folder, Silent()
        )
    else:
        folder.mkdir()
        (folder / "lock").write_text("precious")
        if what == "notes":
            (folder / "a.txt").write_text("hi")
    before = everything(folder)
    assert Path("lock") in before
    with pytest.raises(UserError, match="holds something else than a study"):
        ask(study, folder)
    assert everything(folder) == before


def test_own_files_may_lie_elsewhere(study, tmp_path):
    for home in ("mine", "yours"):
        (tmp_path / home).mkdir()
        (tmp_path / home / "text.txt").write_text("".join(f"Line {i} of some text.\n" for i in range(2000)))

    def of(home):
        return f"data.path={tmp_path / home / 'text.txt'}", f"data.cache={tmp_path / home}", "data.val_fraction=0.5"

    folder = ask(study, tmp_path / "out", *of("mine"))
    ask(study, folder, *of("yours"), "study.seeds=[4]")
    facts = json.loads((folder / "study.json").read_text())
    assert facts["data"]["path"] == facts["settings"]["shared"]["data.path"] == "text.txt"
    assert str(tmp_path) not in json.dumps({key: facts[key] for key in facts.keys() - {"commands"}})
    part = ask(study, tmp_path / "part", *of("yours"), "study.seeds=[5]")
    assert join_studies([part], folder) == 2


def test_begun_again_on_demand(study, tmp_path):
    folder = ask(study, tmp_path / "out")
    before = everything(folder)
    ask(study, folder, "train.steps=5", fresh=True)
    assert everything(tmp_path / "out.1") == before
    assert len(lines(folder)) == 2
    with pytest.raises(UserError):
        ask(study, folder, "train.seq_len=1000000", fresh=True)
    assert not (tmp_path / "out.2").exists()


def test_begun_again_from_within(study, tmp_path, monkeypatch):
    """The folder that "." names goes along with what is moved aside; the new study stands where it was."""
    folder = ask(study, tmp_path / "out")
    before = everything(folder)
    monkeypatch.chdir(folder)
    assert ask(study, Path(), "train.steps=5", fresh=True) == folder
    assert everything(tmp_path / "out.1") == before
    assert len(lines(folder)) == 2
    assert not (folder / "lock").exists()


def test_a_disk_that_is_full(study, tmp_path, monkeypatch):
    """Ledger and study.json are named, so that it is one line; what was there is whole."""
    folder = ask(study, tmp_path / "out")
    before = everything(folder)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with Ledger(folder) as ledger:
        with pytest.raises(OSError, match="No space left") as failed:
            ledger.add("cells/prenorm/new", environment=0)
        assert failed.value.filename == str(folder / "cells.jsonl")
        with pytest.raises(OSError, match="No space left") as failed:
            ledger.spent(1.0)
        assert failed.value.filename == str(folder / "study.json")
    assert {**everything(folder), Path("cells.jsonl"): b""} == {**before, Path("cells.jsonl"): b""}


def test_time_is_kept_run_by_run(study, tmp_path, monkeypatch):
    """Whatever ends the process: the time of the runs that ended is there."""
    told = []
    add = Ledger.add

    def look(self, *of, **more):
        told.append(json.loads((self.folder / "study.json").read_text())["seconds"])
        add(self, *of, **more)

    monkeypatch.setattr(Ledger, "add", look)
    folder = ask(study, tmp_path / "out", "study.seeds=[3,4]")
    assert told[0] is None
    assert 0 < told[1] < told[2] < told[3] <= json.loads((folder / "study.json").read_text())["seconds"]


def test_two_at_once(study, tmp_path):
    folder = ask(study, tmp_path / "out")
    before = everything(folder)
    with locked(folder / "lock", wait=False), pytest.raises(UserError, match="another process works on that study"):
        ask(study, folder, "study.seeds=[4]")
    (folder / "lock").unlink(missing_ok=True)
    assert everything(folder) == before


def test_a_folder_with_something_else(study, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "mine").write_text("kept")
    with pytest.raises(UserError, match="holds something else than a study"):
        ask(study, folder)
    assert everything(folder) == {Path("mine"): b"kept"}


def test_a_kill_while_the_first_file_is_written(study, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / ".study.json.x1y2").write_text('{"title": ')
    assert (ask(study, folder) / "study.json").is_file()


@pytest.mark.parametrize("lost", ["settings", "commands", "seeds", "data", "title"])
def test_a_study_that_lacks_something_is_not_continued(study, tmp_path, lost):
    folder = ask(study, tmp_path / "out")
    facts = json.loads((folder / "study.json").read_text())
    del facts[lost]
    (folder / "study.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match=rf"study\.json: {lost}: is missing$"):
        ask(study, folder, "study.seeds=[4]")


def test_the_shipped_ladders_can_grow(tmp_path, monkeypatch):
    """What docs/results holds of them goes with the recipes of today: seeds can be added."""
    for axis in ("depth", "width"):
        folder = tmp_path / axis
        shutil.copytree(Path(__file__).parents[2] / "docs" / "results" / axis, folder)
        asked = []
        monkeypatch.setattr(run, "run_cells", lambda wanted, *rest, asked=asked: asked.extend(wanted()) or iter(()))
        run_study(Grid(axis), f"study/{axis}", ("study.seeds=[1]",), folder, Console(quiet=True))
        assert len(asked) == len(lines(folder))
        assert {cell.seed for cell in asked} == {1}


@pytest.mark.parametrize("tail", ['{"run": "cells/prenorm/lr-0.0', "\0\0"])
def test_half_a_last_line(study, tmp_path, tail):
    folder = ask(study, tmp_path / "out")
    first, _ = (folder / "cells.jsonl").read_text().splitlines()
    (folder / "cells.jsonl").write_text(f"{first}\n{tail}")
    ask(study, folder)
    kept = [line for line in (folder / "cells.jsonl").read_text().splitlines() if line.startswith("{")]
    assert kept[0] == first
    assert json.loads(kept[-1])["run"] != json.loads(first)["run"]
    assert len(lines(folder)) == 2, "nothing of the half is left"


def test_a_last_line_without_its_end_counts(study, tmp_path):
    folder = ask(study, tmp_path / "out")
    before = (folder / "cells.jsonl").read_text()
    (folder / "cells.jsonl").write_text(before.removesuffix("\n"))
    ask(study, folder, "study.seeds=[4]")
    assert (folder / "cells.jsonl").read_text().startswith(before)
    assert len(outcomes(folder)) == 4


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("{half", "line 2 cannot be read"),
        ("[1]", "line 2 cannot be read"),
        ('{"run": "a", "strategy": "prenorm", "lr": "abc", "seed": 3}', "line 2: lr = 'abc': must be a number"),
        ('{"run": "a", "strategy": "prenorm", "lr": 0.1}', "line 2: seed: is missing"),
    ],
)
def test_a_damaged_line_is_named_and_nothing_is_made(study, tmp_path, wrong, words):
    folder = ask(study, tmp_path / "out")
    first, second = (folder / "cells.jsonl").read_text().splitlines()
    (folder / "cells.jsonl").write_text(f"{first}\n{wrong}\n{second}\n")
    before = everything(folder)
    with pytest.raises(UserError, match=words):
        ask(study, folder, "study.seeds=[4]")
    with pytest.raises(UserError, match=words):
        load_study(folder)
    assert everything(folder) == before


NO_RULES = ("study.stability.margin=-inf", "study.stability.rise=inf", "study.search.reach=1")
"""So short a run learns nothing: without the rules there is a best rate to look for neighbours of, and an end."""


def written_since(begun, folder):
    """Whether a run's folder has changed; those that a new start takes away may go while they are looked at."""
    for path in folder.glob("cells/*/*"):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime > begun:
                return True
    return False


@pytest.mark.parametrize("kind", [Grid(), Tolerance()], ids=["grid", "tolerance"])
@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_kill_9_again_and_again(study, tmp_path, kills, kind):
    """Two at once, the parent alone or its workers with it. The ledger ends with the cells of a study that was left
    alone, each of them made once."""
    rules = NO_RULES if isinstance(kind, Tolerance) else ()
    seeds, quiet = f"study.seeds={list(range(1, 4 * kills + 1))}", Console(quiet=True)
    settings = (*SMALL, *rules, seeds, "study.workers=2")

    def straight_on(folder):
        return run_study(kind, str(study), settings, folder, quiet)

    straight, folder, draw = straight_on(tmp_path / "straight"), tmp_path / "killed", random.Random(1)
    command = [sys.executable, "-m", "gptnorm", *kind.words, str(study), *settings, "--dir", str(folder)]
    where = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    for kill in range(kills):
        process = subprocess.Popen(
            command, env=where, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        begun = time.time()
        # Every fourth kill comes at any moment of the start; the others once something is being written.
        while kill % 4 and process.poll() is None and not written_since(begun, folder):
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.4 if kill % 4 else 5.0))
        if kill % 2:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.send_signal(signal.SIGKILL)
        _, error = process.communicate()
        assert process.returncode == -signal.SIGKILL, f"it ended before it was killed: {error}"
    straight_on(folder)
    assert outcomes(folder) == outcomes(straight)
    assert not (folder / "lock").exists()
    if rules:
        assert len({line["lr"] for line in lines(folder)}) > 2, "the search has gone on from the rates of the grid"
