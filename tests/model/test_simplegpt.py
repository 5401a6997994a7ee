"""simplegpt.md section 8: what an implementation of SimpleNorm must satisfy, on the Llama backbones."""

from __future__ import annotations

import math

import pytest
import torch
from cases import VOCAB, tiny_gpt, tokens

from gptnorm.config import BackboneName, OptimConfig
from gptnorm.norms import NormModule
from gptnorm.train.schedule import lr_factor, warmup_steps

LLAMAS = pytest.mark.parametrize("backbone", ["llama2", "llama3"])


@LLAMAS
def test_gains(backbone: BackboneName) -> None:
    """1. Seven gain vectors a block and one at the end, none of them before a branch."""
    model = tiny_gpt("simplenorm", backbone)
    norms = [name for name, module in model.named_modules() if isinstance(module, NormModule)]
    assert len(norms) == 7 * model.shape.n_layers + 1
    assert [name for name in norms if ".after." not in name] == ["own.final_norm"]


@LLAMAS
def test_output_norm_and_invariance(backbone: BackboneName) -> None:
    """2. ‖Ψ(x)‖ = √d, and Ψ does not change when W or x is scaled."""
    model = tiny_gpt("simplenorm", backbone)
    generator = torch.Generator().manual_seed(0)
    for role in model.shape.matrix_roles:
        psi = getattr(model.blocks[0].attn if role in ("q", "k", "v", "o") else model.blocks[0].ffn, role)
        x = 3 * torch.randn(50, model.shape.in_features(role), generator=generator)
        y = psi(x)
        assert torch.allclose(y.norm(dim=-1), torch.full((50,), y.shape[-1] ** 0.5), rtol=1e-3)
        for c in (0.5, 3.0, 100.0):
            assert torch.allclose(psi(c * x), y, rtol=1e-3, atol=1e-3)
        with torch.no_grad():
            psi.weight.mul_(3.0)
        assert torch.allclose(psi(x), y, rtol=1e-3, atol=1e-3)


@LLAMAS
def test_norm_runs_over_all_heads(backbone: BackboneName) -> None:
    """3. q as a whole has norm √(h d_h); the norms of single heads vary."""
    model = tiny_gpt("simplenorm", backbone)
    q = model.blocks[0].attn.q(torch.randn(20, model.shape.d, generator=torch.Generator().manual_seed(0)))
    assert torch.allclose(q.norm(dim=-1), torch.full((20,), model.shape.d**0.5), rtol=1e-3)
    heads = q.unflatten(-1, (model.shape.n_heads, -1)).norm(dim=-1)
    assert heads.std(dim=-1).min() > 0.05


@LLAMAS
def test_residual_rms(backbone: BackboneName) -> None:
    """4. Each branch adds RMS 1, so the stream's is √(1 + 2l) after l blocks at initialisation."""
    model = tiny_gpt("simplenorm", backbone, d_model=256, n_heads=4, n_layers=6, d_ff=512)
    rms = []

    def watch(block: torch.nn.Module, inputs: object, output: tuple[tuple[torch.Tensor, ...], None]) -> None:
        rms.append(output[0][0].square().mean().sqrt().item())

    for block in model.blocks:
        block.register_forward_hook(watch)
    with torch.no_grad():
        model(tokens(batch=8))
    for after, value in enumerate(rms, 1):
        assert value == pytest.approx(math.sqrt(1 + 2 * after), rel=0.05)


@LLAMAS
@pytest.mark.parametrize("strategy", ["prenorm", "prenorm_qknorm", "simplenorm"])
def test_initial_loss(backbone: BackboneName, strategy: str) -> None:
    """4. Logits are N(0, 1) at initialisation, so the loss is ln V + 0.5 (the head's cut takes off 0.01)."""
    model = tiny_gpt(strategy, backbone, d_model=256, n_heads=4, d_ff=512)
    with torch.no_grad():
        loss = model.loss(tokens(batch=64)).item()
    assert loss == pytest.approx(math.log(VOCAB) + 0.5, abs=0.12)


@pytest.mark.parametrize("d", [64, 256])
@pytest.mark.parametrize("strategy", ["prenorm", "prenorm_qknorm", "simplenorm"])
def test_initial_loss_with_a_tied_head(strategy: str, d: int) -> None:
    """A tied embedding of std 1 would start at the size of d; it must not be drawn like an untied one."""
    model = tiny_gpt(strategy, "llama2", d_model=d, n_heads=4, d_ff=2 * d, tied=True)
    assert model.head.weight is model.embed.weight
    with torch.no_grad():
        loss = model.loss(tokens(batch=64)).item()
    assert loss == pytest.approx(math.log(VOCAB), abs=0.2)


