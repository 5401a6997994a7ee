"""The command as a newcomer meets it: every mistake is one line, exit code 2, nothing written."""

from __future__ import annotations

import subprocess
import sys

import pytest

from gptnorm import cli

RECIPE = """
model = {{strategy = "prenorm", d_model = 16, n_layers = 1, n_heads = 2, d_ff = 32}}
data = {{path = "{text}"}}
train = {{steps = 4, batch_size = 4, seq_len = 16, threads = 1, device = "cpu", eval_batches = 2}}
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with a text, an empty text and tiny.toml."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"The quick brown fox number {i} jumps over {i * i} dogs.\n" for i in range(600)))
    (tmp_path / "empty.txt").touch()
    (tmp_path / "tiny.toml").write_text(RECIPE.format(text=text))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["gptnorm", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code or 0


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("trian", "trian"),
        ("train", "RECIPE"),
        ("train nosuch", "nosuch"),
        ("train " + "a" * 300, "aaa"),
        ("train tiny.toml optim.lr", "KEY=VALUE"),
        ("train tiny.toml optim.lr=abc", "optim.lr"),
        ("train tiny.toml optim.lr=nan", "optim.lr"),
        ("train tiny.toml optim=3", "optim"),
        ("train tiny.toml optim.lrr=3", "did you mean lr?"),
        ("train tiny.toml train.steps=0", "train.steps"),
        ("train tiny.toml train.batch_size=99999999999999999999", "train.batch_size"),
        ("train tiny.toml model.d_model=99999999999999999999", "model.d_model"),
        ("train tiny.toml model.n_heads=5", "model.n_heads"),
        ("train tiny.toml model.preset=9B", "model.preset"),
        ("train tiny.toml model.preset=[]", "model.preset"),
        ("train tiny.toml model.strategy=", "model.strategy"),
        ("train tiny.toml strategy.norm=foo", "strategy.norm"),
        ("train tiny.toml strategy.foo=1", "strategy.foo"),
        ("train tiny.toml seed=-1", "seed"),
        ("train tiny.toml data.path=/nonexistent", "data.path"),
        ("train tiny.toml data.path=", "data.path"),
        ("train tiny.toml data.path=empty.txt", "data.path"),
        ("train tiny.toml train.seq_len=100000000", "train.seq_len"),
        ("train tiny.toml model.vocab_size=10", "model.vocab_size"),
        ("train tiny.toml model.d_model=2000000000 model.n_heads=2", "out of memory"),
        ("train tiny.toml train.device=cuda:99", "train.device"),
        ("train tiny.toml train.device=tpu", "train.device"),
        ("train tiny.toml run.dir=empty.txt", "run.dir"),
        ("train tiny.toml run.dir=empty.txt/x", "run.dir"),
        ("train tiny.toml run.dir=" + "a" * 300, "run.dir"),
        ("train tiny.toml run.dir=", "run.dir"),
        ("resume", "RUN"),
        ("resume nosuch", "nosuch"),
        ("resume empty.txt", "empty.txt"),
        ("strategies nosuch", "nosuch"),
        ("quickstart study.lrs=[]", "study.lrs"),
        ("quickstart study.lrs=[-1]", "study.lrs = -1: must be greater than 0"),
        ("quickstart study.lrs=[1,1]", "study.lrs"),
        ("quickstart study.seeds=[0.5]", "study.seeds"),
        ('quickstart study.strategies=["foo"]', "foo"),
        ("quickstart optim.lr=1", "optim.lr"),
        ("quickstart data.path=text.txt train.seq_len=100000000", "train.seq_len"),
        ("quickstart data.path=text.txt model.vocab_size=10", "model.vocab_size"),
    ],
)
def test_mistakes(place, monkeypatch, capfd, line, word):
    before = sorted(place.rglob("*"))
    assert call(monkeypatch, *line.split()) == 2
    error = capfd.readouterr().err
    assert error.startswith("gptnorm: ")
    assert error.count("\n") == 1
    assert word in error
    assert sorted(place.rglob("*")) == before


def test_a_run_and_what_is_wrong_with_it_later(place, monkeypatch, capfd):
    assert call(monkeypatch, "train", "tiny.toml", "run.dir=run") == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert out.splitlines()[-1].startswith("validation loss ")
    config = (place / "run/config.toml").read_bytes()

    assert call(monkeypatch, "train", "tiny.toml", "run.dir=run") == 2
    assert "gptnorm resume run" in capfd.readouterr().err
    assert (place / "run/config.toml").read_bytes() == config

    assert call(monkeypatch, "resume", "run") == 0
    assert capfd.readouterr().out.splitlines()[-1] == out.splitlines()[-1]

    with (place / "run/checkpoints/step-000004/model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    assert call(monkeypatch, "resume", "run") == 2
    assert "damaged" in capfd.readouterr().err
    (place / "run/checkpoints/step-000004").rename(place / "elsewhere")
    assert call(monkeypatch, "resume", "run") == 2
    assert "no checkpoint" in capfd.readouterr().err


@pytest.mark.parametrize("settings", [("optim.lr=1e30", "optim.clip=0"), ("model.backbone=gpt2", "init.std=1e30")])
def test_divergence_is_exit_code_3(place, monkeypatch, capfd, settings):
    assert call(monkeypatch, "train", "tiny.toml", "run.dir=run", *settings) == 3
    out, err = capfd.readouterr()
    assert err == ""
    assert "non-finite first" in out.splitlines()[-1]


def test_no_command_shows_help_and_listings_work(monkeypatch, capfd):
    assert call(monkeypatch) == 2
    assert "train" in capfd.readouterr().out
    for name in ("settings", "recipes", "strategies"):
        assert call(monkeypatch, name) == 0
        assert "prenorm" in capfd.readouterr().out or name == "settings"


def test_output_into_head(place):
    line = f"{sys.executable} -m gptnorm settings | head -1"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1
