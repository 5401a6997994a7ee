"""The command as a newcomer meets it: every mistake is one line, exit code 2, nothing written."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest

from gptnorm import cli
from gptnorm.cli import study
from gptnorm.cli.study import going_on
from gptnorm.report import html

RESULTS = Path(__file__).parents[1] / "docs/results"

RECIPE = """
model = {{strategy = "prenorm", d_model = 16, n_layers = 1, n_heads = 2, d_ff = 32}}
data = {{path = "{text}"}}
train = {{steps = 4, batch_size = 4, seq_len = 16, threads = 1, device = "cpu", eval_sequences = 8}}
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
        ("inspect", "RECIPE|RUN"),
        ("inspect nosuch", "nosuch"),
        ("inspect .", "not a run folder"),
        ("inspect tiny.toml optim.lrr=3", "did you mean lr?"),
        ("inspect tiny.toml data.path=/nonexistent", "data.path"),
        ("inspect tiny.toml --step 3", "--step"),
        ("inspect tiny.toml --dtype fp16", "--dtype"),
        ("inspect tiny.toml --tokens noise", "--tokens"),
        ("inspect tiny.toml train.seq_len=100000000", "train.seq_len"),
        ("inspect tiny.toml model.d_model=2000000000 model.n_heads=2", "out of memory"),
        ("inspect tiny.toml --json nosuch/x.json", "--json"),
        ("inspect tiny.toml --report .", "--report"),
        ("train tiny.toml watch.every=-1", "watch.every"),
        ("train tiny.toml watch.sequences=0", "watch.sequences"),
        ("train tiny.toml gauge.every=-1", "gauge.every"),
        ("train tiny.toml gauge.every=1 gauge.tolerance=1.5", "gauge.tolerance"),
        ("train tiny.toml gauge.every=1 gauge.products=exact", "gauge.products"),
        ("train tiny.toml gauge.every=1 gauge.token=16", "gauge.token = 16: must be 0 … 15"),
        ('train tiny.toml gauge.every=1 gauge.slots=["up"]', "gauge.slots = 'up': no such slot; there are blocks.0."),
        ('train tiny.toml gauge.products=differences gauge.slots=["up"]', "gauge.slots"),
        ("resume", "RUN"),
        ("resume nosuch", "nosuch"),
        ("resume empty.txt", "empty.txt"),
        ("strategies nosuch", "nosuch"),
        ("quickstart study.lrs=[]", "study.lrs"),
        ("quickstart study.lrs=[-1]", "study.lrs = -1: must be at least 1e-30"),
        ("quickstart study.lrs=[1,1]", "study.lrs"),
        ("quickstart study.seeds=[0.5]", "study.seeds"),
        ('quickstart study.strategies=["foo"]', "foo"),
        ("quickstart optim.lr=1", "optim.lr"),
        ("quickstart study.depths=[1,2]", "study.depths"),
        ("study widht", "widht"),
        ("study width", "RECIPE"),
        ("study width nosuch", "nosuch"),
        ("study width study/width --dir=", "must not be empty; . is the current folder"),
        ("study show tiny.toml", "tiny.toml holds no results"),
        ("verify nosuch", "nosuch: neither a run's folder nor one of shards"),
        ("train laptop/simplenrm", "did you mean laptop/simplenorm?"),
        ("train laptop/base", "model.strategy: is missing"),
        ("study width tiny.toml", "[study]"),
        ("study width study/width study.widths=[64,128]", "study.widths"),
        ("study depth study/depth study.depths=[8]", "study.depths"),
        ("study depth study/width", "study.depths"),
        ("train tiny.toml optim.width_rule=mup", "optim.base_width"),
        ("train tiny.toml optim.width_rule=mup optim.base_width=16 model.tied=true", "optim.width_rule"),
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

    with (place / "run/checkpoints/step-000004/shard-00001-model-00001-of-00002.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    assert call(monkeypatch, "resume", "run") == 2
    assert "damaged" in capfd.readouterr().err
    (place / "run/checkpoints/step-000004").rename(place / "elsewhere")
    assert call(monkeypatch, "resume", "run") == 2
    assert "no checkpoint" in capfd.readouterr().err


def test_inspect_a_recipe_and_a_run(place, monkeypatch, capfd):
    assert call(monkeypatch, "inspect", "tiny.toml", "--json", "a.json", "--report", "a.html") == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert "prenorm on llama2, at initialisation: 1 block of width 16; 4 x 16 tokens" in " ".join(out.split())
    assert (place / "a.html").read_text().startswith("<!DOCTYPE html>")
    start = json.loads((place / "a.json").read_text())
    assert f"{start['loss']:.4f}" in out

    assert call(monkeypatch, "train", "tiny.toml", "run.dir=run", "checkpoint.every=2") == 0
    capfd.readouterr()
    first = json.loads((place / "run/metrics.jsonl").read_text().splitlines()[0])
    assert start["loss"] == pytest.approx(first["loss"], rel=1e-6), "the first batch of training, the same weights"
    found = {}
    for name, arguments in (("newest", ()), ("2", ("--step", "2")), ("0", ("--step", "0"))):
        assert call(monkeypatch, "inspect", "run", "--json", "b.json", *arguments) == 0
        found[name] = json.loads((place / "b.json").read_text())
    assert "after 4 steps" in capfd.readouterr().out
    assert {name: record["step"] for name, record in found.items()} == {"newest": 4, "2": 2, "0": 0}
    assert found["0"]["blocks"] == start["blocks"]
    assert found["newest"]["loss"] < found["2"]["loss"] < start["loss"]

    for line, word in (
        ("inspect run --step 3", "2, 4"),
        ("inspect run model.n_layers=2", "model.n_layers"),
        ("inspect run strategy.eps=1e-3", "strategy.eps"),
        ("inspect run train.batch_size=0", "train.batch_size"),
    ):
        assert call(monkeypatch, *line.split()) == 2
        assert word in capfd.readouterr().err
    assert call(monkeypatch, "inspect", "run", "train.batch_size=2", "train.seq_len=8", "--json", "b.json") == 0
    assert json.loads((place / "b.json").read_text())["sequences"] == 2


def test_inspect_noise_needs_no_text_where_the_vocabulary_is_known(place, monkeypatch):
    arguments = ("data.path=/nonexistent", "model.vocab_size=50", "--tokens", "random", "--dtype", "fp64")
    assert call(monkeypatch, "inspect", "tiny.toml", *arguments, "--json", "a.json") == 0
    record = json.loads((place / "a.json").read_text())
    assert (record["text"], record["dtype"]) == ("uniform random tokens", "fp64")


@pytest.mark.parametrize(
    "line",
    ["train tiny.toml data.path={}", "plan tiny.toml data.tokenizer={} --gpus 1 --memory 8GiB", "verify {}",
     "inspect {}", "eval {}", "resume {}"],
)  # fmt: skip
def test_a_name_that_is_too_long_is_one_line(place, monkeypatch, capfd, line):
    assert call(monkeypatch, *line.format("x" * 300).split()) == 2
    error = capfd.readouterr().err
    assert error.startswith("gptnorm: ")
    assert error.count("\n") == 1
    assert "xxx" in error


@pytest.mark.parametrize("settings", [("optim.lr=1e30", "optim.clip=0"), ("model.backbone=gpt2", "init.std=1e30")])
def test_divergence_is_exit_code_3(place, monkeypatch, capfd, settings):
    assert call(monkeypatch, "train", "tiny.toml", "run.dir=run", *settings) == 3
    out, err = capfd.readouterr()
    assert err == ""
    assert "non-finite first" in out.splitlines()[-1]


def test_a_ladder(place, monkeypatch, capfd):
    study = '[study]\ntitle = "t"\nstrategies = ["prenorm"]\nlrs = [0.01]\nseeds = [0]\ndepths = [1, 2]\n'
    (place / "ladder.toml").write_text(f"{(place / 'tiny.toml').read_text()}\n{study}")
    assert call(monkeypatch, "study", "depth", "ladder.toml", "study.workers=1", "--dir", "mine") == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert out.splitlines()[-1] == "report: mine/report.html"
    assert "largest stable rate" in out
    assert (place / "mine/report.html").is_file()


def test_no_command_shows_help_and_listings_work(monkeypatch, capfd):
    assert call(monkeypatch) == 2
    assert "train" in capfd.readouterr().out
    for name in ("settings", "recipes", "strategies"):
        assert call(monkeypatch, name) == 0
        assert "prenorm" in capfd.readouterr().out or name == "settings"


def test_settings_of_one_table(monkeypatch, capfd):
    assert call(monkeypatch, "settings", "study.search") == 0
    shown = capfd.readouterr().out
    assert "study.search.reach" in shown
    assert "optim." not in shown
    assert call(monkeypatch, "settings", "stduy") == 2
    assert capfd.readouterr().err.startswith("gptnorm: TABLE = 'stduy': must be one of checkpoint, data,")


def test_output_into_head(place):
    line = f"{sys.executable} -m gptnorm settings | head -1"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1


def test_a_second_signal_does_not_keep_a_study_from_ending_its_workers():
    ended = []

    def study():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
            ended.append("workers")

    with pytest.raises(click.exceptions.Exit) as caught, going_on():
        study()
    assert ended == ["workers"]
    assert caught.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("what", ["the reader left", "no report"])
def test_tables_and_report_do_not_need_each_other(tmp_path, monkeypatch, capfd, what):
    shutil.copytree(RESULTS / "quickstart", tmp_path / "study")

    def refuse(*_):
        if what == "the reader left":
            raise SystemExit(1)
        raise PermissionError(errno.EACCES, "Permission denied", "x")

    monkeypatch.setattr(
        *((study.console, "print") if what == "the reader left" else (html, "write_study_report")), refuse
    )
    code = call(monkeypatch, "study", "show", str(tmp_path / "study"))
    out, err = capfd.readouterr()
    assert (tmp_path / "study/report.html").exists() == (what == "the reader left")
    if what == "no report":
        assert code == 2
        assert "simplenorm" in out
        assert err == f"gptnorm: {tmp_path / 'study'}: the report cannot be written (Permission denied)\n"