def test_degree_zero_branches() -> None:
    """Section 1.1: Attn(c x) = Attn(x) and FFN(c x) = FFN(x), which is why no PreNorm is needed."""
    model = tiny_gpt("simplenorm", "llama2").double()
    block = model.blocks[0]
    x = torch.randn(2, 8, model.shape.d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    from gptnorm.model.rope import rotations

    turn = rotations(8, model.shape.head_dim, 1e4, like=x)
    for branch in (lambda z: block.attn(z, turn), block.ffn):
        assert torch.allclose(branch(3 * x), branch(x), rtol=1e-3, atol=1e-4)


@LLAMAS
def test_gradient_is_orthogonal_to_the_weight(backbone: BackboneName) -> None:
    """6. ⟨W, ∇W⟩ = 0 for every Ψ weight (up to eps), not for head and embedding."""
    model = tiny_gpt("simplenorm", backbone).double()
    model.loss(tokens()).backward()
    cosines = {}
    for _, owner in model.weights():
        gradient = owner.weight.grad
        assert gradient is not None
        cosine = (owner.weight * gradient).sum() / (owner.weight.norm() * gradient.norm())
        cosines.setdefault(owner.role, []).append(abs(cosine.item()))
    for role in model.shape.matrix_roles:
        assert max(cosines[role]) < 1e-4, role
    assert cosines["head"][0] > 1e-2
    assert cosines["embed"][0] > 1e-3


def test_schedule_of_the_reference_code() -> None:
    """7. First step lr / (W + 1), factor 1 at step W, 0 at T, a straight line between."""
    config = OptimConfig(schedule="linear", warmup=2000, floor=0.0)
    steps, warm = 200_000, warmup_steps(config, 200_000)
    assert warm == 2000
    assert lr_factor(0, steps, config) == pytest.approx(1 / 2001)
    assert lr_factor(warm, steps, config) == 1.0
    assert lr_factor(steps, steps, config) == 0.0
    assert lr_factor((warm + steps) // 2, steps, config) == pytest.approx(0.5)


class TestClosedForms:
    """5. Section 5.2 at a projection of a real model (`ffn.up` of a block), fp64.

    z = W x, s = √(‖z‖²/d + eps), y = γ ⊙ z / s; with b = γ ⊙ ∂l/∂y:
    J = (1/s) D (I − z zᵀ/(d s²)) W,  L = Jᵀ H_yy J,
    C = −(1/(d s³)) Wᵀ [b zᵀ + z bᵀ + (b·z) I − 3 (b·z) z zᵀ/(d s²)] W,  H_xx = L + C.
    """

    @pytest.fixture(params=[1e-5, 0.3], ids=["eps 1e-5", "eps 0.3"])
    def problem(self, request: pytest.FixtureRequest):
        return self.build(request.param)

    @pytest.fixture
    def without_eps(self):
        return self.build(1e-30)

    def build(self, eps: float):
        model = tiny_gpt("simplenorm", "llama2", own={"eps": eps}, d_model=8, n_heads=2, d_ff=6)
        psi = model.blocks[1].ffn.up.double()
        generator = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        with torch.no_grad():
            psi.after[0].gain.copy_(1 + 0.3 * randn(6))
        a, c = randn(6, 6), randn(6)

        def outer(y: torch.Tensor) -> torch.Tensor:
            return 0.5 * (a @ y).square().sum() + (c * y.tanh()).sum()

        return psi, randn(8), outer, eps

    def parts(self, psi, W, x, outer, eps):
        """H_zz's two halves and the gradient with respect to z, from the formulas alone."""
        gain, d = psi.after[0].gain.detach(), len(W)
        z = W @ x
        s = (z.square().sum() / d + eps).sqrt()
        D, identity = torch.diag(gain), torch.eye(d, dtype=torch.float64)
        y = (D @ z / s).requires_grad_()
        (g,) = torch.autograd.grad(outer(y), y)
        b = gain * g
        J_z = D @ (identity - torch.outer(z, z) / (d * s**2)) / s
        L_zz = J_z.T @ torch.autograd.functional.hessian(outer, y.detach()) @ J_z
        bracket = torch.outer(b, z) + torch.outer(z, b) + (b @ z) * identity
        C_zz = -(bracket - 3 * (b @ z) * torch.outer(z, z) / (d * s**2)) / (d * s**3)
        return L_zz, C_zz, J_z.T @ g

    def measured(self, psi, W, x, outer):
        def loss(x):
            with_weight = torch.func.functional_call(psi, {"weight": W}, (x,))
            return outer(with_weight)

        return torch.autograd.functional.hessian(loss, x)

    def test_activation_hessian(self, problem) -> None:
        psi, x, outer, eps = problem
        W = psi.weight.detach()
        L_zz, C_zz, _ = self.parts(psi, W, x, outer, eps)
        L, C = W.T @ L_zz @ W, W.T @ C_zz @ W
        assert (self.measured(psi, W, x, outer) - (L + C)).abs().max() < 1e-10

    def test_euler_identities(self, without_eps) -> None:
        """Of degree zero, that is without eps: L x = 0, C x = −∇, x·∇ = 0, so ‖C‖ ≥ ‖∇‖ / ‖x‖."""
        psi, x, outer, eps = without_eps
        W = psi.weight.detach()
        L_zz, C_zz, grad_z = self.parts(psi, W, x, outer, eps)
        L, C, grad = W.T @ L_zz @ W, W.T @ C_zz @ W, W.T @ grad_z
        assert (self.measured(psi, W, x, outer) - (L + C)).abs().max() < 1e-10
        assert (L @ x).abs().max() < 1e-10
        assert (C @ x + grad).abs().max() < 1e-10
        assert abs(x @ grad) < 1e-10
        assert torch.linalg.matrix_norm(C, 2) >= grad.norm() / x.norm() - 1e-10

    def test_norm_of_the_bracket(self, without_eps) -> None:
        """‖M‖ = (|u·b| + √((u·b)² + 4 ‖P b‖²)) / 2 for M = P b uᵀ + u (P b)ᵀ + (u·b) P."""
        psi, x, outer, eps = without_eps
        W = psi.weight.detach()
        _, C_zz, _ = self.parts(psi, W, x, outer, eps)
        z, d = W @ x, len(W)
        u, gain = z / z.norm(), psi.after[0].gain.detach()
        y = (d**0.5 * gain * u).requires_grad_()
        (g,) = torch.autograd.grad(outer(y), y)
        b = gain * g
        ub, pb = u @ b, b - (u @ b) * u
        expected = (ub.abs() + (ub**2 + 4 * pb @ pb).sqrt()) / 2
        size = torch.linalg.matrix_norm(C_zz, 2) * z.norm() ** 2 / d**0.5
        assert abs(size - expected) < 1e-10

    def test_scale_of_the_weight(self, without_eps) -> None:
        """W → cW leaves H, L and C alone each; a linear layer's Hessian would grow with c²."""
        psi, x, outer, eps = without_eps
        W = psi.weight.detach()
        one = self.measured(psi, W, x, outer)
        L_one, C_one, _ = (part for part in self.parts(psi, W, x, outer, eps))
        for c in (0.01, 3.0, 100.0):
            assert (self.measured(psi, c * W, x, outer) - one).abs().max() < 1e-10
            L_c, C_c, _ = self.parts(psi, c * W, x, outer, eps)
            for part_c, part in ((L_c, L_one), (C_c, C_one)):
                assert (c**2 * part_c - part).abs().max() < 1e-10 * max(1.0, c**2 * part_c.abs().max().item())

    def test_weight_hessian(self, problem) -> None:
        """H with respect to vec(W) is (x xᵀ) ⊗ H_zz."""
        psi, x, outer, eps = problem
        W = psi.weight.detach()

        def loss(w: torch.Tensor) -> torch.Tensor:
            return outer(torch.func.functional_call(psi, {"weight": w.view_as(W)}, (x,)))

        L_zz, C_zz, _ = self.parts(psi, W, x, outer, eps)
        # vec by rows: index (i, j) of W, so the Kronecker factors stand the other way round.
        expected = torch.kron(L_zz + C_zz, torch.outer(x, x))
        one = torch.autograd.functional.hessian(loss, W.flatten())
        assert (one - expected).abs().max() < 1e-10 * max(1.0, one.abs().max().item())

    def test_weight_hessian_at_another_scale(self, without_eps) -> None:
        """Of size 1/c² at cW, with a gradient orthogonal to W."""
        psi, x, outer, eps = without_eps
        W = psi.weight.detach()

        def loss(w: torch.Tensor) -> torch.Tensor:
            return outer(torch.func.functional_call(psi, {"weight": w.view_as(W)}, (x,)))

        one, scaled = (torch.autograd.functional.hessian(loss, c * W.flatten()) for c in (1, 4))
        assert (16 * scaled - one).abs().max() < 1e-10 * max(1.0, one.abs().max().item())
        _, _, grad_z = self.parts(psi, W, x, outer, eps)
        assert abs((W * torch.outer(grad_z, x)).sum()) < 1e-10
