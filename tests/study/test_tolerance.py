"""The tolerance study from its recipe to its ledger."""

from __future__ import annotations

import json
import math
from operator import attrgetter

import pytest
import torch
from allocator import allocated_peak
from rich.console import Console
from study_folders import SMALL, everything, lines, outcomes

from gptnorm.errors import UserError
from gptnorm.model import build_gpt
from gptnorm.recipe import load_recipe
from gptnorm.report import load_tolerance
from gptnorm.report.grids import TextTable
from gptnorm.report.tolerance_notes import notes
from gptnorm.study.aftermath import _remove_what_was_not_asked
from gptnorm.study.asked import as_settings, parse_rates
from gptnorm.study.config import ToleranceConfig, said_keys
from gptnorm.study.ledger import OtherStudy
from gptnorm.study.measures import Point
from gptnorm.study.outcome import Stability, point_of
from gptnorm.study.run import run_study
from gptnorm.study.tolerance import Tolerance
from gptnorm.train.checkpoint import checkpoints_in, step_of

pytestmark = pytest.mark.usefixtures("in_process")

STUDY = """
[study]
title = "t"
strategies = ["prenorm", "ngpt"]
lrs = [0.001, 0.01]
seeds = [3]
workers = 1

[study.search]
reach = 0
"""


def ask(study, folder, *settings, **more):
    return run_study(Tolerance(), str(study), (*SMALL, *settings), folder, Console(quiet=True), **more)


def plan(path, *overrides):
    recipe, kind = load_recipe(str(path)), Tolerance()
    return kind.plan(recipe, kind.read(recipe, overrides), overrides)


def test_memory_is_what_a_step_takes(study, tmp_path):
    settings = ("study.seeds=[]", "train.batch_size=8", "train.accumulate=2")
    for row in lines(ask(study, tmp_path / "out", *settings)):
        config = load_recipe(str(tmp_path / "out" / row["run"] / "config.toml")).resolve([])
        model = build_gpt(config, vocab=257, device=torch.device("cpu"))
        # From the second micro-batch on.
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        tokens = torch.randint(0, 257, (4, config.train.seq_len + 1))
        # Weights, gradients and AdamW's two moments stay; the pass comes on top.
        expected = 16 * row["parameters"] + allocated_peak(model, tokens, "fp32")
        assert row["memory"] == pytest.approx(expected, rel=1e-3)


def test_seeds_that_pick_and_seeds_that_are_reported(study, tmp_path):
    folder = ask(study, tmp_path / "out", "train.eval_sequences=80")
    rows = lines(folder)
    assert {(row["strategy"], row["seed"]) for row in rows} == {(s, n) for s in ("prenorm", "ngpt") for n in (0, 3)}
    for strategy in ("prenorm", "ngpt"):
        rates = {seed: {r["lr"] for r in rows if (r["strategy"], r["seed"]) == (strategy, seed)} for seed in (0, 3)}
        assert rates[0] <= rates[3], "study.report = all"
        assert {0.001, 0.01} <= rates[0]
    assert all(len(row["nonlinearity"]) == 1 and row["nonlinearity"][0] > 0 for row in rows)
    asked = json.loads((folder / "study.json").read_text())["tolerance"]
    assert (asked["pick"], asked["baseline"], asked["tune"], asked["places"]) == ([0], "prenorm", {}, [])
    before = everything(folder)
    ask(study, folder, "train.eval_sequences=80")
    assert everything(folder) == before


def test_it_grows(study, tmp_path):
    more = ("study.seeds=[4]", "study.lrs=[0.003,0.03]", 'study.strategies=["simplenorm"]')
    folder = ask(study, tmp_path / "out")
    first = (folder / "cells.jsonl").read_text()
    ask(study, folder, *more)
    assert (folder / "cells.jsonl").read_text().startswith(first)
    whole = ask(study, tmp_path / "whole", "study.seeds=[3,4]", "study.lrs=[0.001,0.003,0.01,0.03]",
                'study.strategies=["prenorm","ngpt","simplenorm"]')  # fmt: skip
    grown, asked = outcomes(folder), outcomes(whole)
    assert asked.items() <= grown.items(), "what a study of both makes, and what the first one tried beside that"


