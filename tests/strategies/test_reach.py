"""Parts of the contract that no shipped strategy uses yet, proved by one that uses them all.

The strategy is anGPT as its paper's notes write it (constants instead of norms, LERP residual,
bounded rows), with a norm on values and optimizer factors beside it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import BACKBONES, shake, tiny_shape, tokens
from torch import Tensor

from gptnorm.config import BackboneName, InitConfig, OptimConfig
from gptnorm.model import GPT
from gptnorm.model.init import normalize_
from gptnorm.model.rope import rotate, rotations
from gptnorm.norms import After, Constant, LearnedScale, Norm
from gptnorm.shape import Role, Shape
from gptnorm.strategies import STRATEGIES
from gptnorm.strategies.base import Attention, Branch, Constraint, FeedForward, Group, State, Strategy
from gptnorm.train.optim import build_optimizer


class Reach(Strategy):
    """h ← ν(α) (h + α (x − h)), every ν a function of the shapes."""

    card = STRATEGIES["ngpt"].card

    def projection(self, role: Role, layer: int, shape: Shape) -> tuple[After, ...]:
        d, ff = shape.d, shape.d_ff
        nu = {"v": shape.n_heads**0.5, "o": shape.n_heads**-0.5, "gate": (d / ff) ** 0.5, "up": (d / ff) ** 0.5}
        nu["down"] = (ff / d) ** 0.5
        return (Constant(value=nu[role]),) if role in nu else ()

    def attention(self, layer: int, shape: Shape) -> Attention:
        norm = Norm(kind="rmsnorm", size=shape.head_dim, eps=1e-6, axis="head")
        return Attention(softmax_scale=shape.head_dim**-0.5, q=norm, k=norm, v=norm, rope_first=True)

    def feedforward(self, layer: int, shape: Shape) -> FeedForward:
        return FeedForward(pre_activation=shape.d**0.5, post_activation=3.7)

    def block_parts(self, layer: int, shape: Shape) -> dict[str, After]:
        alpha = LearnedScale(size=shape.d, init=0.05 * (layer + 1), scale=shape.d**-0.5)
        return {"alpha_attn": alpha, "alpha_ffn": alpha}

    def block(self, state: State, attn: Branch, ffn: Branch, own: Any, layer: int, n_layers: int) -> State:
        (h,) = state
        for alpha, branch in ((own.alpha_attn, attn), (own.alpha_ffn, ffn)):
            a = alpha.value()
            h = (h + a * (branch(h) - h)) * torch.rsqrt(a**2 + (1 - a) ** 2)
        return (h,)

    def constraint(self, role: Role, layer: int, shape: Shape) -> Constraint:
        return Constraint(axis=-1, kind="bound")

    def group(self, role: Role | None, layer: int, shape: Shape) -> Group:
        if role is None:
            return Group(lr=0.5, weight_decay=0.0)
        return Group(lr=4.0, weight_decay=0.25) if role in ("o", "down") else Group()


def build(backbone: BackboneName) -> GPT:
    return GPT(tiny_shape(backbone), Reach(), backbone=backbone, init=InitConfig())


def plain(model: GPT, tokens_T: Tensor) -> Tensor:
    """The same equations over the named tensors."""
    p, s = {name: q.detach() for name, q in model.named_parameters()}, model.shape

    def rms(z: Tensor, gain: Tensor) -> Tensor:
        return gain * z / (z.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()

    h = p["embed.weight"][tokens_T]
    if not s.rope_theta:
        h = h + p["position.weight"][: len(tokens_T)]
    turn = rotations(len(tokens_T), s.head_dim, s.rope_theta, like=h) if s.rope_theta else None
    causal = torch.ones(len(tokens_T), len(tokens_T), dtype=torch.bool).tril()
    for n in range(s.n_layers):
        at = f"blocks.{n}.attn"
        q, k, v = (
            (x @ p[f"{at}.{r}.weight"].T).unflatten(-1, (-1, s.head_dim)) for r, x in (("q", h), ("k", h), ("v", h))
        )
        if turn:
            q, k = rotate(q, turn), rotate(k, turn)
        q, k = rms(q, p[f"{at}.q_norm.norm.gain"]), rms(k, p[f"{at}.k_norm.norm.gain"])
        v = rms(s.n_heads**0.5 * v, p[f"{at}.v_norm.norm.gain"])
        share = s.n_heads // s.n_kv_heads
        k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
        scores = torch.einsum("the,she->hts", q, k) * s.head_dim**-0.5
        weights = scores.masked_fill(~causal, float("-inf")).softmax(-1)
        o = torch.einsum("hts,she->the", weights, v).flatten(1)
        branches = [s.n_heads**-0.5 * (o @ p[f"{at}.o.weight"].T)]

        def blend(h: Tensor, x: Tensor, name: str, n: int = n) -> Tensor:
            a = p[f"blocks.{n}.own.{name}.stored"] * (0.05 * (n + 1) * s.d**0.5)
            return (h + a * (x - h)) / (a**2 + (1 - a) ** 2).sqrt()

        h = blend(h, branches[0], "alpha_attn")
        ff = f"blocks.{n}.ffn"
        nu = (s.d / s.d_ff) ** 0.5
        u = nu * (h @ p[f"{ff}.up.weight"].T)
        a = F.silu(s.d**0.5 * nu * (h @ p[f"{ff}.gate.weight"].T)) * u if s.gated else F.gelu(s.d**0.5 * u)
        h = blend(h, (s.d_ff / s.d) ** 0.5 * ((3.7 * a) @ p[f"{ff}.down.weight"].T), "alpha_ffn")
    return h @ p["embed.weight" if s.tied else "head.weight"].T


@pytest.mark.parametrize("backbone", BACKBONES)
def test_block_equation(backbone: BackboneName) -> None:
    model = shake(build(backbone)).double()
    batch = tokens(batch=1)
    with torch.no_grad():
        ours = model(batch)[0]
    torch.testing.assert_close(ours, plain(model, batch[0]), rtol=1e-9, atol=1e-9)


def test_stream_stays_near_one_at_initialisation() -> None:
    """angpt.md section 3: with unit rows and these constants no norm is needed at the start."""
    model = build("llama2")
    norms = []
    for block in model.blocks:
        block.register_forward_hook(lambda m, i, o: norms.append(o[0][0].norm(dim=-1).mean().item()))
    with torch.no_grad():
        model(tokens(batch=8))
    assert norms == pytest.approx([1.0, 1.0], abs=0.1)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_bound_rows(backbone: BackboneName) -> None:
    """Exactly one at the start; after a step the longer rows come back to one, the shorter are left."""
    model = build(backbone)
    for name, owner in model.weights():
        norms = owner.weight.norm(dim=-1)
        assert torch.allclose(norms, torch.ones_like(norms), atol=1e-6), name
        with torch.no_grad():
            owner.weight[0] *= 3.0
            owner.weight[1] *= 0.2
    before = {name: owner.weight.detach().clone() for name, owner in model.weights()}
    model.after_step()
    for name, owner in model.weights():
        assert owner.weight[0].norm().item() == pytest.approx(1.0, abs=1e-6), name
        assert torch.equal(owner.weight[1], before[name][1]), name


def test_per_expert_weights_are_projected_one_by_one() -> None:
    """(experts, out, in): each row or column of each expert, none mixed with another's."""
    weight = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    for axis in (-1, -2):
        unit, bound = weight.clone(), weight.clone() / 2
        normalize_(unit, axis)
        normalize_(bound, axis, only_longer=True)
        for expert in range(3):
            vectors = weight[expert] if axis == -1 else weight[expert].T
            mine = unit[expert] if axis == -1 else unit[expert].T
            kept = bound[expert] if axis == -1 else bound[expert].T
            for row, ours, bounded in zip(vectors, mine, kept, strict=True):
                assert torch.allclose(ours, row / row.norm(), atol=1e-6)
                assert torch.allclose(bounded, (row / 2) / max(1.0, (row / 2).norm().item()), atol=1e-6)


@pytest.mark.parametrize("decay_on", ["all", "matrices"])
def test_groups(decay_on: str) -> None:
    """One step of AdamW by hand: rate and decay carry the strategy's factors."""
    model = build("llama2")
    config = OptimConfig(lr=1e-2, weight_decay=0.4, decay_on=decay_on)
    optimizer = build_optimizer(model, config)
    optimizer.set_lr(1e-2)
    model.loss(tokens()).backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    for name, parameter in model.named_parameters():
        gain = not name.endswith("weight")
        writes = name.endswith(("attn.o.weight", "ffn.down.weight"))
        lr = 1e-2 * (0.5 if gain else 4.0 if writes else 1.0)
        decay = 0.0 if gain else 0.4 * (0.25 if writes else 1.0)
        gradient = parameter.grad
        assert gradient is not None
        expected = before[name] * (1 - lr * decay) - lr * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-4, atol=1e-6, msg=name)
