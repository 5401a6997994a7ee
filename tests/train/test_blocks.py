"""What a block keeps for its backward pass and whether it is compiled changes neither losses nor gradients."""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from cases import tiny_gpt, tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gptnorm.config import MoEConfig
from gptnorm.model import GPT
from gptnorm.model.router import frozen_routing
from gptnorm.strategies import STRATEGIES
from gptnorm.train.blocks import prepare_blocks
from gptnorm.train.nonfinite import first_nonfinite


def gradients(model: GPT, seed: int = 3) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(seed)
    objective = model.objective(tokens())
    objective.total.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": objective.total.detach(), **found}


def build(strategy: str = "simplenorm", **changes: Any) -> GPT:
    return tiny_gpt(strategy, "llama3", **changes)


class Counted(TorchDispatchMode):
    """How often each operation ran."""

    def __init__(self) -> None:
        super().__init__()
        self.times: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.times[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("strategy", ["simplenorm", "residual_dual"])
def test_recomputing_gives_the_same_gradients(
    recompute: Literal["selective", "full"], dropout: float, strategy: str
) -> None:
    """Bit by bit, whatever was dropped: the same operations on the same numbers."""
    model = build(strategy, dropout=dropout)
    expected = gradients(model)
    prepare_blocks(model, recompute, compiled=False)
    for name, value in gradients(model).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputing_with_counters(recompute: Literal["selective", "full"]) -> None:
    """QK-clip and bias balancing see the same largest logits and the same order of loads."""
    moe = MoEConfig(experts=4, top_k=2, shared=1, balance="bias")
    models = [tiny_gpt("prenorm", "llama3", options={"qk_clip": 1e-3}, moe=moe) for _ in range(2)]
    prepare_blocks(models[1], recompute, compiled=False)
    for model in models:
        gradients(model)
        model.after_step()
    for (name, a), b in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_what_is_computed_again() -> None:
    """Full: every map of the blocks. Selective: activations and norms, but no matrix product and no attention."""
    times = {}
    for recompute in ("none", "selective", "full"):
        model = build(n_layers=3)
        prepare_blocks(model, recompute, compiled=False)
        with Counted() as counted:
            gradients(model)
        times[recompute] = counted.times
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    assert [times[r][attention] for r in ("none", "selective", "full")] == [3, 3, 6]
    # Seven maps a block and the head, each once forward and twice backward.
    assert [times[r]["mm"] for r in ("none", "selective", "full")] == [66, 66, 66 + 21]
    assert [times[r]["silu"] for r in ("none", "selective", "full")] == [3, 6, 6]


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_compiled_blocks(recompute: Literal["none", "selective", "full"]) -> None:
    """Names stay, losses and gradients agree, and blocks of one equation are compiled once."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = build(n_layers=12)
    expected, names = gradients(model), list(model.state_dict())
    prepare_blocks(model, recompute, compiled=True, backend="aot_eager", fullgraph=True)
    assert list(model.state_dict()) == names
    for name, value in gradients(model).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    # One for the blocks, one for the loss.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


COMPILED_EXPERTS = [
    pytest.param(
        name, backend, marks=[pytest.mark.slow] if backend == "inductor" or name not in ("simplenorm", "ngpt") else []
    )
    for name in STRATEGIES
    for backend in ("aot_eager", "inductor")
]


@pytest.mark.parametrize(("strategy", "backend"), COMPILED_EXPERTS)
def test_compiled_experts_under_autocast(strategy: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a bf16 run compiles, grouped products included: no farther from fp32 than twice what eager bf16 is."""
    torch._dynamo.reset()
    model = tiny_gpt(strategy, "llama2", moe=True)
    calls, real = [], F.grouped_mm
    with frozen_routing(model):  # a choice that tips over is no rounding
        exact = gradients(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            eager = gradients(model)
            prepare_blocks(model, "none", compiled=True, backend=backend, fullgraph=True)
            monkeypatch.setattr(F, "grouped_mm", lambda *a, **k: calls.append(0) or real(*a, **k))
            compiled = gradients(model)
    assert calls

    def worst(found: dict[str, Tensor]) -> float:
        """The largest error of any gradient, relative to its largest entry; one scalar's may be small by luck."""
        return max(float((found[name] - value).abs().max() / value.abs().max()) for name, value in exact.items())

    assert 0 < worst(eager) < 0.1
    assert worst(compiled) <= 2 * worst(eager)


def test_what_hooks_look_for_is_found_in_compiled_blocks() -> None:
    torch._dynamo.reset()
    model = build(n_layers=1)
    prepare_blocks(model, "none", compiled=True, backend="aot_eager")
    model.objective(tokens()).total.backward()

    def spoil(module: object, args: object, y: Tensor) -> Tensor:
        return y * float("inf")

    handle = model.blocks[0].ffn.up.register_forward_hook(spoil)
    assert first_nonfinite(model, lambda: model.objective(tokens()).total) == "output of blocks.0.ffn.up"
    handle.remove()


def test_every_model_of_a_process_is_compiled() -> None:
    """Models of one block share what the compiler keeps for it, and beyond a limit it would compile no more."""
    torch._dynamo.reset()
    ran: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        def run(*args: Any) -> Any:
            ran.append(strategy)
            return graph.forward(*args)

        return run

    for strategy in STRATEGIES:
        model = tiny_gpt(strategy, "llama2", n_layers=1)
        prepare_blocks(model, "none", compiled=True, backend=backend)
        with torch.no_grad():
            model.loss(tokens())
        assert strategy in ran, "its block ran uncompiled"
    torch._dynamo.reset()
