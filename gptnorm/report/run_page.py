"""The page of one run, finished or not."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from gptnorm.format import count_text, duration_text, loss_text, value_text
from gptnorm.records import finite, read_lines, read_object_if_there, read_toml
from gptnorm.report import page
from gptnorm.report.gauge_page import gauge_sections
from gptnorm.report.page import Markup, tag
from gptnorm.report.run_plot import run_curves
from gptnorm.report.shared import environment_pairs, setting_table
from gptnorm.report.watch_page import watch_sections
from gptnorm.tables import flatten


def run_page(folder: Path) -> str:
    """The HTML of a run report."""
    metrics = read_lines(folder / "metrics.jsonl")
    status = read_object_if_there(folder / "status.json")
    config = flatten(read_toml(folder / "config.toml"))
    environment = read_object_if_there(folder / "environment.json")
    title = f"Run {folder.resolve().name}"
    content: list[Markup] = [tag("header", [tag("h1", title)])]
    state = str(status.get("status") or "unknown")
    if state == "diverged":
        reason = f"Reason: {value_text(status.get('reason') or 'not recorded')}"
        content.append(tag("div", [tag("strong", "This run diverged."), " ", reason], class_="answer bad", role="note"))
    elif state == "running":
        text = "No end is recorded: the run is still going, or it was killed."
        content.append(tag("div", text, class_="answer", role="note"))
    elif status.get("reason"):
        content.append(tag("div", f"{state}: {status['reason']}", class_="answer", role="note"))
    content.append(page.section("Summary", [page.pairs(_run_summary(metrics, status, config))]))
    plot = run_curves(metrics)
    if plot is not None:
        alt = "Training and validation loss over steps, and the learning rate below."
        content.append(page.section("Loss", [page.figure(plot, alt)]))
    content += gauge_sections(metrics)
    content += watch_sections(read_lines(folder / "watch.jsonl"))
    if config:
        content.append(page.details(f"Settings ({len(config)})", [setting_table(config)]))
    if environment:
        content.append(page.section("Environment", [page.pairs(environment_pairs(environment))]))
    return page.page(title, content)


def _run_summary(
    metrics: list[dict[str, Any]], status: dict[str, Any], config: dict[str, Any]
) -> list[tuple[str, str]]:
    steps = [step for row in metrics if (step := finite(row.get("step"))) is not None]
    last = finite(status.get("step"))
    seconds = [value for row in metrics if (value := finite(row.get("seconds"))) is not None]
    strategy = config.get("model.strategy")
    rate = tokens_per_second(metrics)
    return [
        *([("Strategy", value_text(strategy))] if strategy is not None else []),
        ("Status", str(status.get("status") or "unknown")),
        ("Steps", count_text(max(steps, default=None) if last is None else last)),
        *([("Updates left out as spikes", count_text(skipped))] if (skipped := finite(status.get("skipped"))) else []),
        ("Final validation loss", _with_unit(loss_text(finite(status.get("val_loss"))), "nats per token")),
        ("Speed", _with_unit(count_text(rate), "tokens per second")),
        ("Time in training", duration_text(max(seconds, default=None))),
    ]


def _with_unit(text: str, unit: str) -> str:
    return f"{text} {unit}" if any(sign.isdigit() for sign in text) else text


def tokens_per_second(metrics: list[dict[str, Any]]) -> float | None:
    """Training speed from the running totals `tokens` and `seconds` of the train lines.

    The first line is only a start, since it holds the warm-up of the machine; a step back in time, as lines that were
    joined by hand may have, is left out.
    """
    totals = [(finite(row.get("tokens")), finite(row.get("seconds"))) for row in metrics if row.get("split") == "train"]
    points = [(tokens, seconds) for tokens, seconds in totals if tokens is not None and seconds is not None]
    pieces = [(after[0] - before[0], after[1] - before[1]) for before, after in itertools.pairwise(points)]
    forward = [(tokens, seconds) for tokens, seconds in pieces if tokens > 0 and seconds > 0]
    if not forward:
        return None
    return sum(tokens for tokens, _ in forward) / sum(seconds for _, seconds in forward)
