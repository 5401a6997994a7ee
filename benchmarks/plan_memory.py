"""The planner's peak memory against that of a training step.

    python benchmarks/plan_memory.py
    python benchmarks/plan_memory.py --real
    torchrun --nproc-per-node 2 benchmarks/plan_memory.py --real

The first runs the step by the trainer's own code (`gptnorm.train.parallel`) on fake tensors, as the first of N
pretended processes, under torch's memory trackers (`MemTracker`, `FSDPMemTracker`), which know nothing of the planner:
FSDP2 gathers, casts, reduces and frees as it does in a run. What that cannot show is what CUDA's kernels keep that the
CPU's do not (both sides use the planner's stand-in), overlapping streams, and the allocator.

The others measure on real tensors, with as many processes as there are: what CUDA's allocator has given out
(`torch.cuda.max_memory_allocated`), or without a GPU what the CPU's has (torch's profiler), against a plan for the
CPU's kernels.

All take two micro-batches, so that gradients are there in the second one's pass, and leave the optimizer's step out,
whose own peak is lower. The result goes to benchmarks/results/, with device, versions and commit.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.profiler import ProfilerActivity, profile

from gptnorm.config import Config
from gptnorm.environment import describe_environment
from gptnorm.model import GPT, build_gpt
from gptnorm.plan.memory import MemoryModel
from gptnorm.plan.params import model_on_meta
from gptnorm.plan.trace import cuda_kernels, fake_model
from gptnorm.recipe import load_recipe
from gptnorm.sharding import here
from gptnorm.train.inputs import resolve_device
from gptnorm.train.optim import Optimizers, build_optimizer
from gptnorm.train.parallel import World, open_world, parallelize

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Case:
    recipe: str
    gpus: int
    sequences: int
    """Per GPU and micro-batch."""
    settings: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.recipe} {self.gpus} GPU x {self.sequences} {' '.join(self.settings)}".rstrip()


PAPERS = "papers/simplegpt/"
BF16, FULL, SELECTIVE = "parallel.param_dtype=bf16", "train.recompute=full", "train.recompute=selective"
CASES = [
    Case("laptop/base", 1, 16, ("model.strategy=prenorm",)),
    Case("laptop/base", 4, 4, ("model.strategy=angpt", "train.precision=bf16")),
    Case(PAPERS + "1B-prenorm", 1, 8),
    Case(PAPERS + "1B-simplenorm", 1, 8),
    Case(PAPERS + "1B-simplenorm", 1, 16, (SELECTIVE,)),
    Case(PAPERS + "1B-simplenorm", 1, 16, (FULL,)),
    Case(PAPERS + "1B-simplenorm", 8, 1),
    Case(PAPERS + "1B-simplenorm", 8, 1, (BF16,)),
    Case(PAPERS + "1B-simplenorm", 8, 16),
    Case(PAPERS + "1B-simplenorm", 8, 16, (BF16,)),
    Case(PAPERS + "1B-simplenorm", 8, 16, (BF16, "parallel.reshard=false")),
    Case(PAPERS + "1B-simplenorm", 8, 4, (BF16, "parallel.tensor=2")),
    Case(PAPERS + "1.4B-simplenorm", 8, 4, (BF16,)),
    Case(PAPERS + "1.4B-simplenorm", 8, 12, (BF16, SELECTIVE)),
    Case(PAPERS + "7B-simplenorm", 8, 2),
    Case(PAPERS + "7B-simplenorm", 8, 2, (BF16,)),
    Case(PAPERS + "7B-simplenorm", 8, 4, (BF16, FULL)),
    Case(PAPERS + "8B-prenorm", 8, 1, (BF16,)),
    Case(PAPERS + "8B-simplenorm", 8, 1, (BF16,)),
    Case(PAPERS + "8B-simplenorm", 8, 4, (BF16, FULL)),
    Case(PAPERS + "8B-simplenorm", 16, 2, (BF16, FULL, "parallel.tensor=4")),
    Case("papers/olmoe/1B-7B-prenorm_qknorm", 8, 1, (BF16, FULL)),
]


REAL_CASES = [
    Case(PAPERS + "1B-prenorm", 1, 4, ("model.preset=39M",)),
    Case(PAPERS + "1B-simplenorm", 1, 4, ("model.preset=39M",)),
    Case(PAPERS + "1B-simplenorm", 1, 4, ("model.preset=39M", SELECTIVE)),
    Case(PAPERS + "1B-simplenorm", 1, 4, ("model.preset=39M", FULL)),
    Case("papers/nanogpt/124M-prenorm", 1, 2),
    Case("papers/ngpt/0.5B-ngpt", 1, 1, ("model.n_layers=4",)),
    Case("laptop-moe/simplenorm", 1, 16, ("train.precision=bf16",)),
    Case(PAPERS + "1B-simplenorm", 2, 1, ("model.preset=39M",)),
    Case(PAPERS + "1B-simplenorm", 2, 4, ("model.preset=39M",)),
    Case(PAPERS + "1B-simplenorm", 2, 4, ("model.preset=39M", BF16)),
    Case(PAPERS + "1B-simplenorm", 2, 4, ("model.preset=39M", BF16, FULL)),
    Case(PAPERS + "1B-simplenorm", 2, 4, ("model.preset=39M", BF16, "parallel.reshard=false")),
    Case(PAPERS + "1B-simplenorm", 2, 4, ("model.preset=39M", "parallel.tensor=2")),
    Case("papers/nanogpt/124M-prenorm", 2, 2, (BF16,)),
]
"""Small enough for CPUs; of each the ones with as many processes as there are."""


def config_of(case: Case) -> Config:
    """One micro-batch of the case as the batch."""
    batch = case.sequences * case.gpus
    settings = (*case.settings, "train.compile=false", f"train.batch_size={batch}", "train.accumulate=1")
    return load_recipe(case.recipe).resolve(settings)


def predicted(case: Case, config: Config, *, cuda: bool) -> int:
    """The planner's peak in bytes."""
    return MemoryModel(config, config.model.vocab_size or 257, case.gpus, cuda=cuda).use(case.sequences).total


