"""Plans of the papers' large recipes on eight GPUs of 80 GiB, as a Markdown table (docs/plan.md).

    python benchmarks/plan_papers.py

The numbers go to benchmarks/results/plan-papers.json, too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gptnorm.plan import make_plan
from gptnorm.plan.hardware import peak_flops
from gptnorm.plan.sizes import duration
from gptnorm.recipe import load_recipe

RESULT = Path(__file__).parent / "results" / "plan-papers.json"
SIZES = ("1B", "1.4B", "7B", "8B")
STRATEGIES = ("prenorm", "simplenorm")
SETTINGS = ("parallel.param_dtype=bf16",)
MODES = ("none", "selective", "full")


def rows() -> list[dict[str, Any]]:
    """One plan a row: 8 x 80 GiB, H100, 40 % MFU."""
    found = []
    for size in SIZES:
        for strategy in STRATEGIES:
            for mode in MODES:
                recipe = f"papers/simplegpt/{size}-{strategy}"
                config = load_recipe(recipe).resolve([*SETTINGS, f"train.recompute={mode}"])
                plan = make_plan(config, gpus=8, memory=80 * 2**30, mfu=0.4, peak=peak_flops("h100"))
                found.append({"recipe": recipe, "recompute": mode, **plan.record()})
                print(recipe, mode, flush=True)
    return found


def markdown(plans: list[dict[str, Any]]) -> str:
    """The table."""
    lines = [
        "| recipe | parameters | GFLOP per token | recompute | largest micro-batch | planned | peak GiB | time |",
        "|:--|--:|--:|:--|--:|:--|--:|--:|",
    ]
    for plan in plans:
        cells = (
            plan["recipe"].removeprefix("papers/simplegpt/"),
            f"{plan['parameters']['total']:,}",
            f"{plan['flops_per_token']['model'] / 1e9:.2f}",
            plan["recompute"],
            str(plan["largest_micro_batch"]),
            f"{plan['micro_batch']} x 8 x {plan['accumulate']}",
            f"{plan['bytes']['total'] / 2**30:.1f}",
            duration(plan["days"]),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    plans = rows()
    RESULT.write_text(json.dumps(plans, indent=2) + "\n")
    print(markdown(plans))