@pytest.mark.parametrize(
    ("settings", "grown"),
    [
        ([], {"report": "near", "epsilon": 0.1, "search.edge": 4.0, "search.optimum": 3.0, "search.reach": 0}),
        (["study.report=all"], {"report": "all", "epsilon": 0.1}),
        (["study.epsilon=0.05"], {"report": "near", "epsilon": 0.05}),
        (["study.search.edge=1.5"], {"search.edge": 1.5, "search.optimum": 3.0, "search.reach": 0}),
        (["study.search.edge=1.3"], {"search.edge": 1.3, "search.optimum": 3.0, "search.reach": 0}),
    ],
)
def test_what_is_said_now_counts_also_where_it_is_the_default(study, settings, grown):
    """And what is not said stays as it was, setting by setting."""
    first = ("study.report=near", "study.epsilon=0.1", "study.search.edge=4.0", "study.search.optimum=3.0")
    before, kind, recipe = plan(study, *first), Tolerance(), load_recipe(str(study))
    facts = {"strategies": ["prenorm", "ngpt"], "lrs": [0.001, 0.01], "seeds": [3], **before.describe()}
    now = kind.grown(kind.read(recipe, tuple(settings)), facts, said_keys(recipe, tuple(settings)))
    for key, value in grown.items():
        assert attrgetter(key)(now) == value


@pytest.mark.parametrize(
    ("key", "value"),
    [("pick", None), ("epsilon", "a"), ("search", {"edge": "x"}), ("search", None), ("stability", {"rise": []}),
     ("report", "most"), ("tune", [])],
)  # fmt: skip
def test_half_a_study_is_refused_in_one_line(study, tmp_path, key, value):
    folder = ask(study, tmp_path / "out")
    facts = json.loads((folder / "study.json").read_text())
    facts["tolerance"][key] = value
    (folder / "study.json").write_text(json.dumps(facts))
    for look in (lambda: ask(study, folder), lambda: load_tolerance(folder)):
        with pytest.raises(UserError, match=rf"study\.json: tolerance\.{key}\b"):
            look()


def test_settings_are_tuned(study, tmp_path):
    settings = ('study.tune.init.std=["published","twin"]', "study.tune.optim.weight_decay=[0.0,0.1]")
    cells = plan(study, *settings).samples
    variants = {name: [dict(c.setup.variant) for c in cells if c.strategy == name] for name in ("prenorm", "ngpt")}
    # What the strategy has anyway is not tried twice: a twin init, and a decay of 0.1, for nGPT 0.
    assert variants["prenorm"] == [
        {},
        {"init.std": "published", "optim.weight_decay": 0.0},
        {"init.std": "published"},
        {"optim.weight_decay": 0.0},
    ]
    assert variants["ngpt"] == [
        {},
        {"init.std": "published"},
        {"init.std": "published", "optim.weight_decay": 0.1},
        {"optim.weight_decay": 0.1},
    ]
    assert {(c.config.init.std, c.config.optim.weight_decay) for c in cells if c.strategy == "prenorm"} == {
        (std, decay) for std in ("published", "twin") for decay in (0.0, 0.1)
    }
    folder = ask(study, tmp_path / "out", 'study.tune.init.std=["published"]', 'study.strategies=["prenorm"]')
    tried = {json.dumps(row.get("variant", {})) for row in lines(folder) if row["seed"] == 0}
    assert tried == {"{}", '{"init.std": "published"}'}
    differing = json.loads((folder / "study.json").read_text())["settings"]["shared"]
    assert differing["init.std"] == "twin", "what the strategy has as it comes"


def test_settings_that_change_nothing_are_not_tried_twice(study):
    """Without a depth factor it has no target, and the factor's defaults make none."""
    settings = ('study.tune.options.scale_mode=["published","none","forward"]', 'study.strategies=["prenorm"]')
    settings += ('study.tune.options.scale_target=["both","ffn"]', 'study.tune.strategy.norm=["backbone"]')
    assert [dict(cell.setup.variant) for cell in plan(study, *settings).samples] == [
        {},
        {"options.scale_mode": "none"},
        {"options.scale_mode": "forward"},
        {"options.scale_mode": "forward", "options.scale_target": "ffn"},
    ]


def test_settings_that_need_each_other_are_tuned_together(study):
    settings = ('study.tune.optim.width_rule=["align"]', "study.tune.optim.base_width=[8]")
    (own, ruled) = plan(study, *settings, 'study.strategies=["prenorm"]').samples
    assert (own.config.optim.width_rule, ruled.config.optim.width_rule) == ("none", "align")
    assert dict(ruled.setup.variant) == {"optim.width_rule": "align", "optim.base_width": 8}


ANY = TextTable(title="", head=(), rows=(), words=0)


