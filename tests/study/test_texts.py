"""Studies of several texts: each place with its own, and models evaluated on what they have not trained on."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from study_folders import SMALL, everything, lines

from gptnorm.data import Shards, prepare
from gptnorm.errors import UserError
from gptnorm.model import build_gpt
from gptnorm.recipe import load_recipe
from gptnorm.study.join import join_studies
from gptnorm.study.ledger import OtherStudy, text_of
from gptnorm.study.run import run_study
from gptnorm.study.tolerance import Tolerance, TolerancePlan
from gptnorm.train.checkpoint import latest_checkpoint, load_model

pytestmark = pytest.mark.usefixtures("in_process")

STUDY = """
[study]
title = "t"
strategies = ["prenorm"]
lrs = [0.001, 0.01]
seeds = []
workers = 1

[study.search]
reach = 0
"""


@pytest.fixture
def other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A text of capitals, named as one in the current folder."""
    (tmp_path / "deep").mkdir()
    words = (f"{'ABCDEFG'[i % 7] * (i % 5)} {i * 7919}\n" for i in range(4000))
    (tmp_path / "deep/other.txt").write_text("".join(words))
    monkeypatch.chdir(tmp_path)
    return "deep/other.txt"


def ask(study: Path, folder: Path, *settings: str, part: tuple[int, int] = (1, 1)) -> Path:
    return run_study(Tolerance(part), str(study), (*SMALL, *settings), folder, Console(quiet=True))


def by_hand(run: Path, recipe: str, strategy: str, shards: Shards, batches: int) -> float:
    """Mean of -ln p over windows on a grid, from logits in double precision."""
    config = load_recipe(recipe).resolve(strategy=strategy)
    model = build_gpt(config, vocab=257, device=torch.device("cpu"))
    checkpoint = latest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    load_model(checkpoint, model)
    model.eval()
    length = config.train.seq_len
    fit = (len(shards.val) - 1) // length
    taken = min(fit, batches * config.train.batch_size)
    nats = []
    for number in range(taken):
        start = number * fit // taken * length
        window = torch.from_numpy(shards.val[start : start + length + 1].astype(np.int64))
        with torch.no_grad():
            logits = model(window[None, :-1])[0].double()
        nats.append(-torch.log_softmax(logits, -1).gather(1, window[1:, None]).mean())
    return float(torch.stack(nats).mean())


def test_every_text_is_a_place_and_every_model_meets_all(study, text, other, tmp_path):
    both = json.dumps([str(text), other])
    settings = (f"study.map.data.path={both}", f"study.evaluate={both}", "checkpoint.final=true")
    folder = ask(study, tmp_path / "out", *settings, "study.report=best")
    rows = lines(folder)
    assert {row["place"]["data.path"] for row in rows} == {str(text), other}
    texts = {
        name: prepare(load_recipe(str(study)).resolve([f"data.path={json.dumps(name)}"]).data)
        for name in (str(text), other)
    }
    for row in rows:
        assert set(row["elsewhere"]) == {str(text), other}
        assert row["elsewhere"][row["place"]["data.path"]] == pytest.approx(row["val_loss"], rel=1e-6)
        assert (folder / row["run"]).is_dir()
        for name, found in row["elsewhere"].items():
            assert found == pytest.approx(by_hand(folder / row["run"], str(study), "prenorm", texts[name], 1), rel=1e-5)

    facts = json.loads((folder / "study.json").read_text())
    assert {name: entry["fingerprint"] for name, entry in facts["texts"].items()} == {
        name: shards.fingerprint for name, shards in texts.items()
    }
    entropies = {name: entry["unigram_entropy"] for name, entry in facts["texts"].items()}
    assert len(set(entropies.values())) == 2
    assert facts["unigram_entropy"] == entropies[str(text)]
    for row in rows:
        assert text_of(facts, row["place"])["unigram_entropy"] == entropies[row["place"]["data.path"]]

    before = everything(folder)
    ask(study, folder, *settings, "study.report=best")
    assert everything(folder) == before, "finished runs are never made again"


