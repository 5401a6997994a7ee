"""`gptnorm plan` as a newcomer meets it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from gptnorm import cli
from gptnorm.config import DataConfig
from gptnorm.data import Shards, build_shards

SMALL = ("model.d_model=32", "model.n_layers=1", "model.n_heads=4", "train.seq_len=16")


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    monkeypatch.setattr(sys, "argv", ["gptnorm", "plan", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code or 0


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("laptop/simplenorm", "--gpus"),
        ("laptop/simplenorm --gpus 1", "--memory"),
        ("nosuch --gpus 1 --memory 8GiB", "nosuch"),
        ("laptop/simplenorm --gpus 0 --memory 8GiB", "--gpus"),
        ("laptop/simplenorm --gpus 1.5 --memory 8GiB", "--gpus"),
        ("laptop/simplenorm --gpus 1 --memory 80", "--memory = '80': must be a number above 0 with a unit"),
        ("laptop/simplenorm --gpus 1 --memory 8GiB --mfu 0", "--mfu"),
        ("laptop/simplenorm --gpus 1 --memory 8GiB --mfu 40", "--mfu"),
        ("laptop/simplenorm --gpus 1 --memory 8GiB --mfu nan", "--mfu"),
        ("laptop/simplenorm --gpus 1 --memory 8GiB --peak-tflops -1", "--peak-tflops"),
        ("laptop/simplenorm --gpus 1 --memory 8GiB --peak-tflops nan", "--peak-tflops"),
        ("laptop/simplenorm --gpus 1 --memory 8GiB --gpu h1000", "h100, h100-pcie"),
        ("laptop/simplenorm --gpus 1 --memory 8GiB optim.lrr=1", "did you mean lr?"),
        ("laptop/simplenorm --gpus 4 --memory 8GiB parallel.tensor=3", "parallel.tensor"),
        ("laptop/simplenorm --gpus 4 --memory 8GiB parallel.data=3", "parallel.data"),
        ("laptop/simplenorm --gpus 3 --memory 8GiB parallel.tensor=3", "model.n_heads"),
        ("laptop/simplenorm --gpus 3 --memory 8GiB", "train.batch_size"),
        ("laptop/simplenorm --gpus 1 --memory 8GiB data.tokenizer=x.json", "model.vocab_size"),
        ("laptop/simplenorm --gpus 1 --memory 8GiB model.d_model=2000000000", "model.d_model"),
        ("laptop/simplenorm --gpus 1 --memory 1.053GiB train.batch_size=1 train.recompute=full", "iB usable"),
        ("laptop/simplenorm --gpus 1 --memory 8GiB --json nosuch/x.json", "--json"),
    ],
)
def test_mistakes(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], line: str, word: str) -> None:
    recipe, *rest = line.split()
    assert call(monkeypatch, recipe, *SMALL, *rest) == 2
    error = capfd.readouterr().err
    assert error.startswith("gptnorm: ")
    assert error.count("\n") == 1
    assert word in error


def test_a_plan(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    line = "laptop/simplenorm --gpus 2 --memory 8GiB --gpu A100 --mfu 0.3"
    assert call(monkeypatch, *line.split(), *SMALL, "--json", str(path)) == 0
    out, err = capfd.readouterr()
    assert err == ""
    record = json.loads(path.read_text())
    assert f"{record['parameters']['total']:,}" in out
    assert f"{record['flops_per_token']['model']:,}" in out
    assert "at 30% of 312 TFLOP/s" in out
    assert record["micro_batch"] * record["data"] * record["accumulate"] == 16
    assert record["bytes"]["total"] == sum(size for name, size in record["bytes"].items() if name != "total")


def test_shards_say_their_vocabulary(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "texts").mkdir()
    for i in range(40):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"text {i}, and some more of it\n")
    build_shards(DataConfig(path=str(tmp_path / "texts"), tokenizer="bpe", bpe_vocab=300), tmp_path / "shards")
    vocab = Shards.open(tmp_path / "shards").manifest["vocab_size"]
    assert vocab != 257
    found = []
    for settings in (f"data.path={tmp_path}/shards", f"model.vocab_size={vocab}"):
        path = tmp_path / "plan.json"
        line = f"laptop/simplenorm --gpus 1 --memory 8GiB --json {path}"
        assert call(monkeypatch, *line.split(), *SMALL, settings) == 0
        capfd.readouterr()
        found.append(json.loads(path.read_text())["parameters"])
    assert found[0] == found[1]
    for path in (tmp_path / "shards").iterdir():
        if path.suffix != ".bin":
            path.unlink()
    assert call(monkeypatch, *line.split(), *SMALL, f"data.path={tmp_path}/shards") == 2
    assert "model.vocab_size: must be set, as the shards" in capfd.readouterr().err


def test_experts_and_recomputation_show(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    line = "laptop-moe/simplenorm --gpus 1 --memory 8GiB train.recompute=full"
    assert call(monkeypatch, *line.split(), *SMALL) == 0
    out = capfd.readouterr().out
    assert "what one token meets" in out
    assert "second forward pass" in out