def test_what_no_strategy_takes_says_what_each_does(study):
    with pytest.raises(UserError) as caught:
        plan(study, 'study.tune.options.scale_mode=["init"]', 'study.strategies=["simplenorm","ngpt"]')
    ours, theirs = str(caught.value).split("; ngpt: ")
    assert ours.startswith("simplenorm: study.tune.options.scale_mode = 'init': ")
    assert ours.endswith("its branches' outputs are normed: smaller weights would not change the forward pass")
    assert theirs.endswith("its weights are brought to norm 1 at initialisation, which would undo the factor")


def test_what_a_strategy_refuses_it_is_not_tuned_with(study, tmp_path):
    """A baseline that takes a setting is tuned all the same; the report says who does not take it."""
    tune = 'study.tune.options.qk_norm=["head"]'
    folder = ask(study, tmp_path / "out", tune, 'study.strategies=["prenorm","ngpt"]')
    tried = {(row["strategy"], json.dumps(row.get("variant", {}))) for row in lines(folder)}
    assert tried == {("prenorm", "{}"), ("prenorm", '{"options.qk_norm": "head"}'), ("ngpt", "{}")}
    (reason,) = load_tolerance(folder).refused
    assert reason.startswith("ngpt: study.tune.options.qk_norm = 'head': nGPT refuses it: ")
    assert f"Not tuned where a strategy refuses it: {reason}." in notes(load_tolerance(folder), [ANY])
    with pytest.raises(UserError, match="nGPT refuses it") as caught:
        plan(study, tune, 'study.strategies=["ngpt"]')
    assert f"ngpt: {caught.value}" == reason
    # A study that grows by a strategy that takes it says of both.
    ask(study, folder, tune, 'study.strategies=["simplenorm"]')
    assert len(load_tolerance(folder).refused) == 2


def test_places_are_compared(study):
    cells = plan(study, "study.map.model.d_model=[16,32]", "study.map.train.steps=[4,8]").samples
    assert len(cells) == 2 * 4
    sizes = {(c.config.model.d_model, c.config.model.n_heads, c.config.model.d_ff, c.config.train.steps) for c in cells}
    assert sizes == {(16, 2, 32, 4), (16, 2, 32, 8), (32, 4, 64, 4), (32, 4, 64, 8)}, "heads keep their width"
    assert {c.label for c in cells} == {f"model.d_model={d},train.steps={n}" for d in (16, 32) for n in (4, 8)}
    assert len({c.folder for c in cells}) == len(cells)


def test_places_written_out(study, tmp_path):
    first, second = "{model.d_model=16,model.n_layers=2}", "{model.n_layers=1,model.d_model=32}"
    cells = plan(study, f"study.places=[{first},{second}]").samples
    shapes = {(c.config.model.d_model, c.config.model.n_heads, c.config.model.n_layers) for c in cells}
    assert shapes == {(16, 2, 2), (32, 4, 1)}
    only = 'study.strategies=["prenorm"]'
    folder = ask(study, tmp_path / "out", f"study.places=[{first}]", only)
    ask(study, folder, f"study.places=[{second}]", only)
    asked = json.loads((folder / "study.json").read_text())["tolerance"]
    assert asked["places"] == [{"model.d_model": 16, "model.n_layers": 2}, {"model.d_model": 32, "model.n_layers": 1}]
    assert {json.dumps(row["place"]) for row in lines(folder)} == set(map(json.dumps, asked["places"]))
    assert all(row["flops"] > 0 for row in lines(folder))


