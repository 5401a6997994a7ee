"""Width rules: against a table written by hand, in the coordinate check, and against the `mup` package."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import tokens

from gptnorm.config import Config, InitConfig, ModelConfig, MoEConfig, OptimConfig, TrainConfig
from gptnorm.errors import UserError
from gptnorm.model import GPT, build_gpt
from gptnorm.recipe import load_recipe
from gptnorm.strategies import STRATEGIES
from gptnorm.train.optim import build_optimizer, set_lr

BASE, HEAD = 64, 16

# Standard deviation and learning rate at s = 4, relative to the base width.
HIDDEN = (0.5, 0.25)
TABLE = {
    "align": {"embed": (1.0, 1.0), "position": (1.0, 1.0), "head": HIDDEN, None: (None, 1.0)},
    "mup": {"embed": (1.0, 1.0), "position": (1.0, 1.0), "head": (0.25, 0.25), None: (None, 1.0)},
}


def config(rule: str = "none", width: int = BASE, strategy: str = "prenorm", **changes) -> Config:
    model = ModelConfig(strategy=strategy, d_model=width, n_layers=2, n_heads=width // HEAD, d_ff=3 * width)
    found = Config(
        model=replace(model, **changes.pop("model", {})),
        optim=OptimConfig(width_rule=rule, base_width=BASE, eps=1e-12, **changes.pop("optim", {})),
        train=TrainConfig(seq_len=16, batch_size=4),
        **changes,
    )
    return found


def groups(model: GPT, config: Config) -> dict[str, tuple[float, float]]:
    """(factor of the rate, weight decay) by parameter name."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        names[id(p)]: (group["lr_factor"], group["weight_decay"])
        for group in build_optimizer(model, config.optim).param_groups
        for p in group["params"]
    }


@pytest.mark.parametrize("rule", ["align", "mup"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"init": InitConfig(std="published")},
        {"init": InitConfig(std=0.05)},
        {"init": InitConfig(std="unit")},
        {"model": {"backbone": "gpt2", "tied": False}},
        {"model": {"backbone": "llama3", "n_kv_heads": 1}},
        {"moe": MoEConfig(experts=4, shared=1)},
        {"strategy": "ngpt"},
        {"strategy": "simplenorm"},
    ],
    ids=str,
)
def test_against_the_table(rule, changes):
    narrow, wide = config(rule, **changes), config(rule, 4 * BASE, **changes)
    if wide.model.n_kv_heads:
        wide = replace(wide, model=replace(wide.model, n_kv_heads=4))
    small, large = build_gpt(narrow, vocab=512), build_gpt(wide, vocab=512)
    factors, unscaled = groups(large, wide), groups(small, narrow)
    owners = {f"{name}.weight": owner for name, owner in large.weights()}
    for name, parameter in large.named_parameters():
        role = owners[name].role if name in owners else None
        std, lr = TABLE[rule].get(role, HIDDEN)
        assert factors[name] == (lr, 0.1 / lr), name
        assert unscaled[name] == (1.0, 0.1), name
        if role and owners[name].constraint is None:
            drawn = parameter.detach().std() / small.get_parameter(name).detach().std()
            # Five standard errors of a ratio of two sample deviations.
            noise = 5 * (0.5 / parameter.numel() + 0.5 / small.get_parameter(name).numel()) ** 0.5
            assert drawn.item() == pytest.approx(std, rel=noise), name


def test_factors_of_the_strategy_stay():
    """What a strategy itself says multiplies; seen through a strategy with factors of its own."""
    from strategies.test_reach import Reach

    from gptnorm.strategies.base import Draw
    from gptnorm.strategies.width import apply_width_rule

    shape = build_gpt(config(width=4 * BASE), vocab=64, device="meta").shape
    rule = apply_width_rule(Reach(), config("align").optim, shape, lambda role, layer, at: Draw(std=1.0, cut=3.0))
    assert (rule.group("o", 0, shape).lr, rule.group("o", 0, shape).weight_decay) == (1.0, 1.0)
    assert (rule.group(None, 0, shape).lr, rule.group(None, 0, shape).weight_decay) == (0.5, 0.0)
    # The cut is part of the draw: it shrinks with it.
    assert rule.init("q", 0, shape, Draw(std=9.0)) == Draw(std=0.5, cut=1.5)
    assert rule.init("embed", 0, shape, Draw(std=9.0)) == Draw(std=1.0, cut=3.0)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("rule", ["align", "mup"])
def test_at_the_base_width_nothing_changes(strategy, rule):
    plain, ruled = config(strategy=strategy), config(rule, strategy=strategy)
    first, second = build_gpt(plain, vocab=61), build_gpt(ruled, vocab=61)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    assert groups(first, plain) == groups(second, ruled)


def movement(strategy: str, rule: str, width: int) -> tuple[float, float]:
    """RMS change of x_L and of the logits after three Adam steps that are too small to saturate."""
    wanted = config(rule, width, strategy, optim={"weight_decay": 0.0})
    model = build_gpt(wanted, vocab=61)
    optimizer, batch = build_optimizer(model, wanted.optim), tokens()
    with torch.no_grad():
        before = model.features(batch), model(batch)
    for _ in range(3):
        optimizer.zero_grad()
        model.loss(batch).backward()
        set_lr(optimizer, 2e-4)
        optimizer.step()
        model.after_step()
    with torch.no_grad():
        x, z = model.features(batch) - before[0], model(batch) - before[1]
    return x.square().mean().sqrt().item(), z.square().mean().sqrt().item()


@pytest.mark.parametrize("strategy", ["prenorm", "postnorm", "simplenorm", "spannorm"])
def test_coordinate_check(strategy):
    """spannorm.md section 3: four times the width moves x_L by the same under a rule, far more without."""
    x, logits = movement(strategy, "none", BASE)
    wide = {rule: movement(strategy, rule, 4 * BASE) for rule in ("none", "align", "mup")}
    assert wide["none"][0] / x > 2.5
    assert wide["none"][1] / logits > 3.5
    for rule in ("align", "mup"):
        assert wide[rule][0] / x == pytest.approx(1.0, abs=0.2)
    # The head starts at std 1/sqrt(d), so under "align" its logits' change still grows a little.
    assert wide["align"][1] / logits < 1.7
    assert wide["mup"][1] / logits < 1.1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["optim.width_rule=align"], ["optim.base_width = None"]),
        (["optim.width_rule=Align"], ["optim.width_rule = 'Align'", "'align'"]),
        (["optim.width_rule=mup", "optim.base_width=40"], ["optim.base_width = 40", "head width 16"]),
        (
            ["optim.width_rule=mup", "optim.base_width=64", "model.backbone=gpt2"],
            ["optim.width_rule = 'mup'", "model.tied"],
        ),
    ],
)
def test_mistakes_are_one_line(settings, words):
    with pytest.raises(UserError) as caught:
        build_gpt(load_recipe("laptop/prenorm").resolve(settings), vocab=61, device="meta")
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_against_the_mup_package():
    """Rates and decay of its AdamW at the same widths. Its head has a factor 1/s on the output instead."""
    mup = pytest.importorskip("mup")
    wide = config("mup", 4 * BASE)
    model = build_gpt(wide, vocab=61)
    base, delta = build_gpt(config(), vocab=61), build_gpt(config(width=2 * BASE), vocab=61)
    mup.set_base_shapes(model, base, delta=delta, do_assert=False)
    optimizer = mup.MuAdamW(model.parameters(), lr=1.0, weight_decay=0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    theirs = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    ours = groups(model, wide)
    for name, found in theirs.items():
        if name != "head.weight":
            assert found == ours[name], name
