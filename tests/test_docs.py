"""The Python code in docs and README runs, and the README's commands exist."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import itertools
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: str(p.relative_to(ROOT)))
def test_code_runs(page: Path) -> None:
    printed(page)


@functools.cache
def printed(page: Path) -> str:
    """What a page's code prints."""
    names: dict[str, object] = {"__name__": "docs"}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        for block in blocks(page, "python"):
            # No real file name: pydantic would look for docstrings of fields in the page itself.
            exec(compile(block, f"<{page.name}>", "exec"), names)  # our own docs
    return out.getvalue()


NUMBER = r"[-+]?\d+(?:\.\d+)?(?:e-?\d+)?"
WITHOUT_A_TABLE = {
    ("0.059", "0.042", "0.076"): "quickstart with five seeds; README and docs/results/quickstart.md have the command",
    ("0.038", "0.016", "0.060"): "quickstart from the published initialisation; docs/results/quickstart.md",
    ("0.77", "0.59", "1.004"): "docs/results/curvature.md; its table ends at 1.00, which does not say that 1 is held",
}
"""Numbers with intervals that no table has to all digits, and where they are from."""


def measured_intervals() -> set[tuple[float, float, float]]:
    """Every value with its interval in a table of docs/results, or printed by the code of a page."""
    results = ROOT / "docs" / "results"
    rows = [
        line
        for page in PAGES
        if page.parent == results and page.name not in ("README.md", "claims.md")
        for line in page.read_text(encoding="utf-8").splitlines()
        if line.startswith("|")
    ]
    pages = [page for page in PAGES if page.parent == results or page == ROOT / "docs" / "choosing.md"]
    found = re.findall(rf"({NUMBER})(?: edge)? \\?\[({NUMBER}), ({NUMBER})\]", "\n".join(rows))
    shape = rf"value=({NUMBER}), low=({NUMBER}), high=({NUMBER})"
    found += re.findall(shape, "".join(map(printed, pages)))
    return {(float(value), float(low), float(high)) for value, low, high in found}


QUOTING = [page for page in PAGES if page.name in ("README.md", "choosing.md", "claims.md")]
QUOTING += sorted((ROOT / "docs" / "strategies").glob("*.md"))


def test_intervals_that_pages_quote_were_measured() -> None:
    """Seen from either side: what one is below another, the other is above it."""
    measured = measured_intervals()
    both = {*measured, *((-value, -high, -low) for value, low, high in measured)}
    quoted = [
        (page, found)
        for page in QUOTING
        for found in re.findall(
            rf"(?<![\d.])({NUMBER})\**\s*\[({NUMBER}),\s+({NUMBER})\]", page.read_text(encoding="utf-8")
        )
    ]
    assert len(quoted) > 300

    def said(told: tuple[str, str, str], exact: tuple[float, float, float]) -> bool:
        # A table's last digit is rounded already.
        return all(abs(float(a) - b) <= 0.56 * 10.0 ** -decimals(a) for a, b in zip(told, exact, strict=True))

    unknown = [
        f"{page.relative_to(ROOT)}: {told[0]} [{told[1]}, {told[2]}]"
        for page, told in quoted
        if told not in WITHOUT_A_TABLE and not any(said(told, exact) for exact in both)
    ]
    assert not unknown


def decimals(number: str) -> int:
    """After the point, 3 of "0.012" and of "1.2e-2"."""
    digits, _, exponent = number.partition("e")
    return len(digits.partition(".")[2]) - int(exponent or 0)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_every_key_of_a_study_is_in_a_table() -> None:
    from gptnorm.reference import list_study_settings

    rows = "\n".join(
        (ROOT / f"docs/{page}.md").read_text(encoding="utf-8") for page in ("studies", "tolerance", "scaling")
    )
    named = re.findall(r"`([a-z.]+)(?:\.SETTING)?`", "\n".join(re.findall(r"^\| (`[^|]+) \|", rows, re.MULTILINE)))
    assert {setting.key.removeprefix("study.") for setting in list_study_settings()} <= set(named)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_exist(page: Path) -> None:
    """Every `gptnorm …` and `make …` line names a command, a shipped recipe and known settings."""
    from gptnorm.cli import app
    from gptnorm.recipe import load_recipe
    from gptnorm.strategies import STRATEGIES
    from gptnorm.study.asked import as_settings
    from gptnorm.study.config import ToleranceConfig
    from gptnorm.study.grid import Grid
    from gptnorm.study.scaling import Scaling, ScalingConfig
    from gptnorm.study.tolerance import Tolerance

    kinds = {"grid": Grid(), "depth": Grid("depth"), "width": Grid("width")}
    kinds |= {"tolerance": Tolerance(), "scaling": Scaling()}

    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for line in "\n".join(blocks(page, "bash")).splitlines():
        words = line.partition("#")[0].split()
        if words[:1] == ["make"]:
            assert set(words[1:]) <= set(targets), line
        if words[:1] == ["gptnorm"]:
            assert words[1] in app.commands, line
            if words[1] == "train":
                load_recipe(words[2]).resolve([] if words[2].endswith("/base") else words[3:])
            if words[1] == "plan":
                load_recipe(words[2]).resolve([word for word in words[3:] if "=" in word])
            if words[1] == "strategies" and len(words) > 2:
                assert words[2] in STRATEGIES, line
            if words[1] == "study" and words[2] not in ("join", "show"):
                arguments = shlex.split(line, comments=True)[4:]
                settings = tuple(word for word in arguments if "=" in word)
                given = dict(itertools.pairwise(arguments))
                recipe, kind = load_recipe(words[3]), kinds[words[2]]
                settings = as_settings(
                    ScalingConfig if words[2] == "scaling" else ToleranceConfig,
                    recipe,
                    settings,
                    strategies=given.get("--strategies"),
                    lrs=given.get("--lrs"),
                    seeds=None,
                )
                kind.plan(recipe, kind.read(recipe, settings), settings)


