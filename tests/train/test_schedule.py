from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from gptnorm.config import Config, OptimConfig, TrainConfig
from gptnorm.errors import UserError
from gptnorm.train.schedule import lr_factor, warmup_steps

configs = st.builds(
    lambda warmup, share, **more: OptimConfig(
        warmup=warmup, wsd_decay=share * (1 - warmup) if warmup < 1 else share, **more
    ),
    schedule=st.sampled_from(["cosine", "linear", "wsd", "constant"]),
    warmup=st.one_of(st.floats(0, 0.99), st.just(1.0)),
    floor=st.floats(0, 1),
    share=st.floats(1e-3, 1),
)


def torch_factors(kind: str, warmup: int, steps: int, floor: float) -> list[float]:
    """The same schedule put together from torch's own schedulers."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    rise = lr_scheduler.LinearLR(optimizer, start_factor=1 / (warmup + 1), end_factor=1.0, total_iters=warmup)
    if kind == "cosine":
        fall = lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps - warmup, eta_min=floor)
    else:
        fall = lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=floor, total_iters=steps - warmup)
    both = lr_scheduler.SequentialLR(optimizer, [rise, fall], milestones=[warmup])
    factors = []
    for _ in range(steps):
        factors.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        both.step()
    return factors


@pytest.mark.parametrize("kind", ["cosine", "linear"])
@pytest.mark.parametrize("warmup", [1, 5])
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_like_torch(kind, warmup, floor):
    config = OptimConfig(schedule=kind, warmup=float(warmup), floor=floor)
    ours = [lr_factor(step, 40, config) for step in range(40)]
    assert ours == pytest.approx(torch_factors(kind, warmup, 40, floor), abs=1e-6)


@pytest.mark.parametrize("warmup", [0.5, 10.0])
def test_wsd_leaves_room_for_the_warmup(warmup):
    settings, train = {"schedule": "wsd", "warmup": warmup}, TrainConfig(steps=20)
    assert lr_factor(10, 20, OptimConfig(**settings, wsd_decay=0.5)) == 1.0, "the peak is reached"
    Config(train=train, optim=OptimConfig(**settings, wsd_decay=0.5))
    with pytest.raises(UserError, match=rf"^optim\.wsd_decay = 0\.6: must leave room for optim\.warmup = {warmup:g}"):
        Config(train=train, optim=OptimConfig(**settings, wsd_decay=0.6))
    Config(train=train, optim=OptimConfig(warmup=warmup, wsd_decay=0.6))  # where it has no effect it is not looked at


def test_wsd_is_flat_then_linear():
    config = OptimConfig(schedule="wsd", warmup=2.0, floor=0.0, wsd_decay=0.25)
    expected = [1 / 3, 2 / 3, *[1.0] * 14, 0.8, 0.6, 0.4, 0.2, 0.0]
    assert [lr_factor(step, 20, config) for step in range(21)] == pytest.approx(expected)


@given(configs, st.integers(1, 200))
def test_within_bounds_rises_then_never_rises_again(config, steps):
    factors = [lr_factor(step, steps, config) for step in range(steps + 1)]
    warmup = warmup_steps(config, steps)
    assert all(0 <= factor <= 1 for factor in factors)
    assert all(a < b for a, b in pairwise(factors[:warmup]))
    after = factors[warmup:]
    assert all(a >= b for a, b in pairwise(after))
    if config.schedule != "constant" and warmup < steps:
        assert factors[-1] == pytest.approx(config.floor)
