"""A study in parts is the study in one piece."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from processes import PATIENCE, environment
from processes import run as launch
from rich.console import Console
from study_folders import SMALL, everything, lines, outcomes

from gptnorm.errors import UserError
from gptnorm.study.grid import Grid
from gptnorm.study.join import join_studies, parse_part, part_folder
from gptnorm.study.ledger import OtherStudy
from gptnorm.study.run import run_study
from gptnorm.study.tolerance import Tolerance

pytestmark = pytest.mark.usefixtures("in_process")

STUDY = """
[study]
title = "t"
strategies = ["prenorm", "ngpt", "simplenorm"]
lrs = [0.001, 0.01]
seeds = [3]
workers = 1
"""


@pytest.mark.parametrize("kind", [Grid, Tolerance])
def test_parts_make_the_whole(study, tmp_path, kind):
    settings = (*SMALL, *(["study.search.reach=0"] if kind is Tolerance else []))
    quiet = Console(quiet=True)
    whole = run_study(kind(), str(study), settings, tmp_path / "whole", quiet)
    out = tmp_path / "out"
    parts = [
        run_study(kind(part=(k, 2)), str(study), settings, part_folder(out, (k, 2)), quiet) for k in (1, 2)
    ]  # fmt: skip
    assert not outcomes(parts[0]).keys() & outcomes(parts[1]).keys()
    assert join_studies(parts, out) == len(lines(whole))
    assert outcomes(out) == outcomes(whole)
    made = {path for path in everything(whole) if path.name == "metrics.jsonl"}
    assert len(made) == len(lines(whole))
    assert made <= everything(out).keys()
    facts = json.loads((out / "study.json").read_text())
    assert facts["seconds"] == pytest.approx(sum(json.loads((p / "study.json").read_text())["seconds"] for p in parts))
    before = everything(out)
    assert join_studies(parts, out) == 0
    assert everything(out) == before
    run_study(kind(), str(study), settings, out, quiet)
    assert outcomes(out) == outcomes(whole), "nothing is left to be done"
    assert complete(out)
    join_studies(parts, out)
    assert complete(out), "joining has changed nothing"


def test_a_part_that_has_grown_brings_the_time_of_what_is_new(study, tmp_path):
    quiet = Console(quiet=True)
    part = run_study(Grid(), str(study), SMALL, tmp_path / "part", quiet)
    spend(part, 100.0)
    join_studies([part], tmp_path / "whole")
    run_study(Grid(), str(study), (*SMALL, "study.seeds=[4]"), part, quiet)
    spend(part, 120.0)
    join_studies([part], tmp_path / "whole")
    assert json.loads((tmp_path / "whole/study.json").read_text())["seconds"] == 100.0 + 120.0 / 2


def spend(folder: Path, seconds: float) -> None:
    facts = json.loads((folder / "study.json").read_text())
    (folder / "study.json").write_text(json.dumps({**facts, "seconds": seconds}))


def complete(folder: Path) -> bool:
    return json.loads((folder / "study.json").read_text())["complete"]


def test_a_joined_study_is_complete_once_its_command_has_been_run_on_it(study, tmp_path):
    """Each asks for other seeds: together they leave nothing out here, but might."""
    quiet = Console(quiet=True)
    mine = run_study(Grid(), str(study), SMALL, tmp_path / "mine", quiet)
    theirs = run_study(Grid(), str(study), (*SMALL, "study.seeds=[4]"), tmp_path / "theirs", quiet)
    assert complete(mine)
    assert complete(theirs)
    assert join_studies([theirs], mine) == 6
    assert not complete(mine)
    run_study(Grid(), str(study), SMALL, mine, quiet)
    assert complete(mine)
    more = run_study(Grid(), str(study), (*SMALL, "study.seeds=[4,5]"), tmp_path / "theirs", quiet)
    facts = json.loads((more / "study.json").read_text())
    shutil.copytree(more, tmp_path / "asked")
    (tmp_path / "asked" / "cells.jsonl").unlink()
    (tmp_path / "asked" / "study.json").write_text(json.dumps({**facts, "complete": False}))
    assert join_studies([tmp_path / "asked"], mine) == 0
    assert not complete(mine), "no run was added, but more is asked for"


def test_joining_a_study_with_itself_changes_nothing(study, tmp_path):
    settings = (*SMALL, "study.search.reach=0", "study.seeds=[]")
    mine = run_study(Tolerance(), str(study), settings, tmp_path / "mine", Console(quiet=True))
    shutil.copytree(mine, tmp_path / "copy")
    before = everything(mine)
    assert complete(mine)
    assert join_studies([tmp_path / "copy"], mine) == 0
    assert everything(mine) == before


def test_a_part_without_a_run_says_so_and_can_be_joined(study, tmp_path):
    said = Console(record=True, file=io.StringIO())
    parts = [
        run_study(Grid(part=(k, 7)), str(study), SMALL, part_folder(tmp_path, (k, 7)), said) for k in range(1, 8)
    ]  # fmt: skip
    assert not (parts[6] / "cells.jsonl").exists()
    assert "part 7/7: no run falls to it" in said.export_text()
    assert join_studies(parts, tmp_path / "whole") == 6


def test_studies_of_two_machines(study, tmp_path):
    quiet = Console(quiet=True)
    mine = run_study(Grid(), str(study), SMALL, tmp_path / "mine", quiet)
    theirs = run_study(Grid(), str(study), (*SMALL, "study.seeds=[3,4]"), tmp_path / "theirs", quiet)
    facts = json.loads((theirs / "study.json").read_text())
    facts["environments"][0]["device"] = "another"
    (theirs / "study.json").write_text(json.dumps(facts))
    assert join_studies([theirs], mine) == 6
    assert {row["seed"]: row["environment"] for row in lines(mine)} == {3: 0, 4: 1}
    assert [e["device"] for e in json.loads((mine / "study.json").read_text())["environments"]][1] == "another"


def test_what_is_read_off_the_runs_stays_the_first_ones(study, tmp_path):
    """The runs of both are comparable, whatever either reports of them."""
    quiet, small = Console(quiet=True), (*SMALL, "study.search.reach=0", 'study.strategies=["prenorm","ngpt"]')
    asked = {
        "mine": ("study.epsilon=0.1",),
        "theirs": ("study.epsilon=0.5", "study.baseline=ngpt", "study.report=best"),
    }
    mine, theirs = (
        run_study(
            Tolerance(), str(study), (*small, f"study.pick=[{pick}]", "study.seeds=[]", *how), tmp_path / name, quiet
        )
        for pick, (name, how) in zip((0, 0), asked.items(), strict=True)
    )
    before = json.loads((mine / "study.json").read_text())["tolerance"]
    assert before["epsilon"] == 0.1
    join_studies([theirs], mine)
    assert json.loads((mine / "study.json").read_text())["tolerance"] == before
    join_studies([theirs, mine], tmp_path / "new")
    assert json.loads((tmp_path / "new/study.json").read_text())["tolerance"]["baseline"] == "ngpt"


def test_what_does_not_go_together(study, tmp_path):
    quiet = Console(quiet=True)
    mine = run_study(Grid(), str(study), SMALL, tmp_path / "mine", quiet)
    other = run_study(Grid(), str(study), (*SMALL, "train.steps=5"), tmp_path / "other", quiet)
    before = everything(mine)
    with pytest.raises(OtherStudy, match=r"other: cannot be joined, for its train\.steps = 5, and .* others is 4"):
        join_studies([other], mine)
    with pytest.raises(OtherStudy, match=r"other: cannot be joined"):
        join_studies([mine, other], tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match="joined into itself"):
        join_studies([mine], mine)
    with pytest.raises(UserError, match="no such file"):
        join_studies([tmp_path / "none"], mine)
    stranger = tmp_path / "stranger"
    shutil.copytree(mine, stranger)
    for run in (
        "../../away",
        "",
        "cells",
        "cells/prenorm",
        "cells/prenorm/../lr-1",
        "cells/prenorm/lr-1-seed-3/checkpoints",
        str(tmp_path / "cells/a/b"),
    ):
        line = {**lines(mine)[0], "run": run}
        (stranger / "cells.jsonl").write_text(json.dumps(line) + "\n")
        with pytest.raises(UserError, match="names a run that is no folder"):
            join_studies([stranger], mine)
    assert everything(mine) == before


def test_what_cannot_be_copied_is_said_in_one_line(study, tmp_path):
    mine = run_study(Grid(), str(study), SMALL, tmp_path / "mine", Console(quiet=True))
    link = mine / lines(mine)[0]["run"] / "more"
    link.symlink_to(tmp_path)
    with pytest.raises(UserError, match=r"more: a symbolic link, which is not followed"):
        join_studies([mine], tmp_path / "new")
    assert not (tmp_path / "new").exists()
    link.unlink()
    os.mkfifo(link)
    with pytest.raises(UserError, match=r"more: cannot be copied \(.*named pipe"):
        join_studies([mine], tmp_path / "newer")


@pytest.mark.parametrize("text", ["", "3", "0/2", "3/2", "a/b", "1/2/3", "-1/2"])
def test_parts_that_are_none(text):
    with pytest.raises(UserError, match=r"--part"):
        parse_part(text)


def test_a_part():
    assert parse_part("3/16") == (3, 16)


def test_a_job_array(study, tmp_path):
    """SLURM is stood in for by its two variables; everything else is real."""
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "gptnorm"
    command.write_text(f'#!/usr/bin/env bash\nexec "{sys.executable}" -m gptnorm "$@"\n')
    command.chmod(0o755)
    root = Path(__file__).parents[2]
    array = root / "recipes" / "cluster" / "study.sbatch"
    words = ["bash", str(array), str(tmp_path / "out"), "grid", str(study), *SMALL]
    for number in ("1", "2"):
        where = environment(
            PATH=f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
            SLURM_ARRAY_TASK_ID=number,
            SLURM_ARRAY_TASK_COUNT="2",
            OMP_NUM_THREADS="1",
        )
        done = subprocess.run(words, capture_output=True, text=True, env=where, check=False, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr
    parts = sorted((tmp_path / "out").glob("part-*"))
    done = launch("study", "join", *parts, "--dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "6 runs added" in done.stdout
    assert len(outcomes(tmp_path / "out")) == 6
    assert (tmp_path / "out" / "report.html").is_file()