def test_other_maps_are_another_study(study, tmp_path):
    folder = ask(study, tmp_path / "out", "study.map.model.n_layers=[1]", 'study.strategies=["prenorm"]')
    ask(study, folder, "study.map.model.n_layers=[2]", 'study.strategies=["prenorm"]')
    assert {row["place"]["model.n_layers"] for row in lines(folder)} == {1, 2}
    with pytest.raises(OtherStudy, match=r"settings mapped"):
        ask(study, folder, "study.map.model.dropout=[0.0]", 'study.strategies=["prenorm"]')
    with pytest.raises(OtherStudy, match=r"study\.pick = \[0\], not \[9\]"):
        ask(study, folder, "study.pick=[9]", "study.map.model.n_layers=[1]")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["study.pick=[3]"], "study.seeds = [3]: must be other seeds"),
        (["study.pick=[]"], "study.pick = []: must not be empty"),
        (["study.lrs=[0.01]"], "study.lrs = [0.01]: needs 2 or more"),
        (["study.lrs=[0.01,0.0101]"], "study.lrs = [0.01, 0.0101]: needs rates a factor 1.05 or more apart"),
        (["study.baseline=foo"], "study.baseline = 'foo': must be one of prenorm, ngpt"),
        (["study.report=most"], "study.report = 'most'"),
        (["study.lrs=[1e-40,1e-3]"], "study.lrs"),
        (["study.lrs=[1e-3,1e300]"], "must be at most 1e+30"),
        (["study.stability.margin=nan"], "study.stability.margin = nan: must be a number"),
        (["train.log_every=10"], "train.log_every: the study sets it itself"),
        (["study.map.train.log_every=[1,10]"], "study.map.train.log_every = [1, 10]: the study sets it itself"),
        (["study.map.optim.warmup=[{a=1},{a=2}]"], "study.map.optim.warmup = {'a': 1}: must be a value"),
        (["study.tune.init.std=[[{a=1}]]"], "study.tune.init.std = [{'a': 1}]: must be a value"),
        (["study.places=[{optim.warmup=[{a=1}]}]"], "study.places.optim.warmup = [{'a': 1}]: must be a value"),
        (["study.search.edge=1.0"], "study.search.edge = 1.0"),
        (["study.search.foo=1.0"], "study.search.foo: unknown key"),
        (["study.stability.rise=-1"], "study.stability.rise"),
        (["study.tune.init.std=twin"], "study.tune.init.std = 'twin': must be a list"),
        (["study.tune.init.std=[]"], "study.tune.init.std"),
        (["study.tune.init.std=[0.1,0.1]"], "must not repeat an entry"),
        (["study.tune.init.foo=[1]"], "study.tune.init.foo: unknown key; init has"),
        (["study.map.foo=[1,2]"], "study.map.foo: unknown key; the top level has"),
        (["study.places=[{optim.wd=1},{optim.wd=2}]"], "study.places.optim.wd: unknown key; optim has"),
        (["study.places=[1]"], "study.places = 1: must be a list of tables, such as [{KEY = 1}, {KEY = 2}]"),
        (["study.tune.train.steps=[4,8]"], "is part of the budget"),
        (["study.tune.model.n_layers=[1,2]"], "is part of the budget"),
        (["study.tune.init.std=[-1.0]"], "init.std"),
        (["study.map.optim.lr=[0.1]"], "study.map.optim.lr"),
        (["study.map.data.max_tokens=[1]"], "study.map.data.max_tokens"),
        (["study.map.model.d_model=[17]"], "study.map.model.d_model = 17"),
        (['study.map.model.d_model=["a"]'], "study.map.model.d_model = 'a'"),
        (["study.map.init.std=[0.1]", "study.tune.init.std=[0.2]"], "study.tune.init.std: is in study.map, too"),
        (["study.tune.init.std=[0.2]", "init.std=0.3"], "init.std: the study sets it itself; see study.tune"),
        (["study.depths=[1,2]"], "study.depths"),
        (["study.tune=3"], "study.tune"),
        (["study.shortlist=0.02"], "study.shortlist = 0.02: needs study.tune"),
        (["study.shortlist=-0.1", "study.tune.init.std=[0.1]"], "study.shortlist = -0.1: must be at least 0"),
        (["study.shortlist=inf", "study.tune.init.std=[0.1]"], "study.shortlist = inf"),
        (["study.shortlist=0.02", "study.tune.init.std=[0.1]", "study.report=best", "study.seeds=[1,2]"],
         "study.shortlist = 0.02: needs two study.seeds or more and another study.report than 'best'"),
        (["study.shortlist=0.02", "study.tune.init.std=[0.1]", "study.seeds=[1]"],
         "study.shortlist = 0.02: needs two study.seeds or more"),
        (["study.places=[{a=1}]"], "a: unknown key"),
        (["study.places=[{model.n_layers=1},{train.steps=2}]"], "must set the same as the first: model.n_layers"),
        (["study.places=[{}]"], "study.places"),
        (["study.places=[{model.n_layers=1},{model.n_layers=1}]"], "must not repeat an entry"),
        (["study.places=[{optim.lr=1.0}]"], "study.places.optim.lr"),
        (["study.places=[{model.n_layers=1}]", "study.map.train.steps=[4]"], "study.places: is given beside study.map"),
        (["study.places=[{model.n_layers=1}]", "model.n_layers=2"], "model.n_layers: the study sets it"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_anything_is_made(study, tmp_path, settings, words):
    with pytest.raises(UserError) as caught:
        ask(study, tmp_path / "out", *settings)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_every_step_is_logged_whatever_the_recipe_says(study, tmp_path):
    """Spikes, and whether a run is stable, are read off the losses of all steps."""
    recipe = tmp_path / "seldom.toml"
    recipe.write_text(study.read_text().replace("[train]", "[train]\nlog_every = 2"))
    folder = ask(recipe, tmp_path / "out")
    assert load_recipe(str(recipe)).resolve(()).train.log_every == 2
    for row in lines(folder):
        logged = [json.loads(entry) for entry in (folder / row["run"] / "metrics.jsonl").read_text().splitlines()]
        steps = [entry["step"] for entry in logged if entry["split"] == "train"]
        assert len(steps) == max(steps), row["run"]


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        (("checkpoint.every=2", "checkpoint.keep=1", "checkpoint.final=false"), [4]),
        (("checkpoint.every=2", "checkpoint.keep=2", "checkpoint.final=false"), [2, 4]),
        (("checkpoint.every=5", "checkpoint.keep=1", "checkpoint.final=false"), [5]),
        (("checkpoint.every=2", "checkpoint.keep=1", "checkpoint.final=true"), [5]),
        (("checkpoint.every=0", "checkpoint.final=false"), []),
    ],
)
def test_checkpoints_are_those_that_the_recipe_asks_for(study, tmp_path, settings, kept):
    """A measured run passes through one of its own; it takes none of the others away."""
    folder = ask(study, tmp_path / "out", *settings, "train.steps=5", "study.seeds=[]", "study.lrs=[0.001,0.003]")
    for row in lines(folder):
        there = checkpoints_in(folder / row["run"] / "checkpoints")
        assert [step_of(path) for path in there] == kept, row["run"]