@contextlib.contextmanager
def pretended_world(gpus: int, tensor: int) -> Iterator[World]:
    """The first of so many processes, none of which exist."""
    if gpus == 1:
        yield World(device=torch.device("cpu"))
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=gpus, store=FakeStore())
    data = gpus // tensor
    mesh = init_device_mesh("cpu", (data, tensor), mesh_dim_names=("data", "tensor"))
    # Sub-meshes look their coordinates up in a tensor, which is fake by then; the first process is at the origin.
    DeviceMesh._compute_coordinates_from_mesh = staticmethod(lambda mesh_tensor, rank: (0,) * mesh_tensor.ndim)
    yield World(device=torch.device("cpu"), size=gpus, mesh=mesh, data_size=data, tensor_size=tensor)
    dist.destroy_process_group()


def simulated(case: Case, config: Config) -> int:
    """Peak in bytes of two micro-batches' passes, with the optimizer's state there, as torch's trackers count it."""
    vocab = config.model.vocab_size or 257
    with pretended_world(case.gpus, config.parallel.tensor) as world:
        model = model_on_meta(config, vocab)
        with fake_model(model):
            parallelize(model, world, config)
            # The trackers and FSDP2 look at calls of the module.
            model.forward = model.objective  # pyright: ignore[reportAttributeAccessIssue]
            optimizer = build_optimizer(model, config.optim)
            optimizer.prime()
            tokens = torch.zeros(case.sequences, config.train.seq_len + 1, dtype=torch.int64)
            alone = world.mesh is None
            tracker: MemTracker = MemTracker() if alone else FSDPMemTracker(model, optimizer.parts[0])
            if alone:
                tracker.track_external(model, *optimizer.parts)
            with tracker, cuda_kernels():
                for _ in range(2):
                    with autocast(config, "cpu"):
                        total = model(tokens).total
                    total.backward()
                    del total
                    tracker.reset_mod_stats()
            snapshot = tracker.get_tracker_snapshot("peak")
    return next(iter(snapshot.values()))["Total"] - tokens.nbytes


