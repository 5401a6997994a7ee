"""Products that are wrong are refused, and steps that are too long are found."""

from __future__ import annotations

import math

import pytest
import torch
from dense import OnceDifferentiable, batch, model
from hypothesis import given
from hypothesis import strategies as st

from gptnorm.curvature import LanguageLoss, lanczos, parameters_of
from gptnorm.curvature.checks import refuse_wrong_products
from gptnorm.curvature.rates import critical_rate
from gptnorm.curvature.reading import check_products, measure_slots
from gptnorm.errors import UserError


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("strategy", ["prenorm", "simplenorm", "postnorm", "angpt"])
def test_right_products_pass(strategy, dtype):
    loss = LanguageLoss(model(strategy).to(dtype), [batch()])
    with loss.measuring():
        found = refuse_wrong_products(loss.hessian(), loss.finite_difference(extrapolated=True), loss.leaves, what="it")
    assert found < (3e-3 if dtype == torch.float32 else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("strategy", ["prenorm", "simplenorm"])
def test_one_kernel_without_a_second_derivative_among_many_is_refused(strategy, dtype):
    gpt = model(strategy, n_layers=4, d_model=32, d_ff=64).to(dtype)
    assert check_products(gpt, batch(4, 16), parameters_of(gpt, "all")) < 2e-3
    gpt.blocks[2].ffn.act = OnceDifferentiable.apply
    with pytest.raises(UserError, match=r"parameters: a Hessian product differs from finite differences .* by \d"):
        check_products(gpt, batch(4, 16), parameters_of(gpt, "all"))
    how = {"tolerance": 1e-3, "most": 50, "say": str}
    assert measure_slots(gpt, batch(1, 16)[0], ["blocks.3.attn.q"], 5, **how)[0].difference < 1e-2
    with pytest.raises(UserError, match=r"blocks\.1\.attn\.q: a Hessian product differs"):
        measure_slots(gpt, batch(1, 16)[0], ["blocks.1.attn.q"], 5, **how)


def test_experts_are_checked_in_fp32():
    """Choices jump: without holding them the differences are of another function."""
    gpt = model("simplenorm", moe=True, d_model=32, d_ff=24).float()
    assert check_products(gpt, batch(4, 16), parameters_of(gpt, "all")) < 1e-2


def test_other_dtypes_and_autocast():
    gpt = model("prenorm")
    with torch.autocast("cpu", torch.bfloat16):
        assert check_products(gpt.float(), batch(), parameters_of(gpt, "all")) < 1e-2
    with pytest.raises(UserError, match="in fp32 or fp64, not in bfloat16"):
        check_products(gpt.bfloat16(), batch(), parameters_of(gpt, "all"))


def test_weights_that_are_not_finite():
    gpt = model("prenorm")
    with torch.no_grad():
        gpt.head.weight.fill_(math.nan)
    loss = LanguageLoss(gpt, [batch()])
    with loss.measuring(), pytest.raises(UserError, match="is not finite"):
        lanczos(loss.hessian())
    with pytest.raises(UserError, match="too rough"):
        check_products(gpt, batch(), parameters_of(gpt, "all"))


def test_differences_leave_a_kept_graph_alone():
    loss = LanguageLoss(model("simplenorm"), [batch()])
    with loss.measuring():
        hessian = loss.hessian()
        v = hessian.space.draw(torch.Generator().manual_seed(0))
        before = hessian(v)
        loss.finite_difference()(v)
        assert torch.equal(hessian(v), before)


@given(st.floats(1e-8, 1e8), st.floats(1e-6, 1e6))
def test_the_critical_rate_of_a_parabola(curvature, start):
    """ℓ(η) = -η + curvature η² / 2 is at its start again at 2 / curvature."""
    found = critical_rate(lambda rate: -rate + 0.5 * curvature * rate**2, start, most=120)
    assert found.high is not None
    assert found.low <= 2 / curvature * (1 + 1e-9)
    assert found.high >= 2 / curvature * (1 - 1e-9)
    assert found.value == pytest.approx(2 / curvature, rel=0.06)


@given(st.floats(1e-12, 1e3), st.floats(0.1, 10))
def test_a_start_too_small_to_be_seen_is_gone_up_from(start, level):
    """Late in a schedule a step lowers the loss by less than rounding: that is no rate at which it rises."""
    found = critical_rate(lambda rate: level - 2 * rate + 2 * rate**2, start, most=120)
    assert found.high is not None
    assert found.value == pytest.approx(1.0, rel=0.06)


def test_critical_rates_that_are_not_there():
    falls = critical_rate(lambda rate: -rate, 1.0, most=20)
    assert (falls.high, falls.value) == (None, None)
    rises = critical_rate(lambda rate: rate, 1.0, most=20)
    assert (rises.low, rises.value) == (0.0, None)
    assert rises.passes == falls.passes == 20
    noisy = critical_rate(lambda rate: 5.0 + max(rate - 1e-3, 0.0), 1.0)
    assert (noisy.low, noisy.value) == (0.0, None), "rounding is no descent"
    flat = critical_rate(lambda rate: 5.0, 1e-3, most=20)
    assert (flat.low, flat.high) == (0.0, None), "nothing is seen at any rate"
    explodes = critical_rate(lambda rate: -rate if rate < 3 else math.nan, 1e-3)
    assert explodes.value == pytest.approx(3, rel=0.06)


def test_the_critical_rate_along_the_gradient_of_a_model():
    """The loss is no higher at the lower end and higher at the upper one; the quadratic's is 2 gᵀg / gᵀHg."""
    gpt = model("prenorm")
    loss = LanguageLoss(gpt, [batch()])
    with loss.measuring():
        hessian, g = loss.hessian(), loss.gradient()
        expected = float(2 * (g @ g) / (g @ hessian(g)))
        parts = hessian.space.split(g)
        start = [leaf.detach().clone() for leaf in loss.leaves]

        def loss_at(rate):
            for leaf, old, part in zip(loss.leaves, start, parts, strict=True):
                leaf.data.copy_(old - rate * part)
            return loss.value()

        found = critical_rate(loss_at, 0.1)
        assert found.high is not None
        assert loss_at(found.low) < loss_at(0.0) <= loss_at(found.high)
        assert found.high / found.low <= 1.05
    assert expected / 3 < found.low < 3 * expected
