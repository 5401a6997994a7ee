from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptnorm.study.outcome import Stability, Training, count_spikes, summarize


@given(st.lists(st.floats(0, 12), min_size=1, max_size=300))
def test_summary_against_numpy(losses):
    found = summarize(losses, whole=True)
    length = max(1, round(0.05 * len(losses)))
    windows = np.lib.stride_tricks.sliding_window_view(losses, length).mean(-1)
    assert found.tail == pytest.approx(windows[-1], abs=1e-9)
    assert found.lowest == pytest.approx(windows.min(), abs=1e-9)


def test_a_huge_loss_leaves_nothing_in_the_sums_after_it():
    found = summarize([4.0] * 100 + [1e17] + [2.0] * 300, whole=True)
    assert (found.tail, found.lowest) == (2.0, 2.0)


def test_a_run_that_ends_early_has_no_end():
    assert summarize([3.0, 2.0], whole=False).tail is None
    assert summarize([], whole=True).tail is None


def falling(count=400):
    draw = random.Random(0)
    return [4 * math.exp(-k / 80) + 1.5 + draw.gauss(0, 0.03) for k in range(count)]


@pytest.mark.parametrize("places", [[], [200], [100, 200, 300], [200, 201, 202]])
def test_spikes_are_counted_once_each(places):
    losses = falling()
    for place in places:
        losses[place] += 1.0
    assert count_spikes(losses) == (1 if places == [200, 201, 202] else len(places))


def test_a_level_that_stays_is_one_spike():
    assert count_spikes([2.0] * 100 + [4.0] * 100) == 1


def test_when_a_run_is_stable():
    rule, good = Stability(), Training(tail=2.0, lowest=1.9, spikes=0)
    assert rule.holds(2.0, good, 3.0)
    assert not rule.holds(None, good, 3.0)
    assert not rule.holds(2.95, good, 3.0), "collapsed onto token frequencies"
    assert rule.holds(2.95, good, None)
    assert not rule.holds(2.4, Training(tail=2.5, lowest=1.9, spikes=1), 3.0), "never came back from a spike"
    assert not rule.holds(2.0, Training(tail=None, lowest=None, spikes=0), 3.0)
    assert Stability(rise=math.inf, margin=-math.inf).holds(9.0, Training(tail=9.0, lowest=1.0, spikes=3), 3.0)
