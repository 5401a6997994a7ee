"""What AdamW bears, from its own behaviour on quadratic losses."""

from __future__ import annotations

import copy

import pytest
import torch
from dense import batch, model

from gptnorm.config import OptimConfig
from gptnorm.curvature import Hessian, Scaled, lanczos
from gptnorm.curvature.adam import next_update, preconditioner, stability_threshold
from gptnorm.curvature.rates import critical_rate_along
from gptnorm.curvature.reading import measure_adam
from gptnorm.errors import UserError
from gptnorm.train.optim import Optimizers, build_optimizer


def quadratic(seed=0, size=6):
    g = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return g @ g.mT + 0.1 * torch.eye(size, dtype=torch.float64)


@pytest.mark.parametrize("beta1", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("factor", [1.0, 0.25])
@pytest.mark.parametrize(("part", "stable"), [(0.97, True), (1.03, False)])
def test_a_rate_below_the_threshold_is_stable_and_one_above_is_not(beta1, factor, part, stable):
    """With second moments that stay as they are (β2 so near 1), AdamW is heavy-ball with a fixed preconditioner."""
    a, beta2 = quadratic(), 1 - 1e-13
    w = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    group = {"params": [w], "lr_factor": factor}
    adam = torch.optim.AdamW([group], lr=0.0, betas=(beta1, beta2), eps=1e-8, weight_decay=0.0)
    optimizers = Optimizers([adam])
    optimizers.prime()
    state = adam.state[w]
    state["step"].fill_(1e16)  # no correction of the moments' start
    moments = torch.linspace(0.1, 2.0, 6, dtype=torch.float64)
    state["exp_avg_sq"].copy_(moments**2)

    sharpness = Scaled(Hessian([lambda: 0.5 * w @ a @ w], [w]), preconditioner(optimizers, [w]))
    (largest,), _ = lanczos(sharpness, tolerance=1e-12)
    exact = torch.linalg.eigvals(factor * torch.diag(1 / (moments + 1e-8)) @ a).real.max()
    assert largest.value == pytest.approx(float(exact), rel=1e-8)

    lr = stability_threshold(1.0, beta1) / largest.value * part
    with torch.no_grad():
        w.fill_(1e-3)
    optimizers.set_lr(lr)
    for _ in range(1500):
        w.grad = (a @ w).detach()
        optimizers.step()
        state["exp_avg_sq"].copy_(moments**2)
    assert (float(w.detach().norm()) < 1e-3) is stable


def test_second_moments_are_corrected_for_their_start():
    w = torch.ones(2, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.AdamW([{"params": [w], "lr_factor": 1.0}], lr=0.0, betas=(0.9, 0.99), eps=0.0)
    w.grad = torch.tensor([3.0, -4.0], dtype=torch.float64)
    adam.step()
    assert preconditioner(Optimizers([adam]), [w]).tolist() == pytest.approx([3**-0.5, 4**-0.5])


def test_a_parameter_without_moments_is_refused():
    w = torch.ones(2, requires_grad=True)
    adam = torch.optim.AdamW([{"params": [w], "lr_factor": 1.0}], lr=0.1)
    with pytest.raises(UserError, match="no second moments"):
        preconditioner(Optimizers([adam]), [w])
    optimizers = Optimizers([adam])
    optimizers.prime()
    with pytest.raises(UserError, match="no second moments"):
        preconditioner(optimizers, [w])


def test_the_next_update_is_the_one_that_adamw_makes():
    generator = torch.Generator().manual_seed(0)
    w, u = (torch.randn(n, dtype=torch.float64, generator=generator).requires_grad_() for n in (4, 3))
    groups = [{"params": [w], "lr_factor": 1.0}, {"params": [u], "lr_factor": 0.25}]
    adam = torch.optim.AdamW(groups, lr=0.0, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.0)
    optimizers = Optimizers([adam])
    optimizers.set_lr(0.1)
    for _ in range(4):
        gradients = [torch.randn(len(leaf), dtype=torch.float64, generator=generator) for leaf in (w, u)]
        if adam.state:
            expected = next_update(optimizers, [w, u], gradients)
        before = [leaf.detach().clone() for leaf in (w, u)]
        w.grad, u.grad = gradients
        optimizers.step()
    for old, leaf, update in zip(before, (w, u), expected, strict=True):
        assert ((old - leaf.detach()) / 0.1).tolist() == pytest.approx(update.tolist(), rel=1e-9)


def test_the_critical_rate_of_a_quadratic_loss():
    """ℓ(w - η u) = ℓ(w) at η = 2 uᵀ∇ℓ / uᵀ A u."""
    a, w = quadratic(), torch.linspace(-1, 1, 6, dtype=torch.float64, requires_grad=True)
    update = (a @ w).detach().sign()

    def loss():
        return float((0.5 * w @ a @ w).detach())

    before = w.detach().clone()
    found = critical_rate_along(loss, [w], [update], 1e-4)
    exact = float(2 * update @ a @ before / (update @ a @ update))
    assert found.high is not None
    assert found.low <= exact <= found.high < 1.06 * found.low
    assert torch.equal(w.detach(), before)
    uphill = critical_rate_along(loss, [w], [-update], 1e-4)
    assert (uphill.low, uphill.high is None) == (0.0, False)


def test_the_critical_rate_counts_what_puts_the_weights_back():
    """Against a copy of the model that takes the step and its `after_step`, as training does."""
    gpt, tokens = model("ngpt"), batch()
    gpt.after_step()
    generator = torch.Generator().manual_seed(0)
    optimizers = build_optimizer(gpt, OptimConfig(weight_decay=0.0))
    for parameter in gpt.parameters():
        parameter.grad = 1e-3 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
    optimizers.set_lr(0.0)
    optimizers.step()
    names = [name for name, _ in gpt.named_parameters()]
    before = {name: value.clone() for name, value in gpt.state_dict().items()}
    how = {"lr": 1e-2, "config": OptimConfig(), "tolerance": 1e-2, "most": 30, "say": lambda _: None}
    found = measure_adam(gpt, [tokens], names, optimizers, **how).critical
    assert all(torch.equal(value, before[name]) for name, value in gpt.state_dict().items())

    def loss_after(rate):
        other = copy.deepcopy(gpt)
        copied = build_optimizer(other, OptimConfig(weight_decay=0.0))
        copied.prime()
        for mine, theirs in zip(gpt.parameters(), other.parameters(), strict=True):
            for key, value in optimizers.state[mine].items():
                copied.state[theirs][key].copy_(value)
        other.objective(tokens).total.backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), OptimConfig().clip)
        copied.set_lr(rate)
        copied.step()
        other.after_step()
        return float(other.objective(tokens).total.detach())

    assert found.high is not None
    assert loss_after(found.low) < loss_after(0.0) <= loss_after(found.high)
