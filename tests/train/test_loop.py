from __future__ import annotations

import contextlib
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import DENSE, tiny_gpt, tokens
from saving import weights_of
from stopping import Stop, StopAt, train

from gptnorm.config import Config
from gptnorm.data import prepare
from gptnorm.errors import SharedError, UserError
from gptnorm.model import build_gpt
from gptnorm.recipe import load_recipe
from gptnorm.strategies.base import BranchScale
from gptnorm.train import agree, loop
from gptnorm.train import run as run_module
from gptnorm.train.nonfinite import first_nonfinite
from gptnorm.train.parallel import open_world
from gptnorm.train.progress import Silent
from gptnorm.train.run import resume_run, start_run
from gptnorm.train.run_folder import RunFolder


def lines(path):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    text = (path / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def losses(path):
    return [(line["step"], line["split"], line["loss"]) for line in lines(path)]


def test_overfits_one_batch(recipe, tmp_path, text):
    # One window's worth of tokens: every batch is the same few windows.
    folder = tmp_path / "shards"
    folder.mkdir()
    tokens = np.random.default_rng(0).integers(0, 50, 17).astype("<u2")
    tokens.tofile(folder / "train.bin")
    tokens.tofile(folder / "val.bin")
    result = train(
        recipe, tmp_path / "run", f"data.path={folder}", "model.vocab_size=50", "train.steps=150", "optim.lr=0.02"
    )
    assert lines(tmp_path / "run")[0]["loss"] > 0.8 * math.log(50)
    assert result.val_loss is not None
    assert result.val_loss < 0.1


def test_same_seed_same_losses_other_seed_others(recipe, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(recipe, tmp_path / name, f"seed={seed}")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert losses(tmp_path / "a") != losses(tmp_path / "c")


def test_metrics_have_every_step_once_and_validation_last(recipe, tmp_path):
    result = train(recipe, tmp_path / "run", "train.eval_every=2")
    steps = [(line["step"], line["split"]) for line in lines(tmp_path / "run")]
    assert steps == [(s, k) for s in range(1, 7) for k in (("train", "val") if s % 2 == 0 else ("train",))]
    assert lines(tmp_path / "run")[-1]["loss"] == result.val_loss


@pytest.mark.parametrize("batch_size", [1, 4, 5, 16])
def test_validation_is_the_mean_over_the_held_out_windows(recipe, tmp_path, text, batch_size):
    """At rate zero the weights are those of step 0, so that any other code can compute the loss.

    Runs with other batches are judged by the same windows.
    """
    size = f"train.batch_size={batch_size}"
    result = train(recipe, tmp_path / "run", "optim.lr=0", "train.steps=1", "train.eval_sequences=12", size)
    config = load_recipe(str(recipe)).resolve()
    shards = prepare(config.data)
    model = build_gpt(config, vocab=257)
    val = torch.from_numpy(shards.val.astype(np.int64))
    count = (len(val) - 1) // 16
    starts = [i * count // 12 * 16 for i in range(12)]
    one = [
        torch.nn.functional.cross_entropy(model(val[None, s : s + 16])[0], val[s + 1 : s + 17]).item() for s in starts
    ]
    assert result.val_loss == pytest.approx(sum(one) / 12, rel=1e-5)


def test_seconds_are_those_of_training(recipe, tmp_path, monkeypatch):
    """On a clock that validations move by 100 and updates by 1, also where the run is stopped and resumed."""
    clock, validate, clip = [0.0], loop.validation_loss, loop.clip_gradients

    def ticking(function, seconds):
        def call(*args, **settings):
            clock[0] += seconds
            return function(*args, **settings)

        return call

    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(loop, "validation_loss", ticking(validate, 100))
    monkeypatch.setattr(loop, "clip_gradients", ticking(clip, 1))
    config = load_recipe(str(recipe)).resolve(["train.eval_every=2", "checkpoint.every=2"])
    shards = prepare(config.data)
    with pytest.raises(Stop):
        start_run(config, shards, tmp_path / "run", StopAt(3))
    result = resume_run(tmp_path / "run", shards)
    assert clock[0] > 300
    assert result.seconds == 6
    assert [line["seconds"] for line in lines(tmp_path / "run") if "seconds" in line] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_is_one_big_batch(recipe, tmp_path, parts):
    train(recipe, tmp_path / "one", "optim.clip=0")
    train(recipe, tmp_path / "many", "optim.clip=0", f"train.accumulate={parts}")
    for a, b in zip(lines(tmp_path / "one"), lines(tmp_path / "many"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        if a["split"] == "train":
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


@pytest.mark.parametrize(("strategy", "backbone"), DENSE)
def test_resume_after_any_stops_is_bit_identical(recipe, tmp_path, strategy, backbone):
    settings = (f"model.strategy={strategy}", f"model.backbone={backbone}", "checkpoint.every=2", "train.eval_every=3")
    train(recipe, tmp_path / "straight", *settings)
    config = load_recipe(str(recipe)).resolve(settings)
    shards = prepare(config.data)
    with pytest.raises(Stop):
        start_run(config, shards, tmp_path / "cut", StopAt(3))
    with pytest.raises(Stop):
        resume_run(tmp_path / "cut", shards, StopAt(5))
    torch.manual_seed(99)  # the global generator must not matter
    resume_run(tmp_path / "cut", shards)
    assert losses(tmp_path / "cut") == losses(tmp_path / "straight")
    name = "checkpoints/step-000006"
    assert weights_of(tmp_path / "cut" / name) == weights_of(tmp_path / "straight" / name)


def test_resuming_a_finished_run_repeats_its_result(recipe, tmp_path):
    first = train(recipe, tmp_path / "run")
    before = losses(tmp_path / "run")
    again = resume_run(tmp_path / "run", prepare(load_recipe(str(recipe)).resolve().data))
    assert (again.status, again.val_loss) == ("finished", first.val_loss)
    assert losses(tmp_path / "run") == before


def test_resolved_config_reproduces_the_run(recipe, tmp_path):
    train(recipe, tmp_path / "a", f"run.dir={tmp_path / 'a'}", "optim.schedule=wsd", "strategy.eps=1e-4")
    train(tmp_path / "a" / "config.toml", tmp_path / "b", f"run.dir={tmp_path / 'b'}")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_resume_refuses_other_text(recipe, tmp_path, text):
    mine = tmp_path / "mine.txt"
    shutil.copy(text, mine)
    train(recipe, tmp_path / "run", f"data.path={mine}")
    mine.write_text(text.read_text().replace("fox", "cat"))
    config = load_recipe(str(recipe)).resolve([f"data.path={mine}"])
    with pytest.raises(UserError, match=r"data\.path"):
        resume_run(tmp_path / "run", prepare(config.data))


def test_divergence_stops_before_the_update(recipe, tmp_path, monkeypatch):
    """Gradients are spoilt at step 3; the weights must be those after step 2, and the file stays JSON."""
    config = load_recipe(str(recipe)).resolve()
    trainer = loop.Trainer(config, prepare(config.data), open_world(config), Silent())
    kept = {}
    weight = trainer.model.blocks[0].own.attn_norm.gain

    def spoil(grad):
        if trainer.step == 2:
            kept.update({n: p.detach().clone() for n, p in trainer.model.named_parameters()})
            return grad * math.inf
        return grad

    weight.register_hook(spoil)
    folder = RunFolder(tmp_path / "run")
    folder.begin(config, {})
    result = trainer.run(folder)
    assert (result.status, result.step, result.val_loss) == ("diverged", 2, None)
    assert result.reason == "gradient of blocks.0.own.attn_norm.gain"
    assert kept
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, kept[name]), name
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2]
    assert json.loads((tmp_path / "run/status.json").read_text())["status"] == "diverged"
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.parametrize(
    ("weight", "named"),
    [
        ("router.weight", "output of blocks.0.ffn.router"),
        ("routed.up.weight", "output of blocks.0.ffn.routed.up"),
        ("branch gain", "output of blocks.0.ffn"),
    ],
)
def test_parts_of_a_mixture_are_named_when_they_overflow(weight, named):
    """Weights are finite; the logits, an expert's map, or the gained sum alone are not."""
    model = tiny_gpt("prenorm", "llama2", moe=True)
    ffn = model.blocks[0].ffn
    with torch.no_grad():
        if weight == "branch gain":
            ffn.gain = 1e39
        else:
            ffn.get_parameter(weight).fill_(1e38).mul_(torch.tensor([1.0, -1.0]).repeat(16))
    assert first_nonfinite(model, lambda: model.objective(tokens()).total) == named


def test_a_blocks_sum_is_named_when_it_overflows():
    model = tiny_gpt("prenorm", "llama2")
    model.blocks[0].scale = BranchScale(ffn=1e39)
    assert first_nonfinite(model, lambda: model.objective(tokens()).total) == "output of blocks.0"


def test_bad_data_is_found_before_the_folder_is_made(recipe, tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    tokens = np.arange(200, dtype="<u2")
    tokens.tofile(folder / "train.bin")
    tokens.tofile(folder / "val.bin")
    for settings, key in (
        ((), "model.vocab_size"),
        (("model.vocab_size=100",), "model.vocab_size"),
        (("model.vocab_size=70000",), "model.vocab_size"),
        (("model.vocab_size=200", "train.seq_len=200"), "train.seq_len"),
        (("model.vocab_size=200", "train.device=cuda:99"), "train.device"),
    ):
        with pytest.raises(UserError, match=key):
            train(recipe, tmp_path / "run", f"data.path={folder}", *settings)
        assert not (tmp_path / "run").exists()


def test_bf16_trains_close_to_fp32(recipe, tmp_path):
    train(recipe, tmp_path / "fp32")
    train(recipe, tmp_path / "bf16", "train.precision=bf16")
    a, b = losses(tmp_path / "fp32"), losses(tmp_path / "bf16")
    assert a != b, "autocast did nothing"
    assert [x[2] for x in a] == pytest.approx([x[2] for x in b], rel=0.02)


@pytest.mark.parametrize("settings", [(), ("moe.experts=4", "moe.shared=1", "model.d_ff=16")], ids=["dense", "experts"])
def test_fp8_trains_less_close_to_fp32(recipe, tmp_path, settings):
    """The largest differences seen here: 0.04 % in bf16, 0.3 % in fp8."""
    found = {}
    for precision in ("fp32", "bf16", "fp8"):
        train(recipe, tmp_path / precision, f"train.precision={precision}", "train.steps=40", *settings)
        found[precision] = [loss for _, _, loss in losses(tmp_path / precision)]
    assert found["fp32"][-1] < found["fp32"][0] - 1, "nothing was learned"
    near, far = (max(abs(a / b - 1) for a, b in zip(found[p], found["fp32"], strict=True)) for p in ("bf16", "fp8"))
    assert 2 * near < far < 0.01


@pytest.mark.slow
def test_compiled_run_gives_the_same_losses(recipe, tmp_path):
    train(recipe, tmp_path / "eager")
    train(recipe, tmp_path / "compiled", "train.compile=true")
    for a, b in zip(losses(tmp_path / "eager"), losses(tmp_path / "compiled"), strict=True):
        assert a[2] == pytest.approx(b[2], rel=1e-4)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("error", [None, SharedError("of all"), UserError("of one"), KeyboardInterrupt()])
def test_nccl_s_groups_are_not_closed_on_an_error_of_one_process(monkeypatch, device, error):
    """NCCL waits there for the other processes, which know nothing of it, so that it would never be told."""
    closed = []
    monkeypatch.setattr(run_module, "open_world", lambda config: SimpleNamespace(device=torch.device(device)))
    monkeypatch.setattr(run_module, "close_world", closed.append)
    with contextlib.suppress(UserError, KeyboardInterrupt), run_module._opened_world(Config()):
        if error is not None:
            raise error
    waits = device == "cuda" and not (error is None or isinstance(error, SharedError))
    assert len(closed) == (0 if waits else 1)


@pytest.mark.parametrize(
    ("mine", "all_say", "told"),
    [
        ("too short", ["too short", "too short"], "^too short$"),
        ("", ["", "too short"], r"^too short \(process 1\)$"),
        ("too long", ["too long", "too short"], r"^too long \(process 0\)$"),
    ],
)
def test_what_keeps_one_process_from_going_on_keeps_all(monkeypatch, mine, all_say, told):
    def gathered(words, group):
        assert words == {"": mine}
        return {"": all_say}

    def begin():
        with agree.together("all of them"):
            if mine:
                raise UserError(mine)

    monkeypatch.setattr(agree, "gathered", gathered)
    with pytest.raises(SharedError, match=told):
        begin()
