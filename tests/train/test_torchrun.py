"""Runs on several processes, as torchrun starts them, against one process."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import PATIENCE, environment, launch, metrics, numbers, run, start_many, status, told_once, wait_for_step

SETTINGS = ("train.steps=20", "checkpoint.every=5", "train.eval_every=10", "model.n_layers=2", "model.dropout=0")
TOLERANCE = 1e-5
"""Relative, of losses over 20 steps in fp32: sums come in another order, and AdamW's first steps amplify it."""
FIFTY_STEPS = 1e-4
"""Nats, over 50 fp32 steps: what docs/parallel.md promises."""
MUON_STEPS = 5e-4
"""The same with Muon, which orthogonalises in bf16 and so makes a last place visible; the largest seen is 2.4e-4."""


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


FIFTY = (*SETTINGS, "train.steps=50", "checkpoint.every=25", "model.vocab_size=258")
"""A vocabulary that two processes can share."""


@pytest.fixture(scope="module")
def fifty(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fifty") / "run"
    assert run("train", recipe, f"run.dir={folder}", *FIFTY).returncode == 0
    return folder


@pytest.fixture(scope="module")
def square(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("square") / "run"
    done = launch(4, "train", recipe, f"run.dir={folder}", *FIFTY, "parallel.data=2", "parallel.tensor=2")
    assert done.returncode == 0, done.stderr
    return folder


def apart(a, b):
    """The largest difference of two runs' losses, in nats."""
    losses, others = ([(line["step"], line["split"], line["loss"]) for line in metrics(folder)] for folder in (a, b))
    assert [line[:2] for line in losses] == [line[:2] for line in others]
    return max(abs(one[2] - other[2]) for one, other in zip(losses, others, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("made_by", "data", "tensor"), [("square", 1, 1), ("square", 1, 2), ("fifty", 2, 2)])
def test_a_checkpoint_goes_on_in_another_layout(request, tmp_path, fifty, made_by, data, tensor):
    folder = tmp_path / "run"
    shutil.copytree(request.getfixturevalue(made_by), folder)
    shutil.rmtree(folder / "checkpoints/step-000050")
    words = ("resume", folder, f"parallel.data={data}", f"parallel.tensor={tensor}")
    done = run(*words) if data * tensor == 1 else launch(data * tensor, *words)
    assert done.returncode == 0, done.stderr
    state = json.loads((folder / "checkpoints/step-000050/state.json").read_text())
    assert state["processes"] == data * tensor
    assert apart(folder, fifty) < FIFTY_STEPS


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["parallel.data=2", "parallel.tensor=2"])
def test_muon_follows_one_process(recipe, tmp_path, layout):
    one, two = tmp_path / "one", tmp_path / "two"
    settings = (*FIFTY, "optim.name=muon")
    assert run("train", recipe, f"run.dir={one}", *settings).returncode == 0
    done = launch(2, "train", recipe, f"run.dir={two}", *settings, layout)
    assert done.returncode == 0, done.stderr
    assert apart(one, two) < MUON_STEPS


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_all_write_a_checkpoint_first(recipe, double, tmp_path, number):
    """SIGTERM goes to torchrun alone, Ctrl-C to every process of the terminal, and from torchrun to its own again."""
    folder = tmp_path / "run"
    settings = (*SETTINGS, "checkpoint.every=0")
    process = start_many(2, "train", recipe, f"run.dir={folder}", *settings, start_new_session=True)
    wait_for_step(folder, 4, process)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    out, _ = process.communicate(timeout=PATIENCE)
    assert status(folder)["status"] == "interrupted"
    assert f"continue with: gptnorm resume {folder}" in out
    assert launch(2, "resume", folder).returncode == 0
    assert numbers(folder) == numbers(double)


def test_bad_input_is_one_line_of_one_process(recipe, tmp_path):
    done = launch(2, "train", recipe, f"run.dir={tmp_path / 'run'}", "parallel.data=3")
    assert "parallel.data = 3" in told_once(done)
    done = launch(2, "train", recipe, f"run.dir={tmp_path / 'run'}", "train.seq_len=1000000")
    assert "train.seq_len = 1000000" in told_once(done)
    assert not (tmp_path / "run").exists()
    assert "parallel.tensor" in run("train", recipe, f"run.dir={tmp_path / 'run'}", "parallel.tensor=2").stderr


@pytest.mark.parametrize("key", ["data.path", "optim.lr"])
def test_processes_that_would_train_on_something_else_are_refused(recipe, tmp_path, key):
    """As where each machine has its own copy of a text or of a recipe, and one is old."""
    for rank in range(2):
        (tmp_path / f"{rank}.txt").write_text("".join(f"Line {i + rank} of a text.\n\n" for i in range(2000)))
    script = tmp_path / "unlike.py"
    script.write_text(
        "import os, sys\n"
        "from gptnorm.cli import main\n"
        "rank = os.environ['RANK']\n"
        f"mine = {{'data.path': {str(tmp_path)!r} + f'/{{rank}}.txt', 'optim.lr': f'{{rank}}e-3'}}[{key!r}]\n"
        f"sys.argv[1:] = ['train', {str(recipe)!r}, 'run.dir={tmp_path / 'run'}', f'{key}={{mine}}']\n"
        "main()\n"
    )
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    where = environment(OMP_NUM_THREADS="1")
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=PATIENCE, env=where)
    assert re.search(rf"{re.escape(key)}: .* on the first process of the run, .* on another", told_once(done))
    assert not (tmp_path / "run").exists()


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
        process.communicate(timeout=PATIENCE)
        assert status(folder)["reason"] == "SIGTERM"
        done = subprocess.run(words, capture_output=True, text=True, env=where, check=False, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr
        assert numbers(folder) == numbers(double)
    assert (tmp_path / "asked").read_text() == "requeue 7\n"


def test_the_gauge_reads_on_two_processes_what_it_reads_on_one(recipe, tmp_path):
    """Differentiating twice on one, differences of gradients on two."""
    settings = ("train.steps=3", "gauge.every=3", "gauge.tolerance=1e-3", "gauge.most=60", "checkpoint.final=false")
    assert run("train", recipe, f"run.dir={tmp_path / 'one'}", *settings).returncode == 0
    done = launch(2, "train", recipe, f"run.dir={tmp_path / 'two'}", *settings)
    assert done.returncode == 0, done.stderr
    one, two = (
        {line["step"]: line for line in metrics(tmp_path / name) if "hessian_max" in line} for name in ("one", "two")
    )
    assert list(one) == list(two) == [1, 3]
    for step in one:
        assert two[step]["hessian_max"] == pytest.approx(one[step]["hessian_max"], rel=5e-3)
    assert two[3]["adam_sharpness"] == pytest.approx(one[3]["adam_sharpness"], rel=5e-3)
    assert two[3]["adam_threshold"] == one[3]["adam_threshold"]
    assert two[3]["gauge_steps"] > 0
    assert "slots" in one[1]
    assert "slots" not in two[1]
    folder = tmp_path / "never"
    refused = launch(2, "train", recipe, f"run.dir={folder}", *settings, "gauge.products=autograd")
    assert "gauge.products = 'autograd': must be" in told_once(refused)
    assert not folder.exists()
