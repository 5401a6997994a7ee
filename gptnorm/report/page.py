"""HTML, built so that text is escaped unless it was built here: a name from the data cannot become markup."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from gptnorm import __version__

_VOID = frozenset({"meta", "br"})


class Markup(str):
    """Text that is HTML already."""


Content = str | Iterable[str]


def tag(name: str, content: Content = "", /, **attributes: str) -> Markup:
    """One element. `class_` gives `class`, `aria_label` gives `aria-label`; strings that are no Markup are escaped."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(value)}"' for key, value in attributes.items()
    )
    if name in _VOID:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{join(content)}</{name}>")


def join(content: Content) -> Markup:
    """The parts one after another, escaped where they are no Markup."""
    parts = [content] if isinstance(content, str) else content
    return Markup("".join(part if isinstance(part, Markup) else html.escape(part) for part in parts))


def section(heading: str, content: Iterable[str]) -> Markup:
    """A part of the page under a heading of the second level."""
    return tag("section", [tag("h2", heading), *content])


def details(summary: str, content: Iterable[str]) -> Markup:
    """Content that opens on demand, without any script."""
    return tag("details", [tag("summary", summary), *content])


def table(
    label: str, head: list[str], rows: Iterable[Iterable[Markup]], class_: str = "", words: frozenset[str] = frozenset()
) -> Markup:
    """A table that scrolls inside its own frame; `rows` hold ready `th` and `td` elements.

    Of the columns in `class_="numbers"`, those named in `words` hold text.
    """
    names = [
        tag("th", name, scope="col", class_="words") if name in words else tag("th", name, scope="col") for name in head
    ]
    inside = [
        tag("thead", tag("tr", names)),
        tag("tbody", [tag("tr", row) for row in rows]),
    ]
    # Focusable, so that the keyboard can scroll it too.
    return tag(
        "div", tag("table", inside, class_=class_), class_="scroll", tabindex="0", role="region", aria_label=label
    )


def prose(text: str) -> Markup:
    """Running text in which no line ends inside a number such as 1e-3 or a mean ± sd."""
    parts = re.split(r"(\d[\d.]*e-?\d+|\d[\d.]* ± \d[\d.]*)", text)
    return join(tag("span", part, class_="whole") if index % 2 else part for index, part in enumerate(parts))


def head_cell(text: str) -> Markup:
    """The heading of a row; a dotted key may break after a dot."""
    return tag("th", Markup(re.sub(r"\.(?=[a-z])", ".<wbr>", html.escape(text))), scope="row")


def data_cell(content: Content, class_: str = "") -> Markup:
    """A cell of a row."""
    return tag("td", content, class_=class_) if class_ else tag("td", content)


def pairs(items: Iterable[tuple[str, str]]) -> Markup:
    """Names and values as a description list."""
    return tag("dl", [tag("div", [tag("dt", name), tag("dd", value)]) for name, value in items])


def answer(sentences: Sequence[str]) -> Markup:
    """What the page says in a box at its top, the first sentence strong."""
    first, *rest = sentences
    return tag("div", [tag("p", [tag("strong", prose(first)), " ", prose(" ".join(rest))])], class_="answer")


def figure(svg: str, alt: str, caption: str = "") -> Markup:
    """A plot on a card that stays white in the dark: `svg` is ours (`figure.to_svg`), `alt` says what it shows."""
    named = svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(alt)}"', 1)
    return tag("figure", [Markup(named), *([tag("figcaption", caption)] if caption else [])])


def page(title: str, content: Iterable[str]) -> str:
    """The whole file: style inlined, nothing loaded from anywhere."""
    css = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Markup(css)),
    ]
    footer = tag("footer", f"Made by gptnorm {__version__}. This file is complete in itself and loads nothing.")
    body = [tag("main", content), footer]
    return "<!DOCTYPE html>\n" + tag("html", [tag("head", head), tag("body", body)], lang="en") + "\n"
