"""`gptnorm eval` as a newcomer meets it."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from stopping import train
from tokenizers import normalizers

from gptnorm import cli
from gptnorm.config import DataConfig
from gptnorm.data import Shards, build_shards, load_tokenizer, prepare
from gptnorm.evaluate import command
from gptnorm.recipe import load_recipe
from gptnorm.train.run_folder import RunFolder

WINDOW = 16


def documents(first: int, last: int) -> list[str]:
    return [f"The quick brown fox number {i} jumps over {i * i} dogs. Bonjour, é{i}!\n" for i in range(first, last)]


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with texts, and runs on bytes, on a BPE, on pieces of a file and on nanoGPT's shards."""
    place = tmp_path_factory.mktemp("eval")
    write_jsonl(place / "corpus.jsonl", documents(0, 300))
    write_jsonl(place / "other.jsonl", documents(1000, 1040))
    write_jsonl(place / "field.jsonl", documents(1000, 1040), field="body")
    (place / "one.txt").write_text("".join(documents(0, 300)))
    (place / "empty.txt").touch()
    (place / "tiny.toml").write_text(
        'model = {strategy = "prenorm", d_model = 16, n_layers = 1, n_heads = 2, d_ff = 32}\n'
        f"train = {{steps = 3, batch_size = 4, seq_len = {WINDOW}, threads = 1, eval_sequences = 4}}\n"
        f'data = {{path = "{place}/corpus.jsonl", val_fraction = 0.2}}\n'
    )
    nano = place / "nano"
    nano.mkdir()
    draw = np.random.default_rng(0)
    for split, size in (("train", 500), ("val", 40 * WINDOW + 1)):
        draw.integers(0, 50, size).astype("<u2").tofile(nano / f"{split}.bin")
    for name, settings in {
        "run": ("checkpoint.every=2",),
        "bpe": ("data.tokenizer=bpe", "data.bpe_vocab=300"),
        "pieces": (f"data.path={place}/one.txt",),
        "nanorun": (f"data.path={nano}", "model.vocab_size=50", "train.eval_sequences=40"),
        "learned": ("model.backbone=gpt2",),
        "low": ("train.precision=fp8",),
    }.items():
        train(place / "tiny.toml", place / name, *settings)
    return place


@pytest.fixture
def call(place, monkeypatch, capfd):
    """The exit code, output, error output and JSON record of `gptnorm eval`."""
    monkeypatch.chdir(place)

    def run(line: str, code: int = 0):
        record = place / "found.json"
        record.unlink(missing_ok=True)
        monkeypatch.setattr(sys, "argv", ["gptnorm", "eval", *line.split(), "--json", str(record)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        assert (ended.value.code or 0) == code, err
        assert err.count("\n") == (code == 2)
        assert code == 0 or err.startswith("gptnorm: ")
        return out, err, json.loads(record.read_text()) if record.exists() else None

    return run


def test_the_record_is_kept_though_nobody_reads_what_is_printed(call, place, monkeypatch):
    def gone(*_):
        raise SystemExit(0)

    monkeypatch.setattr(command, "print_evaluation", gone)
    _, _, record = call("run")
    assert record is not None


def shards_of(place: Path, run: str) -> Shards:
    return prepare(load_recipe(str(place / run / "config.toml")).resolve().data)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("nosuch", ["nosuch", "not a run folder"]),
        ("corpus.jsonl", ["not a run folder"]),
        ("a" * 300, ["not a run folder"]),
        ("run --step 9", ["--step", "2, 3"]),
        ("run --data nosuch", ["gptnorm: --data = 'nosuch': no such file"]),
        ("run --data=", ["--data"]),
        ("run --data " + "a" * 300, ["--data"]),
        ("run --data empty.txt", ["--data = 'empty.txt'", "no text"]),
        ("run --data field.jsonl", ["text_field", "body"]),
        ("run --data c4", ["--data = 'c4'", "data build"]),
        ("run --data hf:a/b", ["--data", "data build"]),
        ("run --data nano", ["--data = 'nano'", "manifest.json"]),
        ("run --stride 17", ["--stride = 17", "16"]),
        ("run --window 8 --stride 9", ["--stride = 9", "8"]),
        ("run --stride 0", ["--stride"]),
        ("run --window 0", ["--window"]),
        ("run --tokens none", ["--tokens = 'none'"]),
        ("run --documents both", ["--documents"]),
        ("run --json nosuch/x.json", ["--json"]),
        ("run optim.lr=1", ["optim.lr", "train.batch_size"]),
        ("run model.d_model=32", ["model.d_model", "as it was trained"]),
        ("run data.path=other.jsonl", ["data.path", "--data"]),
        ("run train.batch_size=0", ["train.batch_size"]),
        ("run train.device=tpu", ["train.device"]),
        ("run train.precision=fp16", ["train.precision", "bf16"]),
        ("run train.precision=fp8", ["train.precision", "must be", "bf16", "neighbours"]),
        ("run batch_size", ["KEY=VALUE"]),
        ("learned --window 17", ["--window = 17", "16"]),
        ("nanorun", ["--documents", "stream"]),
        ("nanorun --documents stream --data other.jsonl", ["--data", "tokenizer"]),
    ],
)
def test_mistakes(call, place, monkeypatch, capfd, line, words):
    before = sorted(p for p in place.rglob("*") if p.name != "found.json")
    if "--json" in line:
        monkeypatch.setattr(sys, "argv", ["gptnorm", "eval", *line.split()])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 2
        err = capfd.readouterr().err
        assert err.count("\n") == 1
        assert all(word in err for word in words)
        return
    _, err, record = call(line, 2)
    for word in words:
        assert word in err
    assert record is None
    assert sorted(place.rglob("*")) == before


