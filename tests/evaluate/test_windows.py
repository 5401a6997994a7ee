from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptnorm.evaluate import cut_windows

ids = st.integers(0, 2**31)


@st.composite
def sizes(draw):
    length = draw(st.integers(1, 12))
    return length, draw(st.integers(1, length))


@given(sequence=st.lists(ids, max_size=60), shape=sizes(), parts=st.lists(st.integers(0, 60), max_size=4))
@settings(max_examples=300, deadline=None)
def test_every_target_once_with_the_promised_context(sequence, shape, parts):
    """Whatever the division into chunks; positions are found by giving each token its own index as id."""
    length, stride = shape
    positions = np.arange(len(sequence), dtype=np.uint32)
    scored = []
    for window in cut_windows(np.split(positions, sorted(min(p, len(sequence)) for p in parts)), length, stride):
        assert 2 <= len(window.tokens) <= length + 1
        assert (np.diff(window.tokens) == 1).all(), "neighbours"
        assert 1 <= window.first < len(window.tokens)
        for place in range(window.first, len(window.tokens)):
            target = int(window.tokens[place])
            scored.append(target)
            assert place >= min(target, length - stride + 1), "context"
            assert place == (target if target <= length else length - stride + 1 + (target - length - 1) % stride)
    assert scored == list(range(1, len(sequence)))


@given(sequence=st.lists(ids, min_size=2, max_size=60), shape=sizes())
@settings(max_examples=100, deadline=None)
def test_tokens_are_those_of_the_sequence(sequence, shape):
    whole = np.array(sequence, np.uint32)
    found = [window.tokens[window.first :] for window in cut_windows([whole], *shape)]
    assert np.concatenate(found).tolist() == sequence[1:]


def test_a_stride_of_a_window_is_how_training_cuts():
    from gptnorm.data import validation_windows

    tokens = np.arange(6 * 16 + 1, dtype=np.uint16)
    theirs = np.concatenate(list(validation_windows(tokens, batch_size=4, seq_len=16, most=999)))
    ours = [window.tokens for window in cut_windows([tokens], 16, 16)]
    assert np.array_equal(np.stack(ours), theirs)


def test_a_long_sequence_does_not_stand_in_memory():
    def chunks():
        for at in range(10_000):
            assert len(held) == 0 or at - held[-1] <= 32, "read no further ahead than a chunk and a window"
            yield np.full(1, at)

    held: list[int] = []
    for window in cut_windows(chunks(), 16, 4):
        held[:] = [int(window.tokens[-1])]
    assert held == [9_999]


@pytest.mark.parametrize("tokens", [0, 1])
def test_nothing_to_predict(tokens):
    assert list(cut_windows([np.zeros(tokens, np.uint16)], 4, 2)) == []
