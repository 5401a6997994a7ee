"""Dense matrices of operators, from torch.func where it can, and small models in double precision."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from cases import shake, tiny_gpt, tokens
from torch import Tensor
from torch.func import functional_call, hessian, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

from gptnorm.curvature import Operator
from gptnorm.model import GPT


def matrix(operator: Operator) -> Tensor:
    """Column by column."""
    eye = torch.eye(operator.space.size, dtype=operator.space.dtype)
    return torch.stack([operator(column) for column in eye], 1)


def model(strategy: str, backbone: str = "llama2", **changes: object) -> GPT:
    """Two blocks of width 8 with two heads, gains off their initial values, fp64, eval."""
    sizes = {"d_model": 8, "n_heads": 2, "d_ff": 12, "n_layers": 2, **changes}
    return shake(tiny_gpt(strategy, backbone, **sizes)).double().eval()


def batch(rows: int = 2, length: int = 6, seed: int = 3) -> Tensor:
    return tokens(rows, length, seed)


def dense_hessian(gpt: GPT, names: list[str], batch: Tensor, *, total: bool = True) -> Tensor:
    """By torch.func.hessian of the objective."""
    parameters = {name: p.detach() for name, p in gpt.named_parameters()}
    shapes = {name: parameters[name].shape for name in names}

    def loss(flat: Tensor) -> Tensor:
        moved = dict(parameters)
        at = 0
        for name, shape in shapes.items():
            moved[name] = flat[at : at + shape.numel()].view(shape)
            at += shape.numel()
        return functional_call(_Objective(gpt, total=total), {f"gpt.{k}": v for k, v in moved.items()}, (batch,))

    flat = torch.cat([parameters[name].reshape(-1) for name in names])
    with sdpa_kernel(SDPBackend.MATH):
        return torch.autograd.functional.hessian(loss, flat)


def dense_gauss_newton(gpt: GPT, names: list[str], batch: Tensor, *, z_loss: float = 0.0) -> Tensor:
    """Jᵀ H J with torch.func's Jacobian of the logits and the closed form of cross-entropy's Hessian."""
    parameters = {name: p.detach() for name, p in gpt.named_parameters()}
    inputs, targets = batch[:, :-1], batch[:, 1:].flatten()

    def logits(chosen: dict[str, Tensor]) -> Tensor:
        return functional_call(gpt, {**parameters, **chosen}, (inputs,)).flatten(0, 1)

    with sdpa_kernel(SDPBackend.MATH):
        jacobian = jacrev(logits)({name: parameters[name] for name in names})
        z = logits({})
        p, lse = z.softmax(-1), z.logsumexp(-1)[:, None, None]
    J = torch.cat([jacobian[name].flatten(2) for name in names], 2)
    outer = p[:, :, None] * p[:, None, :]
    H = (torch.diag_embed(p) - outer) * (1 + 2 * z_loss * lse) / len(targets) + 2 * z_loss * outer / len(targets)
    return torch.einsum("nvi,nvw,nwj->ij", J, H, J)


class _Objective(torch.nn.Module):
    def __init__(self, gpt: GPT, *, total: bool) -> None:
        super().__init__()
        self.gpt, self.total = gpt, total

    def forward(self, batch: Tensor) -> Tensor:
        found = self.gpt.objective(batch)
        return found.total if self.total else found.loss


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest error over the largest entry."""
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


class OnceDifferentiable(torch.autograd.Function):
    """silu with the right gradient, whose own derivative is silently that of a constant factor: a kernel that saves its
    slope and multiplies by it, as hand-written ones do."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.sigmoid() * (1 + x * (1 - x.sigmoid())))
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx, *grads):
        (slope,) = ctx.saved_tensors
        return grads[0] * slope


__all__ = [
    "F",
    "OnceDifferentiable",
    "batch",
    "dense_gauss_newton",
    "dense_hessian",
    "hessian",
    "matrix",
    "model",
    "relative",
]
