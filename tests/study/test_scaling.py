"""The scaling study from its recipe to its places."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from study_folders import SMALL, everything, lines

from gptnorm.errors import UserError
from gptnorm.recipe import load_recipe
from gptnorm.report import load_tolerance
from gptnorm.report.scaling import spots_of
from gptnorm.study.run import run_study
from gptnorm.study.scaling import Scaling, as_places

STUDY = """
[study]
title = "t"
strategies = ["prenorm"]
lrs = [0.001, 0.01]
workers = 1
models = [{ model.d_model = 8, tokens = [512, 1024] }, { model.d_model = 16, tokens = [512] }]
batches = [1, 2]

[study.search]
reach = 0
"""

RUN = tuple(setting for setting in SMALL if not setting.startswith("train.steps"))


def places(study, *overrides):
    recipe = load_recipe(str(study))
    return Scaling().read(recipe, overrides).places


def test_every_model_sees_its_text_at_every_batch(study):
    seq_len = load_recipe(str(study)).resolve(()).train.seq_len
    found = places(study)
    assert len(found) == 6
    for place in found:
        tokens = place["train.steps"] * place["train.batch_size"] * seq_len
        assert tokens == (1024 if place == {**place, "model.d_model": 8} and tokens > 512 else 512)
    alone = places(study, "study.batches=[]")
    assert [sorted(place) for place in alone] == [["model.d_model", "train.steps"]] * 3


@given(
    st.lists(st.integers(1, 48), min_size=1, max_size=4, unique=True),
    st.integers(1, 64),
    st.lists(st.integers(4000, 10**7), min_size=1, max_size=3, unique=True),
)
def test_all_batches_see_as_many_tokens_about_those_asked_for(batches, seq_len, tokens):
    tokens = [max(n, 48 * 64) for n in tokens]
    whole = math.lcm(*batches) * seq_len
    steps = [round(n / whole) for n in tokens]
    if len(set(steps)) < len(steps) or any(abs(k * whole - n) > 0.1 * n for k, n in zip(steps, tokens, strict=True)):
        with pytest.raises(UserError, match=r"^study\.models\.tokens = \d+: "):
            as_places(({"model.d_model": 8, "tokens": tokens},), tuple(batches), 16, seq_len)
        return
    found = as_places(({"model.d_model": 8, "tokens": tokens},), tuple(batches), 16, seq_len)
    seen = {}
    for place in found:
        seen.setdefault(place["train.steps"] * place["train.batch_size"] * seq_len, []).append(place)
    assert all(len(same) == len(batches) for same in seen.values())
    assert sorted(seen) == sorted(k * whole for k in steps)


def test_what_is_wrong_is_said_by_name(study):
    for setting, words in (
        ("study.map.model.d_model=[8,16]", "study.map: is for 'gptnorm study tolerance'"),
        ("study.models=[{model.d_model=8}]", "study.models.tokens = None: must be a list of whole numbers"),
        ("study.models=[{model.d_model=8,tokens=[0.5]}]", "study.models.tokens"),
        ("study.models=[{model.d_model=8,tokens=[1]}]", "one step of 2 sequences"),
        ("study.models=[{optim.lr=0.1,tokens=[512]}]", "study.models = 'optim.lr': must have model settings"),
        ('study.models=[{model.strategy="ngpt",tokens=[512]}]', "study.models = 'model.strategy'"),
        ("study.models=[{model.d_model=8,tokens=[512]},{model.n_layers=1,tokens=[512]}]", "set the same as the first"),
        ("study.models=[{model.d_model=9,tokens=[512]}]", "study.models.model.d_model"),
        ("study.models=[]", "study.models"),
        ("study.batches=[0]", "study.batches"),
        ("train.steps=3", "train.steps: the study sets it itself; see study.models"),
        ("train.batch_size=3", "train.batch_size: the study sets it itself; see study.batches"),
        ("study.widths=[8,16]", "study.widths"),
    ):
        recipe = load_recipe(str(study))
        with pytest.raises(UserError) as error:
            Scaling().plan(recipe, Scaling().read(recipe, (setting,)), (setting,))
        assert words in str(error.value), setting


def test_a_recipe_without_models_is_told_so():
    with pytest.raises(UserError) as error:
        Scaling().read(load_recipe("study/tolerance"), ())
    assert str(error.value) == "study.models: is missing"


def test_it_runs_and_grows(study, tmp_path, in_process):
    def ask(*settings):
        return run_study(Scaling(), str(study), (*RUN, *settings), tmp_path / "out", Console(quiet=True))

    folder = ask()
    rows = lines(folder)
    assert len({json.dumps(row["place"]) for row in rows}) == 6
    before = everything(folder)
    ask()
    assert everything(folder) == before
    first = (folder / "cells.jsonl").read_text()
    ask("study.models=[{model.d_model=16,tokens=[1024]}]", "study.seeds=[1]")
    assert (folder / "cells.jsonl").read_text().startswith(first)
    found = load_tolerance(folder)
    mine = spots_of(found, "prenorm")
    assert len(mine) == 8
    assert {spot.tokens for spot in mine} == {512, 1024}
    seq_len = load_recipe(str(study)).resolve(()).train.seq_len
    assert {spot.batch for spot in mine} == {seq_len, 2 * seq_len}
    # Twice the text is twice the compute.
    small = {spot.tokens: spot.flops for spot in mine if dict(spot.model)["model.d_model"] == 8}
    assert small[1024] == pytest.approx(2 * small[512])
    assert json.loads((folder / "study.json").read_text())["tolerance"]["report"] == "around"
