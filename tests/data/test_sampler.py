from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptnorm.data import Sampler, validation_windows

sizes = st.tuples(st.integers(2, 400), st.integers(1, 40), st.integers(1, 9), st.integers(0, 2**70)).filter(
    lambda size: size[0] > size[1]
)
"""(tokens, seq_len, batch_size, seed)"""


def flattened(sampler: Sampler, steps: int) -> np.ndarray:
    return np.concatenate([sampler.starts(step) for step in range(steps)])


@given(sizes)
@settings(max_examples=200, deadline=None)
def test_each_epoch_holds_each_window_once(size):
    count, seq_len, batch_size, seed = size
    sampler = Sampler(np.arange(count), batch_size, seq_len, seed)
    n = sampler.windows_per_epoch
    starts = flattened(sampler, -(-3 * n // batch_size))[: 3 * n]
    for epoch in starts.reshape(3, n):
        ordered = np.sort(epoch)
        assert 0 <= ordered[0] < seq_len
        assert ordered[-1] + seq_len < count
        np.testing.assert_array_equal(np.diff(ordered), seq_len)
        # Not one window more would fit at every phase.
        assert n == 1 or (n + 1) * seq_len + seq_len > count - 1


@given(sizes, st.lists(st.integers(0, 50), min_size=1, max_size=8))
@settings(deadline=None)
def test_a_batch_is_a_function_of_seed_and_step(size, steps):
    count, seq_len, batch_size, seed = size
    tokens = np.arange(count, dtype=np.uint16)
    straight = Sampler(tokens, batch_size, seq_len, seed)
    expected = [straight.batch(step) for step in range(51)]
    for step in steps:
        np.testing.assert_array_equal(straight.batch(step), expected[step])
        np.testing.assert_array_equal(Sampler(tokens, batch_size, seq_len, seed).batch(step), expected[step])


@given(sizes, st.integers(0, 10**9))
@settings(deadline=None)
def test_batches_are_slices_of_the_tokens(size, step):
    count, seq_len, batch_size, seed = size
    tokens = np.random.default_rng(0).integers(0, 2**16, count).astype("<u2")
    sampler = Sampler(tokens, batch_size, seq_len, seed)
    batch = sampler.batch(step)
    assert batch.shape == (batch_size, seq_len + 1)
    assert batch.dtype == np.int64
    for row, start in zip(batch, sampler.starts(step), strict=True):
        np.testing.assert_array_equal(row, tokens[start : start + seq_len + 1])


def test_no_target_comes_twice_in_an_epoch():
    sampler = Sampler(np.arange(1000), 7, 13, seed=5)
    n = sampler.windows_per_epoch
    batches = np.concatenate([sampler.batch(step) for step in range(-(-n // 7))])[:n]
    assert set(Counter(batches[:, 1:].ravel().tolist()).values()) == {1}


def test_seeds_and_epochs_differ():
    samplers = [Sampler(np.arange(10_000), 50, 10, seed) for seed in range(4)]
    orders = [flattened(sampler, 20)[: sampler.windows_per_epoch] for sampler in samplers]
    orders.append(flattened(samplers[0], 50)[samplers[0].windows_per_epoch :][: samplers[0].windows_per_epoch])
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert np.mean(one == other) < 0.01


def test_order_is_uniform():
    """The first window of an epoch is each of 10 about equally often, and so is the phase."""
    sampler = Sampler(np.arange(110), 1, 10, seed=1)
    assert sampler.windows_per_epoch == 10
    firsts = np.array([sampler.starts(10 * epoch)[0] for epoch in range(2000)])
    for counts in (np.bincount(firsts // 10, minlength=10), np.bincount(firsts % 10, minlength=10)):
        chi_squared = np.sum((counts[:10] - 200) ** 2 / 200)
        assert chi_squared < 40  # nine degrees of freedom: p < 1e-5


def test_order_is_the_same_on_every_machine():
    """Golden values: what a run was trained on must not change under it."""
    assert Sampler(np.arange(210), 10, 10, seed=0).starts(0).tolist() == [1, 121, 91, 171, 31, 41, 101, 51, 151, 71]
    assert Sampler(np.arange(210), 10, 10, seed=0).starts(2).tolist() == [99, 129, 69, 79, 169, 189, 59, 19, 89, 119]


def test_training_split_too_short(refused):
    refused(["train.seq_len = 10: the training split holds 10 tokens, so at most 9"], Sampler, np.arange(10), 1, 10, 0)
    assert Sampler(np.arange(11), 2, 10, 0).batch(3).tolist() == [list(range(11))] * 2


@given(st.integers(2, 500), st.integers(1, 40), st.integers(1, 9), st.integers(1, 81))
@settings(max_examples=200, deadline=None)
def test_validation_windows(count, seq_len, batch_size, most):
    if count <= seq_len:
        return
    tokens = np.arange(count, dtype=np.uint16)
    taken = list(validation_windows(tokens, batch_size, seq_len, most))
    for one, other in zip(taken, validation_windows(tokens, batch_size, seq_len, most), strict=True):
        np.testing.assert_array_equal(one, other)
    assert all(batch.dtype == np.int64 and batch.shape[1] == seq_len + 1 for batch in taken)
    assert all(len(batch) == batch_size for batch in taken[:-1])
    rows = np.concatenate(taken)
    np.testing.assert_array_equal(rows, rows[:, :1] + np.arange(seq_len + 1))
    available = (count - 1) // seq_len
    assert len(rows) == min(available, most)
    np.testing.assert_array_equal(rows, np.concatenate(list(validation_windows(tokens, 1, seq_len, most))))
    # Spread over the whole split: from its first window to within one gap of its last.
    assert rows[0, 0] == 0
    assert rows[-1, 0] // seq_len >= available - -(-available // len(rows))
    gaps = np.diff(rows[:, 0])
    assert (gaps >= seq_len).all()
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= seq_len


def test_validation_split_too_short(refused):
    refused(
        ["train.seq_len = 4: the validation split holds 3 tokens, so at most 2"], validation_windows, [1] * 3, 1, 4, 1
    )


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_memory_mapped_tokens(tmp_path, dtype):
    np.arange(1000).astype(dtype).tofile(tmp_path / "x.bin")
    tokens = np.memmap(tmp_path / "x.bin", dtype, mode="r")
    batch = Sampler(tokens, 3, 10, 0).batch(0)
    assert type(batch) is np.ndarray
    assert batch.dtype == np.int64
