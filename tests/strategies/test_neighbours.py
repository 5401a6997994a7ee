"""What the neighbour strategies must do by their own equations: limits, closed forms, and the other readings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import shake, tiny_gpt, tiny_shape, tokens
from strategies.plain import Plain, plain_hybridnorm, plain_mixln, plain_siamesenorm_equation, rms
from torch import Tensor

from gptnorm.config import BackboneName, InitConfig, OptionsConfig
from gptnorm.errors import UserError
from gptnorm.model import GPT
from gptnorm.model.init import published_draw
from gptnorm.model.parts import Parts
from gptnorm.model.rope import rotations
from gptnorm.strategies import make_strategy
from gptnorm.strategies.base import Draw, Strategy


def std(name: str, role: Any, layer: int, n_layers: int, backbone: BackboneName = "llama2", **own: Any) -> float:
    """Standard deviation with which a weight of a 32 wide model is drawn, relative to the backbone's bare one."""
    strategy = make_strategy(name, own)
    shape = tiny_shape(backbone, n_layers=n_layers)
    published = published_draw(backbone, role, layer, shape, InitConfig(std=0.5))
    draw = strategy.init(role, layer, shape, published)
    return draw.std * draw.depth / 0.5


def same_weights(model: GPT, other: GPT) -> GPT:
    """`other` with every weight and gain that it shares with `model`."""
    shared = {name: p for name, p in model.state_dict().items() if name in other.state_dict()}
    other.load_state_dict(shared, strict=False)
    return other


def silence(model: GPT, *roles: str) -> GPT:
    with torch.no_grad():
        for _, owner in model.weights():
            if owner.role in roles:
                owner.weight.zero_()
    return model


def stream(model: GPT, batch: Tensor) -> list[tuple[Tensor, ...]]:
    """The state after each block."""
    states: list[tuple[Tensor, ...]] = []
    hooks = [block.register_forward_hook(lambda m, i, o: states.append(o[0])) for block in model.blocks]
    with torch.no_grad():
        model(batch)
    for hook in hooks:
        hook.remove()
    return states