def test_a_run_is_judged_by_the_entropy_of_its_own_text(study, text, other, tmp_path):
    """One text is of a single letter nearly, so that its entropy is far below the other's."""
    Path("flat.txt").write_text("".join("a" * 60 + f"{i}\n" for i in range(1500)))
    paths = json.dumps([str(text), "flat.txt"])
    folder = ask(study, tmp_path / "out", f"study.map.data.path={paths}", "train.steps=30")
    facts = json.loads((folder / "study.json").read_text())
    low, high = (facts["texts"][name]["unigram_entropy"] for name in ("flat.txt", str(text)))
    assert low < high / 2
    # Far below the entropy of prose, and above that of the flat text: by its own there is nothing to report.
    judged = [{**row, "val_loss": (low + high) / 2, "tail_loss": 1.0, "lowest_loss": 1.0} for row in lines(folder)]
    recipe, kind = load_recipe(str(study)), Tolerance()
    asked = (f"study.map.data.path={paths}", "study.seeds=[3]", "study.report=best")
    plan = kind.plan(recipe, kind.read(recipe, asked), asked)
    wanted = plan.wanted(
        {row["run"]: row for row in judged}, lambda line: text_of(facts, line["place"])["unigram_entropy"]
    )
    assert {cell.text for cell in wanted if cell.seed == 3} == {str(text)}


def test_what_is_asked_of_the_plan_is_the_entropy_of_each_text(study, text, other, tmp_path, monkeypatch):
    seen = {}

    def wanted(plan, done, entropy):
        seen.update({line["place"]["data.path"]: entropy(line) for line in done.values()})
        return before(plan, done, entropy)

    before = TolerancePlan.wanted
    monkeypatch.setattr(TolerancePlan, "wanted", wanted)
    folder = ask(study, tmp_path / "out", f"study.map.data.path={json.dumps([str(text), other])}")
    facts = json.loads((folder / "study.json").read_text())
    assert seen == {name: entry["unigram_entropy"] for name, entry in facts["texts"].items()}
    assert len(set(seen.values())) == 2


def test_one_text_with_others_beside_it(study, text, other, tmp_path):
    folder = ask(study, tmp_path / "out", f'study.evaluate=["{other}"]', "study.report=all")
    assert all(set(row["elsewhere"]) == {other} and "place" not in row for row in lines(folder))
    rows = len(lines(folder))
    ask(study, folder, "study.seeds=[7]", "study.report=all")
    facts = json.loads((folder / "study.json").read_text())
    assert facts["tolerance"]["evaluate"] == [other], "what was said stays"
    assert set(facts["texts"]) == {text.name, other}
    assert len(lines(folder)) > rows
    assert all(set(row["elsewhere"]) == {other} for row in lines(folder))
    with pytest.raises(OtherStudy, match=r"study\.evaluate = \['deep/other\.txt'\], not \['sotu'\]"):
        ask(study, folder, 'study.evaluate=["sotu"]')


@pytest.mark.parametrize("same", [True, False])
def test_a_text_of_the_same_name(study, text, other, tmp_path, same):
    shutil.copy(text if same else other, tmp_path / text.name)
    settings = (f"data.path={text}", f'study.evaluate=["{text.name}"]')
    facts = json.loads((ask(study, tmp_path / "out", *settings) / "study.json").read_text())
    assert set(facts.get("texts", ())) == (set() if same else {str(text), text.name})


def test_shards_that_do_not_say_their_tokens_and_texts_that_are_too_short(study, text, other, tmp_path):
    for name in ("bare", "more"):
        (tmp_path / name).mkdir()
        for split in ("train", "val"):
            (np.arange(4000) % 50).astype("<u2").tofile(tmp_path / name / f"{split}.bin")
    (np.arange(9) % 50).astype("<u2").tofile(tmp_path / "more/val.bin")
    own = (f"data.path={tmp_path / 'bare'}", "model.vocab_size=300")
    for settings, words in (
        ((*own, 'study.evaluate=["more"]'), "shards without a manifest.json"),
        (('study.evaluate=["bare"]',), "study.evaluate = 'bare': 'bare' is shards without a manifest.json"),
        (("model.vocab_size=300", 'study.map.data.path=["bare","more"]'), "more: train.seq_len = 16: the validation"),
    ):
        with pytest.raises(UserError) as caught:
            ask(study, tmp_path / "out", *settings)
        assert words in str(caught.value)
        assert not (tmp_path / "out").exists()


