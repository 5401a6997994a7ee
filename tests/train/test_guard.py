"""Which updates are left out, against plain numpy, and what leaving one out does."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stopping import train

from gptnorm.config import GuardConfig
from gptnorm.data import prepare
from gptnorm.recipe import load_recipe
from gptnorm.report.html import write_run_report
from gptnorm.train.guard import Guard
from gptnorm.train.loop import Trainer
from gptnorm.train.parallel import open_world
from gptnorm.train.progress import Silent
from gptnorm.train.run_folder import RunFolder

VALUES = st.floats(min_value=1e-3, max_value=1e3) | st.sampled_from([math.nan, math.inf])


@settings(max_examples=60, deadline=None)
@given(pairs=st.lists(st.tuples(VALUES, VALUES), max_size=60), sigmas=st.sampled_from([0.5, 1.0, 3.0]))
def test_judges_as_plain_numpy(pairs, sigmas):
    guard = Guard(GuardConfig(sigmas=sigmas, window=16), torch.device("cpu"))
    history: list[tuple[float, float]] = []
    skipped, first_bad = 0, 0
    for update, pair in enumerate(pairs, start=1):
        loss, norm = (torch.tensor(value, dtype=torch.float64) for value in pair)
        found = guard.judge(update, loss, norm).item()
        finite = all(map(math.isfinite, pair))
        if not finite and not first_bad:
            first_bad = update
        spike = False
        if len(history) >= 16 and not first_bad:
            last = np.array(history[-16:])
            spike = bool((np.array(pair) > last.mean(0) + sigmas * last.std(0, ddof=1)).any())
        skipped += spike
        if finite:
            history.append(pair)
        assert found == float(bool(first_bad) or spike)
    guard.look()
    assert (guard.nonfinite_at, guard.skipped) == (first_bad, skipped)


def trainer_of(recipe, *changes):
    config = load_recipe(str(recipe)).resolve(changes)
    return Trainer(config, prepare(config.data), open_world(config), Silent())


def run(trainer, path):
    folder = RunFolder(path)
    folder.begin(trainer.config, {})
    return trainer.run(folder)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_spike_is_left_out_whole(recipe, tmp_path, name):
    """At update 21 the gradient is a thousand times too long: weights and moments stay as they were, bit by bit."""
    trainer = trainer_of(
        recipe, "guard.sigmas=6", "guard.window=16", "train.steps=22", "optim.clip=0", f"optim.name={name}"
    )
    kept: dict[str, torch.Tensor] = {}
    compared = []

    def spike(grad):
        if trainer.step == 20:
            kept.update({key: value.clone() for key, value in trainer.tensors().items()})
            return grad * 1000
        if trainer.step == 21:
            now = trainer.tensors()
            compared.extend(torch.equal(now[key], value) for key, value in kept.items() if "guard" not in key)
        return grad

    trainer.model.blocks[0].own.attn_norm.gain.register_hook(spike)
    result = run(trainer, tmp_path / "run")
    assert (result.status, result.step, result.skipped) == ("finished", 22, 1)
    assert compared
    assert all(compared)
    found = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in found if line["split"] == "train"] == [0] * 20 + [1, 1]
    assert json.loads((tmp_path / "run/status.json").read_text())["skipped"] == 1
    page = write_run_report(tmp_path / "run").read_text()
    assert re.search(r"Updates left out as spikes</dt>\s*<dd[^>]*>1<", page)


def test_a_number_that_is_not_finite_is_found_late_and_has_changed_nothing(recipe, tmp_path):
    """Looked at every fifth step: the weights are still those that met it, and it is named."""
    trainer = trainer_of(recipe, "train.log_every=5", "train.steps=20", "watch.every=0")
    kept = {}

    def spoil(grad):
        if trainer.step == 6:
            kept.update({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
            return grad * math.inf
        return grad

    trainer.model.blocks[0].own.attn_norm.gain.register_hook(spoil)
    result = run(trainer, tmp_path / "run")
    assert (result.status, result.step) == ("diverged", 6)
    assert result.reason == "gradient of blocks.0.own.attn_norm.gain"
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, kept[name]), name
    found = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in found] == [5]


def test_no_step_waits_for_the_host(recipe, tmp_path, monkeypatch):
    """Numbers are taken from the device when they are logged, and not in between."""
    waits = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, real=real: (waits.append(1), real(self))[1])
    counts = {}
    for every in (1, 20, 40):
        waits.clear()
        settings = (f"train.log_every={every}", "train.steps=40", "guard.sigmas=6", "guard.window=16", "watch.every=0")
        train(recipe, tmp_path / str(every), *settings)
        counts[every] = len(waits)
    assert counts[20] == counts[40] + 1
    assert counts[1] == counts[40] + 39
