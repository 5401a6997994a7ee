"""What the watch of a training run costs: time of a step with a reading over that of a step without.

    python benchmarks/watch_cost.py RECIPE [--rounds N] [--compiled] [KEY=VALUE ...]

One model takes steps on random tokens; with and without a reading they take turns, and which comes first changes from
round to round, so that a slow minute of the machine hits both alike. The ratio is the median over rounds of this
round's watched step over its unwatched one, with quartiles; per step of a run it is (ratio - 1) / `watch.every`. A
step is forward, backward (in `train.accumulate` parts), clipping, AdamW and after_step. `peak` is the GPU's peak of
memory in each.

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

from gptnorm.config import Config
from gptnorm.environment import describe_environment
from gptnorm.errors import UserError
from gptnorm.model import build_gpt
from gptnorm.recipe import load_recipe
from gptnorm.train.blocks import prepare_blocks
from gptnorm.train.inputs import resolve_device
from gptnorm.train.optim import build_optimizer
from gptnorm.train.watch import Watch

RESULTS = Path(__file__).parent / "results"
WARM_UP = 3


class Runner:
    """A model that takes steps as the training loop does, watched or not."""

    def __init__(self, config: Config, device: torch.device, compiled: bool) -> None:
        train = config.train
        vocab = config.model.vocab_size or 257
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, vocab, (train.batch_size, train.seq_len + 1), generator=generator)
        self.micros = tokens.to(device).chunk(train.accumulate)
        self.config, self.device = config, device
        self.model = build_gpt(config, vocab=vocab, device=device)
        prepare_blocks(self.model, "none", compiled=False, float8=config.train.precision == "fp8")
        self.optimizer = build_optimizer(self.model, config.optim)
        self.objective = torch.compile(self.model.objective) if compiled else self.model.objective
        self.watch = Watch(self.model, config.watch, self.autocast)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.config.train.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def step(self, watched: bool) -> None:
        self.optimizer.zero_grad()
        for tokens in self.micros:
            with self.autocast():
                objective = self.objective(tokens)
            (objective.total / len(self.micros)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip or float("inf")).item()
        if watched:
            self.watch.before_step(1, self.micros[0])
        self.optimizer.step()
        self.model.after_step()
        self.watch.after_step()

    def timed(self, watched: bool) -> tuple[float, int | None]:
        """Seconds of one step, the device's work included, and the GPU's peak of bytes.

        On a CPU it is the process's processor time, which neighbours on the machine change less than the clock.
        """
        gpu = self.device.type == "cuda"
        if gpu:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        clock = time.perf_counter if gpu else time.process_time
        start = clock()
        self.step(watched)
        if gpu:
            torch.cuda.synchronize(self.device)
        return clock() - start, torch.cuda.max_memory_allocated(self.device) if gpu else None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipe")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--rounds", type=int, default=40, help="timed pairs of steps")
    parser.add_argument("--compiled", action="store_true", help="the training step through torch.compile")
    arguments = parser.parse_intermixed_args()
    if arguments.rounds < 2:
        raise UserError("--rounds: at least 2")
    config = load_recipe(arguments.recipe).resolve(arguments.settings)
    if not config.watch.every:
        raise UserError("watch.every = 0: nothing would be read")
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    device = resolve_device(config.train.device)
    runner = Runner(config, device, arguments.compiled)
    for watched in (False, True) * WARM_UP:
        runner.step(watched)
    found: dict[bool, list[tuple[float, int | None]]] = {False: [], True: []}
    for turn in range(arguments.rounds):
        for watched in (False, True) if turn % 2 else (True, False):
            found[watched].append(runner.timed(watched))
    ratios = [a[0] / b[0] for a, b in zip(found[True], found[False], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    every = config.watch.every
    row = {
        "strategy": config.model.strategy,
        "parameters": sum(p.numel() for p in runner.model.parameters()),
        "mode": "compiled" if arguments.compiled else "eager",
        "precision": config.train.precision,
        "tokens_per_step": config.train.batch_size * config.train.seq_len,
        "sequences": config.watch.sequences,
        "every": every,
        "median_ms": {
            "unwatched": round(1e3 * statistics.median(s for s, _ in found[False]), 3),
            "watched": round(1e3 * statistics.median(s for s, _ in found[True]), 3),
        },
        "ratio": round(middle, 4),
        "ratio_quartiles": [round(low, 4), round(high, 4)],
        "cost_per_step": round((middle - 1) / every, 5),
        "peak_MiB": {
            name: None if (peak := found[watched][-1][1]) is None else round(peak / 2**20, 1)
            for name, watched in (("unwatched", False), ("watched", True))
        },
    }
    environment = describe_environment(device)
    record = {
        "benchmark": "watch_cost",
        "command": shlex.join(["python", "benchmarks/watch_cost.py", *sys.argv[1:]]),
        "rounds": arguments.rounds,
        "environment": environment,
        "row": row,
    }
    print(json.dumps(row, indent=1))
    print(
        f"a watched step takes {middle:.3f} [{low:.3f}, {high:.3f}] times as long; {100 * (middle - 1) / every:.2f} % "
        f"of a run at watch.every = {every}"
    )
    RESULTS.mkdir(exist_ok=True)
    stem = f"watch-cost-{arguments.recipe}-{row['mode']}-{environment['device']}"
    path = RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', stem.lower()).strip('-')}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"watch_cost: {error}")
