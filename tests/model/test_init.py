"""Initialisation against the published tables."""

from __future__ import annotations

import math

import pytest
import torch
from cases import tiny_gpt, tiny_shape

from gptnorm.config import InitConfig
from gptnorm.model import GPT
from gptnorm.model.init import block_std
from gptnorm.strategies import make_strategy


def stds(model: GPT) -> dict[str, float]:
    return {name: owner.weight.std().item() for name, owner in model.weights()}


def close(value: float, expected: float, numbers: int) -> bool:
    """Within five standard errors of a sample standard deviation."""
    return abs(value / expected - 1) < 5 / math.sqrt(2 * numbers)


def test_llama_table() -> None:
    """simplegpt.md section 1.2."""
    shape = tiny_shape("llama2", d_model=256, n_layers=3, d_ff=512)
    model = GPT(shape, make_strategy("prenorm", {}), backbone="llama2", init=InitConfig(std="published"))
    for name, owner in model.weights():
        depth = math.sqrt(2 * (owner.layer + 1))
        expected = {
            "embed": 1.0,
            "q": 0.02,
            "k": 0.02,
            "v": 0.02,
            "gate": 0.02,
            "o": 0.02 / depth,
            "down": 0.02 / depth,
            "up": 0.02 / depth,
            # cut at three standard deviations, which takes 1.3 % off
            "head": 256**-0.5 * 0.98658,
        }[owner.role]
        assert close(owner.weight.std().item(), expected, owner.weight.numel()), name
    assert model.head.weight.abs().max() <= 3 * 256**-0.5
    assert model.embed.weight.abs().max() > 3


def test_gpt2_table() -> None:
    """simplegpt.md section 2.3: nanoGPT's 0.02, c_proj 0.02 / sqrt(2 L)."""
    shape = tiny_shape("gpt2", d_model=256, n_layers=3, d_ff=1024)
    model = GPT(shape, make_strategy("prenorm", {}), backbone="gpt2", init=InitConfig(std="published"))
    for name, owner in model.weights():
        expected = 0.02 / math.sqrt(6) if owner.role in ("o", "down") else 0.02
        assert close(owner.weight.std().item(), expected, owner.weight.numel()), name


def test_twin_and_number() -> None:
    wide, narrow = tiny_shape("llama2", d_model=2048), tiny_shape("llama2", d_model=64)
    assert block_std(InitConfig(std="twin"), "q", wide) == pytest.approx(0.02)
    assert block_std(InitConfig(std="twin"), "q", narrow) == pytest.approx(0.02 * math.sqrt(32))
    assert block_std(InitConfig(std=0.3), "q", narrow) == 0.3


def test_twin_leaves_embedding_and_head_alone() -> None:
    shape = tiny_shape("llama2", d_model=64)
    spread = {
        std: stds(GPT(shape, make_strategy("prenorm", {}), backbone="llama2", init=InitConfig(std=std)))
        for std in ("published", "twin")
    }
    for name, published in spread["published"].items():
        factor = 1.0 if name in ("embed", "head") else math.sqrt(2048 / 64)
        assert spread["twin"][name] == pytest.approx(published * factor, rel=1e-3), name


def test_strategies_start_from_the_same_numbers() -> None:
    one, other = tiny_gpt("prenorm", "llama2"), tiny_gpt("simplenorm", "llama2")
    names = {name for name, _ in one.weights()}
    assert names == {name for name, _ in other.weights()}
    for name in names:
        assert torch.equal(one.get_parameter(f"{name}.weight"), other.get_parameter(f"{name}.weight")), name


def test_seeds_differ_and_repeat() -> None:
    first, again, other = (tiny_gpt("prenorm", "llama2", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.embed.weight, again.embed.weight)
    assert not torch.equal(first.embed.weight, other.embed.weight)
    blocks = first.blocks[0].attn.q.weight, first.blocks[1].attn.q.weight
    assert not torch.equal(*blocks)
