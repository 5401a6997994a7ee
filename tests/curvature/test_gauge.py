"""The gauge's numbers against dense matrices in fp64, and a model that cannot tell whether it was read.

Tolerance of eigenvalues: the gauge's own, 1e-2, in which fp32 (1e-5) has room.
"""

from __future__ import annotations

import pytest
import torch
from dense import OnceDifferentiable, batch, dense_hessian, matrix, model

from gptnorm.config import Config, GaugeConfig, MoEConfig, OptimConfig, TrainConfig
from gptnorm.curvature import Hessian, LanguageLoss, Scaled, SlotLoss, Space, lanczos, slots_of
from gptnorm.curvature.algorithms import ritz_value
from gptnorm.curvature.gauge import Gauge, flat
from gptnorm.errors import UserError
from gptnorm.train.optim import build_optimizer

TOLERANCE = 1e-2


def settings(**gauge):
    return Config(gauge=GaugeConfig(every=1, **gauge), train=TrainConfig(seq_len=6), optim=OptimConfig(lr=1e-2))


def trained(gpt, config, updates=2):
    """Its optimizer after some updates, and the gradient of the next one."""
    optimizers = build_optimizer(gpt, config.optim)
    for number in range(updates + 1):
        optimizers.zero_grad()
        gpt.objective(batch(4, 6, seed=number)).total.backward()
        if number < updates:
            optimizers.step()
            gpt.after_step()
    return optimizers


def top(dense):
    return float(torch.linalg.eigvalsh(dense)[-1])


def precise(operator):
    """λ_max by the algorithm that is tested against dense matrices."""
    (largest,), _ = lanczos(operator, tolerance=1e-8)
    return largest.value


@pytest.mark.parametrize(
    ("strategy", "changes"),
    [("simplenorm", {"tied": True}), ("ngpt", {}), ("prenorm", {"moe": MoEConfig(experts=3), "d_ff": 4})],
)
def test_numbers_are_those_of_fp64(strategy, changes):
    config = settings(sequences=2)
    gpt = model(strategy, n_layers=1, **changes).float().train()
    optimizers = trained(gpt, config)
    reading = Gauge(gpt, optimizers, config).read(batch(2), 1e-2)

    scales = []
    for p in gpt.parameters():
        assert p.grad is not None
        v = 0.95 * optimizers.state[p]["exp_avg_sq"].double() + 0.05 * p.grad.double() ** 2
        scales.append((((v / (1 - 0.95**3)).sqrt() + 1e-8) ** -0.5).reshape(-1))
    gpt = gpt.double().eval()
    whole, scale = LanguageLoss(gpt, [batch(2)]), torch.cat(scales)
    with whole.measuring():
        largest, seen = (precise(part) for part in (whole.hessian(), Scaled(whole.hessian(), scale)))
    assert reading["hessian_max"] == pytest.approx(largest, rel=TOLERANCE)
    assert reading["adam_sharpness"] == pytest.approx(seen, rel=TOLERANCE)
    if changes.get("tied"):
        hessian = dense_hessian(gpt, whole.names, batch(2))
        assert reading["hessian_max"] == pytest.approx(top(hessian), rel=TOLERANCE)
        assert reading["adam_sharpness"] == pytest.approx(top(scale[:, None] * hessian * scale), rel=TOLERANCE)
    assert reading["adam_threshold"] == pytest.approx((2 + 1.8) / (0.1 * 1e-2), rel=1e-5)
    assert reading["slots"]
    for name, found in reading["slots"].items():
        loss = SlotLoss(gpt, batch(2)[0], name, 2)
        with loss.measuring():
            for part in ("hessian", "gauss_newton", "curvature"):  # themselves tested in test_activation
                norm = float(torch.linalg.matrix_norm(matrix(getattr(loss, part)()), 2))
                assert found[part] == pytest.approx(norm, rel=TOLERANCE, abs=1e-8), (name, part)