def test_the_validation_loss_is_that_of_the_trainer(call, place):
    """Where the windows coincide: nanoGPT's shards, a stride of a window, every window of the split."""
    status = json.loads((place / "nanorun/status.json").read_text())
    _, _, record = call(f"nanorun --documents stream --stride {WINDOW}")
    (row,) = record["rows"]
    assert row["nats_per_token"] == pytest.approx(status["val_loss"], rel=1e-6)
    assert (row["tokens"], row["bytes"], row["bits_per_byte"]) == (40 * WINDOW, None, None)


@pytest.mark.parametrize("run", ["run", "bpe"])
def test_by_default_the_validation_split(call, place, run):
    manifest = shards_of(place, run).manifest["val"]
    for mode in ("separate", "stream"):
        out, _, record = call(f"{run} --documents {mode}")
        (row,) = record["rows"]
        assert row["scored"] == "held out"
        assert row["scored"] in out
        counts = [row[key] for key in ("documents", "tokens", "bytes", "end_tokens")]
        assert counts == [manifest[key] for key in ("documents", "tokens", "text_bytes", "documents")]
        assert (record["window"], record["stride"], record["documents"]) == (WINDOW, WINDOW // 2, mode)
        assert f"{row['bits_per_byte']:.4f}" in out


def test_checkpoints(call):
    found = [call(f"run --step {step}")[2] for step in (0, 2, 3)]
    assert [record["step"] for record in found] == [0, 2, 3]
    assert call("run")[2]["rows"] == found[-1]["rows"]
    assert len({record["rows"][0]["nats"] for record in found}) == 3


def test_how_it_is_computed_does_not_matter(call):
    one = call("run --data other.jsonl")[2]["rows"][0]
    other = call("run --data other.jsonl train.batch_size=7 train.threads=1 train.device=cpu")[2]["rows"][0]
    assert other["nats"] == pytest.approx(one["nats"], rel=1e-6)
    near = call("run --data other.jsonl train.precision=bf16")[2]
    assert near["precision"] == "bf16"
    assert near["rows"][0]["nats"] == pytest.approx(one["nats"], rel=1e-2)


def test_a_run_in_fp8_is_scored_without_it(place, monkeypatch):
    """On a GPU in bf16, which it has beside its rounding; whatever the device, in what is asked for."""
    monkeypatch.setattr(command, "resolve_device", lambda name: torch.device("cpu" if name == "auto" else name))
    trained = RunFolder.open(place / "low").config()
    assert trained.train.precision == "fp8"
    for settings, precision in (
        ([], "fp32"),
        (["train.precision=bf16"], "bf16"),
        (["train.device=cuda"], "bf16"),
        (["train.device=cuda", "train.precision=fp32"], "fp32"),
    ):
        assert command._config(trained, settings).train.precision == precision


def test_the_runs_own_tokenizer_reads_other_text(call, place):
    tokenizer = load_tokenizer(shards_of(place, "bpe").folder)
    texts = documents(1000, 1040)
    assert "body" in call("bpe --data other.jsonl --data field.jsonl", 2)[1]
    _, _, record = call("bpe --data other.jsonl")
    (row,) = record["rows"]
    assert row["tokens"] == sum(len(ids) + 1 for ids in tokenizer.encode_batch(texts))
    assert row["bytes"] == sum(len(text.encode()) for text in texts)
    assert (row["scored"], row["documents"], row["left_out"]) == ("all", 40, 0)
    _, _, again = call("bpe --data field.jsonl data.text_field=body")
    assert again["rows"][0]["nats"] == row["nats"]


def test_a_row_for_each_text(call):
    out, _, record = call("run --data other.jsonl --data corpus.jsonl --tokens 1k")
    assert [(row["data"], row["scored"]) for row in record["rows"]] == [
        ("other.jsonl", "all"),
        ("corpus.jsonl", "held out"),
    ]
    for row in record["rows"]:
        assert 990 <= row["tokens"] <= 1000
        assert row["data"] in out


@pytest.mark.parametrize("run", ["run", "bpe", "pieces"])
def test_training_documents_are_never_scored(call, place, tmp_path, run):
    """By path, as a copy, as part of something else, and as shards of other settings."""
    name = "one.txt" if run == "pieces" else "corpus.jsonl"
    shards = shards_of(place, run)
    held_out = call(run)[2]["rows"][0]
    shutil.copy(place / name, tmp_path / name)
    for same in (place / name, tmp_path / name, shards.folder):
        row = call(f"{run} --data {same}")[2]["rows"][0]
        assert (row["scored"], row["nats"]) == ("held out", held_out["nats"]), same

    mixed = tmp_path / "mixed"
    mixed.mkdir()
    shutil.copy(place / name, mixed / f"renamed{Path(name).suffix}")
    shutil.copy(place / "other.jsonl", mixed / "zz.jsonl")
    out, _, record = call(f"{run} --data {mixed}")
    row = record["rows"][0]
    if run == "pieces":
        # The file as a whole holds training text, as part of shards, too.
        assert (row["left_out"], row["documents"]) == (1, 40)
        build_shards(DataConfig(path=str(mixed), val_fraction=0.5), tmp_path / "whole")
        again = call(f"{run} --data {tmp_path / 'whole'}")[2]["rows"][0]
        assert (again["left_out"], again["documents"], again["compared_with_training"]) == (1, 40, True)
    else:
        assert (row["left_out"], row["documents"]) == (
            shards.manifest["train"]["documents"],
            shards.manifest["val"]["documents"] + 40,
        )
    assert f"left out {row['left_out']} document" in out

    if run == "run":
        path = str(place / name)
        build_shards(DataConfig(path=path, val_fraction=0.5), tmp_path / "half")
        row = call(f"run --data {tmp_path / 'half'}")[2]["rows"][0]
        assert (row["scored"], row["documents"], row["tokens"]) == (
            "all",
            held_out["documents"],
            held_out["tokens"],
        )
        write_jsonl(tmp_path / "seen.jsonl", [text for text in documents(0, 300) if not _is_held_out(text)])
        assert "nothing is left" in call(f"run --data {tmp_path / 'seen.jsonl'}", 2)[1]


def _is_held_out(text: str) -> bool:
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) < 0.2 * 2**64


