"""The watch: right numbers, one line per reading, and a run that cannot tell whether it is watched."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
from cases import tiny_gpt, tokens
from saving import weights_of
from stopping import Stop, StopAt, train
from strategies.plain import Plain, nothing, rms
from torch._dynamo.utils import counters

from gptnorm.config import WatchConfig
from gptnorm.data import Sampler, prepare
from gptnorm.model import build_gpt
from gptnorm.norms import LearnedScale
from gptnorm.recipe import load_recipe
from gptnorm.train.checkpoint import load_model
from gptnorm.train.run import resume_run, start_run
from gptnorm.train.watch import Watch, summarize

ON, OFF = "watch.every=1", "watch.every=0"


def lines(path, name="watch.jsonl"):
    return [json.loads(line) for line in (path / name).read_text().splitlines()]


def losses(path):
    return [(line["step"], line["split"], line["loss"], line.get("grad_norm")) for line in lines(path, "metrics.jsonl")]


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("model.backbone=gpt2", "model.strategy=simplenorm", "train.accumulate=2"),
        ("model.strategy=ngpt",),
        ("options.qk_clip=0.01",),
        ("moe.experts=4", "moe.balance=bias", "train.precision=bf16"),
    ],
    ids=lambda settings: " ".join(settings) or "plain",
)
def test_losses_and_weights_are_the_same_with_and_without(recipe, tmp_path, settings):
    """Buffers that only training touches (QK-clip's largest logit, the router's counts) included."""
    train(recipe, tmp_path / "on", ON, *settings)
    train(recipe, tmp_path / "off", OFF, *settings)
    assert losses(tmp_path / "on") == losses(tmp_path / "off")
    name = "checkpoints/step-000006"
    assert weights_of(tmp_path / "on" / name) == weights_of(tmp_path / "off" / name)
    assert [line["step"] for line in lines(tmp_path / "on")] == [1, 2, 3, 4, 5, 6]
    assert not (tmp_path / "off/watch.jsonl").exists()


def test_resumed_run_has_the_same_losses_and_readings(recipe, tmp_path):
    settings = ("checkpoint.every=2", ON)
    train(recipe, tmp_path / "straight", *settings)
    config = load_recipe(str(recipe)).resolve(settings)
    shards = prepare(config.data)
    with pytest.raises(Stop):
        start_run(config, shards, tmp_path / "cut", StopAt(3))
    with (tmp_path / "cut/watch.jsonl").open("a") as file:
        file.write('{"step": 4, "stre')
    with pytest.raises(Stop):
        resume_run(tmp_path / "cut", shards, StopAt(5))
    resume_run(tmp_path / "cut", shards)
    assert losses(tmp_path / "cut") == losses(tmp_path / "straight")
    assert lines(tmp_path / "cut") == lines(tmp_path / "straight")


def test_readings_come_at_the_first_step_and_every_so_many(recipe, tmp_path):
    train(recipe, tmp_path / "run", "watch.every=4", "train.steps=9")
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 4, 8]


def test_norms_are_those_of_a_plain_forward_pass(recipe, tmp_path):
    """At step 1 the weights are the initial ones, so any other code can compute the readings."""
    train(recipe, tmp_path / "run", ON, "watch.sequences=2", "train.steps=1")
    (reading,) = lines(tmp_path / "run")
    config = load_recipe(str(recipe)).resolve()
    model = build_gpt(config, vocab=257)
    batch = torch.from_numpy(Sampler(prepare(config.data).train, 4, 16, 0).batch(0))[:2, :-1]
    plain = Plain(model)
    plain.scale = model.shape.head_dim**-0.5
    parts = []
    for sequence in batch:
        x = plain.embed(sequence).double()
        plain.p = {name: p.double() for name, p in plain.p.items()}
        a = plain.attend(rms(x, plain.p["blocks.0.own.attn_norm.gain"]), "blocks.0", nothing, nothing)
        f = plain.feed(rms(x + a, plain.p["blocks.0.own.ffn_norm.gain"]), "blocks.0", nothing)
        parts.append((x + a + f, a, f))
    for name, pieces in zip(("stream", "attn", "ffn"), zip(*parts, strict=True), strict=True):
        together = torch.cat(pieces)
        assert reading[f"{name}_norm"] == [pytest.approx(together.norm(dim=-1).mean().item(), rel=1e-4)]
        square = pytest.approx(together.pow(2).mean().item(), rel=1e-4)
        assert [reading["stream_rms"][0] ** 2 if name == "stream" else reading[f"{name}_variance"][0]] == [square]
    assert reading["logit_bound"][0] >= reading["logit_max"][0]
    assert reading["gains"] == {name: {"mean": [1.0], "max": [1.0]} for name in ("attn_norm", "ffn_norm")}


@pytest.mark.parametrize("strategy", ["prenorm", "ngpt"])
def test_update_ratios_are_those_of_the_weights(recipe, tmp_path, strategy):
    """‖W_1 - W_0‖ / ‖W_0‖ from the initial weights and the first checkpoint; projections are part of an update."""
    settings = (f"model.strategy={strategy}", "model.n_layers=2")
    train(recipe, tmp_path / "run", ON, "train.steps=1", *settings)
    config = load_recipe(str(recipe)).resolve(settings)
    old, new = build_gpt(config, vocab=257), build_gpt(config, vocab=257)
    load_model(tmp_path / "run/checkpoints/step-000001", new)
    (reading,) = lines(tmp_path / "run")
    update = reading["update"]
    assert update["blocks"] == [1, 2]
    assert set(update["ends"]) == {"embed", "head"}
    assert list(update["roles"]) == list(old.shape.matrix_roles)
    for (name, a), (_, b) in zip(old.weights(), new.weights(), strict=True):
        ratio = ((b.weight - a.weight).norm() / a.weight.norm()).item()
        found = update["roles"][a.role][a.layer] if name.startswith("blocks.") else update["ends"][a.role]
        assert found == pytest.approx(ratio, rel=1e-4), name
        assert ratio > 0


def test_deep_models_have_the_updates_of_eight_blocks(recipe, tmp_path):
    train(recipe, tmp_path / "run", ON, "train.steps=1", "model.n_layers=11")
    (reading,) = lines(tmp_path / "run")
    blocks = reading["update"]["blocks"]
    assert (len(blocks), blocks[0], blocks[-1]) == (8, 1, 11)
    assert all(len(column) == 8 for column in reading["update"]["roles"].values())
    assert len(reading["stream_norm"]) == 11


def test_gains_that_trained_show(recipe, tmp_path):
    train(recipe, tmp_path / "run", ON, "model.strategy=simplenorm", "optim.lr=0.1")
    first, *_, last = lines(tmp_path / "run")
    assert set(last["gains"]) == {
        *(f"attn.{role}" for role in "qkvo"),
        *(f"ffn.{role}" for role in ("gate", "up", "down")),
    }
    assert first["gains"]["attn.q"]["max"] == [1.0]
    assert last["gains"]["attn.q"]["max"][0] > last["gains"]["attn.q"]["mean"][0] > 0
    assert last["gains"]["attn.q"]["max"][0] > 1.0


def test_two_scales_after_one_map_are_told_apart():
    model = tiny_gpt("simplenorm", "llama2")
    after = model.blocks[1].attn.q.after
    after.append(LearnedScale(size=32, init=3.0, scale=1.0).build())
    watch = Watch(model, WatchConfig(every=1), contextlib.nullcontext)
    watch.before_step(1, tokens())
    reading = watch.after_step()
    assert reading is not None
    gains = reading["gains"]
    assert "attn.q" not in gains
    assert gains["attn.q.0"]["mean"] == [1.0, 1.0]
    assert gains["attn.q.1"]["mean"] == [None, 3.0]
    assert gains["attn.k"]["mean"] == [1.0, 1.0]


def test_compiled_training_graph_is_left_alone(recipe, tmp_path, monkeypatch):
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **more: compiler(function, backend="aot_eager", **more))
    graphs = {}
    for name, setting in (("on", ON), ("off", OFF)):
        torch._dynamo.reset()
        counters.clear()
        train(recipe, tmp_path / name, setting, "train.compile=true")
        graphs[name] = counters["stats"]["unique_graphs"]
    assert losses(tmp_path / "on") == losses(tmp_path / "off")
    assert graphs["on"] == graphs["off"] > 0


def test_a_diverging_run_still_writes_json(recipe, tmp_path):
    result = train(recipe, tmp_path / "run", ON, "optim.lr=1e30", "optim.clip=0")
    assert result.status == "diverged"

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    for line in (tmp_path / "run/watch.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_summary_is_the_worst_over_blocks(recipe, tmp_path):
    train(recipe, tmp_path / "run", ON, "model.n_layers=3", "train.steps=1")
    (reading,) = lines(tmp_path / "run")
    found = summarize(reading)
    assert found["stream_rms"] == max(reading["stream_rms"])
    assert found["update_ratio"] >= reading["update"]["ends"]["head"]
    reading["stream_rms"] = [None, None, None]
    assert "stream_rms" not in summarize(reading)
