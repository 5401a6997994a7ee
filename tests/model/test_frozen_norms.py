"""Norms whose scale is one constant each: the calibrating pass by independent hooks, and what is left of a norm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import shake, tiny_gpt, tokens
from saving import load, save
from torch import Tensor

from gptnorm.config import OptimConfig
from gptnorm.errors import UserError
from gptnorm.model import GPT
from gptnorm.model.moe import reference_experts
from gptnorm.norms import Frozen, FrozenModule, Norm, NormModule, calibration
from gptnorm.plan.trace import fake_model, trace_pass
from gptnorm.probe import probe
from gptnorm.strategies import STRATEGIES, find_strategy, make_strategy
from gptnorm.strategies.compose import offers, preset_options
from gptnorm.train.blocks import prepare_blocks
from gptnorm.train.optim import build_optimizer

FROZEN = {"norm_scale": "frozen"}
TAKEN = [name for name in STRATEGIES if offers(find_strategy(name)())["norm_scale=frozen"] is None]
VALUES_PER_HEAD = {"qkv_norm", "hybridnorm", "siamesenorm"}
"""Their heads differ in RMS where tokens do not."""


def norms_of(model: GPT) -> dict[str, FrozenModule]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FrozenModule)}


def factors(model: GPT) -> dict[str, Tensor]:
    return {name: norm.factor.clone() for name, norm in norms_of(model).items()}


def seen_by(model: GPT, batch: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Each frozen norm's input and output in a forward pass."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        norm.register_forward_hook(lambda module, args, y, name=name: seen.update({name: (args[0], y)}))
        for name, norm in norms_of(model).items()
    ]
    with torch.no_grad():
        model(batch)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("strategy", TAKEN)
def test_every_output_over_its_gain_has_rms_1_on_the_batch(strategy: str, moe: bool) -> None:
    model = tiny_gpt(strategy, "llama3", options=FROZEN, moe=moe)
    if not moe:
        shake(model)
    model.calibrate(tokens())
    assert model.training
    seen = seen_by(model, tokens()[:, :-1])
    assert seen
    assert seen.keys() == norms_of(model).keys()
    for name, norm in norms_of(model).items():
        z, y = (x.double() for x in seen[name])
        if not moe and norm.gain is not None:
            y = y / norm.gain.double()
        spec = norm.spec.norm
        before, after = (x.square().sum(-1).mean() / (1 if spec.kind == "l2" else spec.size) for x in (z, y))
        assert after.item() == pytest.approx((before / (before + spec.eps)).item(), rel=1e-5), name
        assert after.sqrt().item() == pytest.approx(1.0, abs=0.02), name


def test_every_expert_counts_with_its_own_tokens() -> None:
    """Grouped products: the pairs that are computed; the reference path: every expert on every token."""
    model = tiny_gpt("simplenorm", "llama2", options=FROZEN, moe=True)
    model.calibrate(tokens())
    z, _ = seen_by(model, tokens()[:, :-1])["blocks.0.ffn.routed.up.after.0"]
    assert z.shape[:-1] == (2 * 3 * 15,)
    grouped = factors(model)
    with reference_experts(model):
        model.calibrate(tokens())
        z, y = seen_by(model, tokens()[:, :-1])["blocks.0.ffn.routed.up.after.0"]
    assert z.shape[:-1] == (4, 3 * 15)
    assert y.square().mean().item() == pytest.approx(1.0, rel=1e-3)
    for name, factor in factors(model).items():
        assert factor.item() == pytest.approx(grouped[name].item(), rel=0.1), name


@pytest.mark.parametrize("strategy", [name for name in TAKEN if name not in VALUES_PER_HEAD])
def test_where_all_tokens_are_alike_it_is_the_live_model(strategy: str) -> None:
    """One token throughout: attention returns its value at every position, so that every vector is of one RMS."""
    batch = torch.full((2, 9), 7)
    live, frozen = (tiny_gpt(strategy, "llama2", options=options).double() for options in ({}, FROZEN))
    frozen.calibrate(batch)
    torch.testing.assert_close(frozen(batch), live(batch), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(frozen(tokens()), live(tokens()), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["rmsnorm", "l2"])
def test_what_is_left_of_a_norm_is_linear(kind: Any) -> None:
    spec = Norm(kind=kind, size=6, eps=1e-5)
    live, frozen = spec.build().double(), Frozen(norm=spec).build().double()
    z = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    with torch.no_grad(), calibration([frozen]):
        frozen(z)
    same = z / z.norm(dim=-1, keepdim=True) * z.norm() / 2
    torch.testing.assert_close(frozen(same), live(same), rtol=1e-12, atol=1e-12)

    def bend(norm: Any, at: Tensor) -> float:
        return torch.autograd.functional.hessian(lambda x: norm(x).sum(), at).abs().max().item()

    jacobians = [[torch.autograd.functional.jacobian(norm, x) for x in z[:2]] for norm in (live, frozen)]
    assert not torch.allclose(*jacobians[0], rtol=0.1, atol=0.01)
    assert torch.equal(*jacobians[1])
    torch.testing.assert_close(jacobians[1][0], torch.eye(6, dtype=torch.float64) * frozen.factor)
    assert bend(live, z[0]) > 1e-2
    assert bend(frozen, z[0]) == 0
    # The norm takes the radial direction away (up to eps), its scale alone does not.
    radial = [(jacobian[0] @ z[0]).norm() / frozen(z[0]).norm() for jacobian in jacobians]
    assert radial[0] < 1e-4
    assert radial[1].item() == pytest.approx(1.0)


def test_a_norm_in_two_places_has_no_constant() -> None:
    frozen = Frozen(norm=Norm(kind="rmsnorm", size=4, eps=1e-5)).build()
    with pytest.raises(AssertionError, match="two places"), torch.no_grad(), calibration([frozen]):
        frozen(frozen(torch.ones(2, 4)))
    assert not frozen.measures


def test_a_norm_that_meets_nothing_is_left_at_1() -> None:
    frozen = Frozen(norm=Norm(kind="rmsnorm", size=4, eps=1e-5)).build()
    for batches in ([], [torch.ones(0, 4)]):
        with torch.no_grad(), calibration([frozen]):
            for z in batches:
                frozen(z)
        assert frozen.factor == 1


def test_without_constants_nothing_is_computed(tmp_path: Path) -> None:
    """Drawn again they are gone again; a checkpoint brings them."""
    model = tiny_gpt("simplenorm", "llama2", options=FROZEN, seed=1)
    for compute in (model, model.loss, model.features, model.objective):
        with pytest.raises(UserError, match=r"options\.norm_scale = 'frozen': .* no constants") as error:
            compute(tokens())
        assert "\n" not in str(error.value)
    model.calibrate(tokens())
    optimizer = build_optimizer(model, OptimConfig())
    model.objective(tokens()).total.backward()
    optimizer.step()
    expected = model(tokens())
    folder = save(tmp_path, 1, model, optimizer)
    other = tiny_gpt("simplenorm", "llama2", options=FROZEN, seed=2)
    load(folder, other, build_optimizer(other, OptimConfig()))
    assert torch.equal(other(tokens()), expected)
    assert all(torch.equal(a, b) for a, b in zip(factors(model).values(), factors(other).values(), strict=True))
    model.init_weights(1)
    with pytest.raises(UserError, match="no constants"):
        model(tokens())


def test_calibration_leaves_all_else_alone() -> None:
    """Dropout, what QK-clip and balancing count, gradients; and models without frozen norms are not run at all."""
    balanced = {"norm_scale": "frozen", "qk_clip": 1.0}
    model = tiny_gpt("prenorm", "llama2", options=balanced, moe=True, dropout=0.5).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    model.calibrate(tokens())
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"{name}.factor" for name in norms_of(model)}
    assert torch.equal(torch.get_rng_state(), random)
    assert not model.training
    plain = tiny_gpt("prenorm", "llama2")
    plain.register_forward_pre_hook(lambda *_: pytest.fail("was run"))
    plain.calibrate(tokens())


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_compiled_blocks_are_calibrated_eagerly(recompute: Any) -> None:
    eager, compiled = (tiny_gpt("simplenorm", "llama2", options=FROZEN) for _ in range(2))
    torch._dynamo.reset()
    prepare_blocks(compiled, recompute, compiled=True, backend="aot_eager")
    for model in (eager, compiled):
        model.calibrate(tokens())
    assert factors(eager) == factors(compiled)
    totals = [model.objective(tokens()).total for model in (eager, compiled)]
    torch.testing.assert_close(*totals, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(t, list(m.parameters())) for t, m in zip(totals, (eager, compiled), strict=True)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def test_clipped_queries_stay_clipped() -> None:
    """A live norm would undo QK-clip, which is refused there; a constant passes it on."""
    model = tiny_gpt("prenorm", "llama2", options={**FROZEN, "qk_clip": 0.05, "qk_norm": "head"}, n_layers=1)
    model.calibrate(tokens())
    attn = model.blocks[0].attn
    model(tokens())
    beyond = attn.largest_logit.clone()
    assert (beyond > 0.05).any()
    model.after_step()
    model(tokens())
    torch.testing.assert_close(attn.largest_logit, beyond.clamp_max(0.05), rtol=1e-4, atol=1e-6)


def test_a_probe_and_a_plan_of_it() -> None:
    model = tiny_gpt("sandwich", "llama2", options=FROZEN)
    model.calibrate(tokens())
    found = probe(model, tokens())
    norms = {f"blocks.{n}.own.{name}": rms for n, block in enumerate(found.blocks) for name, rms in block.norms.items()}
    norms |= {f"own.{name}": rms for name, rms in found.norms.items()}
    assert norms.keys() == norms_of(model).keys()
    for name, rms in norms.items():
        assert (rms**2 + 1e-5) ** -0.5 == pytest.approx(factors(model)[name].item(), rel=1e-5), name
    with torch.device("meta"):
        model = tiny_gpt("sandwich", "llama2", options=FROZEN)
    with fake_model(model) as fake:
        assert trace_pass(fake, sequences=2, seq_len=8, precision="bf16").kept.total > 0


# --- which strategies -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_all_norms_are_frozen_or_the_pair_is_refused(strategy: str, moe: bool) -> None:
    live = tiny_gpt(strategy, "llama3", moe=moe)
    if strategy not in TAKEN:
        with pytest.raises(UserError, match=r"options\.norm_scale = 'frozen': .* refuses it") as error:
            tiny_gpt(strategy, "llama3", options=FROZEN, moe=moe)
        assert "\n" not in str(error.value)
        return
    model = tiny_gpt(strategy, "llama3", options=FROZEN, moe=moe)
    assert not [module for module in model.modules() if isinstance(module, NormModule)]
    assert norms_of(model).keys() == {name for name, m in live.named_modules() if isinstance(m, NormModule)}
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in live.named_parameters()]


@pytest.mark.parametrize(
    ("strategy", "own", "reason"),
    [
        ("dyt", {}, "no statistics to freeze"),
        ("ngpt", {}, "back on the sphere"),
        ("angpt", {"norm_qk": False}, "no norm that could be frozen"),
        ("prenorm", {"norm": "layernorm"}, "take the mean of each token away"),
        ("prenorm", {"norm": "np_layernorm"}, "take the mean of each token away"),
    ],
)
def test_a_refusal_says_why(strategy: str, own: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        tiny_gpt(strategy, "llama2", own=own, options=FROZEN)


def test_a_backbones_layernorm_is_refused() -> None:
    """That it has one, only the shape knows."""
    with pytest.raises(UserError, match=r"options\.norm_scale = 'frozen': layernorm: .*strategy\.norm") as error:
        tiny_gpt("prenorm", "gpt2", options=FROZEN)
    assert "\n" not in str(error.value)
    model = tiny_gpt("prenorm", "gpt2", own={"norm": "rmsnorm"}, options=FROZEN)
    model.calibrate(tokens())
    assert model.loss(tokens()).isfinite()


def test_options_add_norms_to_freeze() -> None:
    options = preset_options(find_strategy("angpt")())
    own = {"norm_qk": False}
    strategy = make_strategy("angpt", own, type(options)(qk_norm="head", norm_scale="frozen"))
    model = tiny_gpt("angpt", "llama2", own=own, options={"qk_norm": "head", **FROZEN})
    attention = strategy.attention(0, model.shape)
    assert isinstance(attention.q, Frozen)
    assert attention.q.axis == "head"
    assert len(norms_of(model)) == 4
