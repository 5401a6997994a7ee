"""Whatever stands in a study.json: it is shown, or refused in one line that names the file."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ladder_folders import make_ladder
from report_folders import make_study
from tolerance_folders import Bowl, lines_of, make_tolerance

from gptnorm.errors import UserError
from gptnorm.report import markdown_study
from gptnorm.study.ledger import differences, facts_to_grow, joined

GONE = object()
NUMBERS = [3, -1.5, 0, 1e-35, 1e308, 10**400]
JUNK = [GONE, None, *NUMBERS, True, "x", "", [], [[]], [{}], ["x"], {}, {"a": 3}, {"a": {"b": []}}]


def make_grid(folder: Path) -> Path:
    return make_study(folder, {"a": {1e-3: [2.0], 1e-2: [1.9]}, "b": {1e-3: [2.1], 1e-2: [2.2]}})


def make_rungs(folder: Path) -> Path:
    return make_ladder(folder, {("a", None): {2: 1e-2, 4: 1e-2}}, lrs=[3e-3, 1e-2, 3e-2])


def make_places(folder: Path) -> Path:
    text = {"fingerprint": "f", "vocab": 16, "unigram_entropy": 1.9, "train_tokens": 9, "val_tokens": 9}
    bowls = {"base": Bowl(4e-3), "ours": Bowl(4e-3, bottom=1.9)}
    places: list[dict[str, Any]] = [{"data.path": name, "train.steps": 50} for name in ("b", "c")]
    lines = [entry for place in places for entry in lines_of(bowls, [1e-3, 4e-3], range(2), place=place)]
    asked = {"places": places, "evaluate": ["b"], "tune": {"init.std": [0.02, "twin", [0.1, "a"]]}}
    return make_tolerance(folder, lines, lrs=[1e-3, 4e-3], seeds=[1], asked=asked, texts={"b": text, "c": text})


def paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where anything stands."""
    if at:
        yield at
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from paths(value[key], (*at, key))


def damaged(facts: dict[str, Any], at: tuple[Any, ...], junk: Any) -> dict[str, Any]:
    found = copy.deepcopy(facts)
    table: Any = found
    for key in at[:-1]:
        table = table[key]
    if junk is GONE:
        del table[at[-1]]
    else:
        table[at[-1]] = junk
    return found


@pytest.mark.parametrize("file", ["study.json", "cells.jsonl"])
@pytest.mark.parametrize("make", [make_grid, make_rungs, make_places])
def test_any_damage_is_one_line(tmp_path: Path, make: Any, file: str) -> None:
    folder = make(tmp_path / "study")
    path = folder / file
    first, *rest = path.read_text().splitlines(keepends=True) if file == "cells.jsonl" else [path.read_text()]
    assert markdown_study(folder)
    refused, tried = [], 0
    for at, junk in itertools.product(paths(json.loads(first)), JUNK):
        path.write_text("".join([json.dumps(damaged(json.loads(first), at, junk)), "\n", *rest]))
        tried += 1
        try:
            assert markdown_study(folder)
        except UserError as error:
            refused.append(str(error))
    assert all(told.startswith((f"{folder / 'study.json'}: ", f"{folder / 'cells.jsonl'}: ")) for told in refused)
    assert not [told for told in refused if "\n" in told]
    assert tried / 4 < len(refused) < tried


@pytest.mark.parametrize("make", [make_grid, make_rungs, make_places])
def test_what_is_damaged_is_not_joined_either(tmp_path: Path, make: Any) -> None:
    """Nor gone on with: it is refused in one line, differs, or joins the undamaged one."""
    folder = make(tmp_path / "study")
    path = folder / "study.json"
    whole = json.loads(path.read_text())
    whole["settings"]["recipe"] = {"train.steps": 6}
    refused, grown = [], 0
    for at, junk in itertools.product(paths(whole), JUNK):
        path.write_text(json.dumps(damaged(whole, at, junk)))
        try:
            facts = facts_to_grow(folder)
        except UserError as error:
            refused.append(str(error))
            continue
        for pair in ((facts, whole), (whole, facts)):
            if not list(differences(*pair)):
                both = joined(*pair)
                assert set(both["strategies"]) == {name for part in pair for name in part["strategies"]}
                assert both["lrs"] == sorted({lr for part in pair for lr in part["lrs"]})
        grown += 1
    assert not [told for told in refused if "\n" in told or str(folder) not in told]
    assert min(len(refused), grown) > 50


def test_a_run_at_a_place_that_is_none_is_refused(tmp_path: Path) -> None:
    """As one is that lost its "place" or its value where a ledger was mended by hand."""
    folder = make_places(tmp_path / "study")
    first, *rest = (folder / "cells.jsonl").read_text().splitlines()
    (key,) = (key for key in json.loads(first)["place"] if key != "data.path")
    for at, junk, words in (
        (("place",), GONE, "no settings"),
        (("place", key), None, f"{key} = None"),
        (("place", key), 7.5, f"{key} = 7.5"),
    ):
        wrong = json.dumps(damaged(json.loads(first), at, junk))
        (folder / "cells.jsonl").write_text("\n".join([wrong, *rest, ""]))
        with pytest.raises(
            UserError, match=r"cells\.jsonl: the place of cells/\S+ is none of study\.json's: "
        ) as caught:
            markdown_study(folder)
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("at", "junk", "told"),
    [
        (("settings",), GONE, "settings: is missing"),
        (("settings", "shared"), 3, "settings.shared = 3: must be a table; write its keys as settings.shared.KEY"),
        (("tolerance", "epsilon"), 0, "tolerance.epsilon = 0: must be greater than 0"),
        (("tolerance", "search", "edge"), "x", "tolerance.search.edge = 'x': must be a number"),
        (("tolerance", "pick"), [], "tolerance.pick = []: must not be empty"),
        (("seeds",), [1, 1], "seeds = [1, 1]: must not hold a value twice"),
        (("lrs", 0), 0.0, "lrs = 0.0: must be at least 1e-30"),
        (("data", "vocab"), -1, "data.vocab = -1: must be at least 2"),
        (("tolerance",), None, "tolerance = None: must be a table; write its keys as tolerance.KEY"),
        (
            ("settings", "recipe"),
            None,
            "settings.recipe = None: must be a table; write its keys as settings.recipe.KEY",
        ),
        (
            ("tolerance", "search", "far"),
            2,
            "tolerance.search.far: unknown key; tolerance.search has optimum, edge, reach",
        ),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, at: tuple[Any, ...], junk: Any, told: str) -> None:
    folder = make_places(tmp_path / "study")
    file = folder / "study.json"
    file.write_text(json.dumps(damaged(json.loads(file.read_text()), at, junk)))
    with pytest.raises(UserError) as caught:
        markdown_study(folder)
    assert str(caught.value) == f"{file}: {told}"
