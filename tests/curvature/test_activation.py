"""The Hessian of the loss in what a slot reads, against dense matrices and the closed forms of the theory."""

from __future__ import annotations

import math

import pytest
import torch
from cases import ROWS
from dense import batch, matrix, model, relative
from torch.nn.attention import SDPBackend, sdpa_kernel

from gptnorm.curvature import LanguageLoss, SlotLoss, slots_of
from gptnorm.errors import UserError

STRATEGIES = [row.strategy for row in ROWS]


def loss_of_input(gpt, tokens, slot, token):
    """The loss as a function of what the slot reads at a position, by replacing its input."""

    def loss(x):
        def enter(module, inputs):
            y = inputs[0].clone()
            rows = y.view(-1, *y.shape[2:]) if y.dim() > 2 or y.shape[0] == 1 else y
            if token is None:
                return (x.view_as(y), *inputs[1:])
            rows = y[0] if y.shape[0] == 1 else y
            rows = torch.cat([rows[:token], x[None], rows[token + 1 :]])
            return (rows.view_as(y), *inputs[1:])

        handle = slots_of(gpt)[slot].register_forward_pre_hook(enter)
        try:
            with sdpa_kernel(SDPBackend.MATH):
                return gpt.loss(tokens[None])
        finally:
            handle.remove()

    return loss


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_slot_of_every_strategy(strategy):
    """H_xx against torch's dense Hessian, and H = L + C with C nothing for a bare linear map."""
    gpt, tokens = model(strategy, n_layers=1), batch(1)[0]
    for parameter in gpt.parameters():
        parameter.requires_grad_(False)
    for name, slot in slots_of(gpt).items():
        if name.endswith("own.unit") and name.startswith("blocks."):
            with pytest.raises(UserError, match="is used more than once in a forward pass"):
                SlotLoss(gpt, tokens, name, token=2)
            continue
        loss = SlotLoss(gpt, tokens, name, token=2)
        with loss.measuring():
            hessian, gauss_newton, curvature = (
                matrix(part) for part in (loss.hessian(), loss.gauss_newton(), loss.curvature())
            )
        expected = torch.autograd.functional.hessian(loss_of_input(gpt, tokens, name, 2), loss.x)
        expected = expected.reshape(loss.space.size, loss.space.size)
        scale = expected.abs().max().clamp_min(1e-8)
        assert (hessian - expected).abs().max() < 1e-10 * scale, name
        assert (hessian - gauss_newton - curvature).abs().max() < 1e-10 * scale.clamp_min(
            float(curvature.abs().max())
        ), name
        if not len(getattr(slot, "after", [0])):
            assert not curvature.any(), name


def test_a_whole_sequence():
    gpt, tokens = model("simplenorm", n_layers=1), batch(1)[0]
    loss = SlotLoss(gpt, tokens, "blocks.0.ffn.up")
    with loss.measuring():
        hessian = matrix(loss.hessian())
        assert relative(hessian, matrix(loss.gauss_newton()) + matrix(loss.curvature())) < 1e-10
    expected = torch.autograd.functional.hessian(loss_of_input(gpt, tokens, "blocks.0.ffn.up", None), loss.x)
    assert relative(hessian, expected.reshape_as(hessian)) < 1e-10
    one = SlotLoss(gpt, tokens, "blocks.0.ffn.up", token=3)
    with one.measuring():
        d = one.space.size
        assert relative(matrix(one.hessian()), hessian[3 * d : 4 * d, 3 * d : 4 * d]) < 1e-12


