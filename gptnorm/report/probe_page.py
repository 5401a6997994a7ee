"""The page of one probe: how a signal goes through the blocks, and how its gradient comes back."""

from __future__ import annotations

from typing import Any

from gptnorm.format import count_text, digits_text, loss_text
from gptnorm.records import finite
from gptnorm.report import page
from gptnorm.report.page import Markup, tag
from gptnorm.report.panels import Panel, draw
from gptnorm.report.shared import environment_pairs, setting_table
from gptnorm.tables import flatten


def probe_page(record: dict[str, Any]) -> str:
    """The HTML of a record as `gptnorm.probe.show.make_record` makes it."""
    config = flatten(record["config"])
    strategy, backbone = config["model.strategy"], config["model.backbone"]
    when = f"after {count_text(record['step'])} steps" if record["step"] else "at initialisation"
    title = f"Signal propagation: {strategy}, {when}"
    figures = [
        page.figure(svg, panel.alt) for panel in probe_panels(record) if (svg := draw(panel, "probe")) is not None
    ]
    return page.page(
        title,
        [
            tag("header", [tag("h1", title), tag("p", f"{backbone}, {record['source']}", class_="subtitle")]),
            page.section("Summary", [page.pairs(_summary(record))]),
            page.section("Block by block", [tag("div", figures, class_="panels"), _notes()]),
            page.details(f"Every block ({len(record['blocks'])})", [_signal_table(record)]),
            page.details("Every projection", [_slot_table(record)]),
            page.details(f"Settings ({len(config)})", [setting_table(config)]),
            page.section("Environment", [page.pairs(environment_pairs(record["environment"]))]),
        ],
    )


def probe_panels(record: dict[str, Any]) -> list[Panel]:
    """What the page shows as plots."""
    blocks: list[dict[str, Any]] = record["blocks"]
    x = list(range(1, len(blocks) + 1))
    roles = list(blocks[0]["slots"])

    def panel(name: str, title: str, lines: dict[str, list[float | None]], **more: Any) -> Panel:
        alt = f"{title} over blocks: {', '.join(lines)}. The numbers are in the tables below."
        return Panel(name=name, title=title, x_label="block", x=x, lines=lines, alt=alt, **more)

    def column(*keys: str) -> list[float | None]:
        return [_pick(block, keys) for block in blocks]

    def by_role(key: str) -> dict[str, list[float | None]]:
        return {role: column("slots", role, key) for role in roles}

    return [
        panel(
            "rms",
            "RMS of stream and branches",
            {"stream": column("stream"), "attention": column("attn"), "feed-forward": column("ffn")},
        ),
        panel("grad", "Gradient norm of the stream", {"dL/dx": column("grad")}),
        panel(
            "cosines",
            "Cosines",
            {"of a block's input and output": column("cosine"), "of two tokens": column("token_cosine")},
            limits=(-0.1, 1.05),
        ),
        panel("ratios", "Gradients against that of W_v", {"W_q": column("q_over_v"), "W_k": column("k_over_v")}),
        panel("raw", "RMS of W x", by_role("raw")),
        panel("used", "RMS after norms and scales", by_role("used")),
        panel("weights", "Gradient norms of the weights", by_role("grad")),
        panel(
            "logits",
            "Attention logits, worst head",
            {
                "bound": [max(block["logit_bound"], key=_or_low) for block in blocks],
                "largest": [max(block["logit_max"], key=_or_low) for block in blocks],
            },
        ),
    ]


def _or_low(value: float | None) -> float:
    return float("-inf") if value is None else value


def _pick(value: Any, keys: tuple[str, ...]) -> float | None:
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return finite(value)


def _summary(record: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("Tokens", f"{record['sequences']} × {record['seq_len']} of {record['text']}, {record['dtype']}"),
        ("Loss", f"{loss_text(finite(record['loss']))} nats per token"),
        ("Largest variance", _number(record["max_variance"])),
        ("Gradient of x₁ over that of the last x", _number(record["gradient_ratio"])),
        ("RMS before block 1", _number(record["start"])),
        *((f"Gradient norm of {role}", _number(slot["grad"])) for role, slot in record["ends"].items()),
    ]


def _notes() -> Markup:
    notes = [
        "RMS: root of the mean square over tokens and features. Branches before any norm of the wiring after them.",
        "Gradient norms: of the training objective on this batch, over all entries of a tensor.",
        "Cosine of two tokens: mean over pairs of a sequence; 1 means that all tokens have become one (rank collapse).",
        "Attention logits: the bound is scale · max‖q‖ · max‖k‖ of a head, the largest is exact.",
    ]
    return tag("ul", [tag("li", note) for note in notes], class_="notes")


def _signal_table(record: dict[str, Any]) -> Markup:
    head = [
        "block",
        "stream",
        "attention",
        "feed-forward",
        "dL/dx",
        "W_q / W_v",
        "W_k / W_v",
        "cos in, out",
        "cos tokens",
        "bound",
        "largest logit",
    ]
    keys = ("stream", "attn", "ffn", "grad", "q_over_v", "k_over_v", "cosine", "token_cosine")
    rows = []
    for number, block in enumerate(record["blocks"], 1):
        values = [
            *(block[key] for key in keys),
            *(max(block[key], key=_or_low) for key in ("logit_bound", "logit_max")),
        ]
        rows.append([page.head_cell(str(number)), *(page.data_cell(_number(value)) for value in values)])
    return page.table("Signal and gradients, block by block", head, rows, class_="numbers")


def _slot_table(record: dict[str, Any]) -> Markup:
    head = ["block", "role", "RMS of W x", "after norms and scales", "gradient norm", "RMS of W"]
    rows = [
        [
            page.head_cell(str(number)),
            page.data_cell(role, "words"),
            *(page.data_cell(_number(slot[key])) for key in ("raw", "used", "grad", "weight")),
        ]
        for number, block in enumerate(record["blocks"], 1)
        for role, slot in block["slots"].items()
    ]
    return page.table("Every projection", head, rows, class_="numbers", words=frozenset({"role"}))


def _number(value: object) -> str:
    return digits_text(finite(value))
