"""The table of a study (strategies × learning rates) for the terminal and as Markdown.

`cell_text` decides what each cell says, for these two and for the HTML report.
"""

from __future__ import annotations

from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from gptnorm.format import MISSING, loss_text, lr_text, plural
from gptnorm.report.results import Entry, Row, Study

BEST = "*"
EDGE = "* edge"
COLLAPSED = "†"


@dataclass(frozen=True, kw_only=True)
class CellText:
    """What one cell says, in parts."""

    value: str
    """ "3.4123", "diverged" or a dash."""
    below: str = ""
    """ "± 0.0061" or "(1 of 3)": what may stand in a second line."""
    mark: str = ""
    """Signs behind the number, explained in the footnotes."""
    best: bool = False

    def __str__(self) -> str:
        return " ".join(part for part in (self.value, self.below, self.mark) if part)


def cell_text(study: Study, row: Row, entry: Entry) -> CellText:
    """The text of one cell: never a number where a seed diverged or none finished."""
    if entry.diverged:
        return CellText(value="diverged", below=f"({len(entry.diverged)} of {entry.planned})")
    if entry.mean is None:
        return CellText(value=MISSING)
    best = row.best is not None and entry.lr == row.best.lr
    marks = []
    if best:
        marks.append(EDGE if row.at_edge else BEST)
    if study.no_better_than_frequencies(entry):
        marks.append(COLLAPSED)
    if not entry.complete:
        marks.append(f"({len(entry.losses)} of {entry.planned})")
    below = "" if entry.sd is None else f"± {loss_text(entry.sd)}"
    return CellText(value=loss_text(entry.mean), below=below, mark=" ".join(marks), best=best)


def footnotes(study: Study) -> list[str]:
    """Plain lines that explain the signs this table uses, and only those."""
    entries = [(row, entry) for row in study.rows for entry in row.entries]
    texts = [cell_text(study, row, entry) for row, entry in entries]
    marks = " ".join(text.mark for text in texts)
    seeds = len(study.seeds)
    mean = "Validation loss in nats per token" + (
        f", mean ± seed sd (ddof 1) over {plural(seeds, 'seed')}." if seeds > 1 else ", one seed."
    )
    notes = [mean]
    if study.pooled_sd is not None:
        notes.append(f"Over all cells together the seed sd is {loss_text(study.pooled_sd)}.")
    if BEST in marks:
        notes.append(f"{BEST} best of its row: lowest mean among the learning rates where every seed finished.")
    if EDGE in marks:
        notes.append(
            f"{EDGE}: the best stands at the edge of the learning rates tried, so it is no optimum; widen the grid."
        )
    if COLLAPSED in marks:
        notes.append(
            f"{COLLAPSED} no better than token frequencies (unigram entropy {loss_text(study.unigram_entropy)})."
        )
    if any(entry.diverged for _, entry in entries):
        notes.append("diverged (k of n): k of n seeds diverged, so no mean is shown.")
    if any(entry.mean is not None and not entry.complete for _, entry in entries):
        notes.append("(k of n): only k of n seeds have finished; not a candidate for the best.")
    if any(entry.seen == 0 for _, entry in entries):
        notes.append(f"{MISSING} not run yet.")
    return notes


def rich_table(study: Study) -> Table:
    """The table for the terminal; print it with a `rich.console.Console`."""
    # Text, never markup: a name with brackets in it is shown as it is.
    table = Table(
        title=Text(study.title, style="bold"),
        caption=Text("\n".join(footnotes(study))),
        box=box.HORIZONTALS,
        show_lines=True,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        caption_justify="left",
        title_justify="left",
    )
    # Where room is short, names fold before numbers do.
    table.add_column("strategy", style="bold", overflow="fold", min_width=8)
    for lr in study.lrs:
        table.add_column(lr_text(lr), justify="right", no_wrap=True)
    for row in study.rows:
        cells = []
        for entry in row.entries:
            text = cell_text(study, row, entry)
            style = "bold" if text.best else "red" if entry.diverged else ""
            cells.append(Text(_stacked(text), style=style))
        table.add_row(Text(row.strategy), *cells)
    return table


def _stacked(text: CellText) -> str:
    """A cell in short lines, so that six learning rates fit into eighty columns."""
    sign, _, words = text.mark.partition(" ")
    if len(sign) > 1:
        sign, words = "", text.mark
    return "\n".join(line for line in (f"{text.value} {sign}".strip(), text.below, words) if line)


def markdown_table(study: Study) -> str:
    """The table and its footnotes as Markdown, ending in a newline."""
    lines = [
        "| strategy | " + " | ".join(lr_text(lr) for lr in study.lrs) + " |",
        "|:--|" + "--:|" * len(study.lrs),
    ]
    for row in study.rows:
        cells = []
        for entry in row.entries:
            text = cell_text(study, row, entry)
            escaped = escape(str(text))
            cells.append(f"**{escaped}**" if text.best else escaped)
        lines.append(f"| {escape(row.strategy)} | " + " | ".join(cells) + " |")
    notes = "  \n".join(escape(note) for note in footnotes(study))
    return "\n".join(lines) + f"\n\n{notes}\n"


def escape(text: str) -> str:
    """Keeps pipes, stars and brackets of the data from being read as Markdown or HTML."""
    for sign in "\\|*_`<>[":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())
