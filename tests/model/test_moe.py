"""The mixture of experts against a loop over tokens, its three ways of computing, its router and its balancing."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import tiny_gpt, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gptnorm.config import MoEConfig
from gptnorm.errors import UserError
from gptnorm.model import moe as moe_module
from gptnorm.model.moe import MixtureOfExperts, describe_routing, reference_experts
from gptnorm.model.router import BiasBalancer, Router, auto_gain


def branch(strategy: str = "prenorm", *, d: int = 32, d_ff: int = 24, spread: float = 0.3, **moe: Any):
    """One mixture of experts, its gains (and a bias, if there is one) off their initial values."""
    config = MoEConfig(**{"experts": 4, "top_k": 2, **moe})
    model = tiny_gpt(strategy, "llama2", moe=config, d_model=d, d_ff=d_ff, n_layers=1)
    ffn = model.blocks[0].ffn
    assert isinstance(ffn, MixtureOfExperts)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in ffn.named_parameters():
            if not name.endswith("weight"):
                parameter.mul_(1 + spread * torch.randn(parameter.shape, generator=generator))
        if ffn.router.balancer is not None:
            ffn.router.balancer.get_buffer("bias").normal_(0.0, 0.1, generator=generator)
    return ffn


def inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def token_by_token(ffn: MixtureOfExperts, x_ND: Tensor) -> Tensor:
    """The module's equation in plain Python; `after` is nothing or RMSNorm."""
    config, p = ffn.config, {name: q.detach() for name, q in ffn.named_parameters()}

    def follow(z: Tensor, name: str, e: int) -> Tensor:
        gain = p.get(f"{name}.after.0.gain")
        return z if gain is None else gain[e] * z / (z.pow(2).mean() + 1e-5).sqrt()

    def expert(kind: str, e: int, x: Tensor) -> Tensor:
        gate, up = (follow(p[f"{kind}.{role}.weight"][e] @ x, f"{kind}.{role}", e) for role in ("gate", "up"))
        return follow(p[f"{kind}.down.weight"][e] @ (F.silu(gate) * up), f"{kind}.down", e)

    rows = []
    for x in x_ND:
        z = p["router.weight"] @ x
        score = z.exp() / z.exp().sum() if config.gate == "softmax" else 1 / (1 + (-z).exp())
        bias = ffn.router.balancer.get_buffer("bias") if ffn.router.balancer else torch.zeros(config.experts)
        chosen = sorted(range(config.experts), key=lambda e: -(score[e] + bias[e]).item())[: config.top_k]
        total = sum(score[e] for e in chosen) if config.renormalize else 1.0
        gamma = {"none": 1.0, "sqrt_k": config.top_k**0.5}.get(str(config.branch_gain), config.branch_gain)
        y = gamma * sum(score[e] / total * expert("routed", e, x) for e in chosen)
        y = y + sum(expert("shared", e, x) for e in range(config.shared))
        rows.append(y / (1.0 if config.branch_gain == "none" else (1 + config.shared) ** 0.5))
    return torch.stack(rows)


KINDS = [
    {},
    {"renormalize": False, "branch_gain": "sqrt_k"},
    {"gate": "sigmoid", "shared": 1, "branch_gain": 1.7, "balance": "bias"},
    {"gate": "sigmoid", "renormalize": False, "shared": 2, "experts": 5, "top_k": 3},
    {"balance": "bias", "top_k": 1, "shared": 1, "branch_gain": "sqrt_k", "renormalize": False},
]