def test_differences_find_what_differentiating_twice_finds():
    """In fp32, on a trained model: docs/curvature.md states what is measured on larger ones."""
    gpt = model("simplenorm", d_model=32, d_ff=64).float()
    optimizers = trained(gpt, settings(), updates=5)
    one, other = (
        Gauge(gpt, optimizers, settings(products=how, tolerance=1e-4, most=99)).read(batch(2), 1e-2)
        for how in ("autograd", "differences")
    )
    assert "slots" not in other
    for key in ("hessian_max", "adam_sharpness"):
        assert other[key] == pytest.approx(one[key], rel=2e-3)


def test_muon_leaves_adams_share():
    """Preconditioned is what AdamW updates; the rest counts as fixed."""
    config = Config(gauge=GaugeConfig(every=1), train=TrainConfig(seq_len=6), optim=OptimConfig(name="muon", lr=1e-2))
    gpt = model("prenorm", n_layers=1).float()
    optimizers = trained(gpt, config)
    reading = Gauge(gpt, optimizers, config).read(batch(2), 1e-2)
    own = {name: p for name, p in gpt.named_parameters() if "exp_avg_sq" in optimizers.state[p]}
    assert 0 < len(own) < len(list(gpt.parameters()))
    scales = []
    for p in own.values():
        assert p.grad is not None
        v = 0.95 * optimizers.state[p]["exp_avg_sq"].double() + 0.05 * p.grad.double() ** 2
        scales.append((((v / (1 - 0.95**3)).sqrt() + 1e-8) ** -0.5).reshape(-1))
    part = LanguageLoss(gpt.double(), [batch(2)], list(own))
    with part.measuring():
        expected = precise(Scaled(part.hessian(), torch.cat(scales)))
    assert reading["adam_sharpness"] == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize("products", ["autograd", "differences"])
def test_the_model_is_left_as_it_was(products):
    config = settings(products=products)
    gpt = model("prenorm", moe=True, options={"qk_clip": 0.01}).float().train()
    frozen = gpt.blocks[0].attn.q.weight.requires_grad_(False)
    gpt.blocks[1].eval()
    optimizers = trained(gpt, config)

    def state():
        parameters = [(p.detach().clone(), p.requires_grad, p.grad) for p in gpt.parameters()]
        grads = [None if p.grad is None else p.grad.clone() for p in gpt.parameters()]
        return parameters, grads, [b.clone() for b in gpt.buffers()], [m.training for m in gpt.modules()]

    before, random = state(), torch.get_rng_state()
    Gauge(gpt, optimizers, config).read(batch(2), 1e-2)
    torch.testing.assert_close(state(), before, rtol=0, atol=0)
    assert all(a is b for (_, _, a), (_, _, b) in zip(state()[0], before[0], strict=True)), "the same tensors"
    assert torch.equal(torch.get_rng_state(), random)
    assert not frozen.requires_grad


def test_the_same_reading_again():
    gpt, config = model("simplenorm").float(), settings()
    optimizers = trained(gpt, config)
    gauges = Gauge(gpt, optimizers, config), Gauge(gpt, optimizers, config)
    first, *others = (gauge.read(batch(2), 1e-2) for gauge in (*gauges, gauges[0]))
    assert others == [first, first]


def test_before_adams_first_update_there_is_no_sharpness_of_its_own():
    gpt, config = model("prenorm").float(), settings()
    reading = Gauge(gpt, trained(gpt, config, updates=0), config).read(batch(2), 1e-2)
    assert reading["hessian_max"] > 0
    assert not any(key.startswith("adam") for key in reading)
    assert "adam_threshold" not in Gauge(gpt, trained(gpt, config), config).read(batch(2), 0.0), "no rate, no threshold"


def test_what_cannot_be_believed_is_not_told():
    gpt, config = model("prenorm", n_layers=4, d_model=32, d_ff=64).float(), settings()
    gauge = Gauge(gpt, trained(gpt, config), config)
    act = gpt.blocks[2].ffn.act
    gpt.blocks[2].ffn.act = OnceDifferentiable.apply
    refused = gauge.read(batch(4, 16), 1e-2)
    assert list(refused) == ["gauge_refused"]
    assert "differs from finite differences" in refused["gauge_refused"]
    gpt.blocks[2].ffn.act = act
    assert gauge.read(batch(4, 16), 1e-2)["hessian_max"] > 0, "the next one may be good again"
    with torch.no_grad():
        gpt.embed.weight[0] = float("nan")
    assert list(gauge.read(batch(4, 16), 1e-2)) == ["gauge_refused"]


