"""Rows compared at their own best learning rate, picked on seed 0 and reported on other seeds: what several scripts do.

Each script names its rows and its recipe. For every row: the recipe's rates on seed 0, a rate beyond while the best
stands at the edge (at most twice), then the best rate on seeds 1 to 5. Studies whose folder is there already are not
run again; `--write-only` runs none and rewrites the page from the ledgers beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from gptnorm.files import write_atomic
from gptnorm.report import load_study, markdown_table
from gptnorm.report.results import RunLine
from gptnorm.statistics import sample_sd
from gptnorm.study.grid import Grid
from gptnorm.study.measures import paired_difference
from gptnorm.study.run import run_study

SEEDS = (1, 2, 3, 4, 5)
"""Those reported, none of them the one that the rate was picked on."""

BEYOND = {3e-3: 1e-3, 1e-3: 3e-4, 3e-2: 1e-1, 1e-1: 3e-1}
"""The next rate, outwards."""


def best_rate(losses: dict[float, float | None]) -> float:
    """The rate of lowest loss; None is a run that diverged."""
    return min((loss, lr) for lr, loss in losses.items() if loss is not None)[1]


def rate_beyond(losses: dict[float, float | None]) -> float | None:
    """The rate to try next if the best stands at the edge of those tried."""
    best = best_rate(losses)
    return BEYOND.get(best) if best in (min(losses), max(losses)) else None


def ledger_sections(folders: Iterable[Path], title: str = "") -> list[str]:
    """A section for each study: the command that made it, and its table."""
    sections = []
    for folder in folders:
        study = load_study(folder)
        commands = "\n".join(f"    {command}" for command in study.commands)
        sections.append(f"## {title}{folder.name}\n\n{commands}\n\n{markdown_table(study)}")
    return sections


def gap_text(losses: dict[int, float | None], reference: dict[int, float | None]) -> str:
    """Mean difference and its 95 % paired t-interval, seed by seed; a dash where a seed of either diverged."""
    ours, theirs = ({seed: loss for seed, loss in of.items() if loss is not None} for of in (losses, reference))
    gap = paired_difference(ours, theirs)
    if gap is None or gap.seeds < len(SEEDS):
        return "–"
    return f"{gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A strategy and what is set for it."""

    name: str
    """Of its ledgers' folders."""
    strategy: str
    setting: str
    """The second column: `settings` in words."""
    settings: tuple[str, ...] = ()
    rates: tuple[float, ...] | None = None
    """Of the first screen; None: the recipe's."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The rows of one page."""

    prefix: str
    """Of the ledgers' folders."""
    recipe: str
    column: str
    """Heads the second column."""
    rows: tuple[Row, ...]
    baselines: tuple[str, ...]
    """The names of the rows that the others are compared with."""

    def measure(self, root: Path, console: Console) -> None:
        for row in self.rows:
            rates = () if row.rates is None else (f"study.lrs={list(row.rates)}",)
            self._run(root / f"{self.prefix}-{row.name}-screen", row, (*rates, "study.seeds=[0]"), console)
            for _ in range(2):
                lr = rate_beyond(self.screen(root, row))
                if lr is not None:
                    grid = (f"study.lrs=[{lr!r}]", "study.seeds=[0]")
                    self._run(root / f"{self.prefix}-{row.name}-screen-{lr:g}", row, grid, console)
            lr = best_rate(self.screen(root, row))
            grid = (f"study.lrs=[{lr!r}]", f"study.seeds={list(SEEDS)}")
            self._run(root / f"{self.prefix}-{row.name}-seeds", row, grid, console)

    def screen(self, root: Path, row: Row) -> dict[float, float | None]:
        """Loss of seed 0 by rate; None where it diverged."""
        found = self._cells(root, row, "screen")
        return dict(sorted((cell.lr, cell.val_loss if cell.finished else None) for cell in found))

    def seeds(self, root: Path, row: Row) -> dict[int, float | None]:
        """Loss at the best rate by seed; None where it diverged."""
        best = best_rate(self.screen(root, row))
        found = [cell for cell in self._cells(root, row, "seeds") if cell.lr == best]
        return dict(sorted((cell.seed, cell.val_loss if cell.finished else None) for cell in found))

    def page(self, root: Path, head: str) -> str:
        """The head, the table of the rows, and every ledger's own table."""
        rates = sorted({lr for row in self.rows for lr in self.screen(root, row)})
        references = [row for name in self.baselines for row in self.rows if row.name == name]
        labels = [f"minus {row.strategy}'s ({row.setting})".replace("_", "\\_") for row in references]
        titles = ["strategy", self.column, *(f"{lr:g}" for lr in rates), "best rate, other seeds", *labels]
        lines = [f"| {' | '.join(titles)} |", "|:--|:--|" + "--:|" * (len(titles) - 2)]
        for row in self.rows:
            losses = self.screen(root, row)
            shown = [_text(losses[lr]) if lr in losses else "" for lr in rates]
            seeds = self.seeds(root, row)
            gaps = ["–" if row is other else gap_text(seeds, self.seeds(root, other)) for other in references]
            strategy = row.strategy.replace("_", "\\_")
            result = _summary(best_rate(losses), seeds)
            lines.append(f"| {' | '.join([strategy, row.setting, *shown, result, *gaps])} |")
        entropy = load_study(root / f"{self.prefix}-{self.rows[0].name}-screen").unigram_entropy
        notes = (
            "\nNats per token; the rates' columns are seed 0, then mean ± seed sd (ddof 1), and the gap with its 95 % "
            "paired t-interval over the seeds, which does not hold the error of picking the rate on one seed.\n"
            f"A model that knows token frequencies alone has {entropy:.3f}: a loss there is a failed run, however "
            "finite.\n"
        )
        tables = ledger_sections(sorted(path.parent for path in root.glob(f"{self.prefix}-*/study.json")))
        return head + "\n".join(lines) + "\n" + notes + "\n" + "\n".join(tables)

    def _cells(self, root: Path, row: Row, part: str) -> list[RunLine]:
        folders = sorted(path.parent for path in root.glob(f"{self.prefix}-{row.name}-{part}*/study.json"))
        return [cell for folder in folders for cell in load_study(folder).cells]

    def _run(self, folder: Path, row: Row, grid: tuple[str, ...], console: Console) -> None:
        if not (folder / "study.json").is_file():
            run_study(
                Grid(), self.recipe, (f'study.strategies=["{row.strategy}"]', *grid, *row.settings), folder, console
            )


def main(comparison: Comparison, page: Callable[[Path], str], name: str, description: str | None) -> None:
    """The command line of a script with one comparison, whose page it writes under that name."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="where the ledgers are kept: docs/results")
    parser.add_argument("--write-only", action="store_true", help="only rewrite the page from the ledgers")
    arguments = parser.parse_args()
    if not arguments.write_only:
        comparison.measure(arguments.root, Console())
    write_atomic(arguments.root / name, page(arguments.root))


def _text(loss: float | None) -> str:
    return "diverged" if loss is None else f"{loss:.3f}"


def _summary(lr: float, found: dict[int, float | None]) -> str:
    losses = [loss for loss in found.values() if loss is not None]
    if len(losses) < len(found):
        return f"{lr:g}: diverged ({len(found) - len(losses)} of {len(found)})"
    return f"{lr:g}: {sum(losses) / len(losses):.3f} ± {sample_sd(losses) or 0.0:.3f}"
