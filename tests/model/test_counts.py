"""Parameter counts: the published ones to the last digit, the others as formulas."""

from __future__ import annotations

import pytest
import torch
from cases import BACKBONES, ROWS, Row, feedforwards, tiny_shape

from gptnorm.config import BackboneName, InitConfig, ModelConfig, MoEConfig
from gptnorm.model import GPT
from gptnorm.model.backbones import make_shape
from gptnorm.model.presets import PRESETS, preset_settings
from gptnorm.shape import Shape
from gptnorm.strategies import make_strategy

PUBLISHED = [
    ("llama2", "1B", "prenorm", 1_055_991_808),
    ("llama2", "1B", "prenorm_qknorm", 1_056_065_536),
    ("llama2", "1B", "simplenorm", 1_056_305_152),
    ("llama2", "7B", "prenorm", 6_738_415_616),
    ("llama2", "7B", "prenorm_qknorm", 6_738_677_760),
    ("llama2", "7B", "simplenorm", 6_739_513_344),
    ("llama2", "1B-7B", "prenorm_qknorm", 6_919_161_856),
    ("llama3", "8B", "prenorm", 8_030_261_248),
    ("llama3", "8B", "prenorm_qknorm", 8_030_425_088),
    ("llama3", "8B", "simplenorm", 8_031_375_360),
]
MILLIONS = {"20M": 19.8, "39M": 38.8, "67M": 66.9, "102M": 102.0, "134M": 134.2, "162M": 162.5, "271M": 271.2}


def count(backbone: BackboneName, shape: Shape, strategy: str) -> int:
    with torch.device("meta"):
        model = GPT(shape, make_strategy(strategy, {}), backbone=backbone, init=InitConfig())
    return sum(p.numel() for p in model.parameters())


def preset_shape(backbone: BackboneName, preset: str) -> Shape:
    tree = preset_settings(backbone, preset)
    return make_shape(ModelConfig(backbone=backbone, **tree["model"]), MoEConfig(**tree["moe"]), vocab=0, context=1024)


@pytest.mark.parametrize(("backbone", "preset", "strategy", "expected"), PUBLISHED)
def test_published_counts(backbone: BackboneName, preset: str, strategy: str, expected: int) -> None:
    assert count(backbone, preset_shape(backbone, preset), strategy) == expected


@pytest.mark.parametrize("preset", MILLIONS)
def test_small_llama_counts(preset: str) -> None:
    assert count("llama2", preset_shape("llama2", preset), "simplenorm") / 1e6 == pytest.approx(
        MILLIONS[preset], abs=0.06
    )


def test_nanogpt_counts() -> None:
    # nanoGPT prints 124.34M, 353.77M and 773.43M (gpt2, -medium, -large) with V = 50257 and biases;
    # here by its own formula without biases and V = 50304: 12 d^2 + 2 d a block, tables, final norm.
    for preset, tree in PRESETS["gpt2"].items():
        d, layers = tree["model"]["d_model"], tree["model"]["n_layers"]
        expected = layers * (12 * d * d + 2 * d) + (50_304 + 1024) * d + d
        assert count("gpt2", preset_shape("gpt2", preset), "prenorm") == expected


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.strategy)
@pytest.mark.parametrize(
    ("backbone", "moe"), [*((b, False) for b in BACKBONES), ("llama2", True), ("llama3", True)], ids=str
)
def test_counts_as_formulas(row: Row, backbone: BackboneName, moe: bool) -> None:
    s = tiny_shape(backbone, moe)
    attention = 2 * s.d * s.d + 2 * s.d * s.d_kv
    feedforward = (3 if s.gated else 2) * s.d * s.d_ff * feedforwards(s)
    router = s.experts.routed * s.d if s.experts else 0
    tables = s.vocab * s.d * (1 if s.tied else 2) + (0 if s.rope_theta else s.context * s.d)
    expected = s.n_layers * (attention + feedforward + router) + tables + row.extra(s)
    assert count(backbone, s, row.strategy) == expected
