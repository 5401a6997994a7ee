"""Ladders: what changes from rung to rung, and a real one of each kind from recipe to report."""

from __future__ import annotations

import json

import pytest
import torch
from rich.console import Console

from gptnorm.data import prepare
from gptnorm.errors import UserError
from gptnorm.model import build_gpt
from gptnorm.probe import probe
from gptnorm.recipe import load_recipe
from gptnorm.report import load_ladder
from gptnorm.strategies import STRATEGIES
from gptnorm.study.aftermath import run_and_measure
from gptnorm.study.cell import Cell
from gptnorm.study.grid import Grid, make_cells
from gptnorm.study.run import run_study
from gptnorm.study.signal import signal
from gptnorm.tables import flatten
from gptnorm.train.inputs import open_batches
from gptnorm.train.progress import Silent

STUDY = '\n[study]\ntitle = "t"\nstrategies = ["prenorm", "ngpt"]\nlrs = [0.01, 0.001]\nseeds = [3]\n'
QUIET = Console(quiet=True)


def cells_of(path, axis, *overrides):
    recipe = load_recipe(str(path))
    return make_cells(recipe, Grid(axis).read(recipe, overrides), overrides)


def test_depth_changes_depth_alone(study):
    cells = cells_of(study, "depth", "study.depths=[3,1]")
    assert [cell.rung.size for cell in cells] == [1] * 4 + [3] * 4
    first, last = cells[0].config, cells[-4].config
    assert first.model.n_layers == 1
    assert last.model.n_layers == 3
    assert {cell.folder for cell in cells} >= {
        "cells/prenorm/depth-1/lr-0.001-seed-3",
        "cells/ngpt/depth-3/lr-0.01-seed-3",
    }
    assert len({cell.folder for cell in cells}) == len(cells) == 8


def test_width_keeps_heads_and_proportions(study):
    cells = cells_of(study, "width", "study.widths=[16,32,48]", "model.n_kv_heads=1", 'study.rules=["none","align"]',
                     "optim.base_width=16")  # fmt: skip
    assert len(cells) == 2 * 2 * 3 * 2
    models = {cell.rung.size: cell.config.model for cell in cells}
    assert {d: (m.d_model, m.n_heads, m.n_kv_heads, m.d_ff) for d, m in models.items()} == {
        16: (16, 2, 1, 32), 32: (32, 4, 2, 64), 48: (48, 6, 3, 96),
    }  # fmt: skip
    assert {cell.config.optim.width_rule for cell in cells} == {"none", "align"}
    assert all(cell.config.optim.width_rule == cell.rung.rule for cell in cells)


