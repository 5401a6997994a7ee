"""SpanNorm's closed forms and its measured behaviour at initialisation (spannorm.md sections 1.4, 1.5, 6)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import shake, tiny_gpt, tokens
from torch import Tensor

from gptnorm.config import InitConfig, ModelConfig, OptionsConfig
from gptnorm.model import GPT
from gptnorm.model.backbones import make_shape
from gptnorm.strategies import make_strategy

VARIANTS = ("A", "A1", "C", "D")


def states(model: GPT, batch: Tensor) -> list[Tensor]:
    """The embedding, then the stream after every block."""
    found: list[Tensor] = []
    handles = [model.blocks[0].register_forward_pre_hook(lambda m, i: found.append(i[0][0]))]
    handles += [block.register_forward_hook(lambda m, i, o: found.append(o[0][0])) for block in model.blocks]
    model(batch)
    for handle in handles:
        handle.remove()
    return found


def rms(x: Tensor) -> Tensor:
    return x.square().mean(-1, keepdim=True).sqrt()


def zero(model: GPT, *roles: str) -> None:
    with torch.no_grad():
        for _, owner in model.weights():
            if owner.role in roles:
                owner.weight.zero_()


@pytest.mark.parametrize("n_layers", [1, 5])
def test_one_norm_on_the_identity_route(n_layers: int) -> None:
    """With W_down = 0: x_L = x_0 / RMS(x_0), however deep; attention has no influence at all."""
    model = tiny_gpt("spannorm", "llama2", n_layers=n_layers).double()
    zero(model, "down")
    with torch.no_grad():
        x = states(model, tokens())
    torch.testing.assert_close(x[-1], x[0] / rms(x[0]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("variant", "expected"), [("A", False), ("A1", False), ("C", True), ("D", False)])
def test_attention_reaches_the_stream_through_the_feedforward_alone(variant: str, expected: bool) -> None:
    model = tiny_gpt("spannorm", "llama2", own={"variant": variant})
    zero(model, "down")
    model.loss(tokens()).backward()
    # The skip of variant C carries the attention; in the others nothing of it is left.
    reached = any(float(o.weight.grad.abs().max()) > 1e-9 for _, o in model.weights() if o.role in "qkvo")
    assert reached == expected


def test_without_branches_a_second_block_changes_nothing() -> None:
    model = tiny_gpt("spannorm", "llama2", n_layers=4).double()
    zero(model, "o", "down")
    with torch.no_grad():
        x = states(model, tokens())
    for later in x[2:]:
        torch.testing.assert_close(later, x[1], rtol=1e-4, atol=1e-5)


def test_the_first_skip_stays_raw() -> None:
    """Scaling the embeddings changes x_1, not what the first attention reads."""
    model = tiny_gpt("spannorm", "llama2").double()
    read: list[Tensor] = []
    model.blocks[0].attn.register_forward_pre_hook(lambda m, i: read.append(i[0].detach()))
    with torch.no_grad():
        before = states(model, tokens())[1]
        model.embed.weight *= 3.0
        after = states(model, tokens())[1]
    torch.testing.assert_close(read[0], read[1], rtol=1e-4, atol=1e-5)
    assert (before - after).abs().max() > 0.05


@pytest.mark.parametrize("own", [{}, {"first_attention_norm": False}, {"final_norm": True}, {"skip_alpha": 2.0}])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_as_their_equations(variant: str, own: dict[str, Any]) -> None:
    """spannorm.md section 1.3, one block at a time, from the branches' own outputs."""
    model = shake(tiny_gpt("spannorm", "llama2", own={"variant": variant, **own})).double()
    factor, alpha = (2 * model.shape.n_layers) ** -0.5, own.get("skip_alpha", 1.0)
    outputs: dict[str, list[Tensor]] = {"attn": [], "ffn": []}
    inputs: dict[str, list[Tensor]] = {"attn": [], "ffn": []}
    for block in model.blocks:
        for name in ("attn", "ffn"):
            branch = getattr(block, name)
            branch.register_forward_hook(lambda m, i, o, name=name: outputs[name].append(o))
            branch.register_forward_pre_hook(lambda m, i, name=name: inputs[name].append(i[0]))
    with torch.no_grad():
        x = states(model, tokens())
    for n, block in enumerate(model.blocks):

        def norm(z: Tensor, name: str, own: Any = block.own) -> Tensor:
            return getattr(own, name).gain * z / (z.square().mean(-1, keepdim=True) + 1e-5).sqrt()

        a, f = outputs["attn"][n], factor * outputs["ffn"][n]
        if variant == "A":
            y, out = norm(alpha * x[n] + a, "n1"), norm(alpha * x[n] + f, "n2")
        elif variant == "A1":
            y, out = alpha * x[n] + a, norm(alpha * x[n] + f, "n2")
        elif variant == "C":
            y, out = norm(alpha * x[n] + a, "n1"), norm(alpha * x[n] + a + f, "n2")
        else:
            y, out = norm(a, "n1"), norm(alpha * x[n] + f, "n2")
        first = n == 0 and own.get("first_attention_norm", True)
        torch.testing.assert_close(inputs["attn"][n], norm(x[n], "n0") if first else x[n])
        torch.testing.assert_close(inputs["ffn"][n], y)
        torch.testing.assert_close(x[n + 1], out)


