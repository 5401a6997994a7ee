"""Bit-identical resumes through everything that a run can be doing."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from saving import weights_of
from stopping import Stop, StopAt, train

from gptnorm.data import prepare
from gptnorm.errors import UserError
from gptnorm.model import build_gpt
from gptnorm.probe.source import open_source
from gptnorm.recipe import load_recipe
from gptnorm.train import run as run_module
from gptnorm.train.checkpoint import checkpoint_at, load_model
from gptnorm.train.inputs import open_batches
from gptnorm.train.loop import Trainer
from gptnorm.train.parallel import open_world
from gptnorm.train.progress import Silent
from gptnorm.train.run import resume_run, start_run
from gptnorm.train.run_folder import RunFolder


def lines(path):
    found = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in found]


CASES = {
    "plain": (),
    "dropout": ("model.dropout=0.2",),
    "dropout, accumulation, recomputation": ("model.dropout=0.2", "train.accumulate=2", "train.recompute=full"),
    "middle of an evaluation interval": ("train.eval_every=5",),
    "several steps between looks": ("train.log_every=3",),
    "muon": ("optim.name=muon",),
    "guard": ("guard.sigmas=1.0", "guard.window=16", "train.steps=30"),
    "schedule wsd": ("optim.schedule=wsd",),
    "experts": ("moe.experts=4", "moe.balance=bias", "options.qk_clip=0.5"),
    "bf16": ("train.precision=bf16",),
    "frozen norms": ("options.norm_scale=frozen", "options.qk_norm=head", "train.accumulate=2", "train.precision=bf16"),
    "fp8": ("train.precision=fp8", "train.recompute=full", "guard.sigmas=6.0", "guard.window=16"),
    "fp8, experts": ("train.precision=fp8", "moe.experts=4", "model.d_ff=16"),
    "best": ("checkpoint.best=true", "train.eval_every=1", "checkpoint.keep=1"),
    "synchronous": ("checkpoint.asynchronous=false",),
}


@pytest.mark.parametrize("name", CASES)
def test_two_stops_and_resumes_are_bit_identical(recipe, tmp_path, name):
    settings = ("train.steps=12", "checkpoint.every=3", *CASES[name])
    train(recipe, tmp_path / "straight", *settings)
    config = load_recipe(str(recipe)).resolve(settings)
    shards = prepare(config.data)
    with pytest.raises(Stop):
        start_run(config, shards, tmp_path / "cut", StopAt(6 if "looks" in name else 7))
    with pytest.raises(Stop):
        resume_run(tmp_path / "cut", shards, StopAt(9 if "looks" in name else 11))
    result = resume_run(tmp_path / "cut", shards)
    assert lines(tmp_path / "cut") == lines(tmp_path / "straight")
    last = f"checkpoints/step-{config.train.steps:06d}"
    assert weights_of(tmp_path / "cut" / last) == weights_of(tmp_path / "straight" / last)
    if name == "guard":
        assert result.skipped > 0, "nothing was left out, so nothing was tested"


def test_across_the_end_of_an_epoch(recipe, tmp_path):
    """Five windows in all: the text is gone through many times, in another order each time."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for split in ("train", "val"):
        np.random.default_rng(0).integers(0, 50, 5 * 16 + 1).astype("<u2").tofile(folder / f"{split}.bin")
    settings = (f"data.path={folder}", "model.vocab_size=50", "train.steps=12", "checkpoint.every=1")
    train(recipe, tmp_path / "straight", *settings)
    config = load_recipe(str(recipe)).resolve(settings)
    shards = prepare(config.data)
    with pytest.raises(Stop):
        start_run(config, shards, tmp_path / "cut", StopAt(2))
    for stop in (5, 9):
        with pytest.raises(Stop):
            resume_run(tmp_path / "cut", shards, StopAt(stop))
    resume_run(tmp_path / "cut", shards)
    assert lines(tmp_path / "cut") == lines(tmp_path / "straight")


