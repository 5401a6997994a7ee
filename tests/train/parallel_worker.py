"""One of several processes that compare parallel models with the dense one: torchrun starts it with a file of cases.

Every process computes the dense model, too; what is compared is written by the first one. Cases and results are JSON.

    torchrun --nproc-per-node 4 parallel_worker.py cases.json results.json
"""

from __future__ import annotations

import functools
import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gptnorm.config import Config, GaugeConfig, ModelConfig, MoEConfig, ParallelConfig, TrainConfig
from gptnorm.curvature.gauge import Gauge
from gptnorm.curvature.vectors import Space, SpreadSpace
from gptnorm.model import GPT, build_gpt
from gptnorm.norms import Norm, NormModule
from gptnorm.sharding import Sharers, as_spread, cut_over, enter, gather, here, leave, part_of, whole
from gptnorm.strategies import find_strategy
from gptnorm.strategies.registry import preset_options
from gptnorm.train import parallel
from gptnorm.train.blocks import prepare_blocks
from gptnorm.train.optim import build_optimizer
from gptnorm.train.parallel import World, clip_gradients, close_world, mean_over_data, open_world, parallelize

VOCAB, LENGTH, ROWS = 64, 16, 4


def make_config(case: dict[str, Any]) -> Config:
    options = preset_options(find_strategy(case["strategy"])())
    backbone = case.get("backbone", "llama3")
    sizes: dict[str, Any] = {"d_model": 32, "n_layers": 2, "n_heads": 4, "d_ff": 24 if "moe" in case else 80}
    if backbone == "llama3":
        sizes["n_kv_heads"] = 2
    return Config(
        model=ModelConfig(
            strategy=case["strategy"],
            backbone=backbone,
            **{**sizes, "vocab_size": VOCAB, **case.get("model", {})},
        ),
        strategy=case.get("own", {}),
        options=replace(options, **case.get("options", {})),
        moe=MoEConfig(**case.get("moe", {})),
        train=TrainConfig(**{"batch_size": ROWS, "seq_len": LENGTH, "device": "cpu", **case.get("train", {})}),
        parallel=ParallelConfig(data=case["data"], tensor=case["tensor"], **case.get("parallel", {})),
    )


def dense_model(config: Config, dtype: torch.dtype) -> GPT:
    model = build_gpt(config, vocab=VOCAB).to(dtype)
    model.init_weights(config.seed)
    return model


def spread_model(config: Config, world: World, dtype: torch.dtype, *, meta: bool = True) -> GPT:
    if not meta:
        model = dense_model(config, dtype)
        parallelize(model, world, config)
        return model
    model = build_gpt(config, vocab=VOCAB, device="meta").to(dtype)
    parallelize(model, world, config)
    model.to_empty(device=world.device)
    model.init_weights(config.seed)
    return model


def text(rows: int, length: int, seed: int = 0) -> Tensor:
    """Sequences in which most tokens follow from the one before: something to learn."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB - 4, (rows, length + 1), generator=generator)
    for i in range(1, length + 1):
        surprise = torch.rand(rows, generator=generator) < 0.2
        tokens[:, i] = torch.where(surprise, tokens[:, i], (5 * tokens[:, i - 1] + 7) % (VOCAB - 4))
    return tokens


def own_rows(tokens: Tensor, world: World) -> Tensor:
    return tokens.chunk(world.data_size)[world.data_rank]


@torch.no_grad()
def shake(dense: GPT, spread: GPT) -> None:
    """Moves every gain and scale off its initial value, the same in both."""
    generator = torch.Generator().manual_seed(7)
    for (name, p), q in zip(dense.named_parameters(), spread.parameters(), strict=True):
        if not name.endswith("weight"):
            p.mul_(1 + 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
            here(q).copy_(part_of(p, like=q))


def adamw(model: GPT, lr: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


class Worst:
    """The largest of each kind of difference, with the name of the tensor."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[float, str]] = {}

    def see(self, kind: str, difference: float, name: str = "") -> None:
        if kind not in self.found or not difference <= self.found[kind][0]:
            self.found[kind] = (difference, name)

    def relative(self, kind: str, got: Tensor, expected: Tensor, name: str = "") -> None:
        scale = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
        self.see(kind, ((got - expected).abs().max() / scale).item(), name)


