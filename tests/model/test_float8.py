"""Float8 products against an enumeration of the formats' numbers and dense formulas in fp64."""

from __future__ import annotations

import contextlib
import math
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import tiny_gpt, tokens
from torch import Tensor, nn

from gptnorm.model import GPT
from gptnorm.model.float8 import E4M3, E5M2, encode, float8_experts, float8_linear
from gptnorm.model.moe import ExpertProjection
from gptnorm.model.projection import Projection
from gptnorm.train.blocks import prepare_blocks

KINDS = [pytest.param(E4M3, id="e4m3"), pytest.param(E5M2, id="e5m2")]


def positive(kind: torch.dtype) -> np.ndarray:
    """Every number of the format from 0 up, in fp64. An even place has an even last bit."""
    if kind == E4M3:
        bits, bias, last = 3, 7, 0b1111_110  # the all-ones pattern is nan; no infinity
    else:
        bits, bias, last = 2, 15, 0b11110_11  # the exponent of all ones is infinity and nan
    found = []
    for pattern in range(last + 1):
        exponent, fraction = pattern >> bits, (pattern & (2**bits - 1)) / 2**bits
        found.append((1 + fraction) * 2.0 ** (exponent - bias) if exponent else fraction * 2.0 ** (1 - bias))
    return np.array(found)


def nearest(x: np.ndarray, kind: torch.dtype) -> np.ndarray:
    """The nearest number of the format, ties to the even place, by looking at all of them."""
    grid = positive(kind)
    distance = np.abs(np.abs(x)[:, None] - grid)
    is_nearest = distance == distance.min(1, keepdims=True)
    is_even = np.arange(len(grid)) % 2 == 0
    return np.copysign(grid[(2 * is_nearest + (is_nearest & is_even)).argmax(1)], x)


def rounded(x: Tensor, kind: torch.dtype) -> Tensor:
    """Q(x) in fp64; the scale and the quotient are those of fp32."""
    exact = x.detach().float().numpy()
    scale = np.float32(np.abs(exact).max()) / np.float32(positive(kind)[-1])
    flat = nearest((exact / scale).ravel().astype(np.float64), kind)
    return torch.from_numpy(flat.reshape(exact.shape) * np.float64(scale))


def draw(*size: int, seed: int = 0, spread: float = 1.0) -> Tensor:
    """Numbers over several orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator) * (spread * torch.randn(size, generator=generator)).exp()


def test_the_formats_end_where_torch_says() -> None:
    for kind, largest, smallest in ((E4M3, 448, 2.0**-9), (E5M2, 57344, 2.0**-16)):
        grid = positive(kind)
        assert (grid[-1], grid[1]) == (largest, smallest) == (torch.finfo(kind).max, grid[1])
        assert len(grid) == (127 if kind == E4M3 else 124)


@pytest.mark.parametrize("kind", KINDS)
def test_the_nearest_number_ties_to_even(kind: torch.dtype) -> None:
    """Scale 1: every number, every midpoint, what lies just beside it, subnormals and what vanishes below them."""
    grid = positive(kind)
    middle = (grid[:-1] + grid[1:]) / 2
    x = np.concatenate([grid, middle, middle * (1 + 2.0**-20), middle * (1 - 2.0**-20), grid[1] * 2.0 ** -np.arange(8)])
    x = np.concatenate([x, -x, draw(4000, spread=6.0).clamp(-grid[-1], grid[-1]).numpy().astype(np.float64)])
    codes, scale = encode(torch.from_numpy(x).float(), kind)
    assert scale == 1
    assert codes.dtype == kind
    np.testing.assert_array_equal(codes.double().numpy(), nearest(x, kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1.0, 3e-5, 7e9, 2e-38, 3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_number_falls_on_the_formats_end(kind: torch.dtype, size: float, dtype: torch.dtype) -> None:
    x = draw(64, 50, spread=3.0)
    x = (x / x.abs().max() * size).to(dtype)
    codes, scale = encode(x, kind)
    assert codes.double().abs().max() == torch.finfo(kind).max or size < 1e-37
    if size > 1e-37:
        assert torch.equal(codes.double() * scale.double(), rounded(x, kind))


def test_matrices_have_scales_of_their_own() -> None:
    x = draw(3, 8, 8) * torch.tensor([1.0, 1e-4, 1e5])[:, None, None]
    codes, scale = encode(x, E4M3, by_matrix=True)
    assert scale.shape == (3, 1, 1)
    for i in range(3):
        alone = encode(x[i], E4M3)
        assert torch.equal(codes[i].float(), alone[0].float())
        assert torch.equal(scale[i, 0, 0], alone[1])


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_and_what_is_nearly_zero(kind: torch.dtype) -> None:
    for size in (0.0, 1e-45, 1e-40):
        codes, scale = encode(torch.full((4,), size), kind)
        assert (codes.float() * scale).isfinite().all()
        assert scale > 0


def differentiated(x: Tensor, weight: Tensor, g: Tensor, **experts: Any) -> tuple[Tensor, ...]:
    """y, dx and dW."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = float8_experts(x, weight, **experts) if experts else float8_linear(x, weight)
    return y.detach(), *torch.autograd.grad(y, (x, weight), g)