def test_width_of_the_feed_forward_follows_the_backbone_where_the_recipe_is_silent():
    cells = cells_of("study/width", "width", 'study.rules=["none"]')
    models = {cell.rung.size: cell.config.model for cell in cells}
    assert {d: (m.n_heads, m.d_ff) for d, m in models.items()} == {
        32: (2, None), 64: (4, None), 128: (8, None), 256: (16, None),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("axis", "settings", "word"),
    [
        ("width", [], "study.widths"),
        ("width", ["study.widths=[16,32]"], "study.widths = [16, 32]: needs 3 widths"),
        ("width", ["study.widths=[16,32,32]"], "study.widths"),
        ("width", ["study.widths=[16,32,36]"], "study.widths = 36: must be a multiple of the head width 8"),
        ("width", ["study.widths=[8,16,24]", "model.n_kv_heads=1"], "model.n_kv_heads = 1"),
        ("width", ["study.widths=[16,32,0]"], "study.widths"),
        ("width", ["study.widths=[16,32,64]", "study.depths=[1,2]"], "study.depths = [1, 2]: must be left out"),
        ("width", ["study.widths=[16,32,64]", "model.d_model=32"], "model.d_model: the study sets it itself"),
        ("width", ["study.widths=[16,32,64]", 'study.rules=["align"]'], "optim.base_width"),
        ("width", ["study.widths=[16,32,64]", 'study.rules=["muP"]'], "study.rules"),
        ("width", ["study.widths=[16,32,64]", 'study.rules=["mup","mup"]'], "study.rules"),
        (
            "width",
            ["study.widths=[16,32,64]", 'study.rules=["mup"]', "optim.base_width=16", "optim.width_rule=align"],
            "optim.width_rule: the study sets it itself",
        ),
        (
            "width",
            ["study.widths=[16,32,64]", 'study.rules=["mup"]', "optim.base_width=16", "model.tied=true"],
            "model.tied",
        ),
        ("depth", [], "study.depths"),
        ("depth", ["study.depths=[2]"], "study.depths = [2]: needs 2 depths or more"),
        ("depth", ["study.depths=[1,2]", 'study.rules=["align"]'], "study.rules"),
        ("depth", ["study.depths=[1,2]", "model.n_layers=3"], "model.n_layers: the study sets it itself"),
        ("depth", ["study.depths=2"], "study.depths"),
        (None, ["study.depths=[1,2]"], "study.depths = [1, 2]: must be left out"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_leave_the_old_study_alone(study, tmp_path, axis, settings, word):
    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(UserError) as caught:
        run_study(Grid(axis), str(study), tuple(settings), folder, QUIET)
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(folder.iterdir()) == []
    assert not (tmp_path / "out.1").exists()


def test_a_depth_ladder(study, tmp_path):
    folder = tmp_path / "out"
    settings = ("study.depths=[1,2]", "study.strategies=['prenorm']", "study.lrs=[0.01, 1e30]", "optim.clip=0",
                "study.workers=1", "checkpoint.final=false")  # fmt: skip
    run_study(Grid("depth"), str(study), settings, folder, QUIET)
    rows = [json.loads(line) for line in (folder / "cells.jsonl").read_text().splitlines()]
    assert sorted((row["size"], row["lr"], row["rule"], row["status"]) for row in rows) == [
        (1, 0.01, None, "finished"), (1, 1e30, None, "diverged"),
        (2, 0.01, None, "finished"), (2, 1e30, None, "diverged"),
    ]  # fmt: skip
    for row in rows:
        init, trained = row["signal"]["init"], row["signal"]["trained"]
        assert len(init["grad"]) == len(init["cosine"]) == row["size"]
        assert (trained is None) == (row["status"] == "diverged")
        assert trained != init
        # What the weights passed through is gone, and the run's own settings say so.
        assert list((folder / row["run"]).glob("checkpoints/*")) == []
        assert "final = false" in (folder / row["run"] / "config.toml").read_text()
    facts = json.loads((folder / "study.json").read_text())
    assert facts["commands"][0].startswith("gptnorm study depth ")
    assert "model.n_layers" not in facts["settings"]["shared"]

    ladder = load_ladder(folder)
    assert (ladder.done, ladder.planned, ladder.sizes) == (4, 4, (1, 2))
    assert [level.size for level in ladder.climbs[0].levels] == [1, 2]


def test_a_width_ladder_under_rules(study, tmp_path):
    settings = ("study.widths=[16,32,64]", 'study.rules=["none","align"]', "optim.base_width=16", "study.lrs=[0.01]",
                "study.strategies=['prenorm']", "study.workers=1", "checkpoint.every=6")  # fmt: skip
    folder = run_study(Grid("width"), str(study), settings, tmp_path / "out", QUIET)
    rows = {(r["size"], r["rule"]): r for r in map(json.loads, (folder / "cells.jsonl").read_text().splitlines())}
    assert set(rows) == {(size, rule) for size in (16, 32, 64) for rule in ("none", "align")}
    assert rows[16, "none"]["val_loss"] == rows[16, "align"]["val_loss"]
    assert rows[64, "none"]["val_loss"] != rows[64, "align"]["val_loss"]
    # Checkpoints that the recipe asks for stay.
    assert (folder / rows[16, "none"]["run"] / "checkpoints/step-000006/manifest.json").is_file()
    assert [climb.name for climb in load_ladder(folder).climbs] == ["prenorm, no rule", "prenorm, align"]


def test_signal_is_the_probe_s(recipe):
    config = load_recipe(str(recipe)).resolve(["model.n_layers=3"])
    shards = prepare(config.data)
    model = build_gpt(config, vocab=257)
    tokens = torch.from_numpy(open_batches(config, shards)[1][0])
    found, reading = signal(model, tokens), probe(model, tokens)
    assert found["grad"] == pytest.approx([block.grad for block in reading.blocks], rel=1e-3)
    assert found["cosine"] == pytest.approx([block.cosine for block in reading.blocks], rel=1e-3)
    assert found["token_cosine"] == pytest.approx(reading.blocks[-1].token_cosine, rel=1e-3)
    with torch.no_grad():
        model.blocks[1].attn.o.weight.fill_(float("nan"))
    assert signal(model, tokens)["grad"] == [None] * 3


def test_signal_of_frozen_norms_is_that_of_the_run(recipe, tmp_path):
    """The initialisation has the constants that the run measured: with a rate of 0 nothing is between the two."""
    config = load_recipe(str(recipe)).resolve(["options.norm_scale=frozen", "optim.lr=0", "train.accumulate=2"])
    cell = Cell(strategy="prenorm", lr=0.0, seed=0, config=config, measured="signal")
    _, found = run_and_measure(cell, {cell.text: prepare(config.data)}, tmp_path / "run", Silent())
    assert found["signal"]["init"] == found["signal"]["trained"]
    assert None not in found["signal"]["init"]["grad"]


@pytest.mark.parametrize("axis", ["depth", "width"])
def test_shipped_recipes_leave_a_strategy_s_own_settings_alone(axis):
    own = {key: value for strategy in STRATEGIES.values() for key, value in strategy.recipe_defaults.items()}
    recipe = load_recipe(f"study/{axis}")
    for layer in recipe.layers:
        # Adam's epsilon is the same for all there: small enough for the one strategy that asks for it, too.
        assert own.keys() & flatten(layer.tree).keys() <= {"optim.eps"}
        assert flatten(layer.tree).get("optim.eps", 1e-12) == own["optim.eps"]
    assert make_cells(recipe, Grid(axis).read(recipe, ()), ())


def test_rules_of_the_ledger_go_on_where_none_are_said(study):
    """The command goes on without them, as it does without the widths or rates that were asked before."""
    asked = ["study.widths=[16,32,48]", "model.n_kv_heads=1", "optim.base_width=16"]
    recipe, grid = load_recipe(str(study)), Grid("width")

    def facts(*settings):
        over = (*asked, *settings)
        plan = grid.plan(recipe, grid.read(recipe, over), over)
        said = flatten(recipe.said([key for key in over if not key.startswith("study.")]))
        return {
            **plan.describe(), "settings": {"recipe": said}, "strategies": ["prenorm", "ngpt"], "lrs": [0.01, 0.001],
            "seeds": [3],
        }  # fmt: skip

    silent = grid.read(recipe, tuple(asked))
    assert grid.grown(silent, facts('study.rules=["mup","align"]'), frozenset()).rules == ("mup", "align")
    assert grid.grown(silent, facts(), frozenset()).rules == ()
    over = (*asked, "optim.width_rule=align")
    assert grid.grown(grid.read(recipe, over), facts("optim.width_rule=align"), frozenset()).rules == ()
    more = grid.read(recipe, (*asked, 'study.rules=["none"]'))
    assert grid.grown(more, facts('study.rules=["mup"]'), frozenset()).rules == ("mup", "none")
