"""Time and memory of a Hessian product, and of the largest eigenvalue, beside two other libraries.

    python benchmarks/hessian_time.py RECIPE [--rounds N] [--batches N] [--starts N] [--dtype fp64] [KEY=VALUE ...]

needs curvlinops-for-pytorch and hessian-eigenthings (`make setup` installs them). All do the same product on the same
model and micro-batches, attention in its plain form, in turns, so that a slow minute of the machine hits them alike; a
ratio is the median over rounds of this round's time over that of a gradient in the same round (plain attention, too),
with its quartiles. curvlinops differentiates in forward mode, which silu's gradient lacks: take a recipe with GPT-2's
activation, such as `laptop/prenorm model.backbone=gpt2 strategy.norm=rmsnorm`.

The largest eigenvalue is timed from several random starts, the same vectors for ours (Lanczos) and for scipy's eigsh
on curvlinops' operator, in turns, twice: with tolerance 1e-3 of each one's own rule, and in hindsight, at the loosest
of 0.3, 0.1, … 1e-4 that leaves every start within 1e-3 of the value. Errors are against ours at tolerance 1e-9.

Memory is the largest resident size of a process of its own that takes ten products, less that of one that takes none.

The result goes to benchmarks/results/, with device, versions and commit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptnorm.curvature import LanguageLoss, lanczos
from gptnorm.environment import describe_environment
from gptnorm.errors import UserError
from gptnorm.model import build_gpt
from gptnorm.probe.source import DTYPES
from gptnorm.recipe import load_recipe

RESULTS = Path(__file__).parent / "results"
VOCAB = 257
WITHIN = 1e-3
TOLERANCES = (0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4)


class Flat(nn.Module):
    """Logits of all tokens as rows, as the other libraries want them."""

    def __init__(self, gpt: nn.Module) -> None:
        super().__init__()
        self.gpt = gpt

    def forward(self, tokens: Tensor) -> Tensor:
        return self.gpt(tokens).flatten(0, 1)


class Contest:
    """One model and its micro-batches, with each library's product and largest eigenvalue."""

    def __init__(self, recipe: str, settings: list[str], batches: int, dtype: torch.dtype) -> None:
        self.config = load_recipe(recipe).resolve(settings)
        train = self.config.train
        self.gpt = build_gpt(self.config, vocab=VOCAB, device="cpu").to(dtype).eval()
        generator = torch.Generator().manual_seed(0)
        size = (batches, train.batch_size // train.accumulate, train.seq_len + 1)
        self.tokens = list(torch.randint(0, VOCAB, size, generator=generator))
        self.loss = LanguageLoss(self.gpt, self.tokens)
        self.flat = Flat(self.gpt)

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Plain attention for all."""
        with self.loss.measuring():
            yield

    def products(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """By who makes them."""
        import curvlinops
        import hessian_eigenthings

        data = [(tokens[:, :-1], tokens[:, 1:].flatten()) for tokens in self.tokens]
        rows = sum(len(tokens) for tokens in self.tokens)
        self.curvlinops = curvlinops.HessianLinearOperator(
            self.flat,
            nn.CrossEntropyLoss(),
            list(self.flat.parameters()),
            data,
            check_deterministic=False,
            num_data=rows,
        )
        self.eigenthings = hessian_eigenthings.HessianOperator(self.flat, self.tokens, _cross_entropy)
        self.ours = self.loss.hessian()
        again = self.loss.hessian(keep=False)
        return {
            "gradient": lambda _: self.loss.gradient(),
            "gptnorm": self.ours,
            "gptnorm, graph not kept": again,
            "curvlinops": self._by_curvlinops,
            "hessian-eigenthings": self.eigenthings.matvec,
        }

    def _by_curvlinops(self, v: Tensor) -> Any:
        return self.curvlinops @ v

    def eigenvalues(self) -> dict[str, Callable[[int, float], float]]:
        """The largest, by who finds it, from a start (its seed) and to a tolerance."""
        import hessian_eigenthings
        from scipy.sparse.linalg import eigsh

        def by_curvlinops(seed: int, tolerance: float) -> float:
            start = self.ours.space.draw(torch.Generator().manual_seed(seed)).numpy()
            rule: dict[str, Any] = {"which": "LA", "tol": tolerance, "v0": start}
            found: Any = eigsh(self.curvlinops.to_scipy(), 1, **rule)
            return float(found[0][0])

        def by_eigenthings(seed: int, tolerance: float) -> float:
            rule: dict[str, Any] = {"k": 1, "which": "LA", "max_iter": 200}
            found = hessian_eigenthings.lanczos(self.eigenthings, tol=tolerance, seed=seed, **rule)
            return float(found.eigenvalues[0])

        return {
            "gptnorm": lambda seed, tolerance: lanczos(self.loss.hessian(), tolerance=tolerance, seed=seed)[0][0].value,
            "curvlinops": by_curvlinops,
            "hessian-eigenthings": by_eigenthings,
        }


def _cross_entropy(flat: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(flat(tokens[:, :-1]), tokens[:, 1:].flatten())


def measure(contest: Contest, rounds: int, starts: int) -> dict[str, Any]:
    """Ratios of products to a gradient, and the times to the largest eigenvalue."""
    with contest.ready():
        products = contest.products()
        v = contest.ours.space.draw(torch.Generator().manual_seed(1))
        found = {name: product(v) for name, product in products.items()}
        expected = found["gptnorm"]
        agree = {
            name: float((w - expected).norm() / expected.norm()) for name, w in found.items() if name != "gradient"
        }
        times: dict[str, list[float]] = {name: [] for name in products}
        for _ in range(rounds):
            for name, product in products.items():
                times[name].append(_timed(lambda product=product: product(v))[1])
        ratios = {
            name: _quartiles([t / g for t, g in zip(taken, times["gradient"], strict=True)])
            for name, taken in times.items()
        }
        eigen = race(contest, starts)
    return {
        "product over gradient": ratios,
        "gradient seconds": statistics.median(times["gradient"]),
        "difference from ours": agree,
        "largest eigenvalue": eigen,
    }


def race(contest: Contest, starts: int) -> dict[str, Any]:
    """Times to the largest eigenvalue, over starts."""
    solvers = contest.eigenvalues()
    value = solvers["gptnorm"](starts, 1e-9)

    def near(name: str, tolerance: float) -> bool:
        return all(abs(solvers[name](seed, tolerance) - value) <= WITHIN * abs(value) for seed in range(starts))

    chosen = {name: next((t for t in TOLERANCES if near(name, t)), None) for name in solvers}
    rules = {"own rule": dict.fromkeys(solvers, WITHIN), "in hindsight": chosen}
    return {"value": value, **{rule: _timed_race(solvers, of, value, starts) for rule, of in rules.items()}}


def _timed_race(solvers: Any, tolerances: dict[str, float | None], value: float, starts: int) -> dict[str, Any]:
    times: dict[str, list[float]] = {name: [] for name, tolerance in tolerances.items() if tolerance is not None}
    errors: dict[str, list[float]] = {name: [] for name in times}
    for seed in range(starts):
        for name, taken in times.items():
            found, seconds = _timed(lambda name=name, seed=seed: solvers[name](seed, tolerances[name]))
            taken.append(seconds)
            errors[name].append(abs(found - value) / abs(value))
    ours = times["gptnorm"]
    return {
        "tolerances": tolerances,
        "seconds": times,
        "relative errors": errors,
        "time of ours over theirs, by start": {
            name: [a / b for a, b in zip(ours, taken, strict=True)]
            for name, taken in times.items()
            if name != "gptnorm"
        },
    }


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    found = work()
    return found, time.process_time() - start


def _quartiles(values: list[float]) -> dict[str, Any]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "quartiles": [low, high]}


def memory(arguments: list[str], names: list[str]) -> dict[str, float]:
    """MiB that ten products of each take beside what is there without any."""
    found = {}
    for name in ["nothing", *names]:
        command = [sys.executable, __file__, *arguments, "--only", name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[name] = int(done.stdout.split()[-1]) / 1024
    base = found.pop("nothing")
    return {name: round(value - base, 1) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batches", type=int, default=1, help="micro-batches")
    parser.add_argument("--starts", type=int, default=5, help="of the search for the largest eigenvalue")
    parser.add_argument("--dtype", choices=["fp32", "fp64"], default="fp32")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    try:
        contest = Contest(given.recipe, given.settings, given.batches, DTYPES[given.dtype])
    except UserError as error:
        sys.exit(f"{parser.prog}: {error}")
    if given.only:
        with contest.ready():
            products = contest.products()
            v = contest.ours.space.draw(torch.Generator().manual_seed(1))
            for _ in range(10 if given.only in products else 0):
                products[given.only](v)
        # Not getrusage's: that begins with the size of the process that started this one.
        status = Path("/proc/self/status").read_text(encoding="ascii")
        print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
        return
    names = ["gradient", "gptnorm", "gptnorm, graph not kept", "curvlinops", "hessian-eigenthings"]
    arguments = [given.recipe, *given.settings, "--batches", str(given.batches), "--dtype", given.dtype]
    record = {
        "recipe": given.recipe,
        "settings": given.settings,
        "micro-batches": given.batches,
        "rounds": given.rounds,
        "mode": f"eager, {given.dtype}, one thread, CPU time",
        "parameters": sum(parameter.numel() for parameter in contest.gpt.parameters()),
        **measure(contest, given.rounds, given.starts),
        "MiB beside the model": memory(arguments, names),
        "environment": describe_environment(torch.device("cpu")),
    }
    print(json.dumps({key: value for key, value in record.items() if key != "environment"}, indent=1))
    cpu = re.sub(r"\W+", "-", str(record["environment"].get("cpu") or "cpu").lower()).strip("-")
    name = re.sub(r"\W+", "-", "-".join([given.recipe, *given.settings])).strip("-").lower()
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"hessian-time-{name}-{given.batches}-{given.dtype}-{cpu}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