def test_constants_of_norms_are_measured_once_at_the_beginning(recipe, tmp_path):
    """On the first micro-batch, as `inspect` does; a run that begins again measures the same."""
    settings = ("options.norm_scale=frozen", "train.accumulate=2", "checkpoint.every=3", "checkpoint.keep=9")
    train(recipe, tmp_path / "run", *settings)
    config = load_recipe(str(recipe)).resolve(settings)
    shards = prepare(config.data)

    def constants(step):
        model = build_gpt(config, vocab=257)
        load_model(checkpoint_at(tmp_path / "run/checkpoints", step), model)
        return {name: tensor.item() for name, tensor in model.named_buffers()}

    first = build_gpt(config, vocab=257)
    rows = open_batches(config, shards)[0].batch(0)[:2]
    first.calibrate(torch.from_numpy(rows))
    expected = {name: tensor.item() for name, tensor in first.named_buffers()}
    assert len(expected) == 3
    assert constants(3) == constants(6) == expected
    for folder in (None, RunFolder.open(tmp_path / "run")):
        source = open_source("x", config, folder, step=0)
        assert {name: tensor.item() for name, tensor in source.model.named_buffers()} == expected
    before = lines(tmp_path / "run")
    resume_run(tmp_path / "run", shards, step=0)
    assert lines(tmp_path / "run") == before
    assert constants(6) == expected


def test_dropout_does_something_and_each_step_has_its_own(recipe, tmp_path):
    train(recipe, tmp_path / "without", "optim.lr=0")
    train(recipe, tmp_path / "with", "optim.lr=0", "model.dropout=0.3")
    a, b = lines(tmp_path / "without"), lines(tmp_path / "with")
    assert all(x["loss"] != y["loss"] for x, y in zip(a, b, strict=True) if x["split"] == "train")
    assert a[-1]["loss"] == b[-1]["loss"], "validation has no dropout"
    config = load_recipe(str(recipe)).resolve(["model.dropout=0.3"])
    trainer = Trainer(config, prepare(config.data), open_world(config), Silent())
    batch = trainer.feed.micro_batches(0)[0]

    def loss(step, number):
        trainer.feed.seed_dropout(step, number)
        return trainer.model.objective(batch).loss.item()

    assert len({loss(0, 0), loss(0, 1), loss(1, 0)}) == 3
    assert loss(0, 1) == loss(0, 1)


def test_the_best_checkpoint_is_kept(recipe, tmp_path):
    """The rate rises until it undoes what was learnt: an early validation loss stays the lowest."""
    settings = ("optim.lr=3.0", "optim.schedule=constant", "optim.warmup=20", "train.steps=24")
    train(recipe, tmp_path / "run", *settings, "train.eval_every=2", "checkpoint.best=true", "checkpoint.keep=1")
    losses = {line["step"]: line["loss"] for line in lines(tmp_path / "run") if line["split"] == "val"}
    best = min(losses, key=lambda step: losses[step])
    assert best < 24
    kept = {int(path.name.removeprefix("step-")) for path in (tmp_path / "run/checkpoints").iterdir()}
    assert kept == {best, 24}


def test_where_it_went_on_is_recorded_once(recipe, tmp_path, monkeypatch):
    settings = ("checkpoint.every=1",)
    config = load_recipe(str(recipe)).resolve(settings)
    shards = prepare(config.data)
    with pytest.raises(Stop):
        start_run(config, shards, tmp_path / "run", StopAt(2))
    real = run_module.describe_environment
    monkeypatch.setattr(run_module, "describe_environment", lambda device: {**real(device), "torch": "9.9"})
    for stop in (3, 5):
        with pytest.raises(Stop):
            resume_run(tmp_path / "run", shards, StopAt(stop))
    found = json.loads((tmp_path / "run/environment.json").read_text())
    assert found["torch"] != "9.9"
    assert [(part["step"], part["torch"]) for part in found["resumed"]] == [(1, "9.9")]


def test_a_renamed_checkpoint_is_refused(recipe, tmp_path):
    """Its state says another step than its name: the lines of the steps between would stand for nothing."""
    train(recipe, tmp_path / "run", "checkpoint.every=3")
    shards = prepare(load_recipe(str(recipe)).resolve([]).data)
    checkpoints = tmp_path / "run/checkpoints"
    (checkpoints / "step-000003").rename(checkpoints / "step-000005")
    before = lines(tmp_path / "run")
    with pytest.raises(UserError, match=r"step-000005: holds step 3\b") as error:
        resume_run(tmp_path / "run", shards, step=5)
    assert "\n" not in str(error.value)
    assert lines(tmp_path / "run") == before
