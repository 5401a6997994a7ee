"""Does curvature predict how far the learning rate can be pushed? docs/results/curvature-edge.md.

    python benchmarks/curvature_edge.py docs/results [--runs FOLDER] [--write-only]

Every strategy of the screen (docs/results/tolerance-screen), seed 0 as there: a run at one low rate for all, from whose
curvature the edge is predicted. Those of the tolerance study also have a run at their own largest stable rate.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from curvature_runs import Subject, fill, header, load, measure, row

from gptnorm.curvature.adam import stability_threshold
from gptnorm.format import lr_text, short_text
from gptnorm.report.tolerance_ledger import load_tolerance

LOW = 3e-3
AT_EDGE = ("prenorm", "prenorm_qknorm", "simplenorm", "spannorm", "angpt")
STEPS = (0, 100)
MEASURED = (
    "--step",
    ",".join(map(str, STEPS)),
    "--what",
    "sharpness,adam",
    "--tolerance",
    "1e-2",
    "train.batch_size=4",
)
PERMUTATIONS = 20_000


def screen(results: Path) -> dict[str, float]:
    """The largest stable rate of each strategy."""
    own = load_tolerance(results / "tolerance-screen").places[0].own
    return {name: edge.stable for name, track in own.items() for edge in track.edges.values()}


def subject(strategy: str, rate: float, kind: str) -> Subject:
    return Subject(
        recipe=f"laptop/{strategy}",
        seed=0,
        settings=(f"optim.lr={rate!r}", "checkpoint.every=20", "checkpoint.keep=100"),
        measured=MEASURED,
        run=f"{strategy}-{kind}",
        name=f"{strategy}-{kind}",
    )


def tables(results: Path, edges: dict[str, float]) -> str:
    """As Markdown."""
    readings = results / "curvature-edge"
    low = load(readings, [f"{name}-low" for name in edges])
    at_edge = load(readings, [f"{name}-edge" for name in AT_EDGE])
    known = [name for name in edges if f"{name}-low" in low]
    lines = ["**Predicted and measured edge**\n", header(["strategy", "largest stable rate", *_predictors()])]
    for name in sorted(known, key=edges.__getitem__):
        cells = [short_text(edges[name])] + [short_text(p(low[f"{name}-low"])) for p in _predictors().values()]
        lines.append(row([name.replace("_", r"\_"), *cells]))
    lines += [
        "\n**How well they agree**\n",
        header(["predictor", "rank correlation", "p", "median predicted / measured"]),
    ]
    for label, predict in _predictors().items():
        pairs = [(edges[name], predict(low[f"{name}-low"])) for name in known]
        rho = spearman(pairs)
        ratio = statistics.median(b / a for a, b in pairs)
        lines.append(row([label, f"{rho:+.2f}", f"{chance(pairs, rho):.2g}", f"{ratio:.2g}"]))
    lines += ["\n**λ_max as AdamW sees it over its threshold, at the own largest stable rate**\n"]
    lines.append(header(["strategy", "rate", *(f"step {step}" for step in STEPS[1:])]))
    for name in sorted(edges, key=edges.__getitem__):
        if (found := at_edge.get(f"{name}-edge")) is not None:
            shares = [f"{share(found, step):.2f}" for step in STEPS[1:]]
            lines.append(row([name.replace("_", r"\_"), lr_text(float(f"{edges[name]:.3g}")), *shares]))
    return "\n".join(lines) + "\n"


def _predictors() -> dict[str, Callable[[dict[str, Any]], float]]:
    def by_adam(step: int) -> Callable[[dict[str, Any]], float]:
        def predict(record: dict[str, Any]) -> float:
            seen = at(record, step)["adam"]["largest"]["value"]
            beta1 = record["config"]["optim"]["betas"][0]
            return stability_threshold(1.0, beta1) / seen

        return predict

    def by_passes(step: int) -> Callable[[dict[str, Any]], float]:
        def predict(record: dict[str, Any]) -> float:
            found = at(record, step)["adam"]["critical"]
            return math.sqrt(found["low"] * found["high"]) if found["high"] else math.inf

        return predict

    def by_sharpness(record: dict[str, Any]) -> float:
        return 2 / at(record, 0)["sharpness"]["largest"]["value"]

    seen = {f"(2 + 2β₁) / ((1 - β₁) λ_P), step {step}": by_adam(step) for step in STEPS[1:]}
    passes = {f"critical rate, step {step}": by_passes(step) for step in STEPS[1:]}
    return {**seen, **passes, "2 / λ_max, initialisation": by_sharpness}


def at(record: dict[str, Any], step: int) -> dict[str, Any]:
    return next(reading for reading in record["readings"] if reading["step"] == step)


def share(record: dict[str, Any], step: int) -> float:
    """Of the threshold."""
    seen = at(record, step)["adam"]
    return seen["largest"]["value"] / seen["threshold"]


def spearman(pairs: Sequence[tuple[float, float]]) -> float:
    """The correlation of ranks, those of equal values averaged."""
    x, y = (ranks([pair[i] for pair in pairs]) for i in (0, 1))
    mean = (len(pairs) - 1) / 2
    cov = sum((a - mean) * (b - mean) for a, b in zip(x, y, strict=True))
    return cov / math.sqrt(sum((a - mean) ** 2 for a in x) * sum((b - mean) ** 2 for b in y))


def ranks(values: Sequence[float]) -> list[float]:
    below = [sum(other < value for other in values) for value in values]
    return [low + (values.count(value) - 1) / 2 for low, value in zip(below, values, strict=True)]


def chance(pairs: Sequence[tuple[float, float]], rho: float) -> float:
    """How often a random order correlates as much, either way."""
    generator = random.Random(0)
    x, y = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    hits = 0
    for _ in range(PERMUTATIONS):
        generator.shuffle(y)
        hits += abs(spearman(list(zip(x, y, strict=True)))) >= abs(rho) - 1e-12
    return (hits + 1) / (PERMUTATIONS + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="where docs/results/tolerance-screen is, and where readings go")
    parser.add_argument("--runs", type=Path, default=Path("runs/curvature-edge"))
    parser.add_argument("--write-only", action="store_true", help="tables of what is there")
    given = parser.parse_args()
    edges = screen(given.results)
    if not given.write_only:
        wanted = [subject(name, LOW, "low") for name in edges]
        wanted += [subject(name, edges[name], "edge") for name in AT_EDGE]
        measure(wanted, given.runs, given.results / "curvature-edge")
    fill(given.results / "curvature-edge.md", "edge", tables(given.results, edges))


if __name__ == "__main__":
    main()
