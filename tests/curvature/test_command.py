"""`gptnorm curvature` as a person runs it."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from dense import matrix
from safetensors.torch import load_file

from gptnorm import cli
from gptnorm.cli.output import write_all
from gptnorm.curvature import LanguageLoss, command
from gptnorm.errors import UserError
from gptnorm.probe.source import open_source
from gptnorm.train.run_folder import RunFolder
from gptnorm.train.schedule import lr_factor


@pytest.fixture
def ask(monkeypatch, capsys):
    def ask(*arguments, columns="100"):
        monkeypatch.setattr(sys, "argv", ["gptnorm", "curvature", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", columns)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out = capsys.readouterr()
        return ended.value.code or 0, out.out, out.err

    return ask


def test_a_recipe_at_initialisation(ask, recipe, tmp_path):
    path = tmp_path / "c.json"
    page = tmp_path / "c.html"
    code, out, _ = ask(recipe, "--what", "sharpness,weights,slots,spectrum", "--json", path, "--report", page)
    assert code == 0
    assert "Spectrum of H" in page.read_text(encoding="utf-8")
    for words in (
        "Sharpness",
        "Weights, each by itself",
        "Slots",
        "λ_max G",
        "blocks.0.attn.q",
        "H = L + C",
        "residual",
        "λ > 0.1",
    ):
        assert words in " ".join(out.split())  # where a line breaks depends on the length of the text's path
    record = json.loads(path.read_text())
    (reading,) = record["readings"]
    assert reading["step"] == 0
    assert reading["sharpness"]["largest"]["value"] > 0 > reading["sharpness"]["smallest"]["value"]
    assert reading["sharpness"]["difference"] < 1e-5
    assert {row["name"] for row in reading["weights"]} == {
        f"blocks.0.{name}.weight" for name in ("attn.q", "attn.k", "attn.v", "attn.o", "ffn.gate", "ffn.up", "ffn.down")
    }
    for row in reading["slots"]:
        hessian, both = row["hessian"]["value"], row["gauss_newton"]["value"] + row["curvature"]["value"]
        assert hessian <= both * (1 + 1e-6)
        assert row["scale_free"] == pytest.approx(row["rms"] ** 2 * hessian)
        assert row["difference"] < 1e-4
        assert row["token"] == 8
    spectrum = reading["spectrum"]
    assert spectrum["mean"][0] * reading["sharpness"]["parameters"] == pytest.approx(
        reading["sharpness"]["trace"],
        abs=4 * (spectrum["mean"][1] * reading["sharpness"]["parameters"] + reading["sharpness"]["trace_error"]),
    ), "two estimates of one trace"
    ends = [reading["sharpness"][end]["value"] for end in ("smallest", "largest")]
    points = [value for row in spectrum["values"] for value in row]
    assert (min(points), max(points)) == (pytest.approx(ends[0], rel=1e-3), pytest.approx(ends[1], rel=1e-3))
    again = tmp_path / "again.json"
    ask(recipe, "--what", "sharpness,weights,slots", "--json", again, "--dtype", "fp64", "--rows", 1)
    (other,) = json.loads(again.read_text())["readings"]
    assert other["sharpness"]["largest"]["value"] == pytest.approx(reading["sharpness"]["largest"]["value"], rel=1e-6)
    assert other["sharpness"]["trace"] == pytest.approx(reading["sharpness"]["trace"], rel=1e-6)


def test_no_number_is_cut_in_a_narrow_terminal(ask, recipe):
    slots = ("blocks.0.attn.q", "blocks.0.ffn.gate", "head")
    code, out, _ = ask(recipe, *(part for slot in slots for part in ("--slot", slot)), "--most", "2", columns="80")
    assert code == 0
    assert "…" not in out
    assert "residual" in out
    assert max(map(len, out.splitlines())) <= 80


def test_one_file_that_cannot_be_written_stops_no_other(tmp_path):
    (tmp_path / "taken.json").mkdir()
    page = tmp_path / "c.html"
    with pytest.raises(UserError, match=r"--json = .*: cannot be written"):
        write_all(("--json", tmp_path / "taken.json", lambda: "{}"), ("--report", page, lambda: "<p>"))
    assert page.read_text() == "<p>"


def test_slots_that_are_used_twice_are_left_out(ask, recipe):
    code, out, _ = ask(recipe, "model.strategy=ngpt")
    assert code == 0
    assert "Slots of blocks.0" in out
    assert "attn.q_norm" in out
    assert "own.unit" not in out


def by_hand(run):
    """λ_max of D^-½ H D^-½, D = √v̂ + ε of the next update, v from the checkpoint's own files, the gradient of the
    whole model by a backward pass and clipped by torch, H dense in fp64."""
    config = RunFolder.open(run).config()
    (tensors,) = [load_file(path) for path in (run / "checkpoints/step-000006").glob("*00002-of-00002*")]
    name, beta2 = "blocks.0.attn.q.weight", config.optim.betas[1]
    v, step = (tensors[f"optimizer/{key}/{name}"].double() for key in ("exp_avg_sq", "step"))
    source = open_source(str(run), config, RunFolder.open(run), dtype="fp64")
    source.model.objective(source.tokens).total.backward()
    torch.nn.utils.clip_grad_norm_(source.model.parameters(), config.optim.clip)
    g = source.model.get_parameter(name).grad
    v = beta2 * v + (1 - beta2) * g.square()
    diagonal = (v / (1 - beta2 ** (float(step) + 1))).sqrt() + config.optim.eps
    loss = LanguageLoss(source.model, [source.tokens], [name])
    with loss.measuring():
        hessian = matrix(loss.hessian())
    root = diagonal.reshape(-1) ** -0.5
    return float(torch.linalg.eigvalsh(root[:, None] * hessian * root)[-1])


def test_a_run_at_its_checkpoints(ask, recipe, tmp_path, monkeypatch, capsys):
    run, path = tmp_path / "run", tmp_path / "c.json"
    monkeypatch.setattr(sys, "argv", ["gptnorm", "train", str(recipe), f"run.dir={run}", "checkpoint.every=3"])
    with pytest.raises(SystemExit):
        cli.main()
    capsys.readouterr()
    code, out, _ = ask(run, "--step", "0,3,6", "--what", "sharpness", "--part", "blocks.0.ffn", "--json", path)
    assert code == 0
    assert "Slots" not in out
    record = json.loads(path.read_text())
    assert [reading["step"] for reading in record["readings"]] == [0, 3, 6]
    losses = [reading["sharpness"]["loss"] for reading in record["readings"]]
    assert len(set(losses)) == 3
    assert losses == sorted(losses, reverse=True)
    # In the order of the steps, each once; a missing one shows before the first is measured.
    ask(run, "--step", "6,0,3,6", "--what", "sharpness", "--part", "blocks.0.ffn", "--rows", 2**60, "--json", path)
    again = json.loads(path.read_text())["readings"]
    assert [reading["step"] for reading in again] == [0, 3, 6]
    assert [reading["sharpness"]["loss"] for reading in again] == losses
    with monkeypatch.context() as patch:
        patch.setattr(command, "measure_sharpness", lambda *_, **__: pytest.fail("measured"))
        code, out, err = ask(run, "--step", "0,7", "--what", "sharpness")
    assert (code, "7" in err) == (2, True)
    code, out, _ = ask(run, "--most", "2", "--slot", "blocks.0.ffn.up", "--slot", "blocks.0.attn.o")
    assert code == 0
    assert out.count("*") > 4, "what has not converged is marked, in slots, too"
    code, out, _ = ask(run, "--what", "adam", "--part", "blocks.0.attn.q", "--json", path, "--dtype", "fp64")
    assert code == 0
    assert "As AdamW sees it" in out
    ((adam,),) = ([reading["adam"] for reading in json.loads(path.read_text())["readings"]],)
    assert adam["parameters"] == 16 * 16
    assert adam["largest"]["value"] == pytest.approx(by_hand(run), rel=1e-3)
    config = RunFolder.open(run).config()
    assert adam["critical"]["low"] > 0
    assert adam["lr"] == config.optim.lr * lr_factor(6, 6, config.optim)
    code, out, _ = ask(run, "--step", "0,3", "--what", "adam", "--part", "blocks.0.attn.q", "--json", path)
    assert code == 0
    assert [r["adam"] is None for r in json.loads(path.read_text())["readings"]] == [True, False]
    code, out, err = ask(run, "--step", "0", "--what", "adam")
    assert code == 2
    assert "needs a checkpoint" in err
    code, out, _ = ask(run, "--slot", "blocks.0.attn.o", "--token", "all", "--json", path)
    assert code == 0
    assert "over the whole of the first sequence" in out.replace("\n", " ")
    (whole,) = json.loads(path.read_text())["readings"][0]["slots"]
    code, *_ = ask(run, "--slot", "blocks.0.attn.o", "--token", "0", "--json", path)
    assert code == 0
    (one,) = json.loads(path.read_text())["readings"][0]["slots"]
    assert (whole["token"], one["token"]) == (None, 0)
    assert one["hessian"]["value"] <= whole["hessian"]["value"] * (1 + 1e-3), "a block of the whole"
    (reading,) = json.loads(path.read_text())["readings"]
    assert (reading["step"], [row["name"] for row in reading["slots"]]) == (6, ["blocks.0.attn.o"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--what", "all"], "--what = 'all': must be of sharpness, adam, weights, slots, spectrum"),
        (["--what", "adam"], "--what = 'adam': needs a checkpoint of a run"),
        (["--part", "blocks.7"], "--part = 'blocks.7'"),
        (["--slot", "up"], "--slot = 'up': no such slot; there are blocks.0.attn.q"),
        (["--token", "16"], "--token = 16: must be 0 … 15"),
        (["--token", "last"], "--token = 'last': must be a position of the sequence, middle or all"),
        (["--step", "3"], "--step = 3: needs a run folder"),
        (["--step", "x"], "--step = 'x'"),
        (["--step", "9" * 5000], "--step = '999"),
        (["--token", "9" * 5000], "--token = '999"),
        (["--tolerance", "nan"], "--tolerance = nan: must be above 0"),
        (["--json", "nowhere/c.json"], "--json"),
        (["--report", "nowhere/c.html"], "--report = 'nowhere/c.html': cannot be written: no such folder"),
        (["model.strategy=foo"], "model.strategy"),
    ],
)
def test_what_is_wrong_is_one_line(ask, recipe, arguments, words):
    code, out, err = ask(recipe, *arguments)
    assert code == 2
    assert words in err
    assert len(err.strip().splitlines()) == 1
    assert not out
