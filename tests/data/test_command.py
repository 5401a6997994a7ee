"""`gptnorm data build` as a newcomer meets it."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptnorm import cli
from gptnorm.data import Shards
from gptnorm.data.command import read_arguments, read_count


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with a text."""
    (tmp_path / "text.txt").write_text("".join(f"The quick brown fox number {i} jumps.\n" for i in range(600)))
    (tmp_path / "empty.txt").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(monkeypatch, line):
    monkeypatch.setattr(sys, "argv", ["gptnorm", *line.split()])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code or 0


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("data build text.txt", ["--dir"]),
        ("data build --dir out", ["SOURCE"]),
        ("data build nosuch --dir out", ["data.path = 'nosuch'", "c4", "sotu"]),
        ("data build empty.txt --dir out", ["no text"]),
        ("data build ~nobody0/texts --dir out", ["data.path", "no such file"]),
        ("data build hf:~nobody0/texts --dir out", ["data.path", "OWNER/NAME"]),
        ("data build text.txt tokenizer=bpe --dir out", ["tokenizer=bpe", "data.KEY=VALUE"]),
        ("data build text.txt data.tokenizr=bpe --dir out", ["data.tokenizr", "did you mean tokenizer?"]),
        ("data build text.txt data.tokenizer=gpt2 --dir out", ["data.tokenizer = 'gpt2'", "tokenizer.json"]),
        ("data build text.txt data.val_fraction=1 --dir out", ["data.val_fraction", "less than 1"]),
        ("data build text.txt data.path=sotu --dir out", ["data.path", "as an argument"]),
        ("data build text.txt optim.lr=3 --dir out", ["optim", "data alone"]),
        ("data build text.txt --tokens ten --dir out", ["--tokens = 'ten'", "10B"]),
        ("data build text.txt --documents 0 --dir out", ["--documents = '0'"]),
        ("data build text.txt --tokens 5M data.max_tokens=3 --dir out", ["--tokens", "data.max_tokens"]),
        ("data build text.txt --workers 0 --dir out", ["--workers"]),
        ("data build text.txt --dir empty.txt", ["--dir = 'empty.txt'"]),
        ("data build text.txt --dir .", ["--dir = '.'", "no shards built here"]),
        ("data build . --dir out", ["--dir = 'out'", "lies in the source '.'"]),
        ("data build hf:a/b/c --dir out", ["data.path = 'hf:a/b/c'", "OWNER/NAME"]),
        ("data build hf:nosuch/ --dir out", ["data.path", "OWNER/NAME"]),
    ],
)
def test_mistakes(place, monkeypatch, capfd, line, words):
    before = sorted(place.rglob("*"))
    assert call(monkeypatch, line) == 2
    error = capfd.readouterr().err
    assert error.startswith("gptnorm: ")
    assert error.count("\n") == 1
    for word in words:
        assert word in error
    assert sorted(place.rglob("*")) == before


def test_build_then_train(place, monkeypatch, capfd):
    line = "data build text.txt --dir out data.tokenizer=bpe data.bpe_vocab=300"
    assert call(monkeypatch, line) == 0
    out, err = capfd.readouterr()
    assert err == ""
    shards = Shards.open(place / "out")
    assert f"{len(shards.train):,}" in out
    assert "card: out/card.md" in out
    assert "data.path=out" in out
    assert call(monkeypatch, line) == 0
    assert "built before" in capfd.readouterr().out
    (place / "tiny.toml").write_text(
        'model = {strategy = "prenorm", d_model = 16, n_layers = 1, n_heads = 2, d_ff = 32}\n'
        'train = {steps = 2, batch_size = 2, seq_len = 16, threads = 1, device = "cpu", eval_sequences = 2}\n'
    )
    assert call(monkeypatch, "train tiny.toml data.path=out run.dir=run") == 0


def test_arguments_in_any_order():
    config = read_arguments(
        ["data.val_fraction=0.1", "a", "c4", "data.text_field=body"], tokens="10B", deduplicate=True
    )
    assert config.path == ("a", "c4")
    assert (config.max_tokens, config.max_documents, config.deduplicate) == (10**10, None, True)
    assert (config.val_fraction, config.text_field) == (0.1, "body")


@pytest.mark.parametrize(
    ("text", "number"),
    [("7", 7), ("250_000", 250_000), ("1.5M", 1_500_000), ("10B", 10**10), ("2t", 2 * 10**12), ("1e9", 10**9)],
)
def test_counts(text, number):
    assert read_count("--tokens", text) == number


@given(st.integers(1, 10**7), st.sampled_from([("k", 3), ("M", 6), ("b", 9), ("T", 12)]))
def test_counts_are_exact(thousandths, unit):
    """ "4.1M" is no whole number in binary."""
    name, power = unit
    number = thousandths * 10 ** (power - 3)
    assert read_count("--tokens", f"{thousandths // 1000}.{thousandths % 1000:03}{name}") == number


def test_a_count_beyond_what_a_float_holds():
    assert read_count("--tokens", "9007199254740993") == 9007199254740993


@pytest.mark.parametrize("text", ["", "-1", "0", "1.5", "nan", "inf", "1e99", "1e999999999", "10 B", "B", "0x10"])
def test_no_counts(text, refused):
    refused(["--tokens", repr(text)], read_count, "--tokens", text)
