from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptnorm.config import DataConfig
from gptnorm.data import Shards, load_tokenizer, prepare
from gptnorm.data.build import cache_folder
from gptnorm.data.shards import MANIFEST_FILE
from gptnorm.data.tokenizer import CARD_FILE

any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def is_held_out(text: str, val_fraction: float) -> bool:
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) < val_fraction * 2**64


@pytest.fixture
def texts() -> list[str]:
    return [f"Document {i}: the same words in every one.\n" * (1 + i % 5) for i in range(100)]


@pytest.fixture
def config(tmp_path, configure, texts) -> DataConfig:
    return configure(write_jsonl(tmp_path / "corpus.jsonl", texts), val_fraction=0.2)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
@given(drawn=st.lists(any_text, max_size=20))
@settings(max_examples=15, deadline=None)
def test_tokens_decode_to_the_documents(tokenizer, drawn):
    fixed = [f"fixed {i} é😀\r\n" for i in range(40)]
    with tempfile.TemporaryDirectory() as folder:
        path = write_jsonl(Path(folder) / "a.jsonl", [*drawn, *fixed])
        settings = {"tokenizer": tokenizer, "bpe_vocab": 280}
        shards = prepare(DataConfig(path=str(path), val_fraction=0.3, cache=f"{folder}/cache", **settings))
        reader = load_tokenizer(shards.folder)
        for split, held_out in (("train", False), ("val", True)):
            texts = [text for text in [*drawn, *fixed] if text and is_held_out(text, 0.3) == held_out]
            expected = list(dict.fromkeys(texts)) if held_out else texts
            tokens = getattr(shards, split)
            assert tokens[-1] == shards.end_of_text
            ends = np.flatnonzero(tokens == shards.end_of_text)
            documents = np.split(tokens, ends + 1)[:-1]
            assert [reader.decode(document) for document in documents] == expected
            assert shards.manifest[split]["documents"] == len(expected)
            assert shards.manifest[split]["text_bytes"] == sum(len(text.encode()) for text in expected)
            assert shards.manifest[split]["tokens"] == len(tokens)
        assert shards.val_bytes_per_token == shards.manifest["val"]["text_bytes"] / len(shards.val)


def test_bytes_are_read_by_numpy_alone(config, texts):
    shards = prepare(config)
    tokens = np.fromfile(shards.folder / "val.bin", "<u2")
    expected = [i for text in texts if is_held_out(text, 0.2) for i in [*text.encode(), 256]]
    assert tokens.tolist() == expected
    assert (shards.vocab_size, shards.end_of_text, shards.train.dtype) == (257, 256, np.dtype("<u2"))
    assert shards.verify() == ["train.bin", "val.bin"]


