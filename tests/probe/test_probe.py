"""A probe against hand-written forward passes, autograd on plain tensors, and closed forms."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, CONTEXT, MOE, shake, tiny_gpt, tokens
from strategies.plain import Plain, nothing, rms
from torch import Tensor

from gptnorm.probe import BlockReading, Probe, probe
from gptnorm.probe.trace import traced

LENGTH = CONTEXT - 1


def near(value: float | Tensor) -> object:
    return pytest.approx(value.item() if isinstance(value, Tensor) else value, rel=1e-9)


def numbers(reading: BlockReading | Probe) -> list[float]:
    found: list[float] = []

    def walk(value: object) -> None:
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, list | tuple):
            for inner in value:
                walk(inner)
        elif isinstance(value, float):
            found.append(value)

    walk(dataclasses.asdict(reading))
    return found


def test_against_a_plain_prenorm_and_autograd() -> None:
    """Streams, branches, cosines, and every gradient norm, for one sequence and two blocks."""
    model = shake(tiny_gpt("prenorm", "llama2")).double()
    batch = tokens(batch=1)
    found = probe(model, batch)

    plain = Plain(model)
    plain.scale = model.shape.head_dim**-0.5
    plain.p = {name: p.clone().requires_grad_() for name, p in plain.p.items()}
    x = plain.embed(batch[0, :-1])
    streams, branches = [x], []
    for n in range(2):
        here = f"blocks.{n}"
        a = plain.attend(rms(x, plain.p[f"{here}.own.attn_norm.gain"]), here, nothing, nothing)
        y = x + a
        f = plain.feed(rms(y, plain.p[f"{here}.own.ffn_norm.gain"]), here, nothing)
        x = y + f
        x.retain_grad()
        streams.append(x)
        branches.append((a, f, y))
    loss = F.cross_entropy(plain.head(rms(x, plain.p["own.final_norm.gain"])), batch[0, 1:])
    loss.backward()

    def size(z: Tensor) -> Tensor:
        return z.detach().pow(2).mean().sqrt()

    assert found.loss == near(loss.detach())
    assert found.start == near(size(streams[0]))
    gradients = [z.grad.norm() for z in streams[1:]]
    assert found.gradient_ratio == near(gradients[0] / gradients[1])
    for n, block in enumerate(found.blocks):
        a, f, y = branches[n]
        grad = {r: plain.p[f"blocks.{n}.attn.{r}.weight"].grad.norm() for r in "qkvo"}
        grad |= {r: plain.p[f"blocks.{n}.ffn.{r}.weight"].grad.norm() for r in ("gate", "up", "down")}
        assert block.stream == near(size(streams[n + 1]))
        assert (block.attn, block.ffn) == (near(size(a)), near(size(f)))
        assert block.norms == {"attn_norm": near(size(streams[n])), "ffn_norm": near(size(y))}
        assert block.grad == near(gradients[n])
        assert {role: slot.grad for role, slot in block.slots.items()} == {r: near(g) for r, g in grad.items()}
        assert block.q_over_v == near(grad["q"] / grad["v"])
        assert block.k_over_v == near(grad["k"] / grad["v"])
        assert block.cosine == near(torch.cosine_similarity(streams[n], streams[n + 1], dim=-1).mean())
        z = rms(streams[n], plain.p[f"blocks.{n}.own.attn_norm.gain"])
        assert block.slots["v"].raw == near(size(z @ plain.p[f"blocks.{n}.attn.v.weight"].T))
        assert block.slots["v"].used == block.slots["v"].raw
        assert block.slots["q"].weight == near(size(plain.p[f"blocks.{n}.attn.q.weight"]))
    assert found.ends["embed"].grad == near(plain.p["embed.weight"].grad.norm())
    everything = [*streams, *(y for _, _, y in branches)]
    assert found.max_variance == near(max(size(z) ** 2 for z in everything))


def test_raw_and_used_outputs_around_a_norm() -> None:
    """With a norm after every map: raw is RMS of W x, used is the norm's output, 1 at gain 1 (and RoPE keeps it)."""
    model = tiny_gpt("simplenorm", "llama2").double()
    batch = tokens()
    found = probe(model, batch)
    x = model.embed.weight[batch[:, :-1]]
    raw = (x @ model.blocks[0].attn.q.weight.T).pow(2).mean().sqrt()
    slots = found.blocks[0].slots
    assert slots["q"].raw == near(raw)
    for role, slot in slots.items():
        assert slot.used == pytest.approx(1.0, abs=1e-3), role


