"""Width rules: against a table written by hand, and in the coordinate check."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import tokens

from gptnorm.config import Config, InitConfig, ModelConfig, MoEConfig, OptimConfig, TrainConfig
from gptnorm.errors import UserError
from gptnorm.model import GPT, build_gpt
from gptnorm.norms import LearnedScaleModule
from gptnorm.recipe import load_recipe
from gptnorm.strategies import STRATEGIES
from gptnorm.train.optim import build_optimizer

BASE, HEAD = 64, 16

# Standard deviation and learning rate at s = 4, relative to the base width. "mup" is the Adam column of table 3 of
# arXiv 2203.03466: input weights and biases 1, 1; hidden 1/sqrt(fan in), 1/fan in; output 1/fan in, 1/fan in. "align"
# is spannorm.md section 3. Decay goes as 1 / rate: `MuAdamW` of github.com/microsoft/mup does the same (the package is
# no dependency, as it needs torchvision, and it has the head's factor on the output instead).
HIDDEN = (0.5, 0.25)
TABLE = {
    "align": {"embed": (1.0, 1.0), "position": (1.0, 1.0), "head": HIDDEN, "router": HIDDEN, None: (None, 1.0)},
    "mup": {
        "embed": (1.0, 1.0),
        "position": (1.0, 1.0),
        "head": (0.25, 0.25),
        "router": (0.25, 0.25),  # ours: its output is fixed, like the head's
        None: (None, 1.0),
    },
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
        if role in ("embed", "position", "head") and owners[name].constraint:
            lr = 0.5  # ours: entries of a row of norm 1 are 1/sqrt(d), and so is the step that turns it by one angle
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


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("rule", ["align", "mup"])
def test_the_stream_starts_alike_at_every_width(strategy, rule):
    """|x_0| / |e| of a token's unit vector e is that of the base width, and the stream's RMS that of the draw."""
    sizes = []
    for width in (BASE, 4 * BASE):
        model = build_gpt(config(rule, width, strategy), vocab=512)
        with torch.no_grad():
            (x, *_) = model.strategy.open(model.embed(torch.arange(512)[None]), model.own)
        constrained = model.embed.constraint is not None
        sizes.append(x.square().sum(-1).mean().sqrt() if constrained else x.square().mean().sqrt())
    assert sizes[1].item() == pytest.approx(sizes[0].item(), rel=0.03)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_learned_scales_move_alike_at_every_width(strategy):
    """One Adam step moves what is stored by the rate, and the scale by (init / scale) times that."""

    def scales(width: int) -> dict[str, tuple[float, float]]:
        model = build_gpt(config("align", width, strategy, moe=MoEConfig(experts=2, shared=1)), vocab=61)
        found = {n: m for n, m in model.named_modules() if isinstance(m, LearnedScaleModule)}
        return {n: (m.value().mean().item(), m.spec.init / m.spec.scale) for n, m in found.items()}

    base, wide = scales(BASE), scales(4 * BASE)
    assert base.keys() == wide.keys()
    for name, (start, pace) in base.items():
        assert wide[name] == (pytest.approx(start), pytest.approx(pace)), name


def movement(strategy: str, rule: str, width: int) -> tuple[float, float]:
    """Change of x_L and of the logits after three Adam steps that are too small to saturate: the RMS, or the L2 norm of
    x_L where the stream's vectors have norm 1.
    """
    wanted = config(rule, width, strategy, optim={"weight_decay": 0.0})
    model = build_gpt(wanted, vocab=61)
    optimizer, batch = build_optimizer(model, wanted.optim), tokens()
    with torch.no_grad():
        before = model.features(batch), model(batch)
    for _ in range(3):
        optimizer.zero_grad()
        model.loss(batch).backward()
        optimizer.set_lr(2e-4)
        optimizer.step()
        model.after_step()
    with torch.no_grad():
        x, z = model.features(batch) - before[0], model(batch) - before[1]
    unit = width**0.5 if model.embed.constraint else 1.0
    return unit * x.square().mean().sqrt().item(), z.square().mean().sqrt().item()


# x_L moves by 0.85 to 1.04 times as much at s = 4 under a rule, 2.3 to 4 times without one.
FAST = ("prenorm", "dyt", "postnorm", "simplenorm", "spannorm", "angpt", "ngpt")


@pytest.mark.parametrize(
    "strategy", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in STRATEGIES]
)
def test_coordinate_check(strategy):
    """spannorm.md section 3: four times the width moves x_L by the same under a rule, far more without."""
    x, logits = movement(strategy, "none", BASE)
    wide = {rule: movement(strategy, rule, 4 * BASE) for rule in ("none", "align", "mup")}
    assert wide["none"][0] / x > 2.2
    # Rows and stream of norm 1 alone make the logits' start fall as 1/sqrt(d).
    assert wide["none"][1] / logits > (1.7 if strategy in ("angpt", "ngpt") else 3.5)
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
        (["optim.width_rule=align", "optim.base_width=64", "optim.name=muon"], ["optim.width_rule = 'align'", "muon"]),
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


def test_ladders_keep_adams_epsilon_below_the_gradients():
    """docs/studies.md: 1e-12 or less, whichever strategy."""
    for name in ("study/width", "study/depth"):
        recipe = load_recipe(name)
        for strategy in recipe.study["strategies"]:
            assert recipe.resolve(strategy=strategy).optim.eps == 1e-12
