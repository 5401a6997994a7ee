"""What a checkpoint costs the loop: none, asynchronous and synchronous, in turns.

    python benchmarks/checkpoint_cost.py [RECIPE] [--rounds N] [--every N] [KEY=VALUE ...]

One model, one process. A turn is `every` steps (forward, backward, clipping, update) with a checkpoint after the first,
or with none; the three kinds take turns, so that a slow minute hits them alike. Reported: seconds of a turn, the ratio
to the turn without (quartiles over rounds), and how long the loop itself stood still for a save.
Writing goes to a real file with fsync. The result goes to benchmarks/results/, with device, versions and commit.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gptnorm.environment import describe_environment
from gptnorm.model import build_gpt
from gptnorm.recipe import load_recipe
from gptnorm.train.checkpoint import model_tensors
from gptnorm.train.inputs import resolve_device
from gptnorm.train.optim import build_optimizer
from gptnorm.train.saver import Saver

RESULTS = Path(__file__).parent / "results"
KINDS = ("none", "asynchronous", "synchronous")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="laptop/prenorm")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--every", type=int, default=10, help="steps of a turn")
    options = parser.parse_intermixed_args()
    config = load_recipe(options.recipe).resolve(options.settings)
    device = resolve_device(config.train.device)
    torch.set_num_threads(config.train.threads or torch.get_num_threads())
    vocab = config.model.vocab_size or 257
    model = build_gpt(config, vocab=vocab, device=device)
    optimizer = build_optimizer(model, config.optim)
    optimizer.set_lr(1e-6)
    rows = config.train.batch_size // config.train.accumulate
    tokens = torch.randint(0, vocab, (rows, config.train.seq_len + 1), device=device)

    def step() -> None:
        optimizer.zero_grad()
        model.objective(tokens).total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    def tensors() -> dict[str, torch.Tensor]:
        return model_tensors(model) | {f"optimizer/{name}": t for name, t in optimizer.tensors(model)}

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        step()
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    stands: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        savers = {
            kind: Saver(
                Path(folder) / kind, replace(config.checkpoint, keep=1, asynchronous=kind == "asynchronous"), device
            )
            for kind in KINDS[1:]
        }
        for turn in range(options.rounds):
            for kind in KINDS:
                synchronize()
                began = time.perf_counter()
                for number in range(options.every):
                    step()
                    if number == 0 and kind != "none":
                        synchronize()
                        stood = time.perf_counter()
                        savers[kind].save(turn, tensors(), {}, None)
                        stands[kind].append(time.perf_counter() - stood)
                synchronize()
                seconds[kind].append(time.perf_counter() - began)
                if kind != "none":
                    savers[kind].wait()  # what is still being written does not disturb the next turn
        size = sum(path.stat().st_size for path in (Path(folder) / "synchronous").rglob("*.safetensors"))
        for saver in savers.values():
            saver.close()

    environment = describe_environment(device)
    ratios = {kind: [a / b for a, b in zip(seconds[kind], seconds["none"], strict=True)] for kind in KINDS[1:]}
    result: dict[str, Any] = {
        "what": "seconds of a turn of steps with one checkpoint, eager",
        "command": " ".join(["python", *sys.argv]),
        "steps_of_a_turn": options.every,
        "parameters": sum(p.numel() for p in model.parameters()),
        "checkpoint_MiB": round(size / 2**20, 1),
        "seconds": {kind: round(statistics.median(values), 4) for kind, values in seconds.items()},
        "stands_still": {kind: round(statistics.median(stands[kind]), 4) for kind in KINDS[1:]},
        "ratio_to_none": {
            kind: [round(value, 3) for value in statistics.quantiles(values, n=4)] for kind, values in ratios.items()
        },
        "environment": environment,
    }
    print(json.dumps(result, indent=1))
    RESULTS.mkdir(exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", f"{options.recipe} {' '.join(environment['device'].split()[:2])}".lower())
    (RESULTS / f"checkpoint-cost-{slug}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
