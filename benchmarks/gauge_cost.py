"""What a reading of the curvature gauge costs, in training steps, and how near differences of gradients come.

    python benchmarks/gauge_cost.py RECIPE [--rounds N] [KEY=VALUE ...]

One model trains on the recipe's text. In a round it takes a step without a reading and one with each of these, which
comes first changing from round to round, so that a slow minute of the machine hits all alike:

- reading: as the settings have it;
- sharpness: without slots (`gauge.slots=["none"]`);
- differences: the same by differences of gradients (`gauge.products="differences"`).

The cost is the median over rounds of this round's step with a reading over its step without, less 1, with quartiles; as
more time of a run it is that over `gauge.every`. A step is forward, backward (in `train.accumulate` parts), clipping,
AdamW and after_step. `apart` is how far readings, and eigenvalues by differences that are iterated to 1e-4, are from
eigenvalues by differentiating twice that are, on the same weights: median and largest over rounds, relative. `peak` is
the GPU's peak of memory.

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
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gptnorm.config import NO_SLOTS, Config
from gptnorm.curvature.gauge import Gauge, Reading
from gptnorm.data import Sampler, Shards, prepare
from gptnorm.environment import describe_environment
from gptnorm.errors import UserError
from gptnorm.model import build_gpt
from gptnorm.recipe import load_recipe
from gptnorm.train.blocks import prepare_blocks
from gptnorm.train.inputs import autocast, resolve_device
from gptnorm.train.optim import build_optimizer

RESULTS = Path(__file__).parent / "results"
WARM_UP = 5
KINDS = ("unread", "reading", "sharpness", "differences")
PARTS = ("hessian_max", "adam_sharpness")
APART = ("reading", "differences")


class Runner:
    """A model that takes steps as the training loop does, with a reading or without."""

    def __init__(self, config: Config, shards: Shards, device: torch.device) -> None:
        train = config.train
        self.config, self.device, self.updates = config, device, 0
        self.sampler = Sampler(shards.train, train.batch_size, train.seq_len, config.seed)
        vocab = config.model.vocab_size or shards.vocab_size
        assert vocab is not None, "the recipe's text says its vocabulary"
        self.model = build_gpt(config, vocab=vocab, device=device)
        prepare_blocks(self.model, train.recompute, compiled=train.compile, float8=train.precision == "fp8")
        self.optimizer = build_optimizer(self.model, config.optim)
        bare = replace(config.gauge, slots=NO_SLOTS)
        exact = replace(bare, tolerance=1e-4, most=200)
        settings = {
            "reading": config.gauge,
            "sharpness": bare,
            "differences": replace(bare, products="differences"),
            "exact": exact,
            "exact differences": replace(exact, products="differences"),
        }
        self.gauges = {
            kind: Gauge(self.model, self.optimizer, replace(config, gauge=gauge)) for kind, gauge in settings.items()
        }

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return autocast(self.config, self.device)

    def step(self, kind: str) -> Reading:
        micros = torch.from_numpy(self.sampler.batch(self.updates)).to(self.device).chunk(self.config.train.accumulate)
        if self.updates == 0:
            with self.autocast():
                self.model.calibrate(micros[0])
        self.optimizer.zero_grad()
        for tokens in micros:
            with self.autocast():
                objective = self.model.objective(tokens)
            (objective.total / len(micros)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip or float("inf")).item()
        found = {}
        if kind != "unread":
            found = self.gauges[kind].read(micros[0][: self.config.gauge.sequences], self.config.optim.lr)
        self.optimizer.step()
        self.model.after_step()
        self.updates += 1
        return found

    def timed(self, kind: str) -> tuple[float, int | None, Reading]:
        """Seconds of one step, the device's work included, the GPU's peak of bytes, and the reading.

        On a CPU it is the process's processor time, which neighbours on the machine change less than the clock.
        """
        gpu = self.device.type == "cuda"
        if gpu:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        clock = time.perf_counter if gpu else time.process_time
        start = clock()
        found = self.step(kind)
        if gpu:
            torch.cuda.synchronize(self.device)
        return clock() - start, torch.cuda.max_memory_allocated(self.device) if gpu else None, found

    def apart(self) -> dict[str, dict[str, float]]:
        """How far from eigenvalues to 1e-4 are, on these weights, a reading, and such eigenvalues by differences."""
        tokens = torch.from_numpy(self.sampler.batch(self.updates)).to(self.device)[: self.config.gauge.sequences]
        self.optimizer.zero_grad()
        self.model.objective(tokens).total.backward()
        lr = self.config.optim.lr
        exact, *others = (self.gauges[kind].read(tokens, lr) for kind in ("exact", "sharpness", "exact differences"))
        return {
            name: {key: abs(other[key] / exact[key] - 1) for key in PARTS if key in exact and key in other}
            for name, other in zip(APART, others, strict=True)
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipe")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds of steps")
    arguments = parser.parse_intermixed_args()
    if arguments.rounds < 2:
        raise UserError("--rounds: at least 2")
    config = load_recipe(arguments.recipe).resolve(arguments.settings)
    if not config.gauge.every:
        config = replace(config, gauge=replace(config.gauge, every=50))
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    device = resolve_device(config.train.device)
    runner = Runner(config, prepare(config.data), device)
    for number in range(WARM_UP):
        runner.step(KINDS[number % len(KINDS)])
    found: dict[str, list[tuple[float, int | None]]] = {kind: [] for kind in KINDS}
    apart: dict[str, dict[str, list[float]]] = {name: {key: [] for key in PARTS} for name in APART}
    refused = 0
    for turn in range(arguments.rounds):
        for place in range(len(KINDS)):
            kind = KINDS[(turn + place) % len(KINDS)]
            seconds, peak, reading = runner.timed(kind)
            found[kind].append((seconds, peak))
            refused += "gauge_refused" in reading
        for name, values in runner.apart().items():
            for key, value in values.items():
                apart[name][key].append(value)
    every = config.gauge.every
    row = {
        "strategy": config.model.strategy,
        "parameters": sum(p.numel() for p in runner.model.parameters()),
        "mode": "compiled" if config.train.compile else "eager",
        "precision": config.train.precision,
        "sequences_per_step": config.train.batch_size,
        "seq_len": config.train.seq_len,
        "sequences": config.gauge.sequences,
        "slots": runner.gauges["reading"].slots,
        "every": every,
        "refused": refused,
        "step_ms": round(1e3 * statistics.median(seconds for seconds, _ in found["unread"]), 3),
        "steps": {kind: _cost(found[kind], found["unread"]) for kind in KINDS[1:]},
        "apart": {name: {key: _apart(values) for key, values in parts.items()} for name, parts in apart.items()},
        "peak_MiB": {
            kind: None if (peak := times[-1][1]) is None else round(peak / 2**20, 1) for kind, times in found.items()
        },
    }
    environment = describe_environment(device)
    record = {
        "benchmark": "gauge_cost",
        "command": shlex.join(["python", "benchmarks/gauge_cost.py", *sys.argv[1:]]),
        "rounds": arguments.rounds,
        "environment": environment,
        "row": row,
    }
    print(json.dumps(row, indent=1))
    for kind, cost in row["steps"].items():
        low, high = cost["quartiles"]
        share = cost["median"] / every
        print(f"{kind}: {cost['median']} steps [{low}, {high}], {share:.1%} more time at gauge.every = {every}")
    RESULTS.mkdir(exist_ok=True)
    stem = f"gauge-cost-{arguments.recipe}-{row['mode']}-{environment['device']}"
    path = RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', stem.lower()).strip('-')}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(f"written to {path}")


def _apart(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"median": float(f"{statistics.median(values):.2g}"), "largest": float(f"{max(values):.2g}")}


def _cost(read: list[tuple[float, int | None]], unread: list[tuple[float, int | None]]) -> dict[str, Any]:
    """Of a reading, in steps."""
    steps = [a[0] / b[0] - 1 for a, b in zip(read, unread, strict=True)]
    low, middle, high = statistics.quantiles(steps, n=4)
    return {"median": round(middle, 2), "quartiles": [round(low, 2), round(high, 2)]}


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"gauge_cost: {error}")
