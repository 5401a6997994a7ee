from __future__ import annotations

import pytest
import torch
from cases import tiny_gpt, tokens

from gptnorm.config import OptimConfig
from gptnorm.train.optim import build_optimizer, set_lr


@pytest.mark.parametrize("decay_on", ["all", "matrices"])
def test_three_steps_are_adamw_by_hand(decay_on):
    config = OptimConfig(lr=1e-2, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3, decay_on=decay_on)
    model = tiny_gpt("prenorm", "llama2").double()
    optimizer = build_optimizer(model, config)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    first = {name: torch.zeros_like(p) for name, p in expected.items()}
    second = {name: torch.zeros_like(p) for name, p in expected.items()}
    for step, lr in enumerate((1e-2, 5e-3, 2e-3), start=1):
        optimizer.zero_grad()
        model.loss(tokens(seed=step)).backward()
        set_lr(optimizer, lr)
        optimizer.step()
        for name, parameter in model.named_parameters():
            g, p = parameter.grad, expected[name]
            assert g is not None
            first[name] = 0.8 * first[name] + 0.2 * g
            second[name] = 0.9 * second[name] + 0.1 * g**2
            decay = 0.3 if decay_on == "all" or p.ndim >= 2 else 0.0
            p = p - lr * decay * p
            root = (second[name] / (1 - 0.9**step)).sqrt() + 1e-6
            expected[name] = p - lr * first[name] / (1 - 0.8**step) / root
            torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("decay_on", ["all", "matrices"])
def test_every_parameter_is_in_one_group(decay_on):
    model = tiny_gpt("simplenorm", "gpt2")
    groups = build_optimizer(model, OptimConfig(weight_decay=0.1, decay_on=decay_on)).param_groups
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    for group in groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.1 if decay_on == "all" or parameter.ndim >= 2 else 0.0)
