"""Workers within the cores and the memory of a machine."""

from __future__ import annotations

import multiprocessing
import os
import time
from dataclasses import replace

import pytest
import torch

from gptnorm.recipe import load_recipe
from gptnorm.study import pool, workers
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


def many(*cells, device="cpu", asked=0):
    return workers.workers_for(cells, torch.device(device), 257, asked).count


def test_as_many_as_cores_where_memory_suffices(machine):
    machine(4, 2**36)
    assert many(cell()) == 4
    machine(4, None)
    assert many(cell()) == 4
    assert many(cell(), asked=7) == 7


def test_one_for_each_gpu(machine, monkeypatch):
    machine(16, 2**36)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for gpus in (0, 1, 4):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert many(cell(), device="cuda") == max(1, gpus)
    found = workers.workers_for([cell()], torch.device("cuda"), 257, 8)
    assert (found.count, found.gpus) == (8, ("0", "1", "2", "3"))


def test_one_on_the_gpu_that_is_named(machine, monkeypatch):
    """It has that number in every process: nothing is dealt out."""
    machine(16, 2**36)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for asked in (0, 2):
        found = workers.workers_for([cell()], torch.device("cuda:1"), 257, asked)
        assert (found.count, found.gpus) == (asked or 1, ())


def test_memory_limits(machine):
    machine(64, 10 * workers.PROCESS_BYTES)
    few = many(cell(), cell("train.batch_size=512", "train.seq_len=512"))
    alone = many(cell())
    assert 1 <= few < alone <= 10
    assert many(cell("train.batch_size=512", "train.seq_len=512"), cell()) == few, "the largest counts, wherever it is"
    machine(64, 0)
    assert many(cell()) == 1, "one at least"


@pytest.mark.parametrize(
    ("said", "asked", "count", "each"),
    [(1, 0, 16, None), (8, 0, 2, None), (32, 0, 1, None), (None, 0, 16, 1), (None, 4, 4, 4), (8, 4, 4, None)],
)
def test_threads_times_workers_are_the_cores(machine, monkeypatch, said, asked, count, each):
    """Where the recipe says no number, no worker takes all cores."""
    machine(16, 2**36)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    sample = cell()
    sample = replace(sample, config=replace(sample.config, train=replace(sample.config.train, threads=said)))
    assert workers.workers_for([sample], torch.device("cpu"), 257, asked) == workers.Workers(count=count, threads=each)


def test_omp_num_threads_counts_as_said(machine, monkeypatch):
    machine(16, 2**36)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    sample = cell()
    sample = replace(sample, config=replace(sample.config, train=replace(sample.config.train, threads=None)))
    assert workers.workers_for([sample], torch.device("cpu"), 257) == workers.Workers(count=16)


def test_each_worker_has_its_gpu_and_threads(tmp_path):
    """More of them than there are GPUs, all at work at once."""
    three = workers.Workers(count=3, threads=2, gpus=("3", "GPU-a"))
    context = multiprocessing.get_context("spawn")
    with pool._processes(three, None, context) as executor:
        seen = sorted(executor.map(what_it_sees, [tmp_path] * 3))
    assert seen == [("3", 2), ("3", 2), ("GPU-a", 2)]
    with pool._processes(workers.Workers(count=1), None, context) as executor:
        assert executor.submit(visible).result() == os.environ.get("CUDA_VISIBLE_DEVICES")


def what_it_sees(folder):
    (folder / str(os.getpid())).touch()
    while len(list(folder.iterdir())) < 3:
        time.sleep(0.01)
    return visible(), torch.get_num_threads()


def visible():
    return os.environ.get("CUDA_VISIBLE_DEVICES")


@pytest.mark.parametrize(("named", "names"), [(None, "01"), ("5,GPU-a", ["5", "GPU-a"]), ("2,1,0", "21")])
def test_gpus_by_the_names_that_cuda_takes(monkeypatch, named, names):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert workers.visible_gpus() == tuple(names)
