"""Step time and memory of each strategy relative to one of them, eager and compiled.

    python benchmarks/step_time.py RECIPE --relative-to NAME [--strategies a,b,c] [--rounds N] [KEY=VALUE ...]

All models live in one process and take turns, step by step, so that a slow minute of the machine
hits them alike; a ratio is the median over rounds of this round's time over the reference's, with
its quartiles. A step is forward, backward, clipping, AdamW and the strategy's own after_step, on
random tokens, at the recipe's batch size divided by `train.accumulate` (one micro-batch), compiled as the trainer does,
block by block.

Memory: `saved` is what autograd keeps of the forward pass for the backward pass (eager, storages
counted once, weights left out); `peak` is the GPU's peak during a step less what the other models
hold.

The result goes to benchmarks/results/, with device, versions and commit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptnorm.config import Config
from gptnorm.environment import describe_environment
from gptnorm.errors import UserError
from gptnorm.model import GPT, build_gpt
from gptnorm.recipe import load_recipe
from gptnorm.strategies import STRATEGIES, find_strategy
from gptnorm.train.blocks import prepare_blocks
from gptnorm.train.inputs import resolve_device
from gptnorm.train.optim import build_optimizer

RESULTS = Path(__file__).parent / "results"
WARM_UP = 3
"""Steps before the first that is timed; the first compiled one takes a quarter of a minute to minutes."""


class Runner:
    """One strategy's model, ready to take steps."""

    def __init__(self, config: Config, device: torch.device, tokens: Tensor, vocab: int, compiled: bool) -> None:
        self.config, self.device, self.tokens = config, device, tokens
        self.model: GPT = build_gpt(config, vocab=vocab, device=device)
        prepare_blocks(self.model, "none", compiled=compiled, float8=config.train.precision == "fp8")
        self.optimizer = build_optimizer(self.model, config.optim)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.config.train.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def step(self) -> None:
        self.optimizer.zero_grad()
        with self.autocast():
            total = self.model.objective(self.tokens).total
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip or float("inf"))
        self.optimizer.step()
        self.model.after_step()

    def timed_step(self) -> float:
        """Seconds of one step, the device's work included."""
        synchronize(self.device)
        start = time.perf_counter()
        self.step()
        synchronize(self.device)
        return time.perf_counter() - start

    def saved_bytes(self) -> int:
        """Bytes that autograd keeps for the backward pass, beside the weights."""
        weights = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), self.autocast():
            self.model.objective(self.tokens)
        return sum(storages.values())

    def peak_bytes(self) -> int | None:
        """Peak of GPU memory during a step, without what was allocated before by others."""
        if self.device.type != "cuda":
            return None
        own = 4 * 3 * sum(p.numel() for p in self.model.parameters())  # weights and Adam's two moments
        self.optimizer.zero_grad()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated() - own
        torch.cuda.reset_peak_memory_stats()
        self.step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(names: list[str], arguments: argparse.Namespace, compiled: bool) -> list[dict[str, Any]]:
    """One row per strategy, in the order of `names`."""
    recipe = load_recipe(arguments.recipe)
    configs = {name: recipe.resolve(arguments.settings, strategy=name) for name in names}
    train = configs[names[0]].train
    if train.threads:
        torch.set_num_threads(train.threads)
    device = resolve_device(train.device)
    vocab = configs[names[0]].model.vocab_size or 257
    batch = train.batch_size // train.accumulate
    tokens = torch.randint(0, vocab, (batch, train.seq_len + 1), generator=torch.Generator().manual_seed(0)).to(device)
    runners = {name: Runner(config, device, tokens, vocab, compiled) for name, config in configs.items()}
    for name, runner in runners.items():
        print(f"  warming up {name} ({'compiled' if compiled else 'eager'})", file=sys.stderr)
        for _ in range(WARM_UP):
            runner.step()
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(arguments.rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(runners[name].timed_step())
    rows = []
    for name, runner in runners.items():
        ratios = [a / b for a, b in zip(times[name], times[arguments.relative_to], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                "strategy": name,
                "mode": "compiled" if compiled else "eager",
                "parameters": sum(p.numel() for p in runner.model.parameters()),
                "median_ms": round(1e3 * statistics.median(times[name]), 3),
                "ratio": round(middle, 4),
                "ratio_quartiles": [round(low, 4), round(high, 4)],
                "saved_MiB": None if compiled else round(runner.saved_bytes() / 2**20, 2),
                "peak_MiB": None if (peak := runner.peak_bytes()) is None else round(peak / 2**20, 1),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipe")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--relative-to", required=True, metavar="NAME")
    parser.add_argument("--strategies", default=",".join(STRATEGIES), help="comma-separated; default: all")
    parser.add_argument("--rounds", type=int, default=30, help="timed steps of each strategy")
    parser.add_argument("--modes", default="eager,compiled", help="eager, compiled, or both")
    arguments = parser.parse_intermixed_args()
    names = list(dict.fromkeys([arguments.relative_to, *arguments.strategies.split(",")]))
    for name in names:
        find_strategy(name)
    if arguments.rounds < 2:
        raise UserError("--rounds: at least 2")

    config = load_recipe(arguments.recipe).resolve(arguments.settings, strategy=names[0])
    device = resolve_device(config.train.device)
    environment = describe_environment(device)
    rows = [row for mode in arguments.modes.split(",") for row in measure(names, arguments, mode == "compiled")]

    print(
        f"\n{'strategy':16} {'mode':9} {'ms/step':>9} {'ratio':>7} {'quartiles':>15} {'saved MiB':>10} {'peak MiB':>9}"
    )
    for row in rows:
        quartiles = "{:.3f} - {:.3f}".format(*row["ratio_quartiles"])
        print(
            f"{row['strategy']:16} {row['mode']:9} {row['median_ms']:9.2f} {row['ratio']:7.3f} {quartiles:>15}"
            f" {row['saved_MiB'] or '':>10} {row['peak_MiB'] or '':>9}"
        )
    record = {
        "benchmark": "step_time",
        "command": shlex.join(["python", "benchmarks/step_time.py", *sys.argv[1:]]),
        "relative_to": arguments.relative_to,
        "rounds": arguments.rounds,
        "precision": config.train.precision,
        "environment": environment,
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    stem = re.sub(r"[^a-z0-9]+", "-", f"step-time-{arguments.recipe}-{environment['device']}".lower()).strip("-")
    path = RESULTS / f"{stem}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"step_time: {error}")