def deep(n_layers: int, options: dict[str, Any], d: int = 64) -> GPT:
    sizes = ModelConfig(d_model=d, n_heads=d // 32, n_layers=n_layers, d_ff=8 * d // 3)
    shape = make_shape(sizes, vocab=64, context=32)
    strategy = make_strategy("spannorm", {}, OptionsConfig(**options))
    return GPT(shape, strategy, backbone="llama2", init=InitConfig(std="unit"))


@pytest.mark.parametrize(
    ("options", "low", "high"),
    [
        ({"scale_mode": "forward", "scale_target": "ffn"}, 1.0, 2.2),
        ({"scale_mode": "init", "scale_target": "both"}, 1.0, 2.2),
        ({"scale_mode": "none"}, 1e9, 1e18),
    ],
    ids=["forward", "init", "no depth factor"],
)
def test_gradient_ratio_at_128_blocks(options: dict[str, Any], low: float, high: float) -> None:
    """|dL/dx_1| / |dL/dx_L|: 1.3 with c = 1/2, 8e12 without a factor (sections 1.4, 1.5)."""
    model = deep(128, options).double()
    found: list[Tensor] = []

    def keep(block: torch.nn.Module, inputs: object, output: tuple[tuple[Tensor, ...], None]) -> None:
        output[0][0].retain_grad()
        found.append(output[0][0])

    for block in (model.blocks[0], model.blocks[-1]):
        block.register_forward_hook(keep)
    model.loss(torch.randint(0, 64, (2, 33), generator=torch.Generator().manual_seed(0))).backward()
    first, last = (float(x.grad.norm()) for x in found)
    assert low <= first / last <= high


def test_presets_and_their_ablation() -> None:
    """Forward and feed-forward alone by default; the literal ScaleInit moves the factor, never both unasked."""
    forward = tiny_gpt("spannorm", "llama2", n_layers=8)
    assert (forward.blocks[0].scale.attn, forward.blocks[0].scale.ffn) == (1.0, 0.25)
    literal = tiny_gpt("spannorm", "llama2", n_layers=8, options={"scale_mode": "init", "scale_target": "both"})
    assert (literal.blocks[0].scale.attn, literal.blocks[0].scale.ffn) == (1.0, 1.0)
    for (_, ours), (_, other) in zip(forward.weights(), literal.weights(), strict=True):
        factor = 0.25 if ours.role in ("o", "down") else 1.0
        torch.testing.assert_close(other.weight, factor * ours.weight, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("embedding", "tied"), [("unit", False), ("unit", True), ("norm", False)])
def test_embedding_starts_at_rms_one(embedding: str, tied: bool) -> None:
    model = tiny_gpt("spannorm", "llama2", own={"embedding": embedding}, tied=tied, d_model=64)
    with torch.no_grad():
        x = states(model, tokens())[0]
    assert rms(x).mean().item() == pytest.approx(1.0, abs=0.1)