def test_a_measured_run_keeps_no_more_checkpoints_than_were_asked(study, tmp_path):
    """It keeps one more while it trains, which one that diverges, for one, has no use for."""
    folder = ask(study, tmp_path / "out", "checkpoint.every=1", "checkpoint.keep=3", "study.seeds=[]")
    run = folder / lines(folder)[0]["run"]
    asked = load_recipe(str(run / "config.toml")).resolve(["checkpoint.keep=2"])
    assert [step_of(path) for path in checkpoints_in(run / "checkpoints")] == [2, 3, 4]
    _remove_what_was_not_asked(asked, run)
    assert [step_of(path) for path in checkpoints_in(run / "checkpoints")] == [3, 4]


def test_options_stand_for_settings(study):
    recipe = load_recipe(str(study))

    def asked(*settings, **options):
        return as_settings(
            ToleranceConfig, recipe, settings, **{"strategies": None, "lrs": None, "seeds": None, **options}
        )

    found = asked("a=1", strategies="x, y", lrs="1e-3:1e-1", seeds=2)
    assert found == ("a=1", 'study.strategies=["x", "y"]', "study.lrs=[0.001, 0.003, 0.01, 0.03, 0.1]",
                     "study.seeds=[1, 2]")  # fmt: skip
    assert asked("study.pick=[0,2]", seeds=3)[1:] == ("study.seeds=[1, 3, 4]",)
    assert asked(seeds=0) == ("study.seeds=[]",)
    study.write_text(study.read_text().replace("workers = 1", "workers = 1\npick = [1, 2]"))
    found = as_settings(ToleranceConfig, load_recipe(str(study)), (), strategies=None, lrs=None, seeds=2)
    assert found == ("study.seeds=[0, 3]",)
    assert parse_rates("1e-3, 2e-2") == (1e-3, 2e-2)
    with pytest.raises(UserError, match=r"--seeds and study\.seeds say the same"):
        asked("study.seeds=[1]", seeds=2)
    for wrong in ("study.pick=3", "study=3"):
        with pytest.raises(UserError, match="study"):
            asked(wrong, seeds=2)


def test_any_recipe_is_a_study_with_strategies_and_rates(recipe, tmp_path):
    own = load_recipe(str(recipe))
    settings = as_settings(ToleranceConfig, own, (), strategies="prenorm,ngpt", lrs="1e-3,1e-2", seeds=1)
    folder = ask(recipe, tmp_path / "out", *settings, "study.search.reach=0", "study.workers=1")
    assert {(row["strategy"], row["seed"]) for row in lines(folder)} == {
        (s, n) for s in ("prenorm", "ngpt") for n in (0, 1)
    }
    assert json.loads((folder / "study.json").read_text())["title"].endswith(own.name)
    with pytest.raises(UserError, match=r"no \[study\] table.*give study\.strategies, study\.lrs"):
        as_settings(ToleranceConfig, own, (), strategies=None, lrs=None, seeds=1)


