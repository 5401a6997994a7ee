"""Signal propagation at initialisation of deep stacks: the table of docs/results/signal-propagation.md.

    python benchmarks/signal_propagation.py [--layers 128] [--seeds 0,1,2,3,4] [--rows TEXT]
        [--positions none,rope] [--d-ff 352] [--page-only]

Random tokens and targets, vocabulary 512, d 128, head width 32, SwiGLU of width 352 (8/3 d, rounded up to a multiple
of 32), 2 sequences of 64 tokens, fp64, gains 1, embedding of standard deviation 1, `init.std = "unit"` (every branch
has about unit output variance), with and without rotary positions. `--rows` measures only the rows whose name holds
TEXT; what was measured before is kept. The numbers go to docs/results/signal-propagation/results.json, each row with
where it was measured; the page is made from them and from frame.txt beside it.

"theirs" are the numbers of a numerical check by the authors of this project's notes on SpanNorm (arXiv 2601.22580),
made with a throw-away script before this code existed: an independent implementation, not the paper's own table.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gptnorm.config import InitConfig, ModelConfig, OptionsConfig
from gptnorm.environment import describe_environment
from gptnorm.errors import UserError
from gptnorm.model import GPT
from gptnorm.model.backbones import make_shape
from gptnorm.probe import probe
from gptnorm.strategies import make_strategy
from gptnorm.typed import read_table

FOLDER = Path(__file__).parents[1] / "docs" / "results" / "signal-propagation"
PAGE = FOLDER.with_suffix(".md")
VOCAB, WIDTH, HEADS, LENGTH, SEQUENCES = 512, 128, 4, 64, 2
SHOWN_LAYERS = 128
POSITIONS = ("none", "rope")
SEEDS = (0, 1, 2, 3, 4)
"""Of every row on the page."""
FACTOR = 1.1
"""How far beyond our range over seeds their number may lie."""

UNIT: dict[str, Any] = {"scale_mode": "none"}
S2L: dict[str, Any] = {"scale_mode": "init", "scale_target": "both", "scale_count": "2L"}
FFNL: dict[str, Any] = {"scale_mode": "init", "scale_target": "ffn", "scale_count": "L"}
BOTHL: dict[str, Any] = {"scale_mode": "init", "scale_target": "both", "scale_count": "L"}
FWD: dict[str, Any] = {"scale_mode": "forward", "scale_target": "ffn", "scale_count": "2L"}

COLUMNS = {
    "variance": "variance",
    "ratio": "gradient ratio",
    "cosine": "cos last",
    "token_cosine": "token cos",
    "q_over_v": "q/v",
}
COSINES = ("cosine", "token_cosine")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    scheme: str
    init: str
    strategy: str
    own: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    theirs: tuple[float | None, ...] = (None,) * 5
    """In the order of `COLUMNS`, at L = 128."""

    @property
    def name(self) -> str:
        return f"{self.scheme} {self.init}"


def _rows(scheme: str, strategy: str, theirs: dict[str, tuple[float | None, ...]], **own: Any) -> list[Row]:
    options = {"unit": UNIT, "s2L": S2L, "ffnL": FFNL, "both 1/√L": BOTHL, "forward": FWD, "own": {}}
    return [
        Row(scheme=scheme, init=init, strategy=strategy, own=own, options=options[init], theirs=numbers)
        for init, numbers in theirs.items()
    ]


ROWS = [
    *_rows("PreNorm", "prenorm", {"unit": (180, 47, 0.996, 0.27, 0.27), "s2L": (1.59, 1.57, 0.999, 0.02, 0.65)}),
    *_rows(
        "PostNorm",
        "postnorm",
        {
            "unit": (2.64, 7e11, 0.53, 0.75, 7e-7),
            "s2L": (1.01, 1.33, 0.998, 0.02, 0.62),
            "ffnL": (1.04, 1.8, 0.64, 1.00, 2e-16),
        },
    ),
    *_rows(
        "SpanNorm A",
        "spannorm",
        {
            "unit": (2.11, 8e12, 0.70, 0.02, 0.46),
            "s2L": (1.03, 1.29, 0.998, 0.00, 0.72),
            "ffnL": (1.03, 1.88, 0.996, 0.01, 0.72),
            "both 1/√L": (None, 1.66, None, None, None),
            "forward": (None,) * 5,
        },
    ),
    *_rows(
        "SpanNorm C",
        "spannorm",
        {"s2L": (1.03, 1.33, 0.998, 0.02, 0.62), "ffnL": (2.8, 3.4, 0.62, 1.00, 1e-16)},
        variant="C",
    ),
    *_rows("B2T", "b2t", {"s2L": (4.05, 1.07, 0.999, 0.01, 0.70), "ffnL": (3.9, 0.93, 0.93, 1.00, 3e-4)}),
    *_rows(
        "SpanNorm A1",
        "spannorm",
        {"s2L": (1.03, 1.29, 0.998, 0.00, 0.71), "ffnL": (1.03, 3.2, 0.995, 0.01, 0.43)},
        variant="A1",
    ),
    *_rows(
        "SpanNorm D",
        "spannorm",
        {"s2L": (1.03, 2.1, 0.998, 0.13, 0.47), "ffnL": (1.03, 3.4, 0.996, 0.30, 0.34)},
        variant="D",
    ),
    *_rows("DeepNorm", "deepnorm", {"own": (16, 0.99, 1.000, 0.00, 0.13)}),
    *_rows("KEEL (α = 2L)", "keel", {"unit": (6.6e4, 0.99, 1.000, 0.03, 0.58)}),
    *_rows("KEEL, first attention plain", "keel", {"unit": (6.6e4, 0.99, 1.000, 0.03, 0.58)}, first_attention="plain"),
    *_rows("LNS", "lns", {"unit": (3.6, 1.35, 1.000, 0.23, 0.004)}),
    *_rows("Peri-LN", "periln", {"unit": (289, 23, 0.997, 0.68, 0.15)}),
    *_rows(
        "HybridNorm",
        "hybridnorm",
        {"unit": (2.1, 2e12, 0.67, 0.17, 0.06), "s2L": (1.0, 1.34, 0.998, 0.02, 0.61)},
    ),
    # Not in the check.
    *_rows("SimpleNorm", "simplenorm", {"own": (None,) * 5}),
    *_rows("anGPT", "angpt", {"own": (None,) * 5}),
    *_rows("nGPT", "ngpt", {"own": (None,) * 5}),
]


def measure(row: Row, layers: int, seed: int, d_ff: int, positions: str) -> dict[str, float]:
    """The table's numbers of one model, and the loss."""
    sizes = ModelConfig(d_model=WIDTH, n_layers=layers, n_heads=HEADS, d_ff=d_ff, vocab_size=VOCAB)
    shape = make_shape(sizes, vocab=VOCAB, context=LENGTH)
    if positions == "none":
        # A table of learned positions, all of them zero.
        shape = replace(shape, rope_theta=None)
    options = read_table(OptionsConfig, row.options, key="options") if row.options else None
    strategy = make_strategy(row.strategy, row.own, options)
    model = GPT(shape, strategy, backbone="llama2", init=InitConfig(std="unit"), seed=seed).double()
    if model.position is not None:
        nn.init.zeros_(model.position.weight)
    # One more token than is read: each target is the next token, uniform and independent of what was read before it.
    generator = torch.Generator().manual_seed(seed)
    found = probe(model, torch.randint(0, VOCAB, (SEQUENCES, LENGTH + 1), generator=generator))
    last, middle = found.blocks[-1], found.blocks[layers // 2]
    # The sum that ends a block is the input of the norm that is called last in it, or the stream itself.
    ends = [list(block.norms.values())[-1] for block in found.blocks if block.norms]
    return {
        "variance": max([found.start, *ends, *(block.stream for block in found.blocks)]) ** 2,
        "any_variance": found.max_variance,
        "ratio": found.gradient_ratio,
        "cosine": last.cosine,
        "token_cosine": last.token_cosine,
        "q_over_v": middle.q_over_v,
        "loss": found.loss,
    }


def key(entry: dict[str, Any]) -> tuple[Any, ...]:
    """What tells one entry of the results from another."""
    return entry["scheme"], entry["init"], entry["layers"], entry["positions"]


def spread(values: list[float]) -> dict[str, float | None]:
    """Median and range over seeds; None for what is no number."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return {"median": None, "low": None, "high": None}
    return {
        "median": float(f"{statistics.median(known):.4g}"),
        "low": float(f"{min(known):.4g}"),
        "high": float(f"{max(known):.4g}"),
    }


def agrees(column: str, theirs: float, ours: dict[str, float | None]) -> bool:
    """Whether their single number lies within our seeds' range, widened by `FACTOR`.

    A cosine c has to do so both as c and as 1 - c: a difference of 0.03 is much next to 0 and next to 1.
    """
    low, high = ours["low"], ours["high"]
    if low is None or high is None:
        return False
    if column not in COSINES:
        return _meet((theirs, theirs), (low, high))
    # As printed there: cosines of blocks that hardly turn have three decimals, all others two.
    rounding = 0.0005 if column == "cosine" and theirs > 0.99 else 0.005
    least, most = theirs - rounding, theirs + rounding
    return _meet((least, most), (low, high)) and _meet((1 - most, 1 - least), (1 - high, 1 - low))


def _meet(theirs: tuple[float, float], ours: tuple[float, float]) -> bool:
    """Whether two intervals overlap once ours is widened by the factor; an end below 0 moves down as well."""
    low, high = ours
    return theirs[1] >= min(low / FACTOR, low * FACTOR) and theirs[0] <= max(high / FACTOR, high * FACTOR)


def is_bound(column: str, theirs: float | None) -> bool:
    """Whether their cosine is rounded to 0 or 1, so that it only says how large ours (or 1 - ours) may be."""
    return column in COSINES and theirs in (0.0, 1.0)


def table(record: dict[str, Any], positions: str) -> str:
    """Markdown: theirs / the median of ours [range over seeds]; ‡ where they differ by more than that."""
    lines = ["| scheme | init | " + " | ".join(COLUMNS.values()) + " |", "|:--|:--|" + "--:|" * len(COLUMNS)]
    for row in record["rows"]:
        if (row["layers"], row["positions"]) != (SHOWN_LAYERS, positions):
            continue
        cells = []
        for column, theirs in zip(COLUMNS, row["theirs"], strict=True):
            ours = row["ours"][column]
            text = f"{_short(ours['median'])} [{_short(ours['low'])}, {_short(ours['high'])}]"
            if theirs is None:
                cells.append(f"– / {text}")
            else:
                cells.append(f"{_short(theirs)} / {text}" + ("" if agrees(column, theirs, ours) else " ‡"))
        lines.append(f"| {row['scheme']} | {row['init']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}".replace("e+0", "e").replace("e+", "e").replace("e-0", "e-")


def page(record: dict[str, Any]) -> str:
    """The page: its frame from `frame.txt` beside the results, the tables and counts from the numbers."""
    frame = (FOLDER / "frame.txt").read_text(encoding="utf-8")
    cells = [(column, theirs) for row in ROWS for column, theirs in zip(COLUMNS, row.theirs, strict=True)]
    numbers = {
        **{positions: table(record, positions).rstrip() for positions in POSITIONS},
        "marked": table(record, POSITIONS[0]).count("‡"),
        "compared": sum(theirs is not None for _, theirs in cells),
        "bounds": sum(is_bound(column, theirs) for column, theirs in cells),
        "factor": FACTOR,
        "where": where(record),
    }
    for name, value in numbers.items():
        frame = frame.replace(f"{{{name}}}", str(value))
    return frame


def where(record: dict[str, Any]) -> str:
    """Where the rows of the page were measured, and how many at each place."""
    shown = [row["environment"] for row in record["rows"] if row["layers"] == SHOWN_LAYERS]
    places = Counter(f"{e['device']}, torch {e['torch']}, commit {e['commit']}" for e in shown)
    return "; ".join(f"{count} rows on {place}" for place, count in places.most_common())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=SHOWN_LAYERS)
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="comma-separated")
    parser.add_argument("--rows", default="", help="only rows whose name holds this")
    parser.add_argument("--positions", default="none,rope")
    parser.add_argument("--d-ff", type=int, default=352)
    parser.add_argument("--page-only", action="store_true", help="write the page from the numbers that there are")
    arguments = parser.parse_args()
    path = FOLDER / "results.json"
    FOLDER.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": []}
    if not arguments.page_only:
        seeds = [int(seed) for seed in arguments.seeds.split(",")]
        torch.set_num_threads(1)
        known = {key(row): row for row in record["rows"]}
        order = {row.name: place for place, row in enumerate(ROWS)}
        chosen = [row for row in ROWS if arguments.rows in row.name]
        for row, positions in ((row, p) for row in chosen for p in arguments.positions.split(",")):
            try:
                runs = [measure(row, arguments.layers, seed, arguments.d_ff, positions) for seed in seeds]
            except UserError as error:
                sys.exit(f"signal_propagation: {row.name}: {error}")
            entry = {
                "scheme": row.scheme,
                "init": row.init,
                "layers": arguments.layers,
                "positions": positions,
                "strategy": row.strategy,
                "own": row.own,
                "options": row.options,
                "seeds": seeds,
                "d_ff": arguments.d_ff,
                "environment": describe_environment(torch.device("cpu")),
                "theirs": row.theirs if arguments.layers == SHOWN_LAYERS else (None,) * 5,
                "ours": {name: spread([run[name] for run in runs]) for name in runs[0]},
            }
            known[key(entry)] = entry
            shown = "  ".join(f"{name} {_short(value['median'])}" for name, value in entry["ours"].items())
            print(f"{row.name:22} {positions:5} {shown}", flush=True)
            record = {
                "benchmark": "signal_propagation",
                "rows": sorted(
                    known.values(),
                    key=lambda r: (r["layers"], r["positions"], order.get(f"{r['scheme']} {r['init']}", len(order))),
                ),
            }
            path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if (FOLDER / "frame.txt").exists():
        PAGE.write_text(page(record), encoding="utf-8")
        print(f"written to {PAGE}")


if __name__ == "__main__":
    main()