def size(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def wired(strategy: Strategy, x: Tensor, a: Tensor, f: Tensor, layer: int = 0, n_layers: int = 4) -> tuple[Tensor, ...]:
    """One block with gains 1 around branches that put out `a` and `f` whatever they read."""
    shape = tiny_shape("llama2", n_layers=n_layers, d_model=x.shape[-1])
    own = Parts(strategy.block_parts(layer, shape)).double()
    ends = Parts(strategy.end_parts(shape)).double()
    with torch.no_grad():
        return strategy.block(strategy.open(x, ends), lambda _: a, lambda _: f, own, layer, n_layers)


def three() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x, a, f = torch.randn(3, 1, 6, 32, generator=generator, dtype=torch.float64)
    return x, a, f


# --- DeepNorm -------------------------------------------------------------------------------------------------------


def test_deepnorm_constants_at_a_hundred_blocks() -> None:
    """Table 2 of the paper for a decoder: α = 200^(1/4) = 3.7606, β = 800^(-1/4) = 0.18803."""
    x, a, f = three()
    (out,) = wired(make_strategy("deepnorm", {}), x, a, f, n_layers=100)
    expected = rms(3.760603093086394 * rms(3.760603093086394 * x + a) + f)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    for layer in (0, 99):
        for role in ("v", "o", "gate", "up", "down"):
            assert std("deepnorm", role, layer, 100) == pytest.approx(0.1880301547, rel=1e-9), role
        assert std("deepnorm", "q", layer, 100) == std("deepnorm", "k", layer, 100) == 1.0
    # nanoGPT's own factor for the output projections is replaced, not multiplied
    assert std("deepnorm", "down", 3, 100, "gpt2") == pytest.approx(0.1880301547, rel=1e-9)


def test_deepnorm_bounds_what_a_step_changes() -> None:
    """With every weight moved in proportion, the stream moves less the deeper the model: α damps each branch."""
    moved = []
    for depth in (2, 16):
        model = tiny_gpt("deepnorm", "llama2", n_layers=depth).double()
        before = stream(model, tokens())[0][0]
        with torch.no_grad():
            for block in model.blocks:
                block.attn.o.weight.mul_(1.1)
                block.ffn.down.weight.mul_(1.1)
        moved.append(size(stream(model, tokens())[0][0] - before))
    assert moved[1] < 0.6 * moved[0]


def test_deepnorm_says_that_its_depth_factor_stays() -> None:
    with pytest.raises(UserError, match="depth factor") as error:
        make_strategy("deepnorm", {}, OptionsConfig(scale_mode="none"))
    assert "\n" not in str(error.value)


# --- B2T ------------------------------------------------------------------------------------------------------------


def test_b2t_is_postnorm_with_the_inputs_skip_added() -> None:
    x, a, f = three()
    (out,) = wired(make_strategy("b2t", {}), x, a, f)
    torch.testing.assert_close(out, rms(x + rms(x + a) + f), rtol=1e-12, atol=1e-12)
    # an attention that cancels its input leaves y = 0 and one norm on the way from bottom to top
    (out,) = wired(make_strategy("b2t", {}), x, -x, f)
    torch.testing.assert_close(out, rms(x + f), rtol=1e-12, atol=1e-12)
    (post,) = wired(make_strategy("postnorm", {}), x, -x, f)
    torch.testing.assert_close(post, rms(f), rtol=1e-12, atol=1e-12)


# --- KEEL -----------------------------------------------------------------------------------------------------------


def test_keel_without_branches_keeps_the_direction() -> None:
    """N(α N(… α x)) = x / RMS(x) for any depth and any α."""
    for own in ({}, {"alpha_count": "L"}):
        model = silence(tiny_gpt("keel", "llama2", n_layers=5, own=own).double(), "o", "down")
        with torch.no_grad():
            x = model.embed(tokens())
        torch.testing.assert_close(stream(model, tokens())[-1][0], rms(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("count", "alpha"), [("2L", 14.0), ("L", 7.0)])
def test_keel_alpha_counts_sublayers_or_blocks(count: str, alpha: float) -> None:
    x, a, f = three()
    (out,) = wired(make_strategy("keel", {"alpha_count": count}), x, a, f, n_layers=7)
    torch.testing.assert_close(out, rms(alpha * rms(alpha * x + a) + f), rtol=1e-12, atol=1e-12)


def test_keel_first_attention_without_alpha() -> None:
    x, a, f = three()
    strategy = make_strategy("keel", {"first_attention": "plain"})
    (first,) = wired(strategy, x, a, f, layer=0, n_layers=7)
    torch.testing.assert_close(first, rms(14 * rms(x + a) + f), rtol=1e-12, atol=1e-12)
    (second,) = wired(strategy, x, a, f, layer=1, n_layers=7)
    torch.testing.assert_close(second, rms(14 * rms(14 * x + a) + f), rtol=1e-12, atol=1e-12)


def test_keel_identity_route_does_not_vanish() -> None:
    """On unit streams a norm of α x + F damps by α / sqrt(α² + 1); 2L of them, α = 2L, leave at least e^(-1/(4L))."""
    gradients = {}
    for name in ("keel", "postnorm"):
        strategy, depth = make_strategy(name, {}), 32
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(1, 4, 256, generator=generator, dtype=torch.float64).requires_grad_()
        noise = torch.randn(2 * depth, 1, 4, 256, generator=generator, dtype=torch.float64)
        h = rms(x)
        own = Parts(strategy.block_parts(0, tiny_shape("llama2", d_model=256))).double()
        for layer in range(depth):
            a, f = noise[2 * layer], noise[2 * layer + 1]
            (h,) = strategy.block((h,), lambda _, a=a: a, lambda _, f=f: f, own, layer, depth)
        probe = torch.randn(h.shape, generator=generator, dtype=torch.float64)
        gradients[name] = float(torch.autograd.grad((h * probe).sum(), x)[0].norm() / probe.norm())
    assert gradients["keel"] > 0.9
    assert gradients["postnorm"] < 2 ** (-0.9 * 32)


# --- Mix-LN ---------------------------------------------------------------------------------------------------------


def test_mixln_limits_are_prenorm_and_postnorm() -> None:
    batch = tokens()
    for fraction, name in ((0.0, "prenorm"), (1.0, "postnorm")):
        limit = shake(tiny_gpt(name, "llama2", n_layers=4))
        ours = same_weights(limit, tiny_gpt("mixln", "llama2", n_layers=4, own={"fraction": fraction}))
        if name == "postnorm":  # there the final norm has nothing left to do: gain 1, and an input of RMS 1
            with torch.no_grad():
                for model in (limit, ours):
                    model.blocks[-1].own.ffn_norm.gain.fill_(1.0)
        torch.testing.assert_close(ours(batch), limit(batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backbone", ["gpt2", "llama3"])
def test_mixln_in_between(backbone: BackboneName) -> None:
    model = shake(tiny_gpt("mixln", backbone, n_layers=3, own={"fraction": 0.7})).double()
    batch = tokens(batch=1)
    with torch.no_grad():
        ours = model(batch)[0]
    torch.testing.assert_close(ours, plain_mixln(Plain(model), batch[0], post_blocks=2), rtol=1e-9, atol=1e-9)


def test_mixln_counts_whole_blocks() -> None:
    """0.29 * 100 is 28.999999999999996 in floating point, and still 29 blocks."""
    x, a, f = three()
    strategy = make_strategy("mixln", {"fraction": 0.29})
    post = [layer for layer in range(100) if size(wired(strategy, x, a, f, layer, 100)[0]) < 1.01]
    assert post == list(range(29))


def test_mixln_fraction_is_a_fraction() -> None:
    with pytest.raises(UserError, match=r"strategy.fraction = 1.5: must be .*1"):
        make_strategy("mixln", {"fraction": 1.5})


# --- LayerNorm scaling ----------------------------------------------------------------------------------------------


def test_lns_is_prenorm_in_its_first_block() -> None:
    prenorm = shake(tiny_gpt("prenorm", "llama2", n_layers=1))
    lns = same_weights(prenorm, tiny_gpt("lns", "llama2", n_layers=1))
    assert torch.equal(lns(tokens()), prenorm(tokens()))


def test_lns_is_prenorm_with_smaller_gains() -> None:
    """N(x) / √l is a norm whose gain is divided by √l."""
    lns = shake(tiny_gpt("lns", "llama3", n_layers=3))
    prenorm = same_weights(lns, tiny_gpt("prenorm", "llama3", n_layers=3))
    with torch.no_grad():
        for layer, block in enumerate(prenorm.blocks):
            block.own.attn_norm.gain.div_((layer + 1) ** 0.5)
            block.own.ffn_norm.gain.div_((layer + 1) ** 0.5)
    torch.testing.assert_close(lns(tokens()), prenorm(tokens()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backbone", ["gpt2", "llama2"])
def test_lns_is_drawn_without_depth_factors(backbone: BackboneName) -> None:
    for role in ("q", "v", "o", "up", "down"):
        assert std("lns", role, 5, 8, backbone) == 1.0
    model = tiny_gpt("lns", "llama2", n_layers=8)
    deep = model.blocks[-1].ffn.down.weight
    assert float(deep.detach().std()) == pytest.approx(0.02 * (2048 / 32) ** 0.5, rel=0.05)


# --- Sandwich, Peri-LN, reordered -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sandwich", "periln", "reordered"])
def test_output_norms_hide_the_size_of_the_output_projections(name: str) -> None:
    model = tiny_gpt(name, "llama2").double()
    with torch.no_grad():
        before = model(tokens())
        for _, owner in model.weights():
            if owner.role in ("o", "down"):
                owner.weight.mul_(50.0)
        after = model(tokens())
    assert size(after - before) < 1e-3 * size(before)


@pytest.mark.parametrize("name", ["sandwich", "periln", "reordered"])
def test_every_branch_adds_rms_one(name: str) -> None:
    """x_l - x_{l-1} is a sum of two vectors of RMS 1 at the start."""
    x, a, f = three()
    (out,) = wired(make_strategy(name, {}), x, a, f)
    base = rms(x) if name == "periln" else x
    torch.testing.assert_close(out, base + rms(a) + rms(f), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "changes"), [("periln", False), ("sandwich", True), ("reordered", True)])
def test_only_periln_norms_the_embedding(name: str, changes: bool) -> None:
    model = tiny_gpt(name, "llama2").double()
    with torch.no_grad():
        before = model(tokens())
        model.embed.weight.mul_(3.0)
        after = model(tokens())
    assert (size(after - before) > 0.05 * size(before)) == changes


def test_reordered_needs_its_query_and_key_norms() -> None:
    """At 32 blocks of unit initialisation |dL/dx_1| / |dL/dx_L| is 11 to 16 with them, 1600 to 5000 without."""
    ratio = {}
    for qk_norm in ("full", "none"):
        model = GPT(
            tiny_shape("llama2", n_layers=32),
            make_strategy("reordered", {}, OptionsConfig(qk_norm=qk_norm)),
            backbone="llama2",
            init=InitConfig(std="unit"),
        )
        found: list[Tensor] = []

        def keep(block: torch.nn.Module, inputs: object, output: Any, found: list[Tensor] = found) -> None:
            output[0][0].retain_grad()
            found.append(output[0][0])

        for block in (model.blocks[0], model.blocks[-1]):
            block.register_forward_hook(keep)
        model.loss(tokens()).backward()
        first, last = (x.grad for x in found)
        assert first is not None
        assert last is not None
        ratio[qk_norm] = float(first.norm() / last.norm())
    assert ratio["none"] > 20 * ratio["full"]


# --- HybridNorm -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["gpt2", "llama3"])
def test_starred_hybridnorm(backbone: BackboneName) -> None:
    model = shake(tiny_gpt("hybridnorm", backbone, own={"first_block": "prenorm"})).double()
    batch = tokens(batch=1)
    with torch.no_grad():
        ours = model(batch)[0]
    theirs = plain_hybridnorm(Plain(model), batch[0], starred=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    unstarred = tiny_gpt("hybridnorm", backbone)
    count = [sum(p.numel() for p in m.parameters()) for m in (model, unstarred)]
    assert count[0] - count[1] == model.shape.d


def test_hybridnorm_attention_ignores_the_size_of_its_input() -> None:
    """q, k and v are normed: the branch is of degree 0 in what it reads."""
    model = tiny_gpt("hybridnorm", "llama2").double()
    x = torch.randn(2, 8, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rotation = rotations(8, 8, 10_000.0, like=x)
    attn = model.blocks[0].attn
    with torch.no_grad():
        torch.testing.assert_close(attn(100 * x, rotation), attn(x, rotation), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["hybridnorm", "siamesenorm"])
def test_megatron_depth_factor(name: str) -> None:
    """W_o and W_down by (2L)^(-1/2), nothing else, on every backbone."""
    for backbone in ("gpt2", "llama2"):
        for role, factor in (("q", 1.0), ("v", 1.0), ("up", 1.0), ("o", 18**-0.5), ("down", 18**-0.5)):
            assert std(name, role, 4, 9, backbone) == pytest.approx(factor), role


# --- SiameseNorm ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["gpt2", "llama3"])
def test_siamesenorm_equation(backbone: BackboneName) -> None:
    own = {"x_stream": "post", "depth_scale": "l+1"}
    model = shake(tiny_gpt("siamesenorm", backbone, own=own)).double()
    batch = tokens(batch=1)
    with torch.no_grad():
        ours = model(batch)[0]
    torch.testing.assert_close(ours, plain_siamesenorm_equation(Plain(model), batch[0]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("depth_scale", "c"), [("2(l+1)", 8**0.5), ("l+1", 2.0)])
def test_siamesenorm_streams(depth_scale: str, c: float) -> None:
    """Y is the sum of all updates, X the normed one; both take the same updates."""
    x, a, f = three()
    strategy = make_strategy("siamesenorm", {"depth_scale": depth_scale})
    x_out, y_out = wired(strategy, x, a, f, layer=3)
    torch.testing.assert_close(y_out, x + a + f, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x_out, rms(x + a / c) + f / c, rtol=1e-12, atol=1e-12)
    post = make_strategy("siamesenorm", {"depth_scale": depth_scale, "x_stream": "post"})
    x_out, y_out = wired(post, x, a, f, layer=3)
    torch.testing.assert_close(y_out, x + a + f, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x_out, rms(rms(x + a / c) + f / c), rtol=1e-12, atol=1e-12)


# --- DyT ------------------------------------------------------------------------------------------------------------


def test_dyt_formula() -> None:
    """γ (e^{αz} - e^{-αz}) / (e^{αz} + e^{-αz}), bounded by γ and linear in the middle."""
    model = tiny_gpt("dyt", "llama2", own={"alpha_attn": 0.8, "alpha_ffn": 0.2, "alpha_final": 0.3}).double()
    own = model.blocks[1].own
    for part, alpha in ((own.attn_tanh, 0.8), (own.ffn_tanh, 0.2), (model.own.final_tanh, 0.3)):
        assert part.alpha.item() == pytest.approx(alpha)
    z = torch.linspace(-4, 4, 9 * 32, dtype=torch.float64).view(9, 32)
    with torch.no_grad():
        own.attn_tanh.gain.copy_(torch.arange(32) / 7)
        up, down = torch.exp(0.8 * z), torch.exp(-0.8 * z)
        torch.testing.assert_close(own.attn_tanh(z), own.attn_tanh.gain * (up - down) / (up + down))


@pytest.mark.parametrize("width", [32, 128])
def test_dyt_starts_with_a_stream_of_rms_one(width: int) -> None:
    model = tiny_gpt("dyt", "llama2", d_model=width)
    assert model.own.embed_scale.value().item() == pytest.approx(width**0.5)
    with torch.no_grad():
        x = model.own.embed_scale(model.embed(tokens(batch=8)))
    assert size(x) == pytest.approx(1.0, rel=0.05)
    # a tied embedding is the head, and stays as published
    tied = tiny_gpt("dyt", "gpt2", d_model=width)
    assert float(tied.embed.weight.detach().std()) == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(("backbone", "kind"), [("llama2", "rmsnorm"), ("gpt2", "layernorm")])
def test_dyt_keeps_true_norms_for_queries_and_keys(backbone: BackboneName, kind: str) -> None:
    model = tiny_gpt("dyt", backbone, options={"qk_norm": "head"})
    assert model.blocks[0].attn.q_norm.norm.spec.kind == kind


# --- PreNorm + QKV-norm ---------------------------------------------------------------------------------------------


def test_qkv_norm_is_prenorm_with_two_options() -> None:
    ours = shake(tiny_gpt("qkv_norm", "llama3"))
    theirs = same_weights(ours, tiny_gpt("prenorm", "llama3", options={"qk_norm": "head", "v_norm": "head"}))
    assert torch.equal(ours(tokens()), theirs(tokens()))


# --- all ------------------------------------------------------------------------------------------------------------

KEEP = ("b2t", "keel", "mixln", "sandwich", "periln", "reordered", "qkv_norm", "dyt")


@pytest.mark.parametrize("name", KEEP)
def test_the_others_keep_the_published_initialisation(name: str) -> None:
    """Llama's (2 (l + 1))^(-1/2) on what writes to the stream."""
    for layer in (0, 5):
        assert std(name, "down", layer, 6) == pytest.approx((2 * layer + 2) ** -0.5)
        assert std(name, "q", layer, 6) == 1.0
    published = Draw(std=0.3, cut=2.0, depth=0.25)
    assert make_strategy(name, {}).init("o", 1, tiny_shape("llama2"), published) == published
