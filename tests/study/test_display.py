"""What a terminal shows while a study runs."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console, Group

from gptnorm.recipe import load_recipe
from gptnorm.study import display
from gptnorm.study.cell import Cell, Setup
from gptnorm.study.display import Display, run_name


@pytest.fixture
def cells(recipe):
    config = load_recipe(str(recipe)).resolve(["train.steps=10"])
    places = [(("model.d_model", 16), ("data.path", "a/[b]"), ("train.steps", 10)), (("model.d_model", 32),)]
    return [
        Cell(strategy="prenorm", lr=lr, seed=3, config=config, setup=Setup(place=place))
        for lr, place in zip((0.01, 0.02), places, strict=True)
    ]


def ended(loss):
    return SimpleNamespace(val_loss=loss, step=7, seconds=2.4)


def test_names_say_what_sets_a_run_apart(cells, recipe):
    assert run_name(cells[0]) == ("prenorm  lr 0.01  seed 3", "d_model 16, path a/[b], steps 10")
    alike = Setup(place=(("a.x", 1),), variant=(("b.x", 2),))
    cell = Cell(strategy="ngpt", lr=1e-3, seed=0, config=cells[0].config, setup=alike)
    assert run_name(cell) == ("ngpt  lr 0.001  seed 0", "a.x 1, b.x 2")


def test_lines_where_there_is_no_terminal(cells):
    file = io.StringIO()
    with Display(Console(file=file, width=20)) as shown:
        shown.add(cells)
        shown.running({cells[0].folder: (5, 2.0)})
        shown.finished(cells[0], ended(2.12345))
        shown.finished(cells[1], ended(None))
    assert file.getvalue().rstrip().splitlines() == [
        "1/2 runs  prenorm  lr 0.01  seed 3  2.1235  (2 s)  d_model 16, path a/[b], steps 10",
        "2/2 runs  prenorm  lr 0.02  seed 3  diverged at step 7  (2 s)  d_model 32",
    ]


def test_a_bar_with_the_runs_below(cells, monkeypatch):
    """Half of one of two equal runs took 30 s: three quarters are left, 90 s. Long lines are cut, never wrapped."""
    file = io.StringIO()
    console = Console(file=file, width=70, force_terminal=True, color_system=None)
    with Display(console) as shown:
        shown.add(cells)
        task = shown._progress.tasks[0]
        monkeypatch.setattr(type(task), "elapsed", property(lambda _: 30.0))
        shown.running({cells[0].folder: (5, 2.0), cells[1].folder: (0, 5.5)})
        paper = Console(file=io.StringIO(), width=70)
        paper.print(Group(*shown._progress.get_renderables()))
        bar, first, second = paper.file.getvalue().splitlines()
        assert "0/2 runs" in bar
        assert "1 min 30 s left" in bar
        assert first.startswith("prenorm  lr 0.01  seed 3  step 5 of 10, loss 2.00  d_model")
        assert first.endswith("…")
        assert second.startswith("prenorm  lr 0.02  seed 3  step 0 of 10, loss 5.50")
        shown.finished(cells[0], ended(1.0))
        shown.running({cells[0].folder: (9, 1.0)})  # said before it ended, heard after
        assert shown._progress.running == [second.rstrip()]
    assert display.Display(console)._count() == "0/0 runs"
