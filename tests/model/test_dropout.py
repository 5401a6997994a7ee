"""Dropout: where it stands, how large it is, and that it is not there without being asked for."""

from __future__ import annotations

import pytest
import torch
from cases import BACKBONES, tiny_gpt, tokens
from torch import Tensor, nn

from gptnorm.config import BackboneName, Config, ModelConfig
from gptnorm.model import GPT, build_gpt

P = 0.25


def loss_and_gradients(model: GPT) -> list[Tensor]:
    model.zero_grad()
    total = model.objective(tokens()).total
    total.backward()
    return [total.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_measurements_are_left_alone(backbone: BackboneName) -> None:
    plain, dropping = (tiny_gpt("prenorm", backbone, dropout=p).eval() for p in (0.0, P))
    for a, b in zip(loss_and_gradients(plain), loss_and_gradients(dropping), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(plain(tokens()), dropping(tokens()))


def test_none_draws_no_numbers() -> None:
    """A run without dropout is the same as before there was any."""
    model = tiny_gpt("prenorm", "gpt2", dropout=0.0)
    state = torch.get_rng_state()
    loss_and_gradients(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_config_asks_for_it() -> None:
    model = ModelConfig(strategy="prenorm", d_model=16, n_layers=1, n_heads=2, d_ff=16, dropout=P)
    assert build_gpt(Config(model=model), vocab=16).blocks[0].dropout == P


@pytest.mark.parametrize("backbone", ["gpt2", "llama3"])
def test_what_is_dropped(backbone: BackboneName) -> None:
    """The embedding's output, positions included, and each branch's, its factor included; the rest is 1/(1-p)."""
    torch.manual_seed(0)
    wide = {"d_model": 256, "n_heads": 4, "n_layers": 1}
    model = tiny_gpt("prenorm", backbone, dropout=P, options={"scale_mode": "forward"}, **wide)
    ids = tokens(batch=16)
    exact: dict[str, Tensor] = {}
    block = model.blocks[0]
    norms = block.own
    norms.attn_norm.register_forward_pre_hook(lambda m, args: exact.__setitem__("dropped x", args[0].detach()))
    norms.ffn_norm.register_forward_pre_hook(lambda m, args: exact.__setitem__("x + a", args[0].detach()))
    block.register_forward_hook(lambda m, args, out: exact.__setitem__("x + a + f", out[0][0].detach()))
    for name in ("attn", "ffn"):
        _keep_output(getattr(block, name), name, exact)
    model.features(ids)

    x = model.embed(ids).detach()
    if model.position is not None:
        x = x + model.position(torch.arange(ids.shape[1])).detach()
    sums = {"x": exact["dropped x"], "a": exact["x + a"] - exact["dropped x"], "f": exact["x + a + f"] - exact["x + a"]}
    whole = {"x": x, "a": exact["attn"] * block.scale.attn, "f": exact["ffn"] * block.scale.ffn}
    masks = {}
    for name, got in sums.items():
        large = whole[name].abs() > 0.1 * whole[name].square().mean().sqrt()
        ratio = (got / whole[name])[large]
        dropped = ratio.abs() < 0.5
        torch.testing.assert_close(ratio[~dropped], torch.full_like(ratio[~dropped], 1 / (1 - P)), rtol=1e-2, atol=0)
        # 65,536 independent draws: four standard deviations.
        assert dropped.float().mean().item() == pytest.approx(P, abs=4 * (P * (1 - P) / len(ratio)) ** 0.5)
        masks[name] = ((got / whole[name]).abs() < 0.5).float()
    assert torch.corrcoef(torch.stack([m.flatten() for m in masks.values()])).triu(1).abs().max() < 0.02


def _keep_output(module: nn.Module, name: str, into: dict[str, Tensor]) -> None:
    module.register_forward_hook(lambda m, args, y: into.__setitem__(name, y.detach()))


def test_branches_of_experts_are_dropped_too() -> None:
    model = tiny_gpt("prenorm", "llama3", dropout=P, moe=True)
    assert not torch.equal(model(tokens()), model(tokens()))
    model.eval()
    assert torch.equal(model(tokens()), model(tokens()))