def test_shards_of_another_tokenizer_are_refused(call, place, tmp_path):
    build_shards(DataConfig(path=str(place / "other.jsonl"), val_fraction=0.3), tmp_path / "bytes")
    row = call(f"run --data {tmp_path / 'bytes'}")[2]["rows"][0]
    assert (row["scored"], row["documents"]) == ("all", 40), "both splits"
    assert row["bytes"] == sum(len(text.encode()) for text in documents(1000, 1040))
    assert "another tokenizer" in call(f"bpe --data {tmp_path / 'bytes'}", 2)[1]
    settings = {"tokenizer": "bpe", "bpe_vocab": 300, "val_fraction": 0.3}
    build_shards(DataConfig(path=str(place / "other.jsonl"), **settings), tmp_path / "another")
    assert "another tokenizer" in call(f"bpe --data {tmp_path / 'another'}", 2)[1]
    settings["tokenizer"] = str(shards_of(place, "bpe").folder / "tokenizer.json")
    build_shards(DataConfig(path=str(place / "other.jsonl"), **settings), tmp_path / "same")
    row = call(f"bpe --data {tmp_path / 'same'}")[2]["rows"][0]
    assert row["nats"] == pytest.approx(call("bpe --data other.jsonl")[2]["rows"][0]["nats"], rel=1e-6)


