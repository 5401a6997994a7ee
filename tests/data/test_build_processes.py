"""Builds that are killed, and builds at the same time, in real processes."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path

import pytest

from gptnorm.config import DataConfig
from gptnorm.data import prepare
from gptnorm.data.build import build_shards
from gptnorm.data.progress import Silent
from gptnorm.data.tokenizer import train_bpe
from gptnorm.lock import locked

PREPARE = """if True:
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

LIMITED = """if True:
    import resource, sys
    from pathlib import Path
    from gptnorm.config import DataConfig
    from gptnorm.data.build import build_shards
    from gptnorm.data.progress import Silent
    from gptnorm.errors import UserError

    # A file that may not grow stands for a disk that is full.
    source, folder, size = sys.argv[1:]
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), int(size)))
    try:
        build_shards(DataConfig(path=source), Path(folder), Silent())
    except UserError as error:
        print(error)
"""


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": f"Document {i}. " * 20}) + "\n" for i in range(200)))
    return path


@pytest.fixture
def mixed(tmp_path):
    """Lines, zipped lines, rows, whole files and repeats: about 1,400 documents."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    texts = [f"The {i}th text says {i * i}.\n" * (1 + i % 9) for i in range(600)]
    lines = "\n".join(json.dumps({"text": text}) for text in texts)
    (folder / "a.jsonl").write_text(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines[: len(lines) // 2].rpartition("\n")[0].encode()))
    for i in range(40):
        (folder / f"c{i:02}.txt").write_text(f"A file of its own, number {i}. " * (i * i))
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return folder
    table = pyarrow.table({"text": [f"row {i} " * 30 for i in range(500)]})
    pyarrow.parquet.write_table(table, folder / "d.parquet", row_group_size=64)
    return folder


def wait_for(folder, count):
    deadline = time.monotonic() + 120
    while len(list(folder.glob("*.reached"))) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_two_processes_want_the_same(tmp_path, corpus, start, tokenizer):
    """One builds, and is held in the midst of it; the other waits, and both get the same shards."""
    processes = [start(PREPARE, corpus, tmp_path / "cache", tokenizer, 4, tmp_path) for _ in range(2)]
    wait_for(tmp_path, 1)
    time.sleep(0.5)
    assert len(list(tmp_path.glob("*.reached"))) == 1
    (tmp_path / "go").touch()
    outputs = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0]
    assert outputs[0] == outputs[1]
    (folder,) = (tmp_path / "cache").iterdir()
    assert folder.name == outputs[0].split()[0]
    assert not (folder / ".build").exists()


@pytest.mark.parametrize("stop_at", [0, 6, 9, 13])
def test_killed_at_a_sync_and_prepared_again(tmp_path, corpus, start, stop_at):
    straight = prepare(DataConfig(path=str(corpus), cache=str(tmp_path / "straight"), val_fraction=0.2))
    cache = tmp_path / "cache"
    process = start(PREPARE, corpus, cache, "bytes", stop_at, tmp_path)
    wait_for(tmp_path, 1)
    process.kill()
    process.wait()
    shards = prepare(DataConfig(path=str(corpus), cache=str(cache), val_fraction=0.2))
    assert shards.verify() == ["train.bin", "val.bin"]
    assert contents(shards.folder) == contents(straight.folder)
    assert list(cache.iterdir()) == [shards.folder]


@pytest.mark.parametrize(
    "settings",
    [
        "dict(tokenizer={bpe!r}, val_fraction=0.2, val_tokens=3000)",
        "dict(val_fraction=0.3, val_tokens=9000, deduplicate=True)",
        "dict(max_documents=901)",
    ],
)
def test_kill_9_again_and_again(tmp_path, mixed, build_killed, settings):
    """And the shards, the card and the manifest are bit for bit those of a build that was left alone."""
    train_bpe((f"The {i}th text says {i * i}.\n" for i in range(100)), 300).save(tmp_path)
    settings = settings.format(bpe=str(tmp_path / "tokenizer.json"))
    # With a BPE each build starts two processes more.
    build_killed([mixed], tmp_path / "killed", settings, kills=6 if "tokenizer" in settings else 10)
    config = DataConfig(path=(str(mixed),), **eval(settings))
    straight = build_shards(config, tmp_path / "straight", Silent(), workers=1)
    assert contents(tmp_path / "killed") == contents(straight.folder)
    assert straight.verify()[:2] == ["train.bin", "val.bin"]


def test_kill_9_while_one_long_text_is_cut(tmp_path, build_killed):
    path = tmp_path / "long.txt"
    path.write_text("".join(f"Line {i} of one long file.\n" for i in range(20_000)))
    build_killed([path], tmp_path / "killed", "{}")
    straight = build_shards(DataConfig(path=(str(path),)), tmp_path / "straight", Silent())
    assert contents(tmp_path / "killed") == contents(straight.folder)


HALF = """if True:
    import os, sys
    from pathlib import Path
    from gptnorm.config import DataConfig
    from gptnorm.data import build, encoder
    from gptnorm.data.progress import Silent

    build.COMMIT_SECONDS, encoder.BATCH_BYTES = 0.0, 12_000
    write = build.Target.write_journal

    def write_and_die(target, journal):
        write(target, journal)
        if target.holds_documents():
            os.kill(os.getpid(), 9)

    build.Target.write_journal = write_and_die
    build.build_shards(DataConfig(path=(sys.argv[1],), val_fraction=0.2), Path(sys.argv[2]), Silent())