def test_kernels_without_a_second_derivative_have_differences():
    """The same wrong kernel: differences of its right gradient are right."""
    config, gpt = settings(products="differences"), model("prenorm").float()
    expected = Gauge(gpt, trained(gpt, config, 0), config).read(batch(2), 1e-2)["hessian_max"]
    gpt.blocks[1].ffn.act = OnceDifferentiable.apply
    found = Gauge(gpt, trained(gpt, config, 0), config).read(batch(2), 1e-2)["hessian_max"]
    assert found == pytest.approx(expected, rel=1e-3)


def test_chosen_slots():
    gpt = model("simplenorm", n_layers=3).float()
    found = Gauge(gpt, build_optimizer(gpt, OptimConfig()), settings()).slots
    assert found == [name for name in slots_of(gpt) if name.startswith("blocks.1.")]
    gauge = Gauge(gpt, build_optimizer(gpt, OptimConfig()), settings(slots=("blocks.2.attn.q",), token=0))
    assert list(gauge.read(batch(2), 1e-2)["slots"]) == ["blocks.2.attn.q"]
    with pytest.raises(UserError, match=r"gauge\.slots = 'up': no such slot; there are blocks\.1\.attn\.q"):
        Gauge(gpt, build_optimizer(gpt, OptimConfig()), settings(slots=("up",)))
    twice = model("ngpt").float()
    with pytest.raises(UserError, match=r"gauge\.slots = 'blocks\.0\.own\.unit': is used more than once"):
        Gauge(twice, build_optimizer(twice, OptimConfig()), settings(slots=("blocks.0.own.unit",)))


def test_numbers_one_by_one():
    reading = {"hessian_max": 1.5, "slots": {"blocks.0.attn.q": {"hessian": 2.0}}, "gauge_refused": "why"}
    assert flat(reading) == {"hessian_max": 1.5, "slots.blocks.0.attn.q.hessian": 2.0}


@pytest.mark.parametrize(
    "values", [[3.0, 1.0, -5.0], [4.0] * 3, [0.0, 0.0, 0.0], [*range(60), 200.0], [-7.0, *[1.0] * 40]]
)
def test_three_vectors_find_the_largest_of_a_known_spectrum(values):
    generator = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64, generator=generator)).Q
    x = torch.zeros(len(values), dtype=torch.float64, requires_grad=True)
    a = q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ q.mT
    operator = Hessian([lambda: 0.5 * x @ a @ x], [x])
    for modulus, expected in ((False, max(values)), (True, max(values, key=abs))):
        found = ritz_value(operator, modulus=modulus, tolerance=1e-6, most=60)
        assert found.value == pytest.approx(expected, rel=1e-5, abs=1e-9)
        assert abs(found.value - expected) <= found.residual + 1e-9


def test_three_vectors_and_all_of_them_agree():
    loss = LanguageLoss(model("simplenorm", n_layers=1), [batch()])
    with loss.measuring():
        hessian = loss.hessian()
        found, ((expected,), _) = ritz_value(hessian, tolerance=1e-9), lanczos(hessian, tolerance=1e-9)
    assert found.value == pytest.approx(expected.value, rel=1e-8)


def test_an_end_that_the_start_hides_is_waited_for():
    """The end of largest modulus has a thousandth of the start's weight: the other one settles first."""

    class Hidden:
        space = Space([torch.zeros(40, dtype=torch.float64)])
        values = torch.linspace(-6.0, 5.0, 40, dtype=torch.float64)
        values[-1] = 11.0

        def __init__(self):
            start = self.space.draw(torch.Generator().manual_seed(0))
            start[-1] = 1e-3
            self.space.draw = lambda generator: start

        def __call__(self, v):
            return self.values * v

    assert ritz_value(Hidden(), modulus=True, tolerance=1e-2, fewest=2, most=40).value == pytest.approx(11.0, rel=1e-2)
