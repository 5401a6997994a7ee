"""One strategy's loss minus another's at every place of a map, as they come and with both tuned, as a picture.

    python benchmarks/lead_map.py docs/results/width-depth-map docs/results/width-depth-map-tuned \
        --out docs/results/width-depth-map/lead.svg

The first ledger's places and comparison; the second may lack some. Hollow: rates that one seed alone picks.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from gptnorm.report import load_tolerance
from gptnorm.report.figure import INK, MUTED, look, new_figure, style, to_svg
from gptnorm.report.tolerance import Place
from gptnorm.study.measures import Estimate

WORDS = {"model.d_model": "d {}", "model.n_layers": "{} blocks", "train.steps": "{} steps"}


class Mark(NamedTuple):
    """What is drawn at a place."""

    found: Estimate
    crossed: bool
    """Whether each seed stands at the rate that all others pick."""


def name_of(place: Place) -> str:
    return ", ".join(WORDS.get(key, f"{key} {{}}").format(value) for key, value in place.settings)


def mark_of(place: Place, name: str, *, tuned: bool) -> Mark | None:
    pair = place.pairs(tuned=tuned).get(name)
    if pair is None or pair.difference is None:
        return None
    return Mark(pair.difference, pair.ours.crossed and pair.theirs.crossed)


def by_place(folder: Path, name: str, *, tuned: bool) -> Iterator[tuple[tuple[tuple[str, object], ...], str, Mark]]:
    for place in load_tolerance(folder).places:
        mark = mark_of(place, name, tuned=tuned)
        if mark is not None:
            yield tuple(place.settings), name_of(place), mark


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("tuned", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    study = load_tolerance(options.folder)
    (name,) = (strategy for strategy in study.about.strategies if strategy != study.baseline)
    own = {key: (words, mark) for key, words, mark in by_place(options.folder, name, tuned=False)}
    tuned = {key: mark for key, _, mark in by_place(options.tuned, name, tuned=True)}
    # Length, then depth, then width: what stands together is what is compared.
    keys = sorted(own, key=lambda key: tuple(int(str(value)) for _, value in reversed(key)))
    with style():
        figure = new_figure(6.6, 1.3 + 0.36 * len(keys))
        axes = figure.add_subplot()
        axes.axvline(0.0, color=INK, linewidth=1.0)
        for series, (label, shift) in enumerate((("as they come", -0.13), ("depth factor tuned for both", 0.13))):
            how = look(series)
            for row, key in enumerate(keys):
                mark = own[key][1] if series == 0 else tuned.get(key)
                if mark is None or mark.found.low is None or mark.found.high is None:
                    continue
                y = row + shift
                axes.plot([mark.found.low, mark.found.high], [y, y], color=how.colour, linewidth=1.8)
                face = how.colour if mark.crossed else "white"
                axes.plot([mark.found.value], [y], how.marker, color=how.colour, markersize=6, markerfacecolor=face)
            axes.plot([], [], how.marker, color=how.colour, linestyle="-", label=label)
        axes.set_yticks(range(len(keys)), [own[key][0] for key in keys])
        axes.set_ylim(len(keys) - 0.5, -0.5)
        axes.set_xlabel(f"loss of {name} minus that of {study.baseline}, nats per token\nleft of 0 {name} is ahead")
        axes.tick_params(axis="y", colors=MUTED)
        figure.legend(loc="outside lower center", ncols=2)
        options.out.write_text(to_svg(figure, "lead") + "\n")


if __name__ == "__main__":
    main()
