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
    for role in ("q", "k", "v", "o"):
        psi = getattr(model.blocks[0].attn, role)
        x = torch.randn(50, model.shape.d, generator=generator)
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

    def watch(block: torch.nn.Module, inputs: object, state: tuple[torch.Tensor, ...]) -> None:
        rms.append(state[0].square().mean().sqrt().item())

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
    """5. Section 5.2: the Hessian of l(Ψ(x)) with respect to x and to vec(W), fp64, eps → 0."""

    d, m = 7, 5

    @pytest.fixture
    def problem(self):
        generator = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        from gptnorm.norms import Norm

        norm = Norm(kind="rmsnorm", size=self.d, eps=0.0).build().double()
        a, c = randn(self.d, self.d), randn(self.d)
        with torch.no_grad():
            assert norm.gain is not None
            norm.gain.copy_(1 + 0.3 * randn(self.d))

        def outer(y: torch.Tensor) -> torch.Tensor:
            return 0.5 * (a @ y).square().sum() + (c * y.tanh()).sum()

        return randn(self.d, self.m), randn(self.m), norm, outer

    def split(self, W, x, norm, outer):
        """L and C as the paper's notes write them: P = I - u uᵀ, D = Diag(γ), b = γ ⊙ g."""
        z = W @ x
        r = z.norm()
        u = z / r
        D, P = torch.diag(norm.gain.detach()), torch.eye(self.d, dtype=torch.float64) - torch.outer(u, u)
        y = (self.d**0.5 * D @ u).requires_grad_()
        (g,) = torch.autograd.grad(outer(y), y)
        H_yy = torch.autograd.functional.hessian(outer, y.detach())
        b = D @ g
        J = self.d**0.5 / r * D @ P @ W
        M = torch.outer(P @ b, u) + torch.outer(u, P @ b) + (u @ b) * P
        return J.T @ H_yy @ J, -(self.d**0.5) / r**2 * W.T @ M @ W, self.d**0.5 / r * W.T @ P @ b

    def test_activation_hessian(self, problem) -> None:
        W, x, norm, outer = problem
        measured = torch.autograd.functional.hessian(lambda x: outer(norm(W @ x)), x)
        L, C, grad = self.split(W, x, norm, outer)
        assert (measured - (L + C)).abs().max() < 1e-10
        assert (L @ x).abs().max() < 1e-10
        assert (C @ x + grad).abs().max() < 1e-10
        assert abs(x @ grad) < 1e-10
        assert torch.linalg.matrix_norm(C, 2) >= grad.norm() / x.norm() - 1e-10

    def test_activation_hessian_does_not_see_the_weights_scale(self, problem) -> None:
        W, x, norm, outer = problem
        one = torch.autograd.functional.hessian(lambda x: outer(norm(W @ x)), x)
        for c in (0.01, 3.0, 100.0):
            scaled = torch.autograd.functional.hessian(lambda x, c=c: outer(norm(c * W @ x)), x)
            assert (scaled - one).abs().max() < 1e-10

    def test_linear_layer_scales_with_the_square(self, problem) -> None:
        W, x, _, _ = problem

        def quadratic(x, c):
            return 0.5 * (c * W @ x).square().sum()

        one = torch.autograd.functional.hessian(lambda x: quadratic(x, 1.0), x)
        assert torch.allclose(torch.autograd.functional.hessian(lambda x: quadratic(x, 3.0), x), 9 * one, atol=1e-10)

    def test_weight_hessian_scales_with_the_inverse_square(self, problem) -> None:
        W, x, norm, outer = problem

        def loss(w):
            return outer(norm(w.view(self.d, self.m) @ x))

        one = torch.autograd.functional.hessian(loss, W.flatten())
        scaled = torch.autograd.functional.hessian(loss, 4 * W.flatten())
        assert (16 * scaled - one).abs().max() < 1e-10
        gradient = torch.autograd.functional.jacobian(loss, W.flatten())
        assert abs(W.flatten() @ gradient) < 1e-10
