from __future__ import annotations

import json
import math

import numpy as np
import pytest
from rich.console import Console

from gptnorm.data import Sampler, prepare
from gptnorm.errors import UserError
from gptnorm.recipe import load_recipe
from gptnorm.study.config import StudyConfig
from gptnorm.study.facts import split_settings
from gptnorm.study.grid import Grid, make_cells
from gptnorm.study.run import run_study
from gptnorm.study.texts import unigram_entropy

STUDY = '\n[study]\ntitle = "t"\nstrategies = ["prenorm", "ngpt"]\nlrs = [0.01, 0.001]\nseeds = [3]\n'


def cells_of(path, *overrides):
    recipe = load_recipe(str(path))
    return make_cells(recipe, Grid().read(recipe, overrides), overrides)


def test_data_order_is_the_same_for_every_strategy_and_rate(study):
    cells = cells_of(study)
    assert {(c.strategy, c.lr, c.seed) for c in cells} == {
        (s, r, 3) for s in ("prenorm", "ngpt") for r in (0.01, 0.001)
    }
    orders = []
    for cell in cells:
        train = cell.config.train
        sampler = Sampler(prepare(cell.config.data).train, train.batch_size, train.seq_len, cell.config.seed)
        orders.append(np.stack([sampler.starts(step) for step in range(20)]))
        assert (cell.config.optim.lr, cell.config.seed) == (cell.lr, cell.seed)
    assert all(np.array_equal(orders[0], order) for order in orders)


def test_split_settings_shows_the_strategy_s_own(study):
    split = split_settings(cells_of(study))
    assert split["differing"]["optim.weight_decay"] == {"prenorm": 0.1, "ngpt": 0.0}
    assert split["shared"]["train.steps"] == 6
    split = split_settings(cells_of(study, "optim.weight_decay=0.1"))
    assert "optim.weight_decay" not in split["differing"]


def test_unigram_entropy_in_closed_form():
    train = np.array([0] * 5 + [1] * 1, dtype=np.uint16)  # with one added to each of four: 6, 2, 1, 1 of 10
    val = np.array([0, 0, 1, 3], dtype=np.uint16)
    expected = -(0.5 * math.log(0.6) + 0.25 * math.log(0.2) + 0.25 * math.log(0.1))
    assert unigram_entropy(train, val, 4) == pytest.approx(expected)


def test_near_rates_have_folders_of_their_own(study):
    folders = [c.folder for c in cells_of(study, "study.lrs=[0.003, 0.0030000001]")]
    assert len(set(folders)) == len(folders)


def test_a_diverged_cell_is_a_data_point(study, tmp_path):
    folder = tmp_path / "out"
    run_study(
        Grid(),
        str(study),
        ("study.strategies=['prenorm']", "study.lrs=[0.001, 1e30]", "optim.clip=0", "study.workers=1"),
        folder,
        Console(quiet=True),
    )
    rows = [json.loads(line) for line in (folder / "cells.jsonl").read_text().splitlines()]
    assert {row["lr"]: row["status"] for row in rows} == {0.001: "finished", 1e30: "diverged"}
    assert next(row["val_loss"] for row in rows if row["lr"] == 1e30) is None
    assert next(row["tail_loss"] for row in rows if row["lr"] == 1e30) is None
    losses = [json.loads(line) for line in (folder / rows[0]["run"] / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["tail_loss"] == [line["loss"] for line in losses if line["split"] == "train"][-1], "5 % of 6 steps"
    assert all((folder / row["run"] / "metrics.jsonl").is_file() for row in rows)


@pytest.mark.parametrize(
    "setting",
    ["study.lrs=[]", "study.lrs=[0]", "study.lrs=3", "study.foo=1", "study=3", "seed=1", "train.seq_len=1000000",
     "model.vocab_size=10"],
)  # fmt: skip
def test_bad_input_leaves_the_old_study_alone(study, tmp_path, setting):
    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(UserError) as caught:
        run_study(Grid(), str(study), (setting,), folder, Console(quiet=True))
    assert setting.partition("=")[0] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(folder.iterdir()) == []
    assert not (tmp_path / "out.1").exists()


def test_workers_may_be_left_out():
    assert StudyConfig(title="t", strategies=("a",), lrs=(1.0,), seeds=(0,)).workers == 0
