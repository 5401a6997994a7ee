"""Workers within the cores and the memory of a machine."""

from __future__ import annotations

import pytest
import torch

from gptnorm.recipe import load_recipe
from gptnorm.study import workers
from gptnorm.study.cell import Cell


def cell(*settings):
    config = load_recipe("laptop/prenorm").resolve(["model.d_model=32", *settings])
    return Cell(strategy="prenorm", lr=1.0, seed=0, config=config)


@pytest.fixture
def machine(monkeypatch):
    def make(cores, memory):
        monkeypatch.setattr(workers, "cores", lambda: cores)
        monkeypatch.setattr(workers, "memory_available", lambda: memory)

    return make


def many(*cells, device="cpu"):
    return workers.workers_for(cells, torch.device(device), 257)


def test_as_many_as_cores_where_memory_suffices(machine):
    machine(4, 2**36)
    assert many(cell()) == 4
    machine(4, None)
    assert many(cell()) == 4
    assert many(cell(), device="cuda") == 1


def test_memory_limits(machine):
    machine(64, 10 * workers.PROCESS_BYTES)
    few = many(cell(), cell("train.batch_size=512", "train.seq_len=512"))
    alone = many(cell())
    assert 1 <= few < alone <= 10
    assert many(cell("train.batch_size=512", "train.seq_len=512"), cell()) == few, "the largest counts, wherever it is"
    machine(64, 0)
    assert many(cell()) == 1, "one at least"


def test_what_this_machine_says():
    assert workers.cores() >= 1
    room = workers.memory_available()
    assert room is None or 0 < room < 2**50