def measured(case: Case, config: Config) -> int:
    """Peak in bytes that the allocator of this process's device saw in the same two passes."""
    # A model and what lets go of its memory name each other, so that earlier ones are still there.
    gc.collect()
    vocab = config.model.vocab_size or 257
    world = open_world(config)
    model: GPT = build_gpt(config, vocab=vocab, device=world.device if world.mesh is None else "meta")
    parallelize(model, world, config)
    if world.mesh is not None:
        model.to_empty(device=world.device)
        model.init_weights(0)
    optimizer = build_optimizer(model, config.optim)
    optimizer.prime()
    tokens = torch.randint(0, vocab, (case.sequences, config.train.seq_len + 1), device=world.device)

    def one_pass() -> None:
        with autocast(config, world.device.type):
            total = model.objective(tokens).total
        total.backward()

    one_pass()
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        one_pass()
        return torch.cuda.max_memory_allocated() - tokens.nbytes
    return most_allocated(one_pass) + sum(here(p).nbytes for p in held(model, optimizer))


def held(model: GPT, optimizer: Optimizers) -> Iterator[torch.Tensor]:
    """What is there all the time: weights, gradients, moments."""
    for parameter in model.parameters():
        assert parameter.grad is not None
        yield from (parameter, parameter.grad)
    yield from (tensor for _, tensor in optimizer.tensors(model) if tensor.ndim)


def most_allocated(action: Callable[[], None]) -> int:
    """The most bytes that the CPU's allocator has given out at once during an action, beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events: list[Any] = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(changes))


def autocast(config: Config, device: str) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if config.train.precision == "fp32" else torch.autocast(device, torch.bfloat16)


def markdown(results: Path = RESULTS) -> str:
    """The errors of every result file, as docs/plan.md has them."""
    lines = ["| run | GPUs x sequences, settings | planned GiB | peak GiB | error |", "|:--|:--|--:|--:|--:|"]
    for path in sorted(results.glob("plan-memory-*.json")):
        kind = path.stem.removeprefix("plan-memory-")
        for row in json.loads(path.read_text())["rows"]:
            recipe, _, rest = row["case"].partition(" ")
            planned, peak = (row[key] / 2**30 for key in ("planned", "peak"))
            rest = rest.replace(" GPU", "").replace("parallel.", "").replace("train.", "").replace("_", "\\_")
            name = recipe.removeprefix("papers/").replace("_", "\\_")
            lines.append(f"| {kind}: {name} | {rest} | {planned:.3f} | {peak:.3f} | {100 * row['error']:+.1f} % |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="cases whose line has this word; nothing is written")
    parser.add_argument("--real", action="store_true", help="measure on real tensors")
    parser.add_argument("--markdown", action="store_true", help="only print the table of what has been measured")
    arguments = parser.parse_args()
    if arguments.markdown:
        print(markdown())
        return
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    first = os.environ.get("RANK", "0") == "0"
    device = resolve_device("auto") if arguments.real else torch.device("cpu")
    cases = [case for case in REAL_CASES if case.gpus == processes] if arguments.real else CASES
    configs = [(case, config_of(case)) for case in cases if arguments.only in str(case)]
    # All of the plans first: they may pretend to be processes, which real ones cannot.
    cuda = device.type == "cuda" or not arguments.real
    plans = [predicted(case, config, cuda=cuda) for case, config in configs]
    rows = []
    for (case, config), planned in zip(configs, plans, strict=True):
        peak = measured(case, config) if arguments.real else simulated(case, config)
        error = planned / peak - 1
        rows.append({"case": str(case), "planned": planned, "peak": peak, "error": round(error, 4)})
        if first:
            print(f"{case!s:96} {planned / 2**20:11.2f} MiB {peak / 2**20:11.2f} MiB {error:+7.2%}", flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()
    if arguments.only or not first:
        return
    kind = f"real-{device.type}-{processes}" if arguments.real else "simulated"
    record = {
        "benchmark": "plan_memory",
        "command": shlex.join(["python", "benchmarks/plan_memory.py", *sys.argv[1:]]),
        "processes": processes,
        "unit": "bytes",
        "environment": describe_environment(device),
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"plan-memory-{kind}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