# --- the sum of experts, three ways -----------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["prenorm", "simplenorm"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_grouped_reference_and_loop_agree(strategy: str, kind: dict[str, Any]) -> None:
    ffn, x = branch(strategy, **kind), inputs(3, 7, 32)
    results = []
    for reference in (False, True):
        ffn.reference, ffn.router.weight.grad = reference, None
        leaf = x.clone().requires_grad_()
        y, routing = ffn(leaf)
        parameters = [leaf, *ffn.parameters()]
        loss = (y * inputs(3, 7, 32, seed=2)).sum() + routing.balance + routing.z
        results.append((y.detach(), torch.autograd.grad(loss, parameters), routing.load))
    torch.testing.assert_close(results[0][0].flatten(0, 1), token_by_token(ffn, x.flatten(0, 1)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_grouped_products_are_used_where_they_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda *a, **k: calls.append(a[0].dtype) or real(*a, **k))
    x = inputs(2, 5, 32)
    with torch.no_grad():
        branch()(x)
        assert calls == [torch.float32] * 3
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, _ = branch()(x)
        assert calls[3:] == [torch.bfloat16] * 3
        assert y.dtype == torch.bfloat16
        branch(d_ff=22)(x)
        branch().double()(x.double())
        ffn = branch()
        with reference_experts(ffn):
            ffn(x)
    assert len(calls) == 6


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_double_precision(kind: dict[str, Any]) -> None:
    ffn, x = branch("simplenorm", **kind).double(), inputs(9, 32).double()
    with torch.no_grad():
        y, routing = ffn(x[None])
    assert y.dtype == routing.z.dtype == torch.float64
    torch.testing.assert_close(y[0], token_by_token(ffn, x), rtol=1e-12, atol=1e-12)


def test_routing_is_exact_under_autocast() -> None:
    ffn, x = branch(gate="sigmoid"), inputs(50, 32)
    exact = ffn.router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = ffn.router(x)
        y, _ = ffn(x[None])
    assert all(torch.equal(a, b) for a, b in zip(exact, rough, strict=True))
    assert rough.gate_NK.dtype == torch.float32
    torch.testing.assert_close(y.float(), ffn(x[None])[0], rtol=0.05, atol=0.05)


@given(
    n=st.integers(1, 9),
    experts=st.integers(1, 7),
    top_k=st.integers(1, 7),
    shared=st.integers(0, 2),
    gate=st.sampled_from(["softmax", "sigmoid"]),
    renormalize=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_any_sizes(n: int, experts: int, top_k: int, seed: int, **others: Any) -> None:
    top_k = min(top_k, experts)
    others["renormalize"] &= top_k > 1
    ffn = branch(d=8, d_ff=12, experts=experts, top_k=top_k, **others)
    x = inputs(n, 8, seed=seed)
    with torch.no_grad():
        y, routing = ffn(x[None])
    torch.testing.assert_close(y[0], token_by_token(ffn, x), rtol=1e-4, atol=1e-5)
    assert routing.load.sum().item() == pytest.approx(1.0)
    assert routing.dropped.item() == 0.0
    assert 0 <= routing.entropy.item() <= math.log(experts) + 1e-6


def test_an_expert_without_tokens() -> None:
    for reference in (False, True):
        ffn, x = branch(), inputs(40, 32).abs()
        ffn.reference = reference
        with torch.no_grad():
            ffn.router.weight[1] = -1.0
        y, routing = ffn(x[None])
        y.square().sum().backward()
        assert routing.load[1] == 0
        for projection in (ffn.routed.gate, ffn.routed.up, ffn.routed.down):
            assert projection is not None
            assert projection.weight.grad is not None
            assert projection.weight.grad.isfinite().all()
            assert projection.weight.grad[1].abs().max() == 0
            assert torch.equal(projection.weight.grad.abs().amax((1, 2)) > 0, routing.load > 0)


def test_all_tokens_to_one_expert() -> None:
    ffn, x = branch(top_k=1, renormalize=False), inputs(40, 32).abs()
    with torch.no_grad():
        ffn.router.weight[:] = 0.0
        ffn.router.weight[2] = 0.1
        y, routing = ffn(x[None])
        assert ffn.routed.gate is not None
        alone = (F.silu(x @ ffn.routed.gate.weight[2].T) * (x @ ffn.routed.up.weight[2].T)) @ ffn.routed.down.weight[
            2
        ].T
        gate = (x @ ffn.router.weight.T).softmax(-1)[:, 2:3]
    assert routing.load.tolist() == [0, 0, 1, 0]
    torch.testing.assert_close(y[0], gate * alone, rtol=1e-5, atol=1e-5)
    assert describe_routing([type(routing)(*(v[None] for v in routing))])["router_load_max"] == 4.0


def test_every_expert_for_every_token() -> None:
    ffn, x = branch(top_k=4, renormalize=False), inputs(10, 32)
    with torch.no_grad():
        y, routing = ffn(x[None])
        every = ffn.routed.all(x)
        p = (x @ ffn.router.weight.T).softmax(-1)
    torch.testing.assert_close(y[0], torch.einsum("ne,end->nd", p, every), rtol=1e-5, atol=1e-5)
    assert routing.load.tolist() == [0.25] * 4
    # At an even load the balancing loss is 1 whatever the router thinks.
    assert routing.balance.item() == pytest.approx(1.0, abs=1e-6)


def test_ties() -> None:
    """A router that knows nothing: k different experts with equal weights."""
    ffn, x = branch(top_k=3), inputs(10, 32)
    with torch.no_grad():
        ffn.router.weight.zero_()
        choice = ffn.router(x)
        y, routing = ffn(x[None])
    assert all(len(set(row)) == 3 for row in choice.expert_NK.tolist())
    assert torch.allclose(choice.gate_NK, torch.tensor(1 / 3))
    assert y.isfinite().all()
    assert routing.entropy.item() == pytest.approx(math.log(4))
    assert routing.z.item() == pytest.approx(math.log(4) ** 2)


def test_sigmoids_that_underflow() -> None:
    ffn, x = branch(gate="sigmoid"), inputs(10, 32).abs()
    with torch.no_grad():
        ffn.router.weight.fill_(-50.0)
        y, routing = ffn(x[None])
    assert y.isfinite().all()
    assert routing.entropy.isfinite()


# --- the strategy's part ----------------------------------------------------------------------------------------------


def test_gains_belong_to_their_expert() -> None:
    ffn, x = branch("simplenorm"), inputs(60, 32)
    with torch.no_grad():
        choice = ffn.router(x)
        before = ffn(x[None])[0][0]
        for projection in (ffn.routed.gate, ffn.routed.up, ffn.routed.down):
            assert projection is not None
            projection.after[0].gain[2] *= 1.5
        after = ffn(x[None])[0][0]
    touched = (choice.expert_NK == 2).any(1)
    assert touched.any()
    assert not touched.all()
    assert torch.equal(before[~touched], after[~touched])
    assert ((before - after)[touched].abs().amax(1) > 1e-3).all()


def test_unit_norms_and_multipliers_per_expert() -> None:
    ffn = branch("ngpt")
    assert torch.allclose(ffn.routed.down.weight.norm(dim=1), torch.ones(4, 24), atol=1e-6)
    assert torch.allclose(ffn.routed.up.weight.norm(dim=2), torch.ones(4, 24), atol=1e-6)
    assert torch.allclose(ffn.router.weight.norm(dim=1), torch.ones(4), atol=1e-6)
    model = tiny_gpt("angpt", "llama2", moe=True, own={"bound": "penalty"})
    up = model.get_submodule("blocks.0.ffn.routed.up")
    assert up.get_buffer("multiplier").shape == (4, 24)
    with torch.no_grad():
        up.weight[1, 3] *= 2.0
    model.after_step()
    assert (up.get_buffer("multiplier") > 1e-3).nonzero().tolist() == [[1, 3]]


@pytest.mark.parametrize("strategy", ["prenorm", "simplenorm", "angpt", "ngpt"])
def test_normed_router(strategy: str) -> None:
    """Logits start with RMS 1, and can grow."""
    ffn, x = branch(strategy, router_norm=True, spread=0.0), inputs(10, 32)
    with torch.no_grad():
        logits = ffn.router(x).logits_NE
        ffn.router.after[-1].gain.mul_(3.0)
        assert torch.allclose(ffn.router(x).logits_NE, 3 * logits, atol=1e-5)
    assert torch.allclose(logits.pow(2).mean(-1), torch.ones(10), atol=1e-3)
    assert sum(p.numel() for p in ffn.router.parameters()) == 4 * 32 + 4
    assert ffn.router.logit_std() == 1.0


# --- the branch gain --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("std", [0.35, 0.6, 1.0])
@pytest.mark.parametrize("experts", [64, 128])
def test_auto_gain_is_in_the_measured_ranges(experts: int, std: float) -> None:
    """spannorm.md section 4, measured there at init with d 256."""

    def gain(top_k: int, gate: Any, renormalize: bool) -> float:
        return auto_gain(std, MoEConfig(experts=experts, top_k=top_k, gate=gate, renormalize=renormalize))

    assert 2.5 < gain(8, "softmax", True) < 2.83
    assert 1.34 < gain(2, "softmax", True) < 1.42
    assert 5.7 < gain(8, "softmax", False) < 25
    assert 0.405 < gain(8, "sigmoid", False) < 0.56


@pytest.mark.parametrize("strategy", ["prenorm", "ngpt", "angpt"])
@pytest.mark.parametrize("kind", [{}, {"renormalize": False}, {"gate": "sigmoid", "renormalize": False}], ids=str)
def test_auto_gain_is_that_of_the_router(strategy: str, kind: dict[str, Any]) -> None:
    """Against the gates of the drawn router on random inputs, of length 1 where the strategy keeps its stream there."""
    ffn = branch(strategy, d=256, experts=16, top_k=4, branch_gain="auto", spread=0.0, **kind)
    x = inputs(2000, 256)
    if strategy != "prenorm":
        x = F.normalize(x, dim=-1)
    with torch.no_grad():
        measured = ffn.router(x).gate_NK.square().sum(-1).mean().item() ** -0.5
    assert ffn.get_buffer("auto_gain").item() == pytest.approx(measured, rel=0.03)


def test_auto_gain_keeps_the_variance_of_one_feedforward() -> None:
    ffn = branch(d=256, d_ff=128, experts=16, top_k=4, shared=1, branch_gain="auto", renormalize=False)
    x = inputs(500, 256)
    with torch.no_grad():
        one = ffn.routed.all(x)[0].var()
        ratio = ffn(x[None])[0].var() / one
    assert ratio.item() == pytest.approx(1.0, abs=0.1)


# --- losses, statistics, balancing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_losses_and_statistics_as_formulas(gate: Any) -> None:
    ffn, x = branch(gate=gate, renormalize=False), inputs(30, 32)
    with torch.no_grad():
        _, routing = ffn(x[None])
    counts, probabilities, z, entropy = [0] * 4, [0.0] * 4, 0.0, 0.0
    for row in x.double():
        logits = (ffn.router.weight.double() @ row).tolist()
        score = [math.exp(v) if gate == "softmax" else 1 / (1 + math.exp(-v)) for v in logits]
        p = [s / sum(score) for s in score]
        for e in sorted(range(4), key=lambda e: -p[e])[:2]:
            counts[e] += 1
        probabilities = [a + b / 30 for a, b in zip(probabilities, p, strict=True)]
        z += math.log(sum(map(math.exp, logits))) ** 2 / 30
        entropy -= sum(q * math.log(q) for q in p) / 30
    assert routing.load.tolist() == pytest.approx([c / 60 for c in counts])
    assert routing.balance.item() == pytest.approx(
        4 * sum(c / 60 * p for c, p in zip(counts, probabilities, strict=True))
    )
    assert routing.z.item() == pytest.approx(z, rel=1e-5)
    assert routing.entropy.item() == pytest.approx(entropy, rel=1e-5)


def test_described_over_blocks_and_micro_batches() -> None:
    model = tiny_gpt("prenorm", "llama2", moe=True)
    routings = [model.objective(tokens(seed=seed)).routing for seed in (0, 1)]
    shown = describe_routing([r for r in routings if r is not None])
    load = torch.stack([r.load for r in routings if r is not None])
    assert load.shape == (2, 2, 4)
    assert shown["router_load_max"] == pytest.approx(4 * load.mean(0).max().item())
    assert shown["router_load_min"] == pytest.approx(4 * load.mean(0).min().item())
    assert shown["dropped"] == 0.0
    assert describe_routing([]) == {}


def test_a_dropped_token_would_show() -> None:
    ffn, x = branch(), inputs(10, 32)
    choice = ffn.router(x)
    counts = torch.bincount(choice.expert_NK.flatten(), minlength=4)
    assert ffn.router.account(choice, counts).dropped == 0
    counts[counts.argmax()] -= 3
    assert ffn.router.account(choice, counts).dropped.item() == pytest.approx(3 / 20)


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_bias_evens_out_a_skewed_load(gate: Any) -> None:
    ffn, x = branch(gate=gate, balance="bias", bias_rate=0.004, experts=8), inputs(400, 32) + 0.5
    balancer = ffn.router.balancer
    assert isinstance(balancer, BiasBalancer)
    balancer.reset()
    loads = []
    with torch.no_grad():
        ffn.router.weight[3] += 0.1
        for _ in range(300):
            loads.append(ffn(x[None])[1].load * 8)
            balancer.after_step()
        choice = ffn.router(x)
        scores = x @ ffn.router.weight.T
        scores = scores.softmax(-1) if gate == "softmax" else scores.sigmoid()
    assert loads[0].max() > 1.7
    assert loads[-1].max() < 1.15
    assert loads[-1].min() > 0.85
    # The bias decides who is chosen and never with what weight.
    chosen = scores.gather(1, choice.expert_NK)
    torch.testing.assert_close(choice.gate_NK, chosen / chosen.sum(-1, keepdim=True))


def test_one_step_of_the_bias() -> None:
    ffn, x = branch(balance="bias", bias_rate=0.25), inputs(30, 32)
    balancer = ffn.router.balancer
    assert balancer is not None
    balancer.reset()
    counts = sum(ffn(part[None])[1].load * 20 for part in x.split(10))
    assert balancer.get_buffer("load").tolist() == pytest.approx(counts.tolist())
    ffn.eval()
    ffn(x[None])
    assert balancer.get_buffer("load").tolist() == pytest.approx(counts.tolist())
    balancer.after_step()
    assert balancer.get_buffer("bias").tolist() == [0.25 * (1 if c < 15 else -1 if c > 15 else 0) for c in counts]
    assert balancer.get_buffer("load").tolist() == [0] * 4


@pytest.mark.parametrize(
    ("changes", "key"),
    [({"top_k": 5}, "moe.top_k"), ({"top_k": 1}, "moe.renormalize=false"), ({"branch_gain": -1.0}, "branch_gain")],
)
def test_refused(changes: dict[str, Any], key: str) -> None:
    with pytest.raises((UserError, ValueError), match=key):
        MoEConfig(experts=4, **changes)


def test_paths_are_chosen_by_type_and_width() -> None:
    takes = moe_module.takes_grouped_mm
    for dtype, unit in ((torch.float32, 4), (torch.bfloat16, 8)):
        for a, b in itertools.product((unit, 3 * unit, unit + 1), repeat=2):
            assert takes(torch.empty(1, dtype=dtype), a, b) == (a % unit == 0 and b % unit == 0)
    assert not takes(torch.empty(1, dtype=torch.float64), 16)
    assert not takes(torch.empty(1, device="meta"), 16)
    assert isinstance(branch().router, Router)
