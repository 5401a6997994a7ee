"""Builds that are killed, and builds at the same time, in real processes."""

from __future__ import annotations

import json
import time

import pytest

from gptnorm.config import DataConfig
from gptnorm.data import prepare

BUILD = """if True:
    import os, sys, time
    from pathlib import Path
    from gptnorm.config import DataConfig
    from gptnorm.data import prepare

    corpus, cache, tokenizer, stop_at, signals = sys.argv[1:]
    fsync, calls = os.fsync, 0

    def pausing(descriptor):
        # The build syncs at each point that matters; here it waits for the test.
        global calls
        fsync(descriptor)
        if calls == int(stop_at):
            Path(signals, f"{os.getpid()}.reached").touch()
            while not Path(signals, "go").exists():
                time.sleep(0.01)
        calls += 1

    os.fsync = pausing
    shards = prepare(DataConfig(path=corpus, cache=cache, tokenizer=tokenizer, bpe_vocab=300, val_fraction=0.2))
    print(shards.folder.name, shards.fingerprint, shards.verify())
"""


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": f"Document {i}. " * 20}) + "\n" for i in range(200)))
    return path


def wait_for(folder, count):
    deadline = time.monotonic() + 60
    while len(list(folder.glob("*.reached"))) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_two_builds_at_once(tmp_path, corpus, start, tokenizer):
    """Both are held just before the manifest is synced, so that both go for the same name."""
    processes = [start(BUILD, corpus, tmp_path / "cache", tokenizer, 2, tmp_path) for _ in range(2)]
    wait_for(tmp_path, 2)
    assert len(list((tmp_path / "cache").iterdir())) == 2
    (tmp_path / "go").touch()
    outputs = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0]
    assert outputs[0] == outputs[1]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [outputs[0].split()[0]]


# Synced in turn: the card, train.bin and val.bin in any order, the manifest, the folder, the cache after the rename.
@pytest.mark.parametrize(("stop_at", "complete"), [(0, False), (2, False), (3, False), (4, False), (5, True)])
def test_killed_build(tmp_path, corpus, start, stop_at, complete):
    cache = tmp_path / "cache"
    process = start(BUILD, corpus, cache, "bytes", stop_at, tmp_path)
    wait_for(tmp_path, 1)
    process.kill()
    process.wait()
    (left,) = cache.iterdir()
    assert left.name.startswith(".") != complete
    shards = prepare(DataConfig(path=str(corpus), cache=str(cache), val_fraction=0.2))
    assert shards.verify() == ["train.bin", "val.bin"]
    assert shards.manifest["train"]["documents"] + shards.manifest["val"]["documents"] == 200
    assert [path for path in cache.iterdir() if not path.name.startswith(".")] == [shards.folder]