def steps(case: dict[str, Any], world: World) -> dict[str, Any]:
    """A few updates of both models in fp64: weights at the start, losses, gradients, norms, weights and buffers."""
    config, dtype = make_config(case), torch.float64
    # Recomputing and compiling are the parallel model's alone.
    plain = replace(config, train=replace(config.train, recompute="none", compile=False))
    dense, spread = dense_model(plain, dtype), spread_model(config, world, dtype, meta=not case.get("built", False))
    weights = dict(dense.named_parameters())
    assert list(weights) == [name for name, _ in spread.named_parameters()]
    assert all(as_spread(p.data) is not None for p in spread.parameters())
    different = [n for n, q in spread.named_parameters() if not torch.equal(whole(q.detach()), weights[n].detach())]
    buffers = dict(dense.named_buffers())
    # Constants that are still to be measured are no numbers, which equal nothing.
    different += [n for n, b in spread.named_buffers() if not torch.equal(b.nan_to_num(), buffers[n].nan_to_num())]
    shake(dense, spread)
    optimizers = adamw(dense, 1e-3), adamw(spread, 1e-3)
    tokens = text(ROWS, LENGTH - 1)
    worst = Worst()
    dense.calibrate(tokens)
    spread.calibrate(own_rows(tokens, world))
    for _ in range(3):
        expected, got = dense.objective(tokens), spread.objective(own_rows(tokens, world))
        expected.total.backward()
        got.total.backward()
        for kind in ("total", "loss"):
            mean = mean_over_data(getattr(got, kind).detach(), world)
            worst.relative("loss", mean, getattr(expected, kind).detach(), kind)
        for (name, p), q in zip(dense.named_parameters(), spread.parameters(), strict=True):
            assert p.grad is not None, name
            assert q.grad is not None, name
            worst.relative("gradient", whole(q.grad), p.grad, name)
        norm = torch.nn.utils.clip_grad_norm_(dense.parameters(), 0.1)
        assert norm > 0.1
        worst.relative("norm", clip_gradients(spread, 0.1, world), norm)
        for model, optimizer in zip((dense, spread), optimizers, strict=True):
            optimizer.step()
            model.after_step()
            optimizer.zero_grad()
        for (name, p), q in zip(dense.named_parameters(), spread.parameters(), strict=True):
            worst.relative("weight", whole(q.detach()), p.detach(), name)
        for name, b in spread.named_buffers():
            worst.relative("buffer", b, buffers[name], name)
        _see_constraints(spread, worst)
    _see_copies(spread, world, worst)
    for norm in spread.frozen_norms():
        constants = [torch.empty_like(norm.factor) for _ in range(world.size)]
        dist.all_gather(constants, norm.factor)
        worst.see("copies", 0.0 if all(torch.equal(norm.factor, other) for other in constants) else 1.0, "factor")
    with torch.no_grad():
        worst.relative("loss", mean_over_data(spread.eval().loss(own_rows(tokens, world)), world), dense.loss(tokens))
        worst.relative("features", spread.features(own_rows(tokens, world)), dense.features(own_rows(tokens, world)))
    # Nothing is left gathered that a checkpoint would then find.
    assert all(as_spread(p.data) is not None for p in spread.parameters())
    return {"different at the start": different, **worst.found}


def _see_constraints(model: GPT, worst: Worst) -> None:
    for name, owner in model.weights():
        if owner.constraint is not None and owner.constraint.kind != "penalty":
            excess = torch.linalg.vector_norm(whole(owner.weight.detach()), dim=owner.constraint.axis) - 1
            kind = owner.constraint.kind
            worst.see("constraint", (excess.abs() if kind == "unit" else excess).max().item(), name)


def _see_copies(model: GPT, world: World, worst: Worst) -> None:
    """Whatever several processes hold of a parameter is the same there, bit by bit."""
    assert world.mesh is not None
    for name, p in model.named_parameters():
        for axis in {"tensor"} - set(cut_over(p)) if world.tensor_size > 1 else ():
            part = here(p.detach()).contiguous()
            parts = [torch.empty_like(part) for _ in range(world.tensor_size)]
            dist.all_gather(parts, part, group=world.mesh.get_group(axis))
            worst.see("copies", 0.0 if all(torch.equal(part, other) for other in parts) else 1.0, name)


