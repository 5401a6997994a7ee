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
        fit = [np.concatenate([part[::2] for part in parts]).astype(np.float64) for parts in (xs, ys)]
        test = [np.concatenate([part[1::2] for part in parts]).astype(np.float64) for parts in (xs, ys)]
        one = [np.column_stack([part, np.ones(len(part))]) for part in (fit[0], test[0])]
        map_ = np.linalg.lstsq(one[0], fit[1], rcond=None)[0]
        error = ((test[1] - one[1] @ map_) ** 2).sum() / ((test[1] - test[1].mean(0)) ** 2).sum()
        assert found[layer] == pytest.approx(error, rel=1e-6)
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
    # Fitted on n tokens, noise leaves 1 + (d + 1) / n.
    tokens = 12 * 8 * 32 // 2
    expected = 1 + 17 / tokens
    assert value_of(lambda x: torch.randn(x.shape, generator=draw)) == pytest.approx([expected] * 2, rel=0.02)


def test_too_few_tokens_say_nothing():
    assert feedforward_nonlinearity(gpt(), batches(1, size=1, length=40)) is None