def test_tables_are_those_of_their_ledgers() -> None:
    """No number in a result table was typed by hand: each ledger's stands in one of the pages beside it."""
    from gptnorm.report import markdown_study

    results = ROOT / "docs" / "results"
    pages = [page.read_text(encoding="utf-8") for page in results.glob("*.md")]
    ledgers = [path.parent for path in results.glob("*/study.json")]
    assert ledgers
    for folder in ledgers:
        table = markdown_study(folder)
        assert any(table.rstrip() in page for page in pages), folder.name
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert markdown_study(results / "quickstart").rstrip() in readme


def load_script(name: str) -> Any:
    """A module of benchmarks/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def scripts_find_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


PAGES_OF_SCRIPTS = [
    ("catalogue", "catalogue.md"),
    ("controls", "controls.md"),
    ("experts", "experts.md"),
]


@pytest.mark.parametrize(("script", "page"), PAGES_OF_SCRIPTS)
def test_pages_made_by_scripts_are_those_of_their_ledgers(script: str, page: str) -> None:
    results = ROOT / "docs" / "results"
    assert (results / page).read_text(encoding="utf-8") == load_script(script).page(results)


def test_what_ending_runs_early_could_save_is_what_the_ledgers_say() -> None:
    found = list(load_script("early_stop").failures(ROOT / "docs" / "results"))
    (five,) = (study.share for study in found if study.study == "tolerance")
    most = {edges: max(study.share for study in found if study.edges == edges) for edges in (True, False)}
    page = " ".join((ROOT / "docs" / "tolerance.md").read_text(encoding="utf-8").split())
    for words in (
        f"would save {100 * five:.0f} % of the time of [the study of five strategies]",
        f"at most {100 * most[True]:.0f} % of any here that looks for edges",
        f"at most {100 * most[False]:.0f} % of any that does not",
    ):
        assert words in page


def test_curvature_was_measured_at_the_best_rates_that_the_ledgers_have() -> None:
    """Sharpness falls with the rate, so that a rate which is no longer a strategy's best asks for another measurement.

    Within 1 %, since a best rate between powers of ten is written with two digits in one place and three in another.
    """
    from gptnorm.report.tolerance_ledger import load_tolerance

    results = ROOT / "docs" / "results"
    (place,) = load_tolerance(results / "tolerance").places
    best = {name: track.best.lr for name, track in place.own.items() if track.best is not None}
    rates = {name: float(lr) for name, lr in load_script("curvature_training").RATES.items()}
    assert rates == pytest.approx(best, rel=0.01)

    sizes = {}
    for place in load_tolerance(results / "width-depth-map").places:
        at = dict(place.settings)
        track = place.own["simplenorm"]
        if at["train.steps"] == 400 and track.best is not None:
            sizes[at["model.d_model"], at["model.n_layers"]] = track.best.lr
    for size, lr in load_script("curvature_sizes").RATES.items():
        assert float(lr) == pytest.approx(sizes[size], rel=0.01), size


def test_what_was_measured_is_what_the_ledgers_say() -> None:
    """And no strategy is missing."""
    from gptnorm.strategies import STRATEGIES
    from gptnorm.strategies.measured import measurements

    record = ROOT / "gptnorm" / "strategies" / "measured.json"
    assert record.read_text(encoding="utf-8") == load_script("catalogue").records(ROOT / "docs" / "results")
    assert set(measurements()) == set(STRATEGIES)


def test_pages_of_strategies_say_what_was_measured_and_published() -> None:
    """Numbers and links as the ledgers have them, and with which models the paper came, as the card has it."""
    from gptnorm.strategies import STRATEGIES
    from gptnorm.strategies.catalogue import published

    catalogue = load_script("catalogue")
    for name, strategy in STRATEGIES.items():
        assert strategy.card.published_with.strip(), name
        page = (ROOT / "docs" / "strategies" / f"{name}.md").read_text(encoding="utf-8")
        assert page == catalogue.strategy_page(name, ROOT / "docs" / "results"), name
        assert published(strategy.card) in " ".join(page.split()), name


def test_cards_name_what_is_extrapolated() -> None:
    """A terminal shows, for every strategy, which pairs its paper does not have."""
    from rich.console import Console

    from gptnorm.strategies import STRATEGIES
    from gptnorm.strategies.catalogue import published, show_one

    for name, strategy in STRATEGIES.items():
        console = Console(width=1000, record=True, file=io.StringIO())
        show_one(name, console)
        assert published(strategy.card) in console.export_text(), name


def test_settings_that_differ_are_those_of_the_ledgers() -> None:
    """The table of the catalogue lists a change for each strategy that presets one, and for no other."""
    from gptnorm.strategies import STRATEGIES

    catalogue = load_script("catalogue")
    lines = catalogue.differences(ROOT / "docs" / "results").splitlines()[3:]
    listed = {line.split(" | ")[0].strip("| ").replace("\\", ""): line for line in lines if line.startswith("|")}
    for name, strategy in STRATEGIES.items():
        presets = {key: value for key, value in strategy.recipe_defaults.items() if not key.startswith("moe.")}
        assert (name in listed) == bool(presets), name
        for key in presets:
            assert f"`{key}=" in listed[name], (name, key)
