"""The gauge of a run: readings that a checkpoint confirms, and a run that cannot tell whether it is read."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from dense import matrix
from safetensors.torch import load_file
from saving import weights_of
from stopping import Stop, StopAt, train
from torch._dynamo.utils import counters

from gptnorm.curvature import LanguageLoss, Scaled, SlotLoss, lanczos
from gptnorm.curvature.gauge import Gauge
from gptnorm.data import Sampler, prepare
from gptnorm.errors import UserError
from gptnorm.probe.source import open_source
from gptnorm.recipe import load_recipe
from gptnorm.train.run import resume_run, start_run
from gptnorm.train.run_folder import RunFolder
from gptnorm.train.schedule import lr_factor

ON = ("gauge.every=3", "gauge.sequences=1", 'gauge.slots=["blocks.0.attn.o"]')
TIMES = ("seconds", "gauge_seconds", "gauge_steps")
"""What a resumed run need not have the same."""


def lines(path):
    found = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in found]


def losses(path):
    return [(line["step"], line["split"], line["loss"], line.get("grad_norm")) for line in lines(path)]


def readings(path):
    return {line["step"]: line for line in lines(path) if "hessian_max" in line or "gauge_refused" in line}


@pytest.mark.parametrize(
    "settings",
    [
        ("model.strategy=ngpt", "train.accumulate=2", "model.dropout=0.2"),
        ("options.qk_clip=0.01", "moe.experts=4", "moe.balance=bias", "train.precision=bf16"),
        ("train.precision=fp8", "train.recompute=full", "options.norm_scale=frozen", "gauge.products=differences"),
    ],
    ids=" ".join,
)
def test_losses_and_weights_are_the_same_with_and_without(recipe, tmp_path, settings):
    """Buffers that only training touches (QK-clip's largest logit, the router's counts) included."""
    by_differences = "gauge.products=differences" in settings
    train(recipe, tmp_path / "on", *(ON[:2] if by_differences else ON), *settings)
    train(recipe, tmp_path / "off", *settings, "gauge.every=0")
    assert losses(tmp_path / "on") == losses(tmp_path / "off")
    name = "checkpoints/step-000006"
    assert weights_of(tmp_path / "on" / name) == weights_of(tmp_path / "off" / name)
    assert list(readings(tmp_path / "on")) == [1, 3, 6]
    assert all(line["hessian_max"] > 0 for line in readings(tmp_path / "on").values())
    assert not readings(tmp_path / "off")


def test_a_resumed_run_has_the_same_losses_and_readings(recipe, tmp_path):
    settings = ("checkpoint.every=2", "model.strategy=simplenorm", *ON, "train.steps=9")
    train(recipe, tmp_path / "straight", *settings)
    config = load_recipe(str(recipe)).resolve(settings)
    shards = prepare(config.data)
    with pytest.raises(Stop):
        start_run(config, shards, tmp_path / "cut", StopAt(3))
    with pytest.raises(Stop):
        resume_run(tmp_path / "cut", shards, StopAt(7))
    resume_run(tmp_path / "cut", shards)
    assert lines(tmp_path / "cut") == lines(tmp_path / "straight")
    assert list(readings(tmp_path / "cut")) == [1, 3, 6, 9]


def test_due_steps_are_logged_with_what_they_cost(recipe, tmp_path):
    train(recipe, tmp_path / "run", *ON, "train.log_every=5", "train.steps=12")
    found = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    found = [line for line in found if line["split"] == "train"]
    assert [line["step"] for line in found] == [1, 3, 5, 6, 9, 10, 12]
    assert [line["step"] for line in found if "gauge_seconds" in line] == [1, 3, 6, 9, 12]
    assert [line["step"] for line in found if "gauge_steps" in line] == [3, 6, 9, 12], (
        "before the first, none to compare"
    )
    assert all(line["gauge_steps"] > 0 for line in found if "gauge_steps" in line)


def test_readings_are_those_of_the_checkpoints(recipe, tmp_path):
    """At step 6, from the weights of checkpoint 5 and the second moments of checkpoint 6, in fp64."""
    settings = ("checkpoint.every=1", "checkpoint.keep=9", "model.d_model=8", "model.d_ff=8", *ON)
    train(recipe, tmp_path / "run", *settings)
    found = readings(tmp_path / "run")[6]
    folder = RunFolder.open(tmp_path / "run")
    config = folder.config()
    source = open_source("run", config, folder, step=5, dtype="fp64")
    sampler = Sampler(prepare(config.data).train, config.train.batch_size, config.train.seq_len, config.seed)
    tokens = torch.from_numpy(sampler.batch(5))[:1]
    (tensors,) = [load_file(path) for path in (tmp_path / "run/checkpoints/step-000006").glob("*00002-of-00002*")]
    names, scales = [name for name, _ in source.model.named_parameters()], []
    for name in names:
        v, step = (tensors[f"optimizer/{key}/{name}"] for key in ("exp_avg_sq", "step"))
        assert float(step) == 6
        root = (v.double() / (1 - config.optim.betas[1] ** 6)).sqrt() + config.optim.eps
        scales.append(root.reshape(-1) ** -0.5)
    whole = LanguageLoss(source.model, [tokens])
    with whole.measuring():
        hessian = whole.hessian()
        for key, operator in (("hessian_max", hessian), ("adam_sharpness", Scaled(hessian, torch.cat(scales)))):
            ((expected,), _) = lanczos(operator, tolerance=1e-8)
            assert found[key] == pytest.approx(expected.value, rel=1e-2)
    lr = config.optim.lr * lr_factor(5, config.train.steps, config.optim)
    assert found["lr"] == lr
    assert found["adam_threshold"] == pytest.approx(3.8 / (0.1 * lr), rel=1e-5)
    ((name, slot),) = found["slots"].items()
    loss = SlotLoss(source.model, tokens[0], name, 8)
    with loss.measuring():
        for part in ("hessian", "gauss_newton", "curvature"):
            norm = float(torch.linalg.matrix_norm(matrix(getattr(loss, part)()), 2))
            assert slot[part] == pytest.approx(norm, rel=1e-2, abs=1e-8)


def test_compiled_training_graph_is_left_alone(recipe, tmp_path, monkeypatch):
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **more: compiler(function, backend="aot_eager", **more))
    graphs = {}
    for name, settings in (("on", ON), ("off", ())):
        torch._dynamo.reset()
        counters.clear()
        train(recipe, tmp_path / name, *settings, "train.compile=true")
        graphs[name] = counters["stats"]["unique_graphs"]
    assert losses(tmp_path / "on") == losses(tmp_path / "off")
    assert graphs["on"] == graphs["off"] > 0


def test_a_refused_reading_is_told_once_and_the_run_goes_on(recipe, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise UserError("curvature: parameters: nothing is right")

    monkeypatch.setattr("gptnorm.curvature.gauge.refuse_wrong_products", refuse)
    said = []

    class Told(StopAt):
        def note(self, step, words):
            said.append((step, words))

    config = load_recipe(str(recipe)).resolve(ON)
    result = start_run(config, prepare(config.data), tmp_path / "run", Told(-1))
    assert result.status == "finished"
    assert said == [(1, "gauge: no reading: parameters: nothing is right")]
    found = readings(tmp_path / "run")
    assert [line["gauge_refused"] for line in found.values()] == ["parameters: nothing is right"] * 3
    assert not any("hessian_max" in line or "slots" in line for line in found.values())


def test_too_little_memory_for_a_reading_loses_no_run(recipe, tmp_path, monkeypatch):
    def fail(self, tokens, lr):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Gauge, "_read", fail)
    assert train(recipe, tmp_path / "run", *ON).status == "finished"
    assert readings(tmp_path / "run")[3]["gauge_refused"] == "out of memory; lower gauge.sequences"


def test_a_diverging_run_still_writes_json(recipe, tmp_path):
    result = train(recipe, tmp_path / "run", "gauge.every=1", "optim.lr=1e30", "optim.clip=0")
    assert result.status == "diverged"

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs the extra tensorboard")
def test_tensorboard_has_every_number(recipe, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(recipe, tmp_path / "run", *ON)
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    tags = events.Tags()["scalars"]
    assert {"hessian_max/gauge", "adam_sharpness/gauge", "slots.blocks.0.attn.o.curvature/gauge"} <= set(tags)
    assert [event.step for event in events.Scalars("hessian_max/gauge")] == [1, 3, 6]
