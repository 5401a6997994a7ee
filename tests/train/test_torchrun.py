"""Runs on several processes, as torchrun starts them, against one process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import environment, metrics, numbers, run, status, wait_for_step
from saving import weights_of

SETTINGS = ("train.steps=20", "checkpoint.every=5", "train.eval_every=10", "model.n_layers=2", "model.dropout=0")
TOLERANCE = 1e-5
"""Relative, of losses over 20 steps in fp32: sums come in another order, and AdamW's first steps amplify it."""


def torchrun(processes: int, *arguments: object) -> list[str]:
    words = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "gptnorm"]
    return [sys.executable, *words, *map(str, arguments)]


def launch(processes: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    where = environment(OMP_NUM_THREADS="1")
    words = torchrun(processes, *arguments)
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=180, env=where)


def close(a, b):
    one, other = ([line["loss"] for line in metrics(folder)] for folder in (a, b))
    assert [(line["step"], line["split"]) for line in metrics(a)] == [(x["step"], x["split"]) for x in metrics(b)]
    return one == pytest.approx(other, rel=TOLERANCE)


@pytest.fixture(scope="module")
def single(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("single") / "run"
    assert run("train", recipe, f"run.dir={folder}", *SETTINGS).returncode == 0
    return folder


@pytest.fixture(scope="module")
def double(recipe, tmp_path_factory):
    """Two processes, killed as one while they train, then resumed."""
    folder = tmp_path_factory.mktemp("double") / "run"
    done = launch(2, "train", recipe, f"run.dir={folder}", *SETTINGS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("validation loss") == 3, "one process speaks"
    return folder


def test_losses_are_those_of_one_process(single, double):
    assert close(single, double)
    state = json.loads((double / "checkpoints/step-000020/state.json").read_text())
    assert state["processes"] == 2
    assert status(double)["status"] == "finished"


@pytest.mark.parametrize(("made_by", "goes_on"), [("double", 1), pytest.param("single", 2, marks=pytest.mark.slow)])
def test_a_checkpoint_goes_on_with_another_number_of_processes(request, tmp_path, single, made_by, goes_on):
    folder = tmp_path / "run"
    shutil.copytree(request.getfixturevalue(made_by), folder)
    shutil.rmtree(folder / "checkpoints/step-000020")
    done = run("resume", folder) if goes_on == 1 else launch(2, "resume", folder)
    assert done.returncode == 0, done.stderr
    assert close(folder, single)


@pytest.mark.slow
def test_kill_9_and_resume_with_the_same_number_is_bit_identical(recipe, tmp_path):
    settings = (*SETTINGS, "train.steps=200")
    straight, folder = tmp_path / "straight", tmp_path / "run"
    assert launch(2, "train", recipe, f"run.dir={straight}", *settings).returncode == 0
    words = torchrun(2, "train", recipe, f"run.dir={folder}", *settings)
    where = environment(OMP_NUM_THREADS="1")
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=where)
    wait_for_step(folder, 28, process)
    # torchrun's processes have sessions of their own, and would live on.
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    for pid in (*map(int, workers.stdout.split()), process.pid):
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    assert status(folder)["status"] == "running"
    assert metrics(folder)[-1]["step"] < 200
    done = launch(2, "resume", folder)
    assert done.returncode == 0, done.stderr
    assert numbers(folder) == numbers(straight)
    assert weights_of(folder / "checkpoints/step-000200") == weights_of(straight / "checkpoints/step-000200")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_all_write_a_checkpoint_first(recipe, double, tmp_path, number):
    """SIGTERM goes to torchrun alone, Ctrl-C to every process of the terminal, and from torchrun to its own again."""
    folder = tmp_path / "run"
    words = torchrun(2, "train", recipe, f"run.dir={folder}", *SETTINGS, "checkpoint.every=0")
    where = environment(OMP_NUM_THREADS="1")
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=where, text=True, start_new_session=True
    )
    wait_for_step(folder, 4, process)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert status(folder)["status"] == "interrupted"
    assert f"continue with: gptnorm resume {folder}" in out
    assert launch(2, "resume", folder).returncode == 0
    assert numbers(folder) == numbers(double)


def test_bad_input_is_one_line_of_one_process(recipe, tmp_path):
    done = launch(2, "train", recipe, f"run.dir={tmp_path / 'run'}", "parallel.data=3")
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("gptnorm:")]
    assert "parallel.data = 3" in line
    assert not (tmp_path / "run").exists()
    assert "parallel.tensor" in run("train", recipe, f"run.dir={tmp_path / 'run'}", "parallel.tensor=2").stderr


ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_launch_files_start_a_run_and_go_on_with_it(recipe, double, tmp_path):
    """SLURM's commands are stood in for by two lines each; everything else is real."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in {
        "torchrun": f'exec "{sys.executable}" -m torch.distributed.run "$@"',
        "srun": 'exec "$@"',
        "scontrol": f'case $1 in show) echo localhost ;; *) echo "$@" >> "{tmp_path}/asked" ;; esac',
        "nvidia-smi": "exit 1",
    }.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tools / name).chmod(0o755)
    where = environment(
        PATH=f"{tools}{os.pathsep}{os.environ['PATH']}",
        OMP_NUM_THREADS="1",
        SLURM_NNODES="1",
        SLURM_GPUS_ON_NODE="2",
        SLURM_JOB_ID="7",
        SLURM_JOB_NODELIST="localhost",
    )
    for script in ("torchrun.sh", "slurm.sbatch"):
        folder = tmp_path / script / "run"
        words = ["bash", str(ROOT / "recipes/cluster" / script), str(recipe), f"run.dir={folder}", *SETTINGS]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=where, text=True)
        wait_for_step(folder, 6, process)
        # torchrun is the script itself (exec), or its child.
        subprocess.run(["pkill", "-TERM", "-f", f"nproc-per-node=2.*{folder}"], check=True)
        process.communicate(timeout=90)
        assert status(folder)["reason"] == "SIGTERM"
        done = subprocess.run(words, capture_output=True, text=True, env=where, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
        assert numbers(folder) == numbers(double)
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