"""


@pytest.fixture
def half_built(tmp_path, mixed, start):
    """A folder whose builder was killed after its first documents."""
    process = start(HALF, mixed, tmp_path / "half")
    process.communicate(timeout=120)
    assert process.returncode == -9
    return tmp_path / "half"


def test_a_half_built_folder_is_told_from_other_things(tmp_path, mixed, half_built, configure, refused):
    refused(["data.path", "half built", "gptnorm data build"], prepare, configure(half_built))
    path = (str(mixed),)
    other = DataConfig(path=path, val_fraction=0.3)
    refused(["--dir", "data.val_fraction = 0.2, not 0.3"], build_shards, other, half_built, Silent())
    same = DataConfig(path=path, val_fraction=0.2)
    content = (mixed / "c01.txt").read_bytes()
    (mixed / "c01.txt").write_text("changed")
    refused(["--dir", "half built from other text"], build_shards, same, half_built, Silent())
    (mixed / "c01.txt").write_bytes(content)
    journal = half_built / ".build" / "journal.json"
    table = json.loads(journal.read_bytes())
    table["place"]["sha256"] = "0" * 64
    written = journal.read_bytes()
    journal.write_text(json.dumps(table))
    refused(["--dir", "its source gives other documents now"], build_shards, same, half_built, Silent())
    journal.write_bytes(written)
    assert build_shards(same, half_built, Silent()).verify()


def test_a_second_builder_is_refused(tmp_path, corpus, refused):
    config, folder = DataConfig(path=str(corpus)), tmp_path / "out"
    with locked(folder / ".build" / "lock", wait=False):
        refused(["--dir", "another process builds there"], build_shards, config, folder, Silent())
    assert build_shards(config, folder, Silent()).verify()


def test_a_full_disk_is_one_line_and_no_loss(tmp_path, mixed, start):
    folder = tmp_path / "out"
    output = start(LIMITED, mixed, folder, 150_000).communicate(timeout=120)[0]
    assert "cannot be written (File too large); the same command goes on" in output
    assert output.count("\n") == 1
    config = DataConfig(path=str(mixed))
    build_shards(config, folder, Silent())
    build_shards(config, tmp_path / "straight", Silent())
    assert contents(folder) == contents(tmp_path / "straight")


def test_no_tokenising_process_outlives_its_parent(tmp_path, mixed, start):
    """Nor a kill of one of them the sense of the build."""
    script = """if True:
        import sys, threading, time
        from pathlib import Path
        from gptnorm.config import DataConfig
        from gptnorm.data import build, encoder
        from gptnorm.data.progress import Silent
        from gptnorm.errors import UserError

        encoder.BATCH_BYTES = 4000
        original = encoder._Worker.encode
        started = []

        def encode(self, texts):
            print(self._process.pid, flush=True)
            if len(started) == 3:
                self._process.kill()
            started.append(self._process.pid)
            return original(self, texts)

        encoder._Worker.encode = encode
        config = DataConfig(path=sys.argv[1], tokenizer="bpe", bpe_vocab=300)
        try:
            build.build_shards(config, Path(sys.argv[2]), Silent())
        except UserError as error:
            print("refused:", error)
    """
    process = start(script, mixed, tmp_path / "out")
    lines = process.communicate(timeout=120)[0].splitlines()
    assert lines[-1].startswith("refused: --workers")
    for line in lines[:-1]:
        if line.isdigit():
            assert not Path("/proc", line).exists()