def agree(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape
        # What fp32 sums differ by; float8 is a thousand times coarser.
        assert ((one.double() - other).norm() / other.norm()).item() < 1e-6


def test_the_three_products() -> None:
    x, weight, g = draw(3, 7, 24), draw(20, 24, seed=1) * 0.02, draw(3, 7, 20, seed=2) * 1e-6
    qx, qw, qg = rounded(x, E4M3), rounded(weight, E4M3), rounded(g, E5M2)
    expected = qx @ qw.T, qg @ qw, torch.einsum("bto,bti->oi", qg, qx)
    agree(differentiated(x, weight, g), expected)
    assert ((qx - x).norm() / x.norm()).item() > 0.005, "nothing was rounded"


EXPERT_P = torch.tensor([0, 0, 0, 2, 2, 3, 3, 3, 3])
ENDS_E = torch.tensor([3, 3, 5, 9], dtype=torch.int32)
"""Of four experts the second has no row."""


def test_the_three_products_of_experts() -> None:
    x, g = draw(9, 16), draw(9, 12, seed=2)
    weight = draw(4, 12, 16, seed=1) * torch.tensor([1.0, 2.0, 0.1, 30.0])[:, None, None]
    qx, qg = rounded(x, E4M3), rounded(g, E5M2)
    qw = torch.stack([rounded(matrix, E4M3) for matrix in weight])
    expected = (
        torch.stack([qw[e] @ row for e, row in zip(EXPERT_P, qx, strict=True)]),
        torch.stack([row @ qw[e] for e, row in zip(EXPERT_P, qg, strict=True)]),
        torch.stack([qg[rows].T @ qx[rows] for rows in torch.arange(4)[:, None] == EXPERT_P]),
    )
    agree(differentiated(x, weight, g, expert=EXPERT_P, ends=ENDS_E), expected)


@pytest.mark.parametrize("shared", [True, False])
def test_every_expert_on_every_row(shared: bool) -> None:
    """Rows that all experts read, and rows of each expert's own."""
    x, g, weight = draw(*([] if shared else [4]), 6, 16), draw(4, 6, 12, seed=2), draw(4, 12, 16, seed=1)
    qx, qg = rounded(x, E4M3), rounded(g, E5M2)
    qw = torch.stack([rounded(matrix, E4M3) for matrix in weight])
    dx = torch.einsum("eno,eoi->eni", qg, qw)
    dw = torch.einsum("eno,ni->eoi" if shared else "eno,eni->eoi", qg, qx)
    expected = torch.einsum("ni,eoi->eno" if shared else "eni,eoi->eno", qx, qw), dx.sum(0) if shared else dx, dw
    agree(differentiated(x, weight, g, expert=torch.arange(4)[:, None], ends=None), expected)


def test_numbers_that_float8_has_pass_unchanged() -> None:
    """Straight-through: output and gradients are the fp32 map's, bit by bit."""
    generator = torch.Generator().manual_seed(0)

    def pick(*size: int, numbers: list[float]) -> Tensor:
        picked = torch.tensor(numbers)[torch.randint(len(numbers), size, generator=generator)]
        picked.view(-1)[0] = numbers[-1]
        return picked

    x, weight = (pick(*size, numbers=[0, 1, -1, 2.5, -0.5, 448]) for size in ((30, 16), (8, 16)))
    g = pick(30, 8, numbers=[0, 1024, -2560, 57344])
    a, b = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = F.linear(a, b)
    expected = y.detach(), *torch.autograd.grad(y, (a, b), g)
    for one, other in zip(differentiated(x, weight, g), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_stays_visible(bad: float) -> None:
    x, weight, g = draw(5, 16), draw(8, 16, seed=1), draw(5, 8, seed=2)
    for place in range(3):
        tensors = [x.clone(), weight.clone(), g.clone()]
        tensors[place].view(-1)[3] = bad
        y, dx, dw = differentiated(*tensors)
        assert y.isfinite().all() == (place == 2)
        assert not (dx.isfinite().any() and place in (1, 2))
        assert not (dw.isfinite().any() and place in (0, 2))
    many = x.clone()
    many[0, 0] = bad
    y = float8_experts(many, weight[None], torch.zeros(5, dtype=torch.int64), torch.tensor([5], dtype=torch.int32))
    assert not y.isfinite().any()


def test_codes_are_multiplied_in_autocasts_type() -> None:
    """They are exact in bfloat16, so that only what leaves the product is rounded to it."""
    x, weight, g = draw(40, 64), draw(48, 64, seed=1), draw(40, 48, seed=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, dx, dw = differentiated(x, weight, g.bfloat16())
    assert (y.dtype, dx.dtype, dw.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    exact = differentiated(x, weight, g.bfloat16().float())
    for one, other in zip((y, dx, dw), exact, strict=True):
        # Rounded to bfloat16 before the scales, and the output once more after them.
        torch.testing.assert_close(one.float(), other, rtol=2.0**-7, atol=1e-4 * other.abs().max().item())


def gradients(model: GPT, *, autocast: bool = True) -> dict[str, Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else contextlib.nullcontext():
        objective = model.objective(tokens())
    objective.total.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": objective.total.detach(), **found}


@pytest.mark.parametrize("moe", [False, True])
def test_only_the_blocks_maps_are_rounded(moe: bool) -> None:
    """Embedding, head and router compute what they did; without rounding all is as before, bit by bit."""
    model = tiny_gpt("prenorm", "llama2", moe=moe)
    before = gradients(model, autocast=False)
    prepare_blocks(model, "none", compiled=False, float8=True)
    maps = {name for name, module in model.named_modules() if getattr(module, "float8", False)}
    branch = ("ffn.routed.", "ffn.shared.") if moe else ("ffn.",)
    roles = [*(f"attn.{role}" for role in "qkvo"), *(f"{b}{role}" for b in branch for role in ("gate", "up", "down"))]
    assert maps == {f"blocks.{layer}.{role}" for layer in range(2) for role in roles}
    assert sum(isinstance(m, Projection | ExpertProjection) for m in model.modules()) == len(maps) + 1, "the head"

    seen: dict[str, tuple[Tensor, Any]] = {}

    def watch(name: str, module: nn.Module) -> None:
        module.register_forward_hook(lambda _, args, y: seen.update({name: (args[0], y)}))

    watch("embed", model.embed)
    watch("head", model.head)
    watch("q", model.blocks[0].attn.q)
    if moe:
        watch("router", model.blocks[0].ffn.router)
    after = gradients(model, autocast=False)
    assert torch.equal(seen["embed"][1], F.embedding(seen["embed"][0], model.embed.weight))
    assert torch.equal(seen["head"][1], F.linear(seen["head"][0], model.head.weight))
    assert not torch.equal(seen["q"][1], F.linear(seen["q"][0], model.blocks[0].attn.q.weight))
    if moe:
        x_ND, choice = seen["router"]
        assert torch.equal(choice.logits_NE, F.linear(x_ND, model.blocks[0].ffn.router.weight))
    assert all(not torch.equal(after[name], value) for name, value in before.items())

    prepare_blocks(model, "none", compiled=False)
    for name, value in gradients(model, autocast=False).items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputing_gives_the_same_gradients(recompute: Literal["selective", "full"], moe: bool) -> None:
    model = tiny_gpt("simplenorm", "llama2", moe=moe)
    prepare_blocks(model, "none", compiled=False, float8=True)
    expected = gradients(model)
    prepare_blocks(model, recompute, compiled=False, float8=True)
    for name, value in gradients(model).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_compiled_blocks(recompute: Literal["none", "selective", "full"]) -> None:
    """In whole graphs, one for all blocks."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = tiny_gpt("simplenorm", "llama3", n_layers=4)
    prepare_blocks(model, "none", compiled=False, float8=True)
    expected = gradients(model)
    prepare_blocks(model, recompute, compiled=True, float8=True, backend="aot_eager", fullgraph=True)
    for name, value in gradients(model).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-6, msg=name)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_compiled_experts() -> None:
    torch._dynamo.reset()
    model = tiny_gpt("prenorm", "llama2", moe=True)
    exact = gradients(model, autocast=False)["loss"]
    prepare_blocks(model, "none", compiled=True, float8=True, backend="aot_eager", fullgraph=True)
    assert gradients(model)["loss"].item() == pytest.approx(exact.item(), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_inductor_rounds_alike(kind: torch.dtype) -> None:
    """Codes that go on to a product in the same kernel are rounded all the same; what is not finite stays so."""
    torch._dynamo.reset()

    def decoded(x: Tensor) -> tuple[Tensor, Tensor]:
        codes, scale = encode(x, kind)
        return codes.to(torch.bfloat16), scale

    compiled = torch.compile(decoded, fullgraph=True)
    x = draw(4096, spread=3.0)
    for got, expected in zip(compiled(x), decoded(x), strict=True):
        assert torch.equal(got, expected)
    x[5] = math.inf
    codes, scale = compiled(x)
    assert not (codes.float() * scale).isfinite().any()
