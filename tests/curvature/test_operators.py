"""Operators against dense matrices in double precision."""

from __future__ import annotations

import pytest
import torch
from cases import ROWS
from dense import batch, dense_gauss_newton, dense_hessian, matrix, model, relative

from gptnorm.config import OptimConfig
from gptnorm.curvature import FiniteDifference, GaussNewton, Hessian, LanguageLoss, Part, Scaled, parameters_of
from gptnorm.curvature.adam import updated_by_adam
from gptnorm.errors import UserError
from gptnorm.train.optim import build_optimizer

STRATEGIES = [row.strategy for row in ROWS]
NAMES = ["blocks.0.attn.k.weight", "blocks.1.ffn.down.weight"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_hessian_and_gauss_newton_of_every_strategy(strategy):
    gpt, tokens = model(strategy), batch()
    loss = LanguageLoss(gpt, [tokens], NAMES)
    with loss.measuring():
        hessian, gauss_newton = matrix(loss.hessian()), matrix(loss.gauss_newton())
        in_rows = matrix(loss.gauss_newton(most_logits=5 * gpt.shape.vocab))
        v = torch.randn(len(hessian), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        assert relative(loss.finite_difference()(v), hessian @ v) < 1e-5
    assert relative(hessian, dense_hessian(gpt, NAMES, tokens)) < 1e-10
    dense = dense_gauss_newton(gpt, NAMES, tokens)
    assert relative(gauss_newton, dense) < 1e-10
    assert relative(in_rows, dense) < 1e-10, "twelve tokens, five at a time"
    assert relative(hessian, hessian.mT) < 1e-10
    assert torch.linalg.eigvalsh(gauss_newton).min() > -1e-12 * gauss_newton.abs().max()


@pytest.mark.parametrize(
    ("strategy", "changes"),
    [
        ("prenorm", {"moe": True, "d_ff": 8}),
        ("simplenorm", {"moe": True, "d_ff": 8}),
        ("prenorm", {"options": {"attention_softcap": 3.0, "logit_softcap": 2.0, "z_loss": 0.1}}),
        ("ngpt", {"backbone": "gpt2"}),
    ],
)
def test_hessian_with_experts_and_options(strategy, changes):
    gpt, tokens = model(strategy, **changes), batch()
    names = [*parameters_of(gpt, "blocks.0.attn.v"), parameters_of(gpt, "blocks.1.ffn")[0]]
    loss = LanguageLoss(gpt, [tokens], names)
    with loss.measuring():
        found = matrix(loss.hessian())
    for module in gpt.modules():
        if hasattr(module, "reference"):
            module.reference = True
    assert relative(found, dense_hessian(gpt, names, tokens)) < 1e-10


def test_gauss_newton_with_z_loss_and_soft_cap():
    """The outputs are the logits after the cap; the z-loss adds 2w (lse (diag p - ppᵀ) + ppᵀ) / N to H_zz."""
    gpt, tokens, weight = model("prenorm", options={"logit_softcap": 2.0, "z_loss": 0.3}), batch(), 0.3
    loss = LanguageLoss(gpt, [tokens], NAMES)
    with loss.measuring():
        found = matrix(loss.gauss_newton())
    assert relative(found, dense_gauss_newton(gpt, NAMES, tokens, z_loss=weight)) < 1e-10


@pytest.mark.parametrize("backbone", ["gpt2", "llama2"])
def test_gauss_newton_of_the_head_in_rows(backbone):
    """Logits that depend on a weight directly, in a tied head also through the stream, or not at all through it."""
    gpt, tokens = model("prenorm", backbone, options={"logit_softcap": 2.0, "z_loss": 0.3}), batch()
    for names in ([parameters_of(gpt, "head")[0], "blocks.1.attn.o.weight"], parameters_of(gpt, "head")):
        loss = LanguageLoss(gpt, [tokens], names)
        with loss.measuring():
            whole = loss.gauss_newton(most_logits=10**9)
            v = whole.space.draw(torch.Generator().manual_seed(0))
            expected = whole(v)
            for most in (1, 3 * gpt.shape.vocab, 12 * gpt.shape.vocab - 1):
                assert relative(loss.gauss_newton(most_logits=most)(v), expected) < 1e-12
    tied = gpt.head.weight is gpt.embed.weight
    name = "embed.weight" if tied else "head.weight"
    loss = LanguageLoss(gpt, [tokens], [name])
    with loss.measuring():
        found = matrix(loss.gauss_newton(most_logits=1))
    if not tied:  # torch.func would take the two uses of one tensor apart
        assert relative(found, dense_gauss_newton(gpt, [name], tokens, z_loss=0.3)) < 1e-10


def test_micro_batches_are_one_batch():
    gpt, tokens = model("simplenorm"), batch(rows=4)
    whole, parts = (LanguageLoss(gpt, batches, NAMES) for batches in ([tokens], [tokens[:1], tokens[1:]]))
    v = torch.randn(sum(leaf.numel() for leaf in whole.leaves), dtype=torch.float64)
    with whole.measuring(), parts.measuring():
        for name in ("hessian", "gauss_newton"):
            one = getattr(whole, name)()(v)
            for keep in (False, True):
                assert relative(getattr(parts, name)(keep=keep)(v), one) < 1e-12
        assert relative(parts.gradient(), whole.gradient()) < 1e-12
        assert relative(parts.hessian().gradient(), whole.gradient()) < 1e-12
        assert parts.value() == pytest.approx(whole.value(), rel=1e-13)


def test_the_model_is_left_as_it_was():
    gpt, tokens = model("prenorm", moe=True, d_ff=8).train(), batch()
    for parameter in list(gpt.parameters())[:3]:
        parameter.requires_grad_(False)
    before = {name: value.clone() for name, value in gpt.state_dict().items()}
    had = [parameter.requires_grad for parameter in gpt.parameters()]
    loss = LanguageLoss(gpt, [tokens])

    def measure():
        with loss.measuring():
            ones = torch.ones(loss.hessian().space.size, dtype=torch.float64)
            loss.hessian()(ones)
            loss.finite_difference()(ones)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        measure()
    assert gpt.training
    assert [parameter.requires_grad for parameter in gpt.parameters()] == had
    assert all(torch.equal(value, before[name]) for name, value in gpt.state_dict().items())
    assert all(parameter.grad is None for parameter in gpt.parameters())
    assert not any(getattr(module, "reference", False) for module in gpt.modules())


def test_preconditioned():
    gpt, tokens = model("prenorm"), batch()
    loss = LanguageLoss(gpt, [tokens], NAMES[:1])
    with loss.measuring():
        hessian = loss.hessian()
        scale = torch.rand(hessian.space.size, dtype=torch.float64) + 0.5
        found = torch.linalg.eigvalsh(matrix(Scaled(hessian, scale**-0.5)))
        expected = torch.linalg.eigvals(torch.diag(1 / scale) @ matrix(hessian)).real.sort().values
    assert relative(found, expected) < 1e-10


def test_a_quadratic_form():
    """A leaf that does not enter, a loss that is linear, and a matrix that is known."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(5, 5, dtype=torch.float64, generator=generator)
    a = a + a.mT
    x, unused = (
        torch.randn(5, dtype=torch.float64, generator=generator, requires_grad=True),
        torch.zeros(2, dtype=torch.float64, requires_grad=True),
    )
    operator = Hessian([lambda: 0.5 * x @ a @ x], [x, unused])
    expected = torch.block_diag(a, torch.zeros(2, 2, dtype=torch.float64))
    assert relative(matrix(operator), expected) < 1e-14
    assert not matrix(Hessian([x.sum], [x, unused])).any()
    assert not matrix(GaussNewton([Part(outputs=lambda: x.sum()[None], loss=lambda z: z.sum())], [x])).any()
    assert relative(matrix(GaussNewton([Part(outputs=lambda: a @ x, loss=lambda z: 0.5 * z @ z)], [x])), a @ a) < 1e-13

    def gradient():
        return torch.autograd.grad(0.5 * x @ a @ x, x)[0]

    def of_seventh_power():
        return torch.autograd.grad((x**7).sum(), x)[0]

    exact, v = 42 * x.detach() ** 5, torch.ones(5, dtype=torch.float64)
    by_step = [FiniteDifference(of_seventh_power, [x], step=step, extrapolated=True) for step in (0.2, 0.1)]
    errors = [relative(differences(v), exact) for differences in by_step]
    assert errors[0] / errors[1] == pytest.approx(16, rel=0.05), "of the fourth order"
    start = x.detach().clone()
    assert relative(matrix(FiniteDifference(gradient, [x])), a) < 1e-8
    assert torch.equal(x.detach(), start)
    assert not FiniteDifference(gradient, [x])(torch.zeros(5, dtype=torch.float64)).any()


def test_names_of_parts():
    gpt = model("simplenorm")
    every = [name for name, _ in gpt.named_parameters()]
    assert parameters_of(gpt, "all") == every
    assert parameters_of(gpt, "blocks.1.attn.q") == ["blocks.1.attn.q.weight", "blocks.1.attn.q.after.0.gain"]
    assert parameters_of(gpt, "head.weight") == ["head.weight"]
    tied = model("prenorm", "gpt2")
    assert "head.weight" not in parameters_of(tied, "all")
    (leaf,) = LanguageLoss(tied, [batch()], parameters_of(tied, "head")).leaves
    assert leaf is tied.embed.weight
    assert updated_by_adam(build_optimizer(tied, OptimConfig()), tied, ["head.weight"]) == ["head.weight"]
    with pytest.raises(UserError, match=r"--part = 'blocks\.1\.a'"):
        parameters_of(gpt, "blocks.1.a")