def test_folders_of_long_lists_of_files(study, other, tmp_path):
    for number in range(4):
        (tmp_path / f"{'long' * 20}{number}.txt").write_text(Path(other).read_text())
    files = json.dumps([[f"{tmp_path}/{'long' * 20}{number}.txt" for number in range(4)]])
    (row, *_) = lines(ask(study, tmp_path / "out", f"study.map.data.path={files}"))
    assert all(len(part.encode()) <= 200 for part in Path(row["run"]).parts)
    assert (tmp_path / "out" / row["run"]).is_dir()
    assert row["place"]["data.path"] == json.loads(files)[0]


def test_parts_and_a_text_that_has_changed(study, text, other, tmp_path):
    settings = (f"study.map.data.path={json.dumps([str(text), other])}", "study.report=best")
    parts = [ask(study, tmp_path / f"part{k}", *settings, part=(k, 2)) for k in (1, 2)]
    assert [{row["place"]["data.path"] for row in lines(part)} for part in parts] == [{str(text)}, {other}]
    join_studies(parts, tmp_path / "whole")
    assert set(json.loads((tmp_path / "whole/study.json").read_text())["texts"]) == {str(text), other}
    apart = [
        ask(study, tmp_path / name, f"study.map.data.path={json.dumps(paths)}", "study.report=best")
        for name, paths in (("one", [str(text)]), ("two", [other]), ("both", [other, str(text)]))
    ]
    for number, order in enumerate(itertools.permutations(apart)):
        join_studies(order, tmp_path / f"joined{number}")
        facts = json.loads((tmp_path / f"joined{number}/study.json").read_text())
        assert facts["texts"] == {name: facts["texts"][name] for name in (str(text), other)}
        first = json.loads((order[0] / "study.json").read_text())
        assert facts["data"] == first["data"]
        assert facts["unigram_entropy"] == first["unigram_entropy"]
    # Each trains on one and is evaluated on both.
    both = f"study.evaluate={json.dumps([str(text), other])}"
    join_studies(
        [
            ask(study, tmp_path / name, f"study.map.data.path={json.dumps([path])}", "study.report=best", both)
            for name, path in (("first", str(text)), ("second", other))
        ],
        tmp_path / "evaluated",
    )
    facts = json.loads((tmp_path / "evaluated/study.json").read_text())
    assert {name: found["trained"] for name, found in facts["texts"].items()} == {str(text): True, other: True}
    Path(other).write_text(Path(other).read_text() + "One more document.\n")
    with pytest.raises(OtherStudy, match=r"the text 'deep/other\.txt'"):
        ask(study, tmp_path / "whole", *settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (['study.evaluate=["nowhere.txt"]'], "study.evaluate = 'nowhere.txt': no such file or folder"),
        (['study.evaluate=[""]'], "study.evaluate"),
        (['study.evaluate=["a","a"]'], "study.evaluate = ['a', 'a']: must not repeat an entry"),
        (["study.evaluate=3"], "study.evaluate"),
        (['study.evaluate=["deep/other.txt"]', "data.tokenizer=bpe", "data.bpe_vocab=300"],
         "study.evaluate = 'deep/other.txt': has other tokens than"),
        (['study.tune.data.path=["deep/other.txt"]'], "study.tune.data.path"),
        (["study.map.data.val_fraction=[0.1]"], "study.map.data.val_fraction"),
        (['study.map.data.path=["deep/other.txt"]', "data.path=sotu"],
         "data.path: the study sets it itself; see study.map"),
        (['study.map.data.path=["nowhere.txt"]'], "data.path = 'nowhere.txt': no such file or folder"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_anything_is_made(study, other, tmp_path, settings, words):
    with pytest.raises(UserError) as caught:
        ask(study, tmp_path / "out", *settings)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
