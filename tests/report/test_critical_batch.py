"""Critical batches that are known beforehand: a token in a batch B is worth 1 / (1 + B / scale) tokens."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from test_scaling import ledger

from gptnorm.report import markdown_study, scaling_table
from gptnorm.report.critical_batch import Batches, batches_of
from gptnorm.report.scaling import best_batches, by_text, frontier, spots_of
from gptnorm.report.scaling_table import OVERHEAD

SCALE = 400
SEQ = 10
BATCHES = (4, 8, 16, 32, 64)


def worth(batch: float, small: float = 0.0) -> float:
    """Args: small: batches below it are worth little, too."""
    return 1 / (1 + batch / SCALE + small / batch)


def made(folder: Path, noise: float = 0.0, small: float = 0.0, **more: Any) -> list[Batches]:
    """Losses that are straight in the logarithm of the tokens' worth, so that what lies between budgets is known."""

    def loss(strategy: str, flops: float, batch: int) -> float:
        return 5 - 0.1 * math.log(flops * worth(batch, small))

    more = {"sizes": (100,), "texts": (6400, 25600, 102400), "batches": BATCHES, **more}
    study = ledger(folder, loss=loss, rate=lambda *_: 0.016, noise=noise, **more)
    return batches_of(spots_of(study, "base"))


def test_tokens_by_batch(tmp_path: Path) -> None:
    found = made(tmp_path)
    assert [at.best.tokens for at in found] == [6400, 25600], "at the largest text nothing can be read off"
    for at in found:
        assert at.best.batch == 40
        for batch, ratio in at.tokens.items():
            assert ratio is not None
            assert ratio.value == pytest.approx(worth(40) / worth(batch), rel=1e-9)
        # Between 80 and 160 tokens per step, where the ratio is taken for a power of the batch; it nearly is.
        low, high = (math.log(worth(40) / worth(batch)) for batch in (80, 160))
        assert at.critical is not None
        assert at.critical.value == pytest.approx(80 * 2 ** ((math.log(1.2) - low) / (high - low)), rel=1e-9)
        assert at.critical.value == pytest.approx(SCALE * (1.2 / worth(40) - 1), rel=0.05)
        assert not at.critical.at_least


def test_from_a_best_batch_between_the_others(tmp_path: Path) -> None:
    """Tokens are worth most at √(400 · 40) = 126, of those tried at 160; what smaller batches take does not count."""
    for at in made(tmp_path, small=40.0):
        assert at.best.batch == 160
        assert not at.at_end
        ratios = {batch: worth(160, 40) / worth(batch, 40) for batch in at.tokens}
        assert {batch: found and found.value for batch, found in at.tokens.items()} == pytest.approx(ratios)
        assert ratios[40] > 1.2
        low, high = math.log(ratios[320]), math.log(ratios[640])
        assert at.critical is not None
        assert at.critical.value == pytest.approx(320 * 2 ** ((math.log(1.2) - low) / (high - low)), rel=1e-9)
    table = markdown_study(tmp_path).split(f"**{OVERHEAD}**")[1].split("\n\n")[1]
    assert [row.split("|")[-2].split()[0] for row in table.splitlines()[2:]] == ["340", "340"]
    assert "edge" not in table


def test_a_best_batch_that_has_no_best_rate_has_no_runner_up(tmp_path: Path) -> None:
    """At the batch of the lowest loss the best rate is the highest tried; the next best is not the best batch."""

    def loss(strategy: str, flops: float, batch: int) -> float:
        return 5 - 0.1 * math.log(flops * worth(batch, 40.0)) - 0.5 * (batch == 80)

    def rate(size: float, tokens: float, batch: float) -> float:
        return 1.0 if batch == 80 else 0.016

    study = ledger(tmp_path, loss=loss, rate=rate, sizes=(100,), texts=(6400, 25600, 102400), batches=BATCHES)
    mine = spots_of(study, "base")
    assert batches_of(mine) == []
    assert frontier(mine) == []
    assert all(best_batches(group) == {} for group in by_text(mine).values())
    text = markdown_study(tmp_path)
    assert OVERHEAD not in text
    table = text.split(f"**{scaling_table.BATCHES}**")[1].split("\n\n")[1]
    assert all(row.endswith("| 80 edge |") for row in table.splitlines()[2:])


def test_at_the_largest_batch_there_is_none(tmp_path: Path) -> None:
    for at in made(tmp_path, small=1e6):
        assert at.best.batch == 640
        assert at.critical is None


def test_where_less_text_takes_the_best_batch_there_it_is_said(tmp_path: Path) -> None:
    """Batch 40 is worse on four times the text, and better again on sixteen times."""

    def loss(strategy: str, flops: float, batch: int) -> float:
        return 5 - 0.1 * math.log(flops * worth(batch)) + (0.5 if flops == 6 * 100 * 25600 else 0.0)

    ledger(tmp_path, loss=loss, rate=lambda *_: 0.016, sizes=(100,), texts=(6400, 25600, 102400), batches=BATCHES)
    table = markdown_study(tmp_path).split(f"**{OVERHEAD}**")[1].split("\n\n")[1]
    assert "25,600 tokens | ≤ 0.250 |" in table


def test_where_the_texts_end_only_a_bracket_is_known(tmp_path: Path) -> None:
    """Twice the text at most: batch 640 takes 2.36 times, the others less."""
    (at,) = made(tmp_path, texts=(25600, 51200), batches=(4, 64))
    assert at.critical is not None
    assert (at.critical.low, at.critical.high) == pytest.approx((40, 640))
    assert OVERHEAD in markdown_study(tmp_path)
    assert at.tokens[640] is not None
    assert at.tokens[640].low == pytest.approx(2.0)
    assert at.tokens[640].high is None


def test_a_batch_that_never_takes_a_fifth_more_is_a_bound(tmp_path: Path) -> None:
    for at in made(tmp_path, batches=(2, 4)):
        assert at.critical is not None
        assert at.critical.at_least
        assert at.critical.value == 40


def test_what_cannot_be_told_has_no_upper_end(tmp_path: Path) -> None:
    """1.1 times the text at most, and the larger batch takes 1.27 times."""
    (at,) = made(tmp_path, texts=(25600, 28160), batches=(4, 16))
    assert at.critical is not None
    assert at.critical.at_least
    assert at.critical.value == 40


def test_interval_over_seeds_holds_the_truth(tmp_path: Path) -> None:
    for at in made(tmp_path, noise=0.001):
        assert at.critical is not None
        assert at.critical.low is not None
        assert at.critical.high is not None
        assert at.critical.low < SCALE * (1.2 / worth(at.best.batch) - 1) < at.critical.high


def test_the_table(tmp_path: Path) -> None:
    made(tmp_path)
    text = markdown_study(tmp_path)
    assert "| strategy | at | batch 40 | batch 80 | batch 160 | batch 320 | batch 640 | critical batch |" in text
    assert "| base | 6,400 tokens | 1 | 1.09 " in text
    row = next(line for line in text.splitlines() if "6,400 tokens | 1 |" in line)
    assert row.split("|")[-2].split()[:2] == ["123", "edge"], "a smaller batch may do better"
    assert "Critical batch: going up from the best batch" in text


def test_one_batch_has_none(tmp_path: Path) -> None:
    assert made(tmp_path, batches=(4,)) == []
