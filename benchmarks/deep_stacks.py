"""Thirty-two blocks: where the norm and where the depth factor stand, each at its own best learning rate.

    python benchmarks/deep_stacks.py docs/results

For every row below: the recipe `study/deep32` over its rates on seed 0, a rate beyond while the best stands at the
edge (at most twice), then the best rate on seeds 1 to 5. The page `docs/results/deep-stacks.md` comes from the ledgers
beside it. Studies whose folder is there already are not run again; `--write-only` runs none.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from own_best import SEEDS, best_rate, ledger_sections, rate_beyond
from rich.console import Console

from gptnorm.files import write_atomic
from gptnorm.report import load_study
from gptnorm.report.results import Cell, sample_sd
from gptnorm.study.grid import run_study

RECIPE = "study/deep32"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A strategy with its depth factor."""

    name: str
    strategy: str
    mode: str
    target: str


ROWS = (
    Row(name="prenorm-init", strategy="prenorm", mode="init", target="both"),
    Row(name="prenorm-forward", strategy="prenorm", mode="forward", target="both"),
    Row(name="postnorm-init", strategy="postnorm", mode="init", target="both"),
    Row(name="postnorm-forward", strategy="postnorm", mode="forward", target="both"),
    Row(name="spannorm-init", strategy="spannorm", mode="init", target="both"),
    Row(name="spannorm-forward", strategy="spannorm", mode="forward", target="ffn"),
)

HEAD = """# Thirty-two blocks: where the norm and the depth factor stand

Llama 2 backbone, d 64, 32 blocks, 64 bytes of Python source, 200 steps of 4 sequences, every map of unit gain at the
start (`init.std=unit`), AdamW with epsilon 1e-12, the same data in the same order for every cell of a seed. The depth
factor (2L)^-½ stands in the initialisation of W_o and W_down (init), or multiplies both branches in the forward pass,
or the feed-forward branch alone (SpanNorm's preset). The rate was picked on seed 0, the losses are of seeds 1 to 5.
Small and short: it tells how unsteady a placement is, not how good at the end. Made by
`python benchmarks/deep_stacks.py docs/results` from the ledgers beside this page.

"""


def cells(root: Path, row: Row, part: str) -> list[Cell]:
    """Every cell of a row's screens, or of its seeds."""
    folders = sorted(path.parent for path in root.glob(f"deep32-{row.name}-{part}*/study.json"))
    return [cell for folder in folders for cell in load_study(folder).cells]


def screen(root: Path, row: Row) -> dict[float, float | None]:
    """Loss of seed 0 by rate; None where it diverged."""
    return dict(sorted((cell.lr, cell.val_loss if cell.finished else None) for cell in cells(root, row, "screen")))


def run(folder: Path, row: Row, grid: tuple[str, ...], console: Console) -> None:
    if (folder / "study.json").is_file():
        return
    options = (f"options.scale_mode={row.mode}", f"options.scale_target={row.target}")
    run_study(RECIPE, (f'study.strategies=["{row.strategy}"]', *grid, *options), folder, console)


def measure(root: Path, console: Console) -> None:
    for row in ROWS:
        run(root / f"deep32-{row.name}-screen", row, ("study.seeds=[0]",), console)
        for _ in range(2):
            lr = rate_beyond(screen(root, row))
            if lr is not None:
                grid = (f"study.lrs=[{lr!r}]", "study.seeds=[0]")
                run(root / f"deep32-{row.name}-screen-{lr:g}", row, grid, console)
        lr = best_rate(screen(root, row))
        run(root / f"deep32-{row.name}-seeds", row, (f"study.lrs=[{lr!r}]", f"study.seeds={list(SEEDS)}"), console)


def page(root: Path) -> str:
    """docs/results/deep-stacks.md."""
    rates = sorted({lr for row in ROWS for lr in screen(root, row)})
    lines = [
        "| strategy | factor | " + " | ".join(f"{lr:g}" for lr in rates) + " | best rate, other seeds |",
        "|:--|:--|" + "--:|" * (len(rates) + 1),
    ]
    for row in ROWS:
        losses = screen(root, row)
        shown = [_text(losses[lr]) if lr in losses else "" for lr in rates]
        factor = f"{row.mode}, {'both branches' if row.target == 'both' else 'feed-forward'}"
        lines.append(f"| {row.strategy} | {factor} | {' | '.join(shown)} | {_seeds(root, row)} |")
    entropy = load_study(root / f"deep32-{ROWS[0].name}-screen").unigram_entropy
    notes = (
        "\nNats per token; the rates' columns are seed 0, the last one mean ± seed sd (ddof 1).\n"
        f"A model that knows token frequencies alone has {entropy:.3f}: a loss there is a failed run, however finite.\n"
    )
    tables = ledger_sections(sorted(path.parent for path in root.glob("deep32-*/study.json")))
    return HEAD + "\n".join(lines) + "\n" + notes + "\n" + "\n".join(tables)


def _text(loss: float | None) -> str:
    return "diverged" if loss is None else f"{loss:.3f}"


def _seeds(root: Path, row: Row) -> str:
    found = cells(root, row, "seeds")
    losses = [cell.val_loss for cell in found if cell.finished and cell.val_loss is not None]
    if len(losses) < len(found):
        return f"{found[0].lr:g}: diverged ({len(found) - len(losses)} of {len(found)})"
    return f"{found[0].lr:g}: {sum(losses) / len(losses):.3f} ± {sample_sd(losses) or 0.0:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="where the ledgers are kept: docs/results")
    parser.add_argument("--write-only", action="store_true", help="only rewrite the page from the ledgers")
    arguments = parser.parse_args()
    if not arguments.write_only:
        measure(arguments.root, Console())
    write_atomic(arguments.root / "deep-stacks.md", page(arguments.root))


if __name__ == "__main__":
    main()
