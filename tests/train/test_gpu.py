"""What only a CUDA device can show; run with -m gpu."""

from __future__ import annotations

import json

import pytest
import torch
from cases import CASES, ROWS

from gptnorm.data import prepare
from gptnorm.recipe import load_recipe
from gptnorm.train.loop import Trainer
from gptnorm.train.run import resume_run, start_run

pytestmark = pytest.mark.gpu

EXPERTS = ("moe.experts=4", "moe.shared=1")


def train(recipe, path, *settings):
    config = load_recipe(str(recipe)).resolve(["train.device=cuda", *settings])
    result = start_run(config, prepare(config.data), path)
    return result, [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("strategy", "backbone", "moe"), CASES)
def test_fp32_loss_is_the_cpu_s(recipe, tmp_path, strategy, backbone, moe):
    settings = (f"model.strategy={strategy}", f"model.backbone={backbone}", *(EXPERTS if moe else ()))
    _, gpu = train(recipe, tmp_path / "gpu", *settings)
    _, cpu = train(recipe, tmp_path / "cpu", *settings, "train.device=cpu")
    assert [line["loss"] for line in gpu] == pytest.approx([line["loss"] for line in cpu], rel=2e-3)


@pytest.mark.parametrize(("strategy", "backbone", "moe"), CASES)
def test_bf16_steps(recipe, tmp_path, strategy, backbone, moe):
    settings = (f"model.strategy={strategy}", f"model.backbone={backbone}", *(EXPERTS if moe else ()))
    _, fp32 = train(recipe, tmp_path / "fp32", *settings)
    result, bf16 = train(recipe, tmp_path / "bf16", *settings, "train.precision=bf16")
    assert result.status == "finished"
    assert [line["loss"] for line in bf16] == pytest.approx([line["loss"] for line in fp32], rel=0.03)


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("strategy", sorted(row.strategy for row in ROWS))
def test_compiled_bf16_is_close_to_eager(recipe, tmp_path, strategy, moe):
    settings = (f"model.strategy={strategy}", "train.precision=bf16", *(EXPERTS if moe else ()))
    _, eager = train(recipe, tmp_path / "eager", *settings)
    _, compiled = train(recipe, tmp_path / "compiled", *settings, "train.compile=true")
    assert [line["loss"] for line in compiled] == pytest.approx([line["loss"] for line in eager], rel=0.03)


def test_no_step_waits_for_the_device(recipe, tmp_path, monkeypatch):
    """Between the steps that are logged; CUDA itself would raise at the first wait."""
    real, guarded = Trainer._update, []

    def update(trainer, *args):
        if trainer.step in range(3, 8):  # the first ones load kernels
            guarded.append(trainer.step)
            torch.cuda.set_sync_debug_mode("error")
        try:
            real(trainer, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Trainer, "_update", update)
    settings = ("train.steps=9", "train.log_every=9", "train.eval_every=0", "checkpoint.every=0", "watch.every=0")
    result, _ = train(recipe, tmp_path / "run", *settings, "guard.sigmas=6", "guard.window=16")
    assert (result.status, guarded) == ("finished", [3, 4, 5, 6, 7])


def test_resume_is_bit_identical(recipe, tmp_path):
    settings = ("checkpoint.every=2", "checkpoint.keep=9")
    _, straight = train(recipe, tmp_path / "run", *settings)
    for name in ("step-000006", "step-000004"):
        (tmp_path / "run/checkpoints" / name).rename(tmp_path / name)
    resume_run(tmp_path / "run", prepare(load_recipe(str(recipe)).resolve().data))
    again = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [(x["step"], x["split"], x["loss"]) for x in again] == [(x["step"], x["split"], x["loss"]) for x in straight]
