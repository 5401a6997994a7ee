"""The same model and batch in two independent libraries: curvlinops-for-pytorch and hessian-eigenthings.

GPT-2's activation and RMSNorm, since the first differentiates in forward mode: silu has no such derivative of its
gradient (torch 2.13), and products in the gains of `F.layer_norm` come out up to a percent off there; `test_layer_norm`
has finite differences and the second library say who is right.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from dense import batch, model, relative
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gptnorm.curvature import LanguageLoss, hutch_pp, lanczos, power_iteration

curvlinops = pytest.importorskip("curvlinops")
hessian_eigenthings = pytest.importorskip("hessian_eigenthings")


class Flat(nn.Module):
    """Logits of all tokens as rows."""

    def __init__(self, gpt):
        super().__init__()
        self.gpt = gpt

    def forward(self, tokens):
        return self.gpt(tokens).flatten(0, 1)


def curvlinops_operator(name, gpt, tokens):
    data = [(tokens[:, :-1], tokens[:, 1:].flatten())]
    kind = {"hessian": curvlinops.HessianLinearOperator, "gauss_newton": curvlinops.GGNLinearOperator}[name]
    flat = Flat(gpt)
    return kind(flat, nn.CrossEntropyLoss(), list(flat.parameters()), data)


def eigenthings_operator(name, gpt, tokens):
    def loss(flat, batch):
        return F.cross_entropy(flat(batch[:, :-1]), batch[:, 1:].flatten())

    if name == "hessian":
        return hessian_eigenthings.HessianOperator(Flat(gpt), [tokens], loss)
    return hessian_eigenthings.GGNOperator(
        Flat(gpt),
        [tokens],
        lambda flat, batch: flat(batch[:, :-1]),
        lambda z, batch: F.cross_entropy(z, batch[:, 1:].flatten()),
    )


@pytest.mark.parametrize("name", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("strategy", ["prenorm", "simplenorm"])
def test_products_and_eigenvalues(strategy, name):
    gpt, tokens = model(strategy, "gpt2", own={"norm": "rmsnorm"}), batch()
    loss = LanguageLoss(gpt, [tokens])
    generator = torch.Generator().manual_seed(1)
    with loss.measuring():
        ours = getattr(loss, name)()
        v = ours.space.draw(generator)
        product = ours(v)
        (largest,), (smallest,) = lanczos(ours, smallest=1, tolerance=1e-7)
        powered = power_iteration(ours, tolerance=1e-3, most=3000)
        trace = hutch_pp(ours, probes=300)
    with sdpa_kernel(SDPBackend.MATH):
        assert relative(product, curvlinops_operator(name, gpt, tokens) @ v) < 1e-6
        theirs = eigenthings_operator(name, gpt, tokens)
        assert relative(product, theirs.matvec(v)) < 1e-6
        # Of either library's own algorithm, to its own tolerance.
        found = hessian_eigenthings.lanczos(theirs, k=1, which="LA", tol=1e-8, max_iter=150, seed=0)
        assert largest.value == pytest.approx(float(found.eigenvalues[0]), rel=1e-4)
        assert powered.value == pytest.approx(float(found.eigenvalues[0]), rel=1e-3)
        if name == "hessian":
            low = hessian_eigenthings.lanczos(theirs, k=1, which="SA", tol=1e-8, max_iter=150, seed=0)
            assert smallest.value == pytest.approx(float(low.eigenvalues[0]), rel=1e-4)
        other = hessian_eigenthings.trace(theirs, num_matvecs=300, seed=1)
    assert trace.error is not None
    assert abs(trace.value - float(other.estimate)) < 6 * trace.error


def test_layer_norm():
    """The gains of layer norms, in which the libraries differ."""
    gpt, tokens = model("prenorm", "gpt2"), batch()
    loss = LanguageLoss(gpt, [tokens])
    with loss.measuring():
        v = loss.hessian().space.draw(torch.Generator().manual_seed(1))
        ours, differences = loss.hessian()(v), loss.finite_difference()(v)
    with sdpa_kernel(SDPBackend.MATH):
        assert relative(eigenthings_operator("hessian", gpt, tokens).matvec(v), ours) < 1e-6
    assert relative(ours, differences) < 1e-6