def test_bytes_are_the_manifests_where_a_tokenizer_changes_the_text(call, place, tmp_path):
    inner = tokenizers.Tokenizer.from_file(str(shards_of(place, "bpe").folder / "tokenizer.json"))
    inner.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    inner.save(str(tmp_path / "plain.json"))
    train(place / "tiny.toml", tmp_path / "run", f"data.tokenizer={tmp_path}/plain.json")
    held_out = shards_of(tmp_path, "run").manifest["val"]
    row = call(f"{tmp_path}/run")[2]["rows"][0]
    assert (row["bytes"], row["tokens"]) == (held_out["text_bytes"], held_out["tokens"])
    assert row["nats_per_token_error"] is not None
    assert row["bits_per_byte_error"] is None
    row = call(f"{tmp_path}/run --tokens 100")[2]["rows"][0]
    assert (row["bytes"], row["bits_per_byte"]) == (None, None), "nobody knows those of a part"
    row = call(f"{tmp_path}/run --data other.jsonl")[2]["rows"][0]
    assert row["bytes"] == sum(len(text.encode()) for text in documents(1000, 1040)), "those of the text itself"


def test_ids_beyond_the_vocabulary_are_refused(call, tmp_path):
    for split in ("train", "val"):
        np.array([1, 2, 77, 3] * 10, "<u2").tofile(tmp_path / f"{split}.bin")
    err = call(f"nanorun --documents stream --data {tmp_path}", 2)[1]
    assert "77" in err
    assert "50" in err


def test_without_the_text_of_training(call, place, tmp_path, monkeypatch):
    """Bytes can be scored all the same, and it is said that nothing was compared; a trained tokenizer is gone."""
    monkeypatch.setenv("GPTNORM_CACHE", str(tmp_path / "cache"))
    corpus = tmp_path / "moved.jsonl"
    shutil.copy(place / "corpus.jsonl", corpus)
    expected = call("run --data other.jsonl")[2]["rows"][0]["nats"]
    for run, settings in (("gone", ()), ("gonebpe", ("data.tokenizer=bpe", "data.bpe_vocab=300"))):
        train(place / "tiny.toml", tmp_path / run, f"data.path={corpus}", *settings)
    text = corpus.read_text()
    for change in ("gone", "changed"):
        corpus.unlink(missing_ok=True)
        if change == "changed":
            corpus.write_text(text + json.dumps({"text": "One more."}) + "\n")
        out, _, record = call(f"{tmp_path}/gone --data other.jsonl")
        assert "not compared" in out
        assert record["rows"][0]["compared_with_training"] is False
        assert record["rows"][0]["nats"] == pytest.approx(expected, rel=1e-6), "the same run, on bytes"
        word = "not what it was" if change == "changed" else "no such file"
        for line in ("gone", f"gone --data {corpus}", "gonebpe --data other.jsonl"):
            assert word in call(f"{tmp_path}/{line}", 2)[1]


def test_moved_shards_are_still_the_runs_own(call, place, tmp_path):
    settings = {"tokenizer": "bpe", "bpe_vocab": 300, "val_fraction": 0.2}
    build_shards(DataConfig(path=str(place / "corpus.jsonl"), **settings), tmp_path / "shards")
    train(place / "tiny.toml", tmp_path / "run", f"data.path={tmp_path}/shards")
    before = call(f"{tmp_path}/run")[2]["rows"][0]
    (tmp_path / "shards").rename(tmp_path / "elsewhere")
    assert "no such file" in call(f"{tmp_path}/run", 2)[1]
    row = call(f"{tmp_path}/run --data {tmp_path}/elsewhere")[2]["rows"][0]
    assert (row["scored"], row["nats"]) == ("held out", before["nats"])