@pytest.mark.parametrize("eps", [None, 1e-5, 0.3])
def test_closed_forms_of_simplenorm(eps):
    """Derived by hand, with and without eps."""
    own = {} if eps is None else {"eps": eps}
    gpt, tokens = model("simplenorm", own=own or {"eps": 1e-300}), batch(1)[0]
    name = "blocks.1.ffn.gate"
    slot = slots_of(gpt)[name]
    loss = SlotLoss(gpt, tokens, name, token=4)
    with loss.measuring():
        hyy, g = matrix(loss.output_hessian()), loss.output_hessian().gradient()
        L, C = matrix(loss.gauss_newton()), matrix(loss.curvature())
        gradient = loss.gradient()
    W, D, x = slot.weight.detach(), torch.diag(slot.after[0].gain.detach()), loss.x
    z = W @ x
    d, eye, b = len(z), torch.eye(len(z), dtype=torch.float64), D @ g
    if eps is None:
        r = z.norm()
        u = z / r
        P = eye - torch.outer(u, u)
        J = math.sqrt(d) / r * D @ P @ W
        bracket = torch.outer(P @ b, u) + torch.outer(u, P @ b) + (u @ b) * P
        expected = -math.sqrt(d) / r**2 * W.mT @ bracket @ W
        norm = (abs(u @ b) + torch.sqrt((u @ b) ** 2 + 4 * (P @ b) @ (P @ b))) / 2
        assert torch.linalg.matrix_norm(bracket, 2) == pytest.approx(float(norm), rel=1e-12)
        # Euler: of degree 0, so that x is in the kernel of L and turned into the gradient by C.
        assert (L @ x).abs().max() < 1e-12 * L.abs().max() * x.norm()
        assert relative(C @ x, -gradient) < 1e-10
        assert torch.linalg.matrix_norm(C, 2) >= gradient.norm() / x.norm() * (1 - 1e-12)
    else:
        s = (z @ z / d + eps).sqrt()
        J = D @ (eye - torch.outer(z, z) / (d * s**2)) @ W / s
        inner = torch.outer(b, z) + torch.outer(z, b) + (b @ z) * eye - 3 * (b @ z) * torch.outer(z, z) / (d * s**2)
        expected = -W.mT @ inner @ W / (d * s**3)
    assert relative(L, J.mT @ hyy @ J) < 1e-10
    assert relative(C, expected) < 1e-10


@pytest.mark.parametrize("factor", [0.01, 3.0, 100.0])
def test_scale_of_the_weight(factor):
    """W → cW: under SimpleNorm L, C and H stay, and the Hessian in W has 1/c²; eps is nothing here."""
    gpt, tokens = model("simplenorm", own={"eps": 1e-300}), batch(1)[0]
    name = "blocks.0.ffn.up"
    weight = slots_of(gpt)[name].weight

    def measured():
        loss, outer = SlotLoss(gpt, tokens, name, token=1), LanguageLoss(gpt, [tokens[None]], [f"{name}.weight"])
        with loss.measuring():
            found = [matrix(part) for part in (loss.hessian(), loss.gauss_newton(), loss.curvature())]
        with outer.measuring():
            return [*found, matrix(outer.hessian())], float(outer.gradient() @ weight.detach().reshape(-1))

    before, _ = measured()
    with torch.no_grad():
        weight.mul_(factor)
    after, radial = measured()
    for old, new, power in zip(before, after, (0, 0, 0, 2), strict=True):
        assert relative(new * factor**power, old) < 1e-9
    assert abs(radial) < 1e-12


def test_a_linear_layer_grows_with_its_square():
    """PreNorm's bare map at fixed H_yy: L is Wᵀ H_yy W, c² times as large."""
    gpt, tokens = model("prenorm"), batch(1)[0]
    loss = SlotLoss(gpt, tokens, "blocks.0.ffn.up", token=1)
    with loss.measuring():
        hyy, L = matrix(loss.output_hessian()), matrix(loss.gauss_newton())
    W = slots_of(gpt)["blocks.0.ffn.up"].weight.detach()
    assert relative(L, W.mT @ hyy @ W) < 1e-10


def test_the_hessian_in_a_weight_is_a_sum_over_pairs_of_tokens():
    """Σ_{s,t} x_s x_tᵀ ⊗ H_{z_s z_t}, in the order in which vec(W) runs along rows of W (out, in)."""
    gpt, tokens = model("prenorm"), batch(1)[0]
    name = "blocks.0.attn.o"
    slot, whole = SlotLoss(gpt, tokens, name), LanguageLoss(gpt, [tokens[None]], [f"{name}.weight"])
    with slot.measuring():
        hzz = matrix(slot.output_hessian())
    with whole.measuring():
        found = matrix(whole.hessian())
    x, length = slot.x, len(slot.x)
    hzz = hzz.view(length, -1, length, hzz.shape[0] // length)
    expected = torch.einsum("si,sotp,tj->oipj", x, hzz, x).reshape_as(found)
    assert relative(found, expected) < 1e-10


def test_what_is_wrong_is_said():
    gpt, tokens = model("prenorm", moe=True, d_ff=8), batch(1)[0]
    with pytest.raises(UserError, match=r"--slot = 'blocks\.0\.ffn': no such slot; there are .*blocks\.0\.attn\.q"):
        SlotLoss(gpt, tokens, "blocks.0.ffn")
    with pytest.raises(UserError, match=r"--token = 5: must be 0 … 4"):
        SlotLoss(gpt, tokens, "blocks.0.attn.q", token=5)
    assert not any("routed" in name or "shared" in name for name in slots_of(gpt))