def test_second_time_is_from_the_cache(config):
    first = prepare(config)
    written = {path.name: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    second = prepare(config)
    assert second.folder == first.folder
    assert second.fingerprint == first.fingerprint
    assert written == {path.name: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    assert list(Path(config.cache or "").iterdir()) == [first.folder]
    with pytest.raises(ValueError, match="read-only"):
        first.train[0] = 1


def test_split_depends_on_content_only(tmp_path, configure, texts):
    contents = []
    for name, order in (("one", 1), ("two", -1)):
        (tmp_path / name).mkdir()
        for i, text in enumerate(texts[::order]):
            (tmp_path / name / f"{i:03}.txt").write_text(text)
        shards = prepare(configure(tmp_path / name, val_fraction=0.2))
        split = {side: load_tokenizer(shards.folder).decode(getattr(shards, side)) for side in ("train", "val")}
        contents.append({side: sorted(text.splitlines()) for side, text in split.items()})
    assert contents[0] == contents[1]


def test_every_deciding_setting_has_its_own_shards(tmp_path, config, configure, texts):
    own = str(tmp_path / "corpus.jsonl")
    bpe = prepare(configure(own, val_fraction=0.2, tokenizer="bpe", bpe_vocab=300))
    theirs = configure(own, val_fraction=0.2, tokenizer=str(bpe.folder / "tokenizer.json"))
    folders = {
        prepare(config).folder,
        bpe.folder,
        prepare(theirs).folder,
        prepare(configure(own, val_fraction=0.2, tokenizer="bpe", bpe_vocab=301)).folder,
        prepare(configure(own, val_fraction=0.3)).folder,
    }
    write_jsonl(tmp_path / "corpus.jsonl", [*texts, "one more"])
    folders.add(prepare(config).folder)
    assert len(folders) == 6
    assert prepare(theirs).manifest["tokenizer"] == theirs.tokenizer


def test_a_bpe_is_the_same_read_back_as_trained(tmp_path, config, configure):
    own = str(tmp_path / "corpus.jsonl")
    trained = prepare(configure(own, val_fraction=0.2, tokenizer="bpe", bpe_vocab=300))
    given = prepare(configure(own, val_fraction=0.2, tokenizer=str(trained.folder / "tokenizer.json")))
    assert trained.fingerprint == given.fingerprint
    assert trained.verify() == ["train.bin", "val.bin", "tokenizer.json"]
    assert trained.vocab_size is not None
    assert trained.vocab_size <= 300


def test_a_bpe_is_trained_on_the_training_split_only(tmp_path, configure):
    held_out = next(text for i in range(999) if is_held_out(text := f"zebra{i} " * 50, 0.1))
    train = [text for i in range(80) if not is_held_out(text := f"word {i}", 0.1)]
    path = write_jsonl(tmp_path / "a.jsonl", [held_out, *train])
    shards = prepare(configure(path, tokenizer="bpe", bpe_vocab=300, val_fraction=0.1))
    assert "ebr" not in (shards.folder / "tokenizer.json").read_text()


@pytest.mark.parametrize(("largest", "dtype"), [(65_535, "uint16"), (65_536, "uint32")])
def test_width_follows_the_largest_id(tmp_path, configure, texts, largest, dtype):
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({"</s>": 0, "<unk>": 1, "words": largest}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.save(str(tmp_path / "t.json"))
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    shards = prepare(configure(path, tokenizer=str(tmp_path / "t.json"), val_fraction=0.2))
    assert shards.manifest["dtype"] == dtype == shards.train.dtype.name
    assert shards.vocab_size == largest + 1
    assert set(np.unique(shards.train).tolist()) == {0, 1, largest}
    raw = np.fromfile(shards.folder / "train.bin", "<u2" if dtype == "uint16" else "<u4")
    np.testing.assert_array_equal(raw, shards.train)


def test_a_cut_file(tmp_path, configure):
    text = "".join(f"Line {i} of one long file.\n" for i in range(8000))
    (tmp_path / "a.txt").write_text(text)
    shards = prepare(configure(tmp_path / "a.txt"))
    manifest = shards.manifest
    assert manifest["corpus"]["piece_size"] == len(text) // 200
    assert manifest["train"]["text_bytes"] + manifest["val"]["text_bytes"] == len(text)
    assert len(shards.val) > 0


def test_stdlib_names_its_python(configure):
    import platform

    manifest = prepare(configure("stdlib")).manifest
    assert manifest["corpus"]["python"] == platform.python_version()
    assert manifest["corpus"]["path"] == ["stdlib"]


def test_where_the_cache_is(monkeypatch):
    for name in ("GPTNORM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_folder(DataConfig()) == Path.home() / ".cache" / "gptnorm"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder(DataConfig()) == Path("/xdg/gptnorm")
    monkeypatch.setenv("GPTNORM_CACHE", "/own")
    assert cache_folder(DataConfig()) == Path("/own")
    assert cache_folder(DataConfig(cache="~/mine")) == Path.home() / "mine"


def test_nanogpt_shards(tmp_path, configure, refused):
    tokens = np.arange(1000, dtype=np.uint16) * 50
    tokens[:900].tofile(tmp_path / "train.bin")
    tokens[900:].tofile(tmp_path / "val.bin")
    (tmp_path / "meta.pkl").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    (tmp_path / "input.txt").write_text("text")
    shards = prepare(configure(tmp_path))
    np.testing.assert_array_equal(shards.train, tokens[:900])
    np.testing.assert_array_equal(shards.val, tokens[900:])
    assert (shards.vocab_size, shards.end_of_text, shards.manifest, shards.val_bytes_per_token) == (
        None,
        None,
        {},
        None,
    )
    assert shards.verify() == []
    refused([str(tmp_path), "no tokenizer"], load_tokenizer, tmp_path)
    tokens[:900].copy()[::-1].tofile(tmp_path / "train.bin")
    assert Shards.open(tmp_path).fingerprint != shards.fingerprint


def test_our_shards_given_as_path(config, configure, tmp_path):
    built = prepare(config)
    moved = shutil.copytree(built.folder, tmp_path / "moved")
    taken = prepare(configure(moved))
    assert taken.fingerprint == built.fingerprint
    assert taken.manifest == built.manifest
    assert taken.folder == moved


@pytest.mark.parametrize("split", ["train", "val"])
def test_bad_nanogpt_shards(tmp_path, configure, refused, split):
    np.zeros(10, np.uint16).tofile(tmp_path / "train.bin")
    np.zeros(10, np.uint16).tofile(tmp_path / "val.bin")
    (tmp_path / f"{split}.bin").write_bytes(b"123")
    refused(["data.path", f"{split}.bin", "3 bytes"], prepare, configure(tmp_path))
    (tmp_path / f"{split}.bin").write_bytes(b"")
    refused(["data.path", f"{split}.bin", "no tokens"], prepare, configure(tmp_path))
    (tmp_path / f"{split}.bin").unlink()
    refused(["data.path", f"{split}.bin", "no such file"], prepare, configure(tmp_path))


@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
def test_damaged_tokens(config, refused, name):
    shards = prepare(config)
    path = shards.folder / name
    content = path.read_bytes()
    path.write_bytes(content[:-2])
    refused(["data.path", name, f"{len(content) - 2} bytes"], prepare, config)
    path.write_bytes(b"\xff" + content[1:])
    refused(["data.path", name, "content"], prepare(config).verify)
    path.unlink()
    refused(["data.path", name], prepare, config)
    refused(["data.path", name], shards.verify)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 3},
        {"vocab_size": "257"},
        {"vocab_size": -1},
        {"dtype": "float64"},
        {"train": {}},
        {"surplus": 1},
    ],
)
def test_bad_manifest(config, refused, change):
    path = prepare(config).folder / MANIFEST_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    refused(["data.path", MANIFEST_FILE, next(iter(change))], prepare, config)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff"])
def test_manifest_that_is_none(config, refused, content):
    (prepare(config).folder / MANIFEST_FILE).write_bytes(content)
    refused(["data.path", MANIFEST_FILE], prepare, config)


def test_missing_manifest_is_not_taken_for_nanogpt(config, refused):
    shards = prepare(config)
    (shards.folder / MANIFEST_FILE).unlink()
    assert (shards.folder / CARD_FILE).exists()
    refused(["data.path", MANIFEST_FILE, "missing"], prepare, config)


def test_empty_split(tmp_path, configure, refused):
    path = write_jsonl(tmp_path / "a.jsonl", ["x"] * 40)
    refused(["data.val_fraction = 0.0001", "40", "val split", "raise"], prepare, configure(path, val_fraction=1e-4))
    refused(["data.val_fraction = 0.9999", "train split", "lower"], prepare, configure(path, val_fraction=0.9999))
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_bad_line_leaves_nothing_behind(tmp_path, configure, texts, refused):
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    with path.open("a") as file:
        file.write("{bad")
    for tokenizer in ("bytes", "bpe"):
        refused(["data.path", "line 101"], prepare, configure(path, tokenizer=tokenizer))
    assert list((tmp_path / "cache").iterdir()) == []


def test_bad_settings(tmp_path, config, configure, refused):
    own = str(tmp_path / "corpus.jsonl")
    refused(["data.tokenizer = 'gpt2'"], prepare, configure(own, tokenizer="gpt2"))
    for tokenizer in ("bytes", "bpe"):
        refused(["data.end_of_text = '</s>'"], prepare, configure(own, tokenizer=tokenizer, end_of_text="</s>"))
    (tmp_path / "file").write_text("")
    refused(["data.cache", "cannot be written"], prepare, configure(own, cache=str(tmp_path / "file" / "cache")))
