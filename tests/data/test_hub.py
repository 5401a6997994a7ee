"""Datasets through the `datasets` library, on folders laid out like repositories of the Hub."""

from __future__ import annotations

import gzip
import json
import os
import sys
from pathlib import Path

import pytest

from gptnorm.config import DataConfig
from gptnorm.data.build import build_shards
from gptnorm.data.hub import HubDataset
from gptnorm.data.names import parse_hub_name
from gptnorm.data.progress import Silent
from gptnorm.data.tokenizer import load_tokenizer

# Read when huggingface_hub is imported: no test asks the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
datasets = pytest.importorskip("datasets")

CARD = """---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/c4-train.*.json.gz
  - split: validation
    path: en/c4-validation.*.json.gz
- config_name: realnewslike
  data_files: news.jsonl
---
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """Laid out as C4 is: configs in the card, zipped lines of several columns, several files to a split."""
    folder = tmp_path_factory.mktemp("hub") / "c4"
    (folder / "en").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    for name, texts in (
        *((f"c4-train.{i:05}-of-00009", texts_of(i)) for i in range(FILES)),
        ("c4-validation.00000-of-00001", ["not to be read"] * 50),
    ):
        lines = [json.dumps({"text": text, "timestamp": "2019", "url": "http://x"}) for text in texts]
        (folder / "en" / f"{name}.json.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    (folder / "news.jsonl").write_text(json.dumps({"text": "news"}) + "\n")
    return folder


def texts_of(file: int) -> list[str | None]:
    texts: list[str | None] = [f"Text {i} of file {file}: {'naïve 😀 ' * (i % 40)}" for i in range(230)]
    texts[3], texts[5] = None, ""
    return texts


FILES = 9
ALL = [text for file in range(FILES) for text in texts_of(file) if text]


def open_dataset(source: str, text_field: str = "text") -> HubDataset:
    return HubDataset(parse_hub_name(source), text_field)


def test_name_config_and_split_are_those_asked_for(repository):
    assert [document.text for document in open_dataset(f"hf:{repository}:en").read()] == ALL
    validation = open_dataset(f"hf:{repository}:en:validation")
    assert {document.text for document in validation.read()} == {"not to be read"}
    assert [document.text for document in open_dataset(f"hf:{repository}:realnewslike").read()] == ["news"]


@pytest.mark.parametrize("kind", ["parquet", "json", "text"])
def test_formats_without_a_card(tmp_path, kind):
    texts = [f"line {i}" for i in range(200)]
    dataset = datasets.Dataset.from_dict({"id": list(range(200)), "text": texts})
    if kind == "parquet":
        dataset.to_parquet(tmp_path / "train.parquet")
    elif kind == "json":
        dataset.to_json(tmp_path / "train.jsonl")
    else:
        (tmp_path / "train.txt").write_text("\n".join(texts))
    assert [document.text for document in open_dataset(f"hf:{tmp_path}").read()] == texts


def test_a_reading_goes_on_from_any_place_any_number_of_times(repository):
    taken, state = [], None
    shares = []
    for stop in (1, 0, 226, 1, 350, 0, 351, 2, 470, 100, 229, 20, 20):
        reading = open_dataset(f"hf:{repository}:en").read(state)
        taken += [next(iter(reading)).text for _ in range(stop)]
        state = json.loads(json.dumps(reading.state()))
        shares.append(reading.share())
    reading = open_dataset(f"hf:{repository}:en").read(state)
    assert [*taken, *(document.text for document in reading)] == ALL
    assert shares == sorted(shares)
    assert shares[-1] >= 0.6


def test_build_from_a_dataset_is_that_from_its_text(repository, tmp_path):
    built = build_shards(DataConfig(path=f"hf:{repository}:en"), tmp_path / "hub", Silent())
    path = tmp_path / "plain.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ALL))
    plain = build_shards(DataConfig(path=str(path)), tmp_path / "plain", Silent())
    assert built.fingerprint == plain.fingerprint
    assert built.manifest["corpus"]["datasets"] == [f"{repository}:en:train"]
    assert f"{repository}:en:train" in (built.folder / "card.md").read_text()


def test_datasets_and_files_in_one_build(repository, tmp_path):
    (tmp_path / "one.txt").write_text("one more")
    path = (str(tmp_path / "one.txt"), f"hf:{repository}:en", f"hf:{repository}:realnewslike")
    config = DataConfig(path=path, tokenizer="bpe", bpe_vocab=300, val_fraction=0.3)
    shards = build_shards(config, tmp_path / "out", Silent())
    reader = load_tokenizer(shards.folder)
    texts = [text for split in (shards.train, shards.val) for text in reader.decode(split).split("\n")]
    assert shards.manifest["train"]["documents"] + shards.manifest["val"]["documents"] == len(ALL) + 2
    assert "one more" in texts[0] or "one more" in texts[1]
    assert shards.manifest["corpus"]["files"] == 1


def test_kill_9_while_streaming(repository, tmp_path, build_killed):
    (tmp_path / "one.txt").write_text("one more. " * 5000)
    sources = [f"hf:{repository}:en", tmp_path / "one.txt", f"hf:{repository}:realnewslike"]
    build_killed(sources, tmp_path / "killed", "{}", kills=6)
    config = DataConfig(path=tuple(map(str, sources)))
    straight = build_shards(config, tmp_path / "straight", Silent())
    killed = {path.name: path.read_bytes() for path in (tmp_path / "killed").iterdir()}
    assert killed == {path.name: path.read_bytes() for path in straight.folder.iterdir()}


@pytest.mark.parametrize(
    ("source", "settings", "words"),
    [
        ("{}:fr", {}, ["data.path", "'fr' not found", "en"]),
        ("{}", {}, ["data.path", "en"]),
        ("{}:en:test", {}, ["data.path", "Bad split: test", "validation"]),
        ("{}:en", {"text_field": "body"}, ["data.text_field = 'body'", "'text', 'timestamp', 'url'"]),
        ("{}/en/none", {}, ["data.path", "OWNER/NAME"]),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(repository, tmp_path, refused, source, settings, words):
    config = DataConfig(path=f"hf:{source.format(repository)}", **settings)
    refused(words, build_shards, config, tmp_path / "out", Silent())
    assert not (tmp_path / "out").exists()


def test_rows_that_hold_no_text(tmp_path, refused):
    datasets.Dataset.from_dict({"text": list(range(50))}).to_parquet(tmp_path / "train.parquet")
    config = DataConfig(path=f"hf:{tmp_path}")
    refused(["data.text_field = 'text'", "row 1", "int"], build_shards, config, tmp_path / "out", Silent())


def test_a_broken_file(tmp_path, refused):
    (tmp_path / "train.parquet").write_bytes(b"PAR1 nothing PAR1")
    refused(["data.path"], build_shards, DataConfig(path=f"hf:{tmp_path}"), tmp_path / "out", Silent())


def test_without_the_library(tmp_path, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(
        ["data.path = 'c4'", "pip install 'gptnorm[data]'"],
        build_shards,
        DataConfig(path="c4"),
        tmp_path / "x",
        Silent(),
    )


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConnectionError("Couldn't reach 'allenai/c4'\non the Hub"), ["cannot be reached", "allenai/c4", "network"]),
        (datasets.exceptions.DatasetNotFoundError("doesn't exist on the Hub"), ["doesn't exist", "hf auth login"]),
        (RuntimeError("Dataset scripts are no longer supported"), ["scripts are no longer supported"]),
        (ValueError("x" * 9999), ["xxx …"]),
    ],
)
def test_whatever_the_library_raises_is_one_line(tmp_path, refused, monkeypatch, error, words):
    def fail(*arguments, **settings):
        raise error

    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    refused(["data.path = 'c4'", *words], build_shards, DataConfig(path="c4"), tmp_path / "out", Silent())
    assert not (tmp_path / "out").exists()


def test_a_network_that_fails_midway_keeps_what_there_is(repository, tmp_path, refused, monkeypatch):
    from gptnorm.data import build, encoder

    monkeypatch.setattr(build, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(encoder, "BATCH_BYTES", 10_000)
    config, folder = DataConfig(path=f"hf:{repository}:en"), tmp_path / "out"
    original = datasets.IterableDataset.__iter__

    def failing(self):
        for number, row in enumerate(original(self)):
            if number == 1500:
                raise ConnectionError("the cable is out")
            yield row

    with monkeypatch.context() as patch:
        patch.setattr(datasets.IterableDataset, "__iter__", failing)
        refused(["data.path", "the cable is out", "goes on where it was"], build_shards, config, folder, Silent())
    assert (folder / ".build" / "journal.json").exists()
    built = build_shards(config, folder, Silent())
    straight = build_shards(config, tmp_path / "straight", Silent())
    assert built.fingerprint == straight.fingerprint


def test_the_commit_of_a_half_built_folder_is_asked_for_again(repository, tmp_path, monkeypatch):
    """Else a dataset that moved on between two starts would be mixed from two versions."""
    from gptnorm.data import build

    asked = []
    original = datasets.load_dataset_builder

    def load(path, name, revision=None):
        asked.append(revision)
        builder = original(str(repository), name)
        builder.hash = revision or "newest"
        return builder

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    monkeypatch.setattr(build, "COMMIT_SECONDS", 0.0)
    config = DataConfig(path="c4")
    with monkeypatch.context() as patch:
        patch.setattr(build.Target, "publish", lambda target: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build_shards(config, tmp_path / "out", Silent())
    (tmp_path / "out" / ".build" / "manifest.json").unlink()
    shards = build_shards(config, tmp_path / "out", Silent())
    assert asked == [None, "newest"]
    assert shards.manifest["corpus"]["datasets"] == ["allenai/c4@newest:en:train"]
