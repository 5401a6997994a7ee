"""What a scaling study's tables say, on ledgers made from known power laws."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from tolerance_folders import line, make_tolerance

from gptnorm.report import load_tolerance, markdown_study, scaling_plots
from gptnorm.report.html import write_study_report
from gptnorm.report.scaling import batch_law, best_batches, by_text, fit_law, frontier, loss_law, rate_law, saving
from gptnorm.report.scaling import spots_of as spots
from gptnorm.report.scaling_table import scaling_answer, scaling_grids
from gptnorm.report.tolerance import ToleranceStudy
from gptnorm.study.measures import Estimate

SEQ = 10
SEEDS = (1, 2, 3, 4, 5)
RATES = tuple(1e-3 * 2**k for k in range(10))


def ledger(
    folder: Path,
    *,
    loss: Any,
    rate: Any,
    sizes: tuple[int, ...] = (100, 300, 1000),
    texts: tuple[int, ...] = (4000, 16000, 64000),
    batches: tuple[int, ...] = (8,),
    strategies: tuple[str, ...] = ("base",),
    noise: float = 0.0,
    rates: Any = None,
) -> ToleranceStudy:
    """Every model (six FLOPs per token and weight) on every text: loss(strategy, C, B) + 0.02 ln²(η / rate(M, D, B)).

    Args:
        noise: seed sd of the relative loss, and three times that of ln(best rate).
        rates: those of a seed; None: all of them.
    """
    lines, places = [], []
    for size, tokens, batch in itertools.product(sizes, texts, batches):
        steps = tokens // (batch * SEQ)
        place = {"model.d_model": size, "train.batch_size": batch, "train.steps": steps}
        places.append(place)
        for strategy, seed in itertools.product(strategies, (0, *SEEDS)):
            draw = random.Random(f"{strategy} {place} {seed}")
            factor, shift = 1 + draw.gauss(0, noise), draw.gauss(0, 3 * noise)
            best = rate(6 * size, tokens, batch * SEQ)
            for lr in RATES if rates is None else rates(seed, best):
                value = factor * loss(strategy, 6 * size * tokens, batch * SEQ)
                value += 0.02 * (math.log(lr / best) - shift) ** 2
                lines.append(line(strategy, lr, seed, value, place=place, flops=6.0 * size * tokens))
    asked = {"places": places, "stability": {"rise": 0.5, "margin": -math.inf}}
    shared = {"train.seq_len": SEQ, "train.batch_size": batches[0], "train.steps": 1}
    settings = {"shared": shared, "differing": {}, "recipe": {}}
    return load_tolerance(
        make_tolerance(folder, lines, strategies=strategies, lrs=RATES, seeds=SEEDS, asked=asked, settings=settings)
    )


def power(strategy: str, flops: float, batch: int) -> float:
    return 30 * flops**-0.15 * (0.8 if strategy == "ours" else 1.0)


def step_law(size: float, tokens: float, batch: float) -> float:
    return 0.5 * size**-0.4 * (tokens / 1e4) ** -0.25 * (batch / 80) ** 0.5


def exponents(law: Any) -> dict[str, float]:
    return {name: found.value for name, found in law.exponents.items()}


def test_laws_that_are_known_are_found(tmp_path: Path) -> None:
    study = ledger(tmp_path, loss=power, rate=step_law, batches=(4, 8, 16))
    mine = spots(study, "base")
    assert len(mine) == 27
    assert exponents(loss_law(mine)) == pytest.approx({"C": -0.15}, abs=1e-3)
    law = rate_law(mine)
    assert exponents(law) == pytest.approx({"M": -0.4, "D": -0.25, "B": 0.5}, abs=1e-6)
    assert law is not None
    assert law.rms < 1e-6
    assert law.points == 27


def test_what_does_not_differ_has_no_exponent(tmp_path: Path) -> None:
    mine = spots(ledger(tmp_path, loss=power, rate=step_law, texts=(16000,)), "base")
    assert rate_law(mine) is not None
    assert exponents(rate_law(mine)) == pytest.approx({"M": -0.4}, abs=1e-6)


def test_what_grows_together_cannot_be_told_apart() -> None:
    size = [1.0, 2.0, 4.0, 8.0, 16.0]
    text = [3 * m**1.5 for m in size]
    assert fit_law({0: size}, {"M": size, "D": text}) is None
    assert fit_law({0: size}, {"M": size}) is not None
    assert fit_law({0: size}, {"M": size, "D": [1.0, 2.0, 1.0, 2.0, 1.0]}) is not None


def test_too_few_places_give_no_law() -> None:
    assert fit_law({0: [1.0, 2.0]}, {"M": [1.0, 2.0]}) is None
    assert fit_law({}, {"M": [1.0, 2.0, 3.0]}) is None
    assert fit_law({0: [1.0, 1.0, 1.0]}, {"M": [2.0, 2.0, 2.0]}) is None


def test_a_fit_is_numpy_s_least_squares() -> None:
    draw = np.random.default_rng(0)
    x, y = draw.uniform(1, 9, (12, 2)), draw.uniform(1, 9, 12)
    law = fit_law({0: list(y)}, {"M": list(x[:, 0]), "D": list(x[:, 1])})
    design = np.column_stack([np.ones(12), np.log(x)])
    expected, left, *_ = np.linalg.lstsq(design, np.log(y), rcond=None)
    assert law is not None
    assert list(exponents(law).values()) == pytest.approx(list(expected[1:]))
    assert law.rms == pytest.approx(math.sqrt(left[0] / 12))


def test_intervals_of_exponents_cover() -> None:
    """Of a hundred studies with noise about 95 hold the true exponents; fewer than 88 is one in two thousand."""
    draw = np.random.default_rng(1)
    size = np.tile([1.0, 3.0, 9.0], 3)
    text = np.repeat([1.0, 4.0, 16.0], 3)
    held = {"M": 0, "D": 0}
    for _ in range(100):
        values = {seed: list(size**-0.3 * text**0.2 * np.exp(draw.normal(0, 0.1, 9))) for seed in range(5)}
        law = fit_law(values, {"M": list(size), "D": list(text)})
        assert law is not None
        for name, true in (("M", -0.3), ("D", 0.2)):
            found = law.exponents[name]
            assert found.low is not None
            assert found.high is not None
            held[name] += found.low < true < found.high
    assert all(88 <= count <= 100 for count in held.values())


def test_the_frontier_is_what_no_cheaper_place_matches(tmp_path: Path) -> None:
    """Large models on little text are dear and bad here."""

    def loss(strategy: str, flops: float, batch: int) -> float:
        return {6 * 1000 * 4000: 9.0}.get(int(flops), power(strategy, flops, batch))

    mine = spots(ledger(tmp_path, loss=loss, rate=step_law), "base")
    found = [(spot.flops, spot.picked_loss) for spot in frontier(mine)]
    assert found == sorted(found)
    assert [loss for _, loss in found] == sorted((loss for _, loss in found), reverse=True)
    by_hand = [
        s for s in mine if not any(o is not s and o.flops <= s.flops and o.picked_loss <= s.picked_loss for o in mine)
    ]
    assert [spot.flops for spot in frontier(mine)] == [spot.flops for spot in by_hand]
    assert 24_000_000 not in [spot.flops for spot in frontier(mine)]


def test_saving_is_that_of_the_laws(tmp_path: Path) -> None:
    """0.8 times the loss at the same compute is the loss of 0.8^(-1 / 0.15) times the compute."""
    study = ledger(tmp_path, loss=power, rate=step_law, strategies=("base", "ours"), noise=0.003)
    ours, theirs = spots(study, "ours"), spots(study, "base")
    found = saving(ours, theirs, frontier(theirs)[-2].flops)
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    assert found.low < 0.8 ** (-1 / 0.15) < found.high
    assert found.high / found.low < 2
    ends = saving(ours, theirs, frontier(theirs)[0].flops)
    assert ends is not None
    assert ends.high is None, "our smallest model is better already"


def test_best_batches(tmp_path: Path) -> None:
    """B* = 120 (D / 16000)^0.5 tokens, of a parabola in ln B."""

    def best(tokens: float) -> float:
        return 120 * (tokens / 16000) ** 0.5

    def loss(strategy: str, flops: float, batch: int) -> float:
        tokens = flops / (6 * next(s for s in (100, 300, 1000) if flops / (6 * s) in texts))
        return power(strategy, flops, batch) * (1 + 0.02 * math.log(batch / best(tokens)) ** 2)

    texts = (6400, 25600, 102400)  # whole steps of every batch
    study = ledger(tmp_path, loss=loss, rate=step_law, batches=(2, 4, 8, 16, 32, 64), texts=texts)
    mine = spots(study, "base")
    for (_, tokens), group in by_text(mine).items():
        assert list(best_batches(group).values()) == pytest.approx([best(tokens)] * 5, rel=0.05)
    law = batch_law(mine)
    assert law is not None
    assert exponents(law) == pytest.approx({"M": 0.0, "D": 0.5}, abs=0.03)
    few = ledger(tmp_path / "few", loss=loss, rate=step_law, batches=(4, 8), texts=texts)
    assert batch_law(spots(few, "base")) is None, "two batches have no optimum between them"


def test_rates_of_the_picking_seeds_stand_in_where_seeds_have_one_rate(tmp_path: Path) -> None:
    def rates(seed: int, best: float) -> tuple[float, ...]:
        return RATES if seed == 0 else (min(RATES, key=lambda lr: abs(math.log(lr / best))),)

    mine = spots(ledger(tmp_path, loss=power, rate=step_law, rates=rates), "base")
    law = rate_law(mine)
    assert law is not None
    assert exponents(law) == pytest.approx({"M": -0.4, "D": -0.25}, abs=1e-6)
    assert law.exponents["M"] == Estimate(value=law.exponents["M"].value, low=None, high=None, seeds=1)


def test_a_best_at_the_end_of_the_rates_is_no_point(tmp_path: Path) -> None:
    def rate(size: float, tokens: float, batch: float) -> float:
        return 1e-5 if (size, tokens) == (6000, 64000) else step_law(size, tokens, batch)

    mine = spots(ledger(tmp_path, loss=power, rate=rate), "base")
    law = rate_law(mine)
    assert law is not None
    assert law.points == 8
    assert exponents(law) == pytest.approx({"M": -0.4, "D": -0.25}, abs=1e-6)
    assert 6000 * 64000 not in [spot.flops for spot in frontier(mine)]


def test_tables_page_and_answer(tmp_path: Path) -> None:
    study = ledger(tmp_path, loss=power, rate=step_law, batches=(4, 8, 16), strategies=("base", "ours"), noise=0.003)
    titles = [grid.title for grid in scaling_grids(study)]
    assert len(titles) == len(set(titles)) == 5, "no law of best batches: each is at an end"
    text = markdown_study(tmp_path)
    assert "| base | +0.1" in text
    assert "edge" in text
    assert "ours" in " ".join(scaling_answer(study))
    raw = write_study_report(tmp_path).read_text(encoding="utf-8")
    assert "Loss against compute" in raw
    assert "Best rate against size and text" in raw


def test_rates_are_drawn_over_all_seeds_or_as_picked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the smallest text seed 3 tried no rate above its best; the other four are no sample of the five."""

    def rates(seed: int, best: float) -> tuple[float, ...]:
        return tuple(lr for lr in RATES if lr < 1.1 * best) if seed == 3 and best == 0.032 else RATES

    study = ledger(tmp_path, loss=power, rate=lambda size, tokens, batch: 0.032 if tokens == 4000 else 0.011,
                   sizes=(100,), rates=rates, noise=0.03)  # fmt: skip
    smallest, *others = spots(study, "base")
    assert set(smallest.rates) == set(SEEDS) - {3}
    figures: list[Figure] = []
    monkeypatch.setattr(scaling_plots, "to_svg", lambda figure, prefix: figures.append(figure) or "")
    scaling_plots.best_rate_panels(study)
    (axes,) = figures[0].axes
    points, *whiskers = axes.get_lines()
    means = [math.exp(np.mean(np.log(list(spot.rates.values())))) for spot in others]
    assert list(points.get_ydata()) == pytest.approx([smallest.picked_rate, *means])
    assert [line.get_xdata()[0] for line in whiskers] == [spot.tokens for spot in others]


def test_places_of_one_compute_are_no_scaling(tmp_path: Path) -> None:
    study = ledger(tmp_path, loss=power, rate=step_law, sizes=(100,), texts=(16000,), batches=(4, 8, 16))
    assert scaling_grids(study) == []
    assert scaling_answer(study) == []


def test_places_with_texts_of_their_own_have_no_law(tmp_path: Path) -> None:
    study = ledger(tmp_path, loss=power, rate=step_law)
    assert scaling_grids(study)
    for name, write in (("cells.jsonl", "place"), ("study.json", "places")):
        path = tmp_path / name
        text = path.read_text().replace('"model.d_model": 300,', '"data.path": "b", "model.d_model": 300,')
        text = text.replace('{"model.d_model"', '{"data.path": "a", "model.d_model"')
        assert write in text
        path.write_text(text)
    split = load_tolerance(tmp_path)
    assert "data.path" in split.mapped
    assert scaling_grids(split) == []
    assert scaling_answer(split) == []
