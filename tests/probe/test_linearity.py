"""1 - R² of the feed-forwards against numpy's least squares on captured tensors, and maps whose value is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from gptnorm.model import build_gpt
from gptnorm.probe.linearity import feedforward_nonlinearity
from gptnorm.recipe import load_recipe

SIZE = ("model.d_model=16", "model.n_layers=2", "model.n_heads=2", "model.vocab_size=64")


def gpt(name="laptop/simplenorm", *settings):
    config = load_recipe(name).resolve([*SIZE, *settings])
    return build_gpt(config, vocab=64)


def batches(count=3, size=8, length=32):
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(0, 64, (size, length + 1), generator=draw) for _ in range(count)]


@pytest.mark.parametrize("name", ["laptop/prenorm", "laptop/simplenorm", "laptop/angpt", "laptop-moe/prenorm"])
def test_it_is_what_least_squares_leaves(name):
    model, seen = gpt(name), {}
    for layer, block in enumerate(model.blocks):

        def keep(module, inputs, output, layer=layer):
            y = output if isinstance(output, torch.Tensor) else output[0]
            xs, ys = seen.setdefault(layer, ([], []))
            xs.append(inputs[0].detach().flatten(0, 1).numpy())
            ys.append(y.detach().flatten(0, 1).numpy())

        block.ffn.register_forward_hook(keep)
    found = feedforward_nonlinearity(model, batches())
    assert found is not None
    for layer, (xs, ys) in seen.items():
        x, y = (np.concatenate(parts).astype(np.float64) for parts in (xs, ys))
        with_one = np.column_stack([x, np.ones(len(x))])
        map_, _, rank, _ = np.linalg.lstsq(with_one, y, rcond=1e-6)
        share = ((y - with_one @ map_) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()
        assert found[layer] == pytest.approx(share * (len(x) - 1) / (len(x) - rank), rel=1e-6)
    assert model.training


class Replaced(nn.Module):
    """A feed-forward that is some function of each token."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def value_of(function):
    model = gpt("laptop/prenorm")
    for block in model.blocks:
        block.ffn = Replaced(function)
    found = feedforward_nonlinearity(model, batches(12))
    assert found is not None
    return found


def test_an_affine_map_has_none():
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(1))
    assert value_of(lambda x: x @ weight + 3.0) == pytest.approx([0, 0], abs=1e-9)


def test_noise_is_all_of_it():
    draw = torch.Generator().manual_seed(2)
    assert value_of(lambda x: torch.randn(x.shape, generator=draw)) == pytest.approx([1.0] * 2, rel=0.02)


def test_inputs_that_hardly_vary_do_not_matter():
    """A stream of a few vectors, and noise far below: no fit may live on the noise."""
    draw = torch.Generator().manual_seed(3)
    model = gpt("laptop/prenorm")

    def flat(module, inputs):
        x = torch.randn(inputs[0].shape, generator=draw)
        x[..., 8:] *= 1e-9
        return (x,)

    for block in model.blocks:
        block.ffn = Replaced(lambda x: torch.randn(x.shape, generator=draw))
        block.ffn.register_forward_pre_hook(flat)
    assert feedforward_nonlinearity(model, batches(12)) == pytest.approx([1.0] * 2, rel=0.02)


def test_too_few_tokens_say_nothing():
    assert feedforward_nonlinearity(gpt(), batches(1, size=1, length=30)) is None
