"""Options that compose: each against its formula, and every refusal against what the option would have done."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BACKBONES, shake, tiny_gpt, tokens
from torch import Tensor

from gptnorm.config import BackboneName, OptionsConfig
from gptnorm.errors import UserError
from gptnorm.model import GPT
from gptnorm.shape import Role, Shape
from gptnorm.strategies import STRATEGIES, find_strategy, make_strategy
from gptnorm.strategies.base import Constraint
from gptnorm.strategies.catalogue import options_markdown
from gptnorm.strategies.compose import compose, refusals
from gptnorm.strategies.prenorm import PreNorm


def head_outputs(model: GPT, batch: Tensor, layer: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v as they enter attention, and what comes out of it, each (B, T, heads, features)."""
    attn, caught = model.blocks[layer].attn, {}
    original = attn._attend

    def spy(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        caught.update(q=q, k=k, v=v, o=original(q, k, v))
        return caught["o"]

    attn._attend = spy
    try:
        model(batch)
    finally:
        del attn._attend
    return tuple(caught[name].detach().transpose(1, 2) for name in "qkvo")


def logits(model: GPT, q: Tensor, k: Tensor) -> Tensor:
    """(B, heads, T, T), the future at -inf."""
    share = q.shape[2] // k.shape[2]
    scores = torch.einsum("bthe,bshe->bhts", q, k.repeat_interleave(share, 2)) * model.blocks[0].attn.softmax_scale
    future = torch.ones(q.shape[1], q.shape[1]).triu(1).bool()
    return scores.masked_fill(future, -math.inf)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_attention_softcap(backbone: BackboneName) -> None:
    model = tiny_gpt("prenorm", backbone, options={"attention_softcap": 0.3})
    q, k, v, o = head_outputs(model, tokens())
    weights = (0.3 * torch.tanh(logits(model, q, k).clamp_min(-1e9) / 0.3)).masked_fill(
        logits(model, q, k) == -math.inf, -math.inf
    )
    expected = torch.einsum("bhts,bshe->bthe", weights.softmax(-1), v.repeat_interleave(q.shape[2] // v.shape[2], 2))
    torch.testing.assert_close(o, expected, rtol=1e-5, atol=1e-6)
    uncapped = tiny_gpt("prenorm", backbone)
    wide = tiny_gpt("prenorm", backbone, options={"attention_softcap": 1e4})
    assert not torch.allclose(model(tokens()), uncapped(tokens()), atol=1e-4)
    torch.testing.assert_close(wide(tokens()), uncapped(tokens()), rtol=1e-5, atol=1e-5)


def test_logit_softcap() -> None:
    capped, plain = (tiny_gpt("angpt", "llama2", options={"logit_softcap": c}) for c in (0.1, None))
    torch.testing.assert_close(capped(tokens()), 0.1 * torch.tanh(plain(tokens()) / 0.1))


def test_z_loss_is_in_the_objective_alone() -> None:
    model = tiny_gpt("prenorm", "gpt2", options={"z_loss": 0.3})
    objective = model.objective(tokens())
    logits_BTV = model(tokens()[:, :-1])
    expected = 0.3 * torch.log(torch.exp(logits_BTV.double()).sum(-1)).square().mean()
    assert (objective.total - objective.loss).item() == pytest.approx(expected.item(), rel=1e-5)
    plain = tiny_gpt("prenorm", "gpt2")
    assert objective.loss.item() == plain.loss(tokens()).item()
    assert plain.objective(tokens()).total.item() == plain.objective(tokens()).loss.item()


@pytest.mark.parametrize("axis", ["head", "full"])
def test_value_norm(axis: str) -> None:
    model = shake(tiny_gpt("prenorm", "llama3", options={"v_norm": axis}))
    seen: list[Tensor] = []
    model.blocks[0].attn.v.register_forward_hook(lambda m, i, o: seen.append(o.detach()))
    *_, v, _ = head_outputs(model, tokens())
    raw = seen[0].unflatten(-1, (2, 8)) if axis == "head" else seen[0]
    normed = raw / (raw.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    gain = model.blocks[0].attn.v_norm.norm.gain.detach()
    torch.testing.assert_close(v, (normed * gain).reshape(v.shape), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_qk_clip(backbone: BackboneName) -> None:
    """The same batch again reaches τ in the heads that went beyond it, and the others are left alone."""
    model = tiny_gpt("prenorm", backbone, n_layers=1, options={"qk_clip": 1.0})
    with torch.no_grad():
        model.blocks[0].attn.q.weight[:8] *= 30  # the first head
    before = [w.clone() for w in (model.blocks[0].attn.q.weight, model.blocks[0].attn.k.weight)]
    q, k, *_ = head_outputs(model, tokens())
    largest = logits(model, q, k).amax((0, 2, 3))
    assert largest[0] > 1
    torch.testing.assert_close(model.blocks[0].attn.largest_logit, largest.clamp_min(0))
    model.after_step()
    q, k, *_ = head_outputs(model, tokens())
    after = logits(model, q, k).amax((0, 2, 3))
    share = model.shape.n_heads // model.shape.n_kv_heads
    for group in range(model.shape.n_kv_heads):
        heads = slice(group * share, (group + 1) * share)
        gamma = min(1.0, 1 / float(largest[heads].max()))
        torch.testing.assert_close(after[heads], largest[heads] * gamma, rtol=1e-4, atol=1e-5)
        rows = slice(group * 8, (group + 1) * 8)
        torch.testing.assert_close(model.blocks[0].attn.k.weight[rows], before[1][rows] * gamma**0.5)
    model.eval()
    model.after_step()
    model(tokens())
    assert model.blocks[0].attn.largest_logit.eq(0).all()


def test_logits_are_exact_under_autocast() -> None:
    """A product in bf16 would round logits near 50 to quarters."""
    model = tiny_gpt("prenorm", "llama2", n_layers=1, options={"qk_clip": 1e9})
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model.blocks[0].attn.q.weight.mul_(100)
        q, k, *_ = head_outputs(model, tokens())
    exact = logits(model, q.float(), k.float()).amax((0, 2, 3))
    torch.testing.assert_close(model.blocks[0].attn.largest_logit, exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", [{"qk_clip": 5.0}, {"attention_softcap": 2.0, "logit_softcap": 9.0, "z_loss": 0.1}])
def test_options_compile(options: dict[str, Any]) -> None:
    model = tiny_gpt("prenorm", "llama3", options=options)
    torch._dynamo.reset()
    compiled = torch.compile(model.objective, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens()).total, model.objective(tokens()).total, rtol=1e-5, atol=1e-6)


# --- ScaleInit ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["both", "ffn", "attn"])
@pytest.mark.parametrize(("count", "power", "factor"), [("2L", 0.5, 8**-0.5), ("L", 1.0, 0.25)])
def test_scale(target: str, count: str, power: float, factor: float) -> None:
    where = {"scale_target": target, "scale_count": count, "scale_power": power}
    bare = tiny_gpt("prenorm", "llama2", n_layers=4, options={"scale_mode": "none"})
    for mode in ("init", "forward", "both"):
        model = tiny_gpt("prenorm", "llama2", n_layers=4, options={"scale_mode": mode, **where})
        expected = {branch: factor if target in ("both", branch) else 1.0 for branch in ("attn", "ffn")}
        forward = expected if mode != "init" else {"attn": 1.0, "ffn": 1.0}
        scale = model.blocks[2].scale
        assert (scale.attn, scale.ffn) == (pytest.approx(forward["attn"]), pytest.approx(forward["ffn"]))
        for (name, plain), (_, ours) in zip(bare.weights(), model.weights(), strict=True):
            branch = {"o": "attn", "down": "ffn"}.get(ours.role)
            drawn = expected[branch] if branch and mode != "forward" else 1.0
            torch.testing.assert_close(ours.weight, drawn * plain.weight, msg=name)


def test_published_depth_factors_are_replaced_not_multiplied() -> None:
    published = tiny_gpt("prenorm", "llama2", n_layers=4)
    bare = tiny_gpt("prenorm", "llama2", n_layers=4, options={"scale_mode": "none"})
    for (name, ours), (_, plain) in zip(published.weights(), bare.weights(), strict=True):
        factor = (2 * (ours.layer + 1)) ** -0.5 if ours.role in ("o", "up", "down") else 1.0
        torch.testing.assert_close(ours.weight, factor * plain.weight, msg=name)


def test_forward_factor_is_an_initialisation_with_its_own_rate() -> None:
    """spannorm.md section 1.6: m in the forward pass = W drawn m times smaller, its rate times m, its decay over m."""
    where = {"scale_target": "ffn", "scale_count": "L", "scale_power": 1.0}
    forward = tiny_gpt("spannorm", "llama2", options={"scale_mode": "forward", **where}).double()
    init = tiny_gpt("spannorm", "llama2", options={"scale_mode": "init", **where}).double()
    with torch.no_grad():  # what fp32 rounded away
        for block, other in zip(init.blocks, forward.blocks, strict=True):
            block.ffn.down.weight.copy_(0.5 * other.ffn.down.weight)

    def optimizer(model: GPT, m: float) -> torch.optim.Optimizer:
        down = [block.ffn.down.weight for block in model.blocks]
        rest = [p for p in model.parameters() if all(p is not d for d in down)]
        groups = [
            {"params": rest},
            {"params": down, "lr": 1e-2 * m, "weight_decay": 0.1 / m},
        ]
        return torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1, eps=1e-300)

    optimizers = [optimizer(forward, 1.0), optimizer(init, 0.5)]
    for step in range(5):
        for model, stepper in zip((forward, init), optimizers, strict=True):
            stepper.zero_grad()
            model.loss(tokens(seed=step)).backward()
            stepper.step()
    torch.testing.assert_close(forward(tokens()), init(tokens()), rtol=1e-8, atol=1e-8)


# --- what is refused would have been in vain ------------------------------------------------------------------------


def change(strategy: str, *roles: str, branch: str | None = None) -> float:
    """Largest change of the logits, relative to their size, when weights of these roles (a branch's output) are
    multiplied by 0.1 and put back as after a step.
    """
    model = tiny_gpt(strategy, "llama2").double()
    batch = tokens()
    with torch.no_grad():
        before = model(batch)
        for _, owner in model.weights():
            if owner.role in roles:
                owner.weight.mul_(0.1)
                if owner.constraint:  # as initialisation would
                    owner.weight.div_(owner.weight.norm(dim=owner.constraint.axis, keepdim=True))
        if branch:
            for block in model.blocks:
                block.scale = type(block.scale)(**{branch: 0.1})
        after = model(batch)
    return float((after - before).abs().max() / before.abs().max())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_refusals_are_those_options_that_do_nothing(strategy: str) -> None:
    bare = find_strategy(strategy)()

    def reason(**options: Any) -> str | None:
        found = refusals(bare, OptionsConfig(**options))
        return next(iter(found.values())) if found else None

    # Doubly differentiable norms have an eps, so "nothing" is a small number.
    nothing, something = 0.05, 0.05
    init = reason(scale_mode="init")
    in_vain = max(change(strategy, "o", "down"), 0.0)
    if init is None:
        assert in_vain > something
    elif "of its own" not in init:
        assert in_vain < nothing, init

    clip = reason(qk_clip=1.0)
    in_vain = change(strategy, "q")
    assert (in_vain < 5e-3) == (clip is not None or preset_qk_norm(strategy)), (in_vain, clip)

    forward = reason(scale_mode="forward")
    in_vain = min(change(strategy, branch="attn"), change(strategy, branch="ffn"))
    if forward is None:
        assert in_vain > 1e-3
    elif "a norm follows" in forward:
        assert in_vain < nothing, forward


def preset_qk_norm(strategy: str) -> bool:
    return find_strategy(strategy).recipe_defaults.get("options.qk_norm", "none") != "none"


@pytest.mark.parametrize(
    ("strategy", "options", "reason"),
    [
        ("simplenorm", {"qk_norm": "head"}, "normed already"),
        ("simplenorm", {"qk_clip": 10.0}, "smaller weights would change nothing"),
        ("simplenorm", {"scale_mode": "init"}, "would not change the forward pass"),
        ("ngpt", {"scale_mode": "init"}, "brought to norm 1"),
        ("angpt", {"scale_mode": "forward"}, "norm 1"),
        ("angpt", {"v_norm": "full"}, "every head has norm 1"),
        ("deepnorm", {"scale_mode": "none"}, "would stay"),
        ("prenorm", {"qk_clip": 10.0, "qk_norm": "full"}, "smaller weights would change nothing"),
    ],
)
def test_a_refusal_is_one_line_that_says_why(strategy: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason) as error:
        make_strategy(strategy, {}, OptionsConfig(**options))
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("options.")


@dataclass(frozen=True)
class Pinned(PreNorm):
    """PreNorm with rows of W_q and W_k that are put back to norm 1."""

    def constraint(self, role: Role, layer: int, shape: Shape) -> Constraint | None:
        return Constraint(axis=-1, kind="unit") if role in ("q", "k") else None


def test_clip_on_pinned_weights_is_refused() -> None:
    with pytest.raises(UserError, match="put back to norm 1 after every step, which would undo the clip"):
        compose(Pinned(), OptionsConfig(qk_clip=1.0))


@pytest.mark.parametrize("largest", [math.inf, math.nan, 0.0])
def test_clip_without_a_largest_logit_leaves_the_weights(largest: float) -> None:
    model = tiny_gpt("prenorm", "llama3", n_layers=1, options={"qk_clip": 1.0})
    attn = model.blocks[0].attn
    before = [projection.weight.detach().clone() for projection in (attn.q, attn.k)]
    attn.get_buffer("largest_logit").fill_(largest)
    model.after_step()
    for projection, weight in zip((attn.q, attn.k), before, strict=True):
        assert torch.equal(projection.weight, weight)
    assert not attn.get_buffer("largest_logit").any()


def test_clip_on_bounded_weights() -> None:
    """anGPT without QK-norm: rows are kept from growing, not pinned, so that a clip stays."""
    model = tiny_gpt("angpt", "llama2", own={"norm_qk": False}, options={"qk_clip": 1e-3})
    model(tokens())
    model.after_step()
    norms = model.blocks[0].attn.q.weight.detach().norm(dim=-1)
    assert (norms < 0.5).all()
    model.after_step()
    torch.testing.assert_close(model.blocks[0].attn.q.weight.detach().norm(dim=-1), norms)


def test_every_other_strategy_takes_every_cap() -> None:
    for name in STRATEGIES:
        model = tiny_gpt(name, "llama2", options={"attention_softcap": 20.0, "logit_softcap": 15.0, "z_loss": 1e-4})
        loss = model.objective(tokens()).total
        loss.backward()
        assert loss.isfinite(), name
        for parameter_name, parameter in model.named_parameters():
            assert parameter.grad is not None, f"{name}: {parameter_name}"
            assert parameter.grad.isfinite().all(), f"{name}: {parameter_name}"


def test_the_table_in_the_docs_is_the_computed_one() -> None:
    page = (Path(__file__).parents[2] / "docs" / "options.md").read_text(encoding="utf-8")
    assert page.partition("<!-- allowed -->\n")[2].partition("<!-- /allowed -->")[0] == options_markdown()