def test_logits_are_those_of_the_attention() -> None:
    model = shake(tiny_gpt("prenorm", "llama3")).double()
    batch = tokens(batch=1)
    found = probe(model, batch)
    plain = Plain(model)
    x = rms(plain.embed(batch[0, :-1]), plain.p["blocks.0.own.attn_norm.gain"])
    for h in range(4):
        q, k = (
            plain.turn((x @ plain.p[f"blocks.0.attn.{r}.weight"].T)[:, at * 8 : at * 8 + 8])
            for r, at in (("q", h), ("k", h // 2))
        )
        logits = 8**-0.5 * (q @ k.T)
        hidden = torch.ones_like(logits, dtype=torch.bool).triu(1)
        assert found.blocks[0].logit_max[h] == near(logits.masked_fill(hidden, -math.inf).max())
        assert found.blocks[0].logit_bound[h] == near(8**-0.5 * q.norm(dim=-1).max() * k.norm(dim=-1).max())


def test_zero_branches_leave_the_stream_alone() -> None:
    """W_o = W_down = 0: the stream is the embedding, every cosine 1, and gradients pass unchanged."""
    model = tiny_gpt("prenorm", "llama2").double()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.o.weight.zero_()
            block.ffn.down.weight.zero_()
    found = probe(model, tokens())
    for block in found.blocks:
        assert (block.attn, block.ffn) == (0.0, 0.0)
        assert block.stream == near(found.start)
        assert block.cosine == near(1.0)
        assert block.token_cosine == near(found.start_token_cosine)
        assert math.isnan(block.q_over_v), "0 / 0: no gradient reaches q or v"
    assert found.gradient_ratio == near(1.0)


def test_identical_tokens_are_collapsed() -> None:
    """Without positions one repeated token gives T equal rows in every block."""
    model = tiny_gpt("postnorm", "gpt2").double()
    assert model.position is not None
    torch.nn.init.zeros_(model.position.weight)
    found = probe(model, torch.full((2, CONTEXT), 5))
    assert found.start_token_cosine == near(1.0)
    assert all(block.token_cosine == near(1.0) for block in found.blocks)


@pytest.mark.parametrize(("strategy", "backbone", "moe"), CASES)
def test_every_strategy_can_be_measured_and_is_left_as_it_was(strategy, backbone, moe) -> None:
    model = tiny_gpt(strategy, backbone, moe=moe)
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    found = probe(model, tokens())
    assert torch.equal(torch.get_rng_state(), state)
    assert len(found.blocks) == 2
    assert all(math.isfinite(x) for x in numbers(found))
    for role in model.shape.matrix_roles:
        assert found.blocks[0].slots[role].grad > 0
    assert all(p.grad is None for p in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(module.training for module in model.modules())
    for block in model.blocks:
        assert "_attend" not in vars(block.attn)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert probe(model, tokens()) == found


def test_a_failure_inside_leaves_no_hook() -> None:
    model = tiny_gpt("prenorm", "llama2")
    with pytest.raises(ZeroDivisionError), traced(model, slots=True):
        raise ZeroDivisionError
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert "_attend" not in vars(model.blocks[0].attn)


@pytest.mark.parametrize("strategy", ["prenorm", "simplenorm"])
def test_experts_count_as_one_role(strategy) -> None:
    """Gradient norms of a role: root of the sum of squares over routed and shared experts."""
    model = tiny_gpt(strategy, "llama2", moe=True)
    found = probe(model, tokens())
    model.eval()
    model.objective(tokens()).total.backward()
    for layer, block in enumerate(found.blocks):
        assert list(block.slots)[:4] == ["q", "k", "v", "o"]
        for role in ("gate", "up", "down", "router"):
            owners = [owner for _, owner in model.weights() if (owner.role, owner.layer) == (role, layer)]
            assert len(owners) == (1 if role == "router" else 2)
            size = sum(float(owner.weight.grad.pow(2).sum()) for owner in owners) ** 0.5
            assert block.slots[role].grad == pytest.approx(size, rel=1e-4), role
            assert block.slots[role].raw is not None
        assert block.ffn > 0


@pytest.mark.parametrize(("strategy", "normed"), [("prenorm", False), ("angpt", False), ("ngpt", True)])
def test_a_router_is_measured_by_its_logits(strategy, normed) -> None:
    """Raw: RMS of x W^T; used: the same after √d (anGPT, nGPT; their x has norm 1) and the norm of the router."""
    config = dataclasses.replace(MOE, router_norm=normed)
    model = shake(tiny_gpt(strategy, "llama2", moe=config)).double()
    router = model.blocks[0].ffn.router
    read = []
    handle = router.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0].detach()))
    found = probe(model, tokens())
    handle.remove()
    z = read[0] @ router.weight.detach().T
    after = z if strategy == "prenorm" else z * 32**0.5
    if normed:
        after = rms(after, router.after[-1].gain.detach())
    slot = found.blocks[0].slots["router"]
    assert slot.raw == near(z.pow(2).mean().sqrt())
    assert slot.used == near(after.pow(2).mean().sqrt())


def test_two_streams_have_one_gradient_together() -> None:
    """ResiDual: ‖dL/d(x, r)‖, both streams; here by autograd on the model's own blocks."""
    model = tiny_gpt("residual_dual", "llama2").double()
    batch = tokens(batch=1)
    found = probe(model, batch)
    kept = []

    def keep(module, inputs, output):
        for stream in output[0]:
            stream.retain_grad()
        kept.append(output[0])

    handles = [block.register_forward_hook(keep) for block in model.blocks]
    model.loss(batch).backward()
    for handle in handles:
        handle.remove()
    for block, state in zip(found.blocks, kept, strict=True):
        squares = [s.grad.pow(2).sum() for s in state if s.grad is not None]
        assert block.grad == near(torch.stack(squares).sum().sqrt())
