"""What several reports show: settings, the environment, and how it was run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from gptnorm.format import count_text, duration_text, loss_text, lr_text, value_text
from gptnorm.records import finite
from gptnorm.report import page
from gptnorm.report.page import Markup, tag
from gptnorm.report.results import About, RunLine

REPORT = "report.html"


def setting_table(settings: dict[str, Any]) -> Markup:
    """Dotted keys and their values."""
    rows = [[page.head_cell(key), page.data_cell(value_text(value))] for key, value in settings.items()]
    return page.table("Settings", ["setting", "value"], rows)


_NAMES = {
    "gptnorm": "gptnorm",
    "commit": "Commit",
    "python": "Python",
    "torch": "PyTorch",
    "device": "Device",
    "threads": "Threads",
    "platform": "Platform",
    "started": "Started",
}
"""Names of an environment's keys that a person reads."""


def environment_pairs(environment: dict[str, Any]) -> list[tuple[str, str]]:
    """Versions, device and the like."""
    known = [(name, value_text(environment[key])) for key, name in _NAMES.items() if key in environment]
    more = [(key, value_text(value)) for key, value in environment.items() if key not in (*_NAMES, "resumed")]
    return known + more + _resumed_pairs(environment)


def environments_pairs(environments: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """The first in full, of every other what differs from it; a key that it lacks is "–"."""
    if not environments:
        return []
    first, *others = environments
    pairs = environment_pairs(first)
    for other in others:
        keys = [key for key in {**first, **other} if first.get(key) != other.get(key)]
        words = "; ".join(f"{_NAMES.get(key, key)}: {value_text(other.get(key))}" for key in keys)
        pairs.append(("Also made with", words))
    return pairs


def _resumed_pairs(environment: dict[str, Any]) -> list[tuple[str, str]]:
    """Where a run went on, each with what was other than before."""
    pairs, before = [], environment
    parts = environment.get("resumed")
    for part in parts if isinstance(parts, list) else ():
        if isinstance(part, dict):
            other = {key: value for key, value in part.items() if key != "step" and before.get(key) != value}
            if isinstance(other.get("settings"), list):
                other["settings"] = " ".join(map(str, other["settings"]))
            words = "; ".join(f"{_NAMES.get(key, key)}: {value_text(value)}" for key, value in other.items())
            pairs.append((f"Resumed at step {value_text(part.get('step'))}", words))
            before = {**before, **part}
    return pairs


def settings_section(study: About) -> Markup:
    """What differs between the strategies, and what they share."""
    label = "Settings that differ between the strategies"
    content: list[Markup] = []
    if study.differing:
        rows = [
            [
                page.head_cell(key),
                *(page.data_cell(value_text(values.get(strategy))) for strategy in study.strategies),
            ]
            for key, values in study.differing.items()
        ]
        content.append(page.table(label, ["setting", *study.strategies], rows))
    else:
        content.append(tag("p", "None but the strategy and the learning rate."))
    if study.shared:
        content.append(page.details(f"Shared settings ({len(study.shared)})", [setting_table(study.shared)]))
    return page.section(label, content)


def provenance_section(study: About, cells: Sequence[RunLine], seeds: str | None = None) -> Markup:
    """Command, data, versions and every run.

    Args:
        seeds: the seeds in words; default: those of the study, listed.
    """
    items = [
        ("Recipe", study.recipe or "not recorded"),
        *_data_pairs(study),
        ("Seeds", ", ".join(str(seed) for seed in study.seeds) if seeds is None else seeds),
        *environments_pairs(study.environments),
        ("Time, of all sessions and parts", duration_text(study.seconds)),
    ]
    content = []
    if study.commands:
        content.append(tag("pre", tag("code", "\n".join(study.commands))))
    content.append(page.pairs(items))
    if cells:
        content.append(page.details(f"Every run ({len(cells)})", [_run_table(study.folder, cells)]))
    return page.section("How it was run", content)


def _data_pairs(study: About) -> list[tuple[str, str]]:
    data = study.data

    def tokens(text: Mapping[str, Any]) -> str:
        training, validation = (count_text(finite(text.get(f"{split}_tokens"))) for split in ("train", "val"))
        return f"{training} training, {validation} validation"

    tokenizer = ("Tokenizer", value_text(data.get("tokenizer")))
    if study.texts:
        found = []
        for name, text in study.texts.items():
            use = "trained on" if text.get("trained") else "evaluated on"
            entropy = loss_text(finite(text.get("unigram_entropy")))
            words = f"{use}; tokens: {tokens(text)}; fingerprint {value_text(text.get('fingerprint'))}"
            found.append((f"Text {name}", f"{words}; unigram entropy {entropy} nats"))
        return [tokenizer, *found]
    return [
        ("Data", value_text(data.get("path"))),
        ("Data fingerprint", value_text(data.get("fingerprint"))),
        tokenizer,
        ("Tokens", tokens(data)),
        ("Unigram entropy", f"{loss_text(study.unigram_entropy)} nats"),
    ]


def _run_table(folder: Path, cells: Sequence[RunLine]) -> Markup:
    rows = []
    for cell in cells:
        own = folder / cell.run / REPORT
        # A link only to what is there; quoting makes it a path, whatever the data says.
        where = tag("a", cell.run, href=quote(f"{cell.run}/{REPORT}")) if cell.run and own.is_file() else cell.run
        rows.append(
            [
                page.head_cell(cell.strategy),
                page.data_cell(lr_text(cell.lr)),
                page.data_cell(str(cell.seed)),
                page.data_cell(cell.status, "diverged words" if cell.diverged else "words"),
                page.data_cell(loss_text(cell.val_loss if cell.finished else None)),
                page.data_cell(duration_text(cell.seconds)),
                page.data_cell([where], "words"),
            ]
        )
    head = ["strategy", "learning rate", "seed", "status", "validation loss", "time", "run"]
    return page.table("Every run", head, rows, class_="numbers grid", words=frozenset({"status", "run"}))