def training(case: dict[str, Any], world: World) -> dict[str, Any]:
    """Fifty updates in fp32, as a run makes them; the losses of both models."""
    config = make_config(case)
    models = dense_model(config, torch.float32), spread_model(config, world, torch.float32)
    losses: list[list[float]] = [[], []]
    optimizers = [adamw(model, 4e-3) for model in models]
    for step in range(50):
        tokens = text(ROWS, LENGTH - 1, seed=step)
        for number, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            objective = model.objective(own_rows(tokens, world) if number else tokens)
            objective.total.backward()
            if number:
                clip_gradients(model, 1.0, world)
            else:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            model.after_step()
            optimizer.zero_grad()
            loss = objective.loss.detach()
            losses[number].append((mean_over_data(loss, world) if number else loss).item())
    worst = Worst()
    _see_copies(models[1], world, worst)
    return {"dense": losses[0], "spread": losses[1], **worst.found}


def dropping(case: dict[str, Any], world: World) -> dict[str, Any]:
    """Processes that share features drop the same ones; those that do not share data follow the dense model."""
    config, dtype = make_config(case), torch.float64
    dense, spread = dense_model(config, dtype), spread_model(config, world, dtype)
    tokens = text(ROWS, LENGTH - 1)
    worst = Worst()
    for model in (dense, spread):
        torch.manual_seed(3)
        model.objective(tokens).total.backward()
    for (name, p), q in zip(dense.named_parameters(), spread.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        worst.relative("gradient", whole(q.grad), p.grad, name)
    return {**worst.found}


def low_precision(case: dict[str, Any], world: World) -> dict[str, Any]:
    """bf16 weights where they are used, fp32 where they are kept and where gradients are added."""
    config = make_config(case)
    dense, spread = dense_model(config, torch.float32), spread_model(config, world, torch.float32)
    tokens = text(ROWS, LENGTH - 1)
    worst = Worst()
    seen = []
    spread.blocks[0].attn.q.register_forward_hook(lambda module, args, y: seen.append(str(y.dtype)))
    losses = []
    for model, batch in ((dense, tokens), (spread, own_rows(tokens, world))):
        objective = model.objective(batch)
        objective.total.backward()
        losses.append(mean_over_data(objective.loss.detach(), world).item())
    kept = {str(t.dtype) for p in spread.parameters() for t in (p, p.grad) if t is not None}
    norms = [torch.nn.utils.get_total_norm([p.grad for p in dense.parameters() if p.grad is not None]).item()]
    if world.tensor_size == 1:
        _see_reduction(config, spread, own_rows(tokens, world), world, worst)
    norms.append(clip_gradients(spread, 1e9, world).item())
    return {"used": seen, "kept": sorted(kept), "losses": losses, "norms": norms, **worst.found}


def _see_reduction(config: Config, spread: GPT, tokens: Tensor, world: World, worst: Worst) -> None:
    """The gradients against the fp32 mean of what each process has alone, in bf16; and what a bf16 mean would be."""
    alone = dense_model(config, torch.float32)
    for p in alone.parameters():
        p.data = p.data.bfloat16()
    alone.objective(tokens).total.backward()
    for (name, p), q in zip(alone.named_parameters(), spread.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert p.grad.dtype == torch.bfloat16
        parts = [torch.empty_like(p.grad) for _ in range(world.size)]
        dist.all_gather(parts, p.grad)
        mean = torch.stack(parts).float().mean(0)
        worst.relative("reduced", whole(q.grad), mean, name)
        worst.relative("reduced in bf16", torch.stack(parts).sum(0).div(world.size).float(), mean, name)


def float8(case: dict[str, Any], world: World) -> dict[str, Any]:
    """Each process rounds whole weights and its own rows: the gradients are the mean of what each has alone."""
    config = make_config(case)
    alone, spread = dense_model(config, torch.float32), spread_model(config, world, torch.float32)
    prepare_blocks(alone, "none", compiled=False, float8=True)
    for model in (alone, spread):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            objective = model.objective(own_rows(text(ROWS, LENGTH - 1), world))
        objective.total.backward()
    worst = Worst()
    for (name, p), q in zip(alone.named_parameters(), spread.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        parts = [torch.empty_like(p.grad) for _ in range(world.size)]
        dist.all_gather(parts, p.grad)
        worst.relative("gradient", whole(q.grad), torch.stack(parts).mean(0), name)
    return {**worst.found}


def maps(case: dict[str, Any], world: World) -> dict[str, Any]:
    """First and second derivatives through the maps between whole and part, a norm's statistics among them."""
    assert world.mesh is not None
    sharers = Sharers.along(world.mesh["tensor"])
    generator = torch.Generator().manual_seed(0)
    x, v, w_in, w_out = (torch.randn(6, 6, generator=generator, dtype=torch.float64) for _ in range(4))
    worst = Worst()
    for kind in ("rmsnorm", "layernorm", "l2"):
        norm = Norm(kind=kind, size=6, eps=1e-5).build().double()
        own = slice(sharers.rank * 3, sharers.rank * 3 + 3)
        part = Norm(kind=kind, size=6, eps=1e-5).build().double()
        part.sharers = sharers
        part.gain = None

        def dense(x: Tensor, norm: NormModule = norm) -> Tensor:
            return torch.tanh(norm(x @ w_in) @ w_out) + torch.sin(x @ w_in)

        def spread(x: Tensor, part: NormModule = part, own: slice = own) -> Tensor:
            z = enter(x, sharers) @ w_in[:, own]
            return torch.tanh(leave(part(z) @ w_out[own], sharers)) + gather(torch.sin(z), sharers)

        expected, got = (_two_derivatives(function, x, v) for function in (dense, spread))
        for number, (a, b) in enumerate(zip(got, expected, strict=True)):
            worst.relative(f"derivative {number}", a, b, kind)
    return {**worst.found}


def _two_derivatives(function: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = function(x)
    (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((first * v).sum(), x)
    return [y.detach(), first.detach(), second]


def gauge(case: dict[str, Any], world: World) -> dict[str, Any]:
    """The gauge on the spread model, by differences, and on the dense one, by differentiating twice; both in fp64."""
    config, dtype = make_config(case), torch.float64
    config = replace(config, gauge=GaugeConfig(every=1, tolerance=1e-6, most=100))
    dense, spread = dense_model(config, dtype), spread_model(config, world, dtype)
    shake(dense, spread)
    tokens = text(ROWS, LENGTH - 1)
    own = own_rows(tokens, world)
    models = ((dense, tokens, None), (spread, own, world.mesh))
    readings, worst = [], Worst()
    for model, rows, mesh in models:
        optimizers = build_optimizer(model, config.optim)
        for _ in range(2):
            optimizers.zero_grad()
            model.calibrate(rows)
            model.objective(rows).total.backward()
            before = [(p.detach().clone(), None if p.grad is None else p.grad.clone()) for p in model.parameters()]
            readings.append(Gauge(model, optimizers, config, mesh).read(rows, 1e-3))
            for (name, p), (weight, gradient) in zip(model.named_parameters(), before, strict=True):
                assert p.grad is not None, name
                assert gradient is not None, name
                same = torch.equal(here(p.detach()), here(weight)) and torch.equal(here(p.grad), here(gradient))
                worst.see("left alone", 0.0 if same else 1.0, name)
            optimizers.set_lr(1e-3)
            optimizers.step()
    assert world.mesh is not None
    spaces = Space(list(dense.parameters())), SpreadSpace(list(spread.parameters()), world.mesh)
    v, w = (space.draw(torch.Generator().manual_seed(5)) for space in spaces)
    for (name, p), a, b in zip(spread.named_parameters(), spaces[0].split(v), spaces[1].split(w), strict=True):
        worst.relative("drawn", b, part_of(a, like=p.detach()), name) if b.numel() else None
    worst.relative("norm", spaces[1].norm(w), v.norm())
    worst.relative("norms", spaces[1].norms(w), spaces[0].norms(v))
    worst.relative("inner", spaces[1].inner(torch.stack((w, w.abs())), w), torch.stack((v @ v, v.abs() @ v)))
    assert spaces[1].dimension == spaces[0].dimension
    return {"dense": readings[:2], "spread": readings[2:], **worst.found}


CHECKS = {check.__name__: check for check in (steps, training, dropping, low_precision, float8, maps, gauge)}


def main(cases: Path, results: Path) -> None:
    torch.set_num_threads(1)
    # One compiler that is quick; what it is given is the same.
    parallel.prepare_blocks = functools.partial(parallel.prepare_blocks, backend="aot_eager")
    found: dict[str, Any] = {}
    world = None
    for name, case in json.loads(cases.read_text()).items():
        world = open_world(make_config(case))
        torch._dynamo.reset()
        try:
            found[name] = CHECKS[case["check"]](case, world)
        except Exception:
            found[name] = {"error": traceback.format_exc()}
        if world.main:
            results.write_text(json.dumps(found))
    if world is not None:
        close_world(world)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
