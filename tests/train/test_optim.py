from __future__ import annotations

import pytest
import torch
from cases import tiny_gpt, tokens

from gptnorm.config import OptimConfig
from gptnorm.train.optim import build_optimizer


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
        optimizer.set_lr(lr)
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


def test_muon_moves_matrices_orthogonally_and_the_rest_is_adamw():
    """Without decay the first update of a matrix is -lr 0.2 sqrt(max(out, in)) U Vᵀ, up to Newton-Schulz's error: its
    singular values lie in the band that five iterations reach, and it points where the gradient does.
    """
    lr = 1e-2
    model = tiny_gpt("prenorm", "llama2").double()
    other = tiny_gpt("prenorm", "llama2").double()
    matrices = {f"{name}.weight" for name, owner in model.weights() if owner.role in model.shape.matrix_roles}
    assert len(matrices) == 7 * len(model.blocks)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = {}
    for gpt, name in ((model, "muon"), (other, "adamw")):
        optimizer = build_optimizer(gpt, OptimConfig(name=name, lr=lr, weight_decay=0.0))
        gpt.loss(tokens()).backward()
        gradients = {key: p.grad.clone() for key, p in gpt.named_parameters() if p.grad is not None}
        optimizer.step()
    for (name, muon), adamw in zip(model.named_parameters(), other.parameters(), strict=True):
        update = muon.detach() - before[name]
        if name not in matrices:
            assert torch.equal(muon, adamw), name
            continue
        scaled = update / (-lr * 0.2 * max(update.shape) ** 0.5)
        s = torch.linalg.svdvals(scaled)
        strong = torch.linalg.svdvals(gradients[name]) > 0.05 * torch.linalg.svdvals(gradients[name]).max()
        assert s[: int(strong.sum())].min() > 0.5, name
        assert s.max() < 1.3, name
        # U Vᵀ is symmetric positive against the gradient: their inner product is nearly the nuclear norm.
        nuclear = torch.linalg.svdvals(gradients[name]).sum()
        assert (scaled * gradients[name]).sum() > 0.7 * nuclear, name


def test_muon_leaves_experts_and_ends_to_adamw():
    model = tiny_gpt("prenorm", "llama2", moe=True)
    adamw, muon = build_optimizer(model, OptimConfig(name="muon")).parts
    by_muon = {id(p) for group in muon.param_groups for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in by_muon}
    assert names == {f"blocks.{i}.attn.{role}.weight" for i in range(len(model.blocks)) for role in "qkvo"}
    assert len(by_muon) + sum(len(g["params"]) for g in adamw.param_groups) == len(list(model.parameters()))
