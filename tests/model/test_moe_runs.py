"""The mixture of experts differentiated, compiled, deferred, checkpointed, trained, and on a GPU."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from cases import tiny_gpt, tokens
from model.test_moe import branch, inputs
from saving import load, save

from gptnorm.cli import runs
from gptnorm.config import MoEConfig, OptimConfig
from gptnorm.data import prepare
from gptnorm.model.moe import frozen_routing, reference_experts
from gptnorm.recipe import load_recipe
from gptnorm.train.optim import build_optimizer
from gptnorm.train.run import resume_run, start_run


def test_second_derivatives_of_the_grouped_path() -> None:
    """fp32 by grouped products against fp64 by the reference."""
    products = []
    for dtype in (torch.float32, torch.float64):
        ffn, x = branch("simplenorm", shared=1).to(dtype), inputs(20, 32).to(dtype)
        parameters = list(ffn.parameters())
        y, routing = ffn(x[None])
        gradient = torch.autograd.grad(y.square().mean() + routing.balance, parameters, create_graph=True)
        slope = sum((g * inputs(*g.shape).to(dtype)).sum() for g in gradient)
        products.append(torch.cat([h.flatten().double() for h in torch.autograd.grad(slope, parameters)]))
    assert ((products[0] - products[1]).norm() / products[1].norm()).item() < 1e-5


def test_forward_mode_on_the_reference_path() -> None:
    ffn, x = branch("simplenorm", shared=1).double(), inputs(1, 20, 32).double()
    v = inputs(1, 20, 32, seed=3).double()
    with frozen_routing(ffn), reference_experts(ffn):
        _, slope = torch.func.jvp(lambda x: ffn(x)[0], (x,), (v,))
        difference = (ffn(x + 1e-6 * v)[0] - ffn(x - 1e-6 * v)[0]) / 2e-6
    torch.testing.assert_close(slope, difference, rtol=1e-6, atol=1e-6)


def test_frozen_routing() -> None:
    ffn, x = branch(), inputs(30, 32)
    before = ffn.router(x)
    with frozen_routing(ffn):
        ffn(x[None])
        with torch.no_grad():
            ffn.router.weight.neg_()
        during = ffn.router(x)
    after = ffn.router(x)
    assert torch.equal(before.expert_NK, during.expert_NK)
    assert torch.equal(during.probs_NE, after.probs_NE)
    assert not torch.equal(before.expert_NK, after.expert_NK)


def test_compiled_under_autocast() -> None:
    """Grouped products, the bias's buffers and autocast in one graph."""
    x, results = inputs(1, 40, 32), []
    for compiled in (False, True):
        torch._dynamo.reset()
        ffn = branch(shared=1, balance="bias", branch_gain="auto", gate="sigmoid")
        run = torch.compile(ffn, backend="aot_eager", fullgraph=True) if compiled else ffn
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, routing = run(x)
        (y.float().square().sum() + routing.balance + routing.z).backward()
        assert ffn.router.balancer is not None
        load = ffn.router.balancer.get_buffer("load").clone()
        assert load.sum() == 40 * 2
        ffn.router.balancer.after_step()
        bias = ffn.router.balancer.get_buffer("bias")
        results.append((y.detach(), load, bias, [p.grad for p in ffn.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=0.02, atol=0.02)


def bias_and_gain(seed: int) -> Any:
    config = MoEConfig(experts=4, shared=1, balance="bias", branch_gain="auto")
    return tiny_gpt("simplenorm", "llama2", moe=config, seed=seed)


def test_deferred_initialisation_sets_the_buffers() -> None:
    direct = bias_and_gain(3)
    with torch.device("meta"):
        deferred = bias_and_gain(9)
    deferred.to_empty(device="cpu")
    for tensor in (*deferred.parameters(), *deferred.buffers()):
        tensor.data.fill_(float("nan"))
    deferred.init_weights(3)
    assert direct.state_dict().keys() == deferred.state_dict().keys()
    assert len(list(direct.buffers())) == 2 * 3
    for name, tensor in direct.state_dict().items():
        assert torch.equal(tensor, deferred.state_dict()[name]), name


def test_checkpoint_keeps_bias_and_gain(tmp_path: Any) -> None:
    def trained(seed: int) -> Any:
        model = bias_and_gain(seed)
        optimizer = build_optimizer(model, OptimConfig())
        model.objective(tokens(seed=seed)).total.backward()
        optimizer.step()
        model.after_step()
        return model, optimizer

    model, optimizer = trained(0)
    path = save(tmp_path, 1, model, optimizer)
    other, other_optimizer = trained(1)
    load(path, other, other_optimizer)
    assert any(b.abs().sum() > 0 for name, b in model.named_buffers() if name.endswith("bias"))
    for (name, a), b in zip(model.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("balance", ["loss", "bias"])
def test_a_run_with_experts(recipe: Any, tmp_path: Any, balance: str) -> None:
    """Metrics in the run's folder, and the same losses after a resume."""
    asked = ["moe.experts=4", "moe.shared=1", f"moe.balance={balance}", "model.d_ff=16", "train.accumulate=2"]
    config = load_recipe(str(recipe)).resolve([*asked, "moe.bias_rate=0.1", "checkpoint.every=3", "checkpoint.keep=9"])
    result = start_run(config, prepare(config.data), tmp_path / "run")
    assert result.status == "finished"

    def lines() -> list[dict[str, Any]]:
        text = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8")
        return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in text.splitlines()]

    straight = lines()
    train = [line for line in straight if line["split"] == "train"]
    assert len(train) == 6
    for line in train:
        assert line["dropped"] == 0.0
        assert 0 <= line["router_load_min"] <= 1 <= line["router_load_max"] <= 4
        assert 0 < line["router_entropy"] <= math.log(4) + 1e-6
        assert line["router_balance"] > 0
        assert line["router_z"] > 0
    for checkpoint in (tmp_path / "run" / "checkpoints").glob("step-*6"):
        for file in checkpoint.iterdir():
            file.unlink()
        checkpoint.rmdir()
    resume_run(tmp_path / "run", prepare(config.data))
    assert lines() == straight


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ("train.compile=true", "4 times the work"),
        ("train.compile=true train.precision=bf16", None),
        ("train.compile=false", None),
        ("train.compile=true moe.experts=0", None),
    ],
)
def test_a_run_on_the_slow_path_says_so(recipe: Any, monkeypatch: Any, settings: str, word: str | None) -> None:
    """fp32 under the compiler: one line, before the first step."""
    config = load_recipe(str(recipe)).resolve(["moe.experts=8", *settings.split()])
    said: list[str] = []
    monkeypatch.setattr(runs, "say", said.append)
    runs.warn(config)
    assert len(said) == (word is not None)
    assert all(word is not None and word in line for line in said)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_products_on_a_gpu(dtype: torch.dtype) -> None:
    results = []
    for device in ("cpu", "cuda"):
        ffn, x = branch("simplenorm", shared=1, gate="sigmoid").to(device), inputs(3, 20, 32).to(device)
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            y, routing = ffn(x)
        (y.float().square().mean() + routing.balance).backward()
        results.append(
            (y.detach().cpu(), routing.load.cpu(), [p.grad.cpu() for p in ffn.parameters() if p.grad is not None])
        )
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(results[1], results[0], rtol=tolerance, atol=tolerance)
