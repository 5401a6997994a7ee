"""`gptnorm theory` as a person runs it."""

from __future__ import annotations

import json
import sys

import pytest

from gptnorm import cli


@pytest.fixture
def ask(monkeypatch, capsys):
    def ask(*arguments):
        monkeypatch.setattr(sys, "argv", ["gptnorm", "theory", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "80")
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out = capsys.readouterr()
        return ended.value.code or 0, out.out, out.err

    return ask


def test_some_checks(ask, tmp_path):
    path, page = tmp_path / "t.json", tmp_path / "t.html"
    asked = ("kinds", "activation", "--seeds", 2, "--widths", "16:32", "--recipe", "laptop/simplenorm")
    code, out, err = ask(*asked, "--json", path, "--report", page)
    assert (code, err) == (0, "")
    for words in ("Kinds of norm (kinds)", "Claim: ", "kinds holds: ", "activation holds: ", "[1.00, 1.00]"):
        assert words in out
    assert "Every slot" not in out
    assert "…" not in out.replace("0.25 …", ""), "nothing is cut off at 80 columns"
    record = json.loads(path.read_text())
    assert [check["name"] for check in record["checks"]] == ["activation", "kinds"]
    assert (record["seeds"], record["widths"], record["recipe"]) == (2, [16, 32], "simplenorm")
    assert "Kinds of norm" in page.read_text()
    again = tmp_path / "again.json"
    ask(*asked, "--json", again)
    assert json.loads(again.read_text())["checks"] == record["checks"]


def test_the_other_checks(ask, tmp_path, monkeypatch):
    from gptnorm.theory import alignment, scale, width
    from gptnorm.theory.checks import CHECKS

    regime, kind = {"A": width.REGIMES["A"]}, {"rmsnorm": scale.NORMS["rmsnorm"]}
    monkeypatch.setattr(scale, "FACTORS", (0.01, 1.0, 10.0))
    monkeypatch.setitem(CHECKS, "scale", lambda asked: scale.check_scale(asked.seeds, kind))
    monkeypatch.setitem(CHECKS, "width", lambda asked: width.check_width(asked.seeds, asked.widths, regime))
    monkeypatch.setattr(alignment, "KAPPAS", (1.0, 10.0))
    monkeypatch.setattr(alignment, "COSINES", (0.0, 1.0))
    monkeypatch.setattr(alignment, "TURNS", (0.0, 0.99))
    path = tmp_path / "t.json"
    code, out, err = ask("width", "scale", "alignment", "--seeds", 2, "--widths", "8,32", "--json", path)
    assert (code, err) == (0, "")
    for words in ("scale ", "width ", "alignment depends: "):
        assert words in out
    assert [check["name"] for check in json.loads(path.read_text())["checks"]] == ["scale", "width", "alignment"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["scael"], "CHECK = 'scael': one of scale, width, activation, alignment, kinds; did you mean scale?"),
        (["all"], "CHECK = 'all': one of scale"),
        (["--widths", "32"], "--widths = '32': must be LOW:HIGH"),
        (["--widths", "x:y"], "--widths = 'x:y'"),
        (["--widths", "9" * 5000 + ",32"], "--widths = '999"),
        (["--widths", "32:99999"], "each must be 8 … 2048"),
        (["--seeds", "1"], "--seeds"),
        (["--seeds", "many"], "--seeds"),
        (["--recipe", "nosuch"], "nosuch"),
        (["--recipe", "laptop/base"], "model.strategy"),
        (["--widths", "10,32"], "model.n_heads"),
        (["--json", "nowhere/t.json"], "--json"),
        (["--report", "nowhere/t.html"], "--report"),
        (["--recipes", "x"], "--recipes"),
    ],
)
def test_what_is_wrong_is_one_line(ask, arguments, words):
    code, out, err = ask(*arguments)
    assert code == 2
    assert words in err
    assert len(err.strip().splitlines()) == 1
    assert not out


def test_help_names_every_check(ask):
    from gptnorm.theory import CHECKS

    code, out, _ = ask("--help")
    assert code == 0
    for name in CHECKS:
        assert f"  {name} " in out