def test_lists_as_values_and_equal_numbers(study, tmp_path):
    """JSON has no tuples, and 0 is 0.0: a study that goes on must find its own places again."""
    only = 'study.strategies=["prenorm"]'
    settings = ("study.map.optim.betas=[[0.9,0.95],[0.9,0.99]]", only)
    folder = ask(study, tmp_path / "out", *settings)
    before = everything(folder)
    ask(study, folder, *settings)
    assert everything(folder) == before
    assert len({cell.folder for cell in plan(study, "study.map.optim.warmup=[0,0.0]", only).samples}) == 1


def test_from_a_map_to_places_written_out(study, tmp_path):
    only = 'study.strategies=["prenorm"]'
    folder = ask(study, tmp_path / "out", "study.map.model.n_layers=[1]", only)
    ask(study, folder, "study.places=[{model.n_layers=2}]", only)
    ask(study, folder, 'study.strategies=["ngpt"]', "study.map.model.n_layers=[1]")
    assert {(row["strategy"], row["place"]["model.n_layers"]) for row in lines(folder)} == {
        (name, n) for name in ("prenorm", "ngpt") for n in (1, 2)
    }
    assert json.loads((folder / "study.json").read_text())["complete"] is True


def test_what_was_said_once_stays(study, tmp_path):
    only = 'study.strategies=["prenorm"]'
    folder = ask(study, tmp_path / "out", "study.epsilon=0.2", "study.stability.rise=inf", "study.report=near", only)
    ask(study, folder, "study.seeds=[4]", only)
    asked = json.loads((folder / "study.json").read_text())["tolerance"]
    assert (asked["epsilon"], asked["stability"]["rise"], asked["report"]) == (0.2, "inf", "near")


def test_a_shortlist_grows(study, tmp_path):
    """Settings that the picking seed puts below the best are reported once the list is long enough, and stay so."""
    tuned = ('study.tune.init.std=["twin","published"]', 'study.strategies=["prenorm"]', "study.report=neighbours")
    tuned += ("study.stability.margin=-inf", "study.seeds=[3,4]")
    folder = ask(study, tmp_path / "out", *tuned)
    before = lines(folder)
    assert {row["seed"] for row in before if "variant" not in row} == {0, 3, 4}
    assert {row["seed"] for row in before if "variant" in row} == {0}
    ask(study, folder, *tuned, "study.shortlist=9.0")
    ask(study, folder, *tuned)
    assert json.loads((folder / "study.json").read_text())["tolerance"]["shortlist"] == 9.0
    assert lines(folder)[: len(before)] == before
    assert {row["seed"] for row in lines(folder) if "variant" in row} == {0, 3, 4}


@pytest.mark.parametrize(
    "text", ["", ":", "1:", "a", "1:2:3", "3:1", "0:1", "-1", "nan", "inf", "1,,2", "1e-300:1e300"]
)
def test_rates_that_are_none(text):
    with pytest.raises(UserError, match="--lrs"):
        parse_rates(text)


@pytest.mark.parametrize(
    ("line", "stable"),
    [
        ({"status": "finished", "val_loss": 2.0, "tail_loss": 2.0, "lowest_loss": 1.9}, True),
        ({"status": "finished", "val_loss": 2.95, "tail_loss": 2.0, "lowest_loss": 1.9}, False),
        ({"status": "finished", "val_loss": 2.5, "tail_loss": 2.5, "lowest_loss": 1.9}, False),
        ({"status": "finished", "val_loss": None, "tail_loss": 2.0, "lowest_loss": 1.9}, False),
        ({"status": "diverged", "val_loss": None, "tail_loss": None, "lowest_loss": None}, False),
        ({"status": "diverged", "val_loss": 2.0, "tail_loss": 2.0, "lowest_loss": 2.0}, False),
    ],
)
def test_a_line_as_a_point(line, stable):
    point = point_of({"lr": 0.1, **line}, Stability(), 3.0)
    loss = line["val_loss"] if line["status"] == "finished" else None
    assert point == Point(0.1, loss, stable)
    if line["tail_loss"] == 2.5:
        assert point_of({"lr": 0.1, **line}, Stability(rise=math.inf), 3.0).stable
