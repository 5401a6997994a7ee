"""The scale of activations: against a forward pass by hand, known exponents, and norms that do not bound."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gptnorm.curvature.activation import slots_of
from gptnorm.model import build_gpt
from gptnorm.recipe import load_recipe
from gptnorm.theory import activation

WIDTHS = (16, 32, 64)


@pytest.fixture
def recipe_of(tmp_path):
    def made(strategy):
        path = tmp_path / "one.toml"
        path.write_text(
            f'[model]\nstrategy = "{strategy}"\nn_layers = 2\nn_heads = 2\nffn_multiple = 8\n'
            '[data]\npath = "sotu"\n[train]\nseq_len = 32\ndevice = "cpu"\n'
        )
        return load_recipe(str(path))

    return made


def test_sizes_of_a_slot_by_hand(recipe_of):
    config = recipe_of("prenorm").resolve(["model.d_model=16"])
    model = build_gpt(config, vocab=64).eval()
    tokens = torch.randint(0, 64, (1, 9), generator=torch.Generator().manual_seed(0))
    found = activation.read(model, tokens)
    with torch.no_grad():
        h = model.embed.weight[tokens[0, :-1]]
        x = F.rms_norm(h, (16,), None, 1e-5)
        y = x @ slots_of(model)["blocks.0.attn.q"].weight.mT
    sizes, _ = found["blocks.0.attn.q"]
    assert sizes.d == 16
    assert sizes.x == pytest.approx(float(x.square().mean().sqrt()), rel=1e-5)
    assert sizes.y == pytest.approx(float(y.square().mean().sqrt()), rel=1e-5)
    assert set(found) == {name for name in slots_of(model) if name.startswith("blocks.")}


def test_exponents_and_verdicts(recipe_of):
    """RMS(Wx) = std √d RMS(x): with 0.02 ‖Wx‖ goes as d, with the fan-in twin as √d, with a norm as √d under both."""
    found = activation.check_activation([0, 1], WIDTHS, recipe_of("prenorm"))
    assert found.verdict == "depends"
    assert found.numbers["exponent.prenorm (published).attn.q"] == pytest.approx(1.0, abs=0.1)
    assert found.numbers["exponent.prenorm (twin).attn.q"] == pytest.approx(0.5, abs=0.1)
    assert "not kept by prenorm (published)" in found.reason
    found = activation.check_activation([0, 1], WIDTHS, recipe_of("simplenorm"))
    assert found.verdict == "holds"
    assert all(value == pytest.approx(0.5, abs=0.05) for value in found.numbers.values())
    rows = {row[0]: row for row in found.tables[0].rows}
    assert rows["simplenorm (twin)"][1:3] == [7, 0]


def test_published_alone_does_not_hold(recipe_of, monkeypatch):
    monkeypatch.setattr(activation, "INITS", ("published",))
    assert activation.check_activation([0, 1], WIDTHS, recipe_of("prenorm")).verdict == "does not hold"


def test_a_norm_that_does_not_bound(recipe_of):
    bare = {"nothing": lambda z, gain: gain * z}
    found = activation.check_activation([0, 1], (16, 32), recipe_of("simplenorm"), bare)
    assert found.verdict == "does not hold"
    assert "is broken for nothing" in found.reason


def test_bands_are_met():
    """An axis alone has ‖y‖ = |γ_i| √d: both ends of RMSNorm's band are reached, a layernorm's are not."""
    for band in activation.bands([0, 1], (16, 64)):
        assert band.kept
        if band.kind == "rmsnorm":
            assert band.low == pytest.approx(band.least, rel=1e-12)
            assert band.high == pytest.approx(band.most, rel=1e-12)
        else:
            assert band.low > band.least * 1.01


def test_strategies_of_a_recipe(recipe_of):
    assert activation.strategies_of(recipe_of("prenorm")) == [None]
    assert len(activation.strategies_of(load_recipe("quickstart"))) == 3


def test_frozen_norms_and_norms_that_are_used_twice_are_measured_too(recipe_of, tmp_path):
    found = activation.measure(recipe_of("ngpt"), [0], (16, 32))
    assert {model.name for model in found} == {"ngpt (published)", "ngpt (twin)"}
    path = tmp_path / "one.toml"
    path.write_text(path.read_text().replace("ngpt", "prenorm") + '[options]\nnorm_scale = "frozen"\n')
    assert len(activation.measure(load_recipe(str(path)), [0], (16, 32))) == 2
