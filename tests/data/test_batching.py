"""The order of an epoch, and batches."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnkit import data

KEY = jax.random.key(0)


@pytest.mark.parametrize("n", [1, 2, 30, 65_537])
def test_the_order_is_a_permutation(n):
    order = data.shuffled_indices(KEY, 3, n)
    assert (order.shape, order.dtype) == ((n,), jnp.int32)
    np.testing.assert_array_equal(np.sort(order), np.arange(n))


def test_the_order_is_a_function_of_key_and_epoch():
    orders = {
        (seed, epoch): tuple(data.shuffled_indices(jax.random.key(seed), epoch, 30).tolist())
        for seed in range(3)
        for epoch in range(10)
    }
    assert len(set(orders.values())) == len(orders)
    assert tuple(data.shuffled_indices(jax.random.key(1), 4, 30).tolist()) == orders[1, 4]


def test_the_epoch_may_be_traced_and_is_compiled_once():
    traced = []

    @jax.jit
    def compiled(key, epoch):
        traced.append(1)
        return data.shuffled_indices(key, epoch, 30)

    for epoch in range(4):
        np.testing.assert_array_equal(compiled(KEY, epoch), data.shuffled_indices(KEY, epoch, 30))
    assert len(traced) == 1


@pytest.mark.parametrize("x64", [False, True])
def test_every_kind_of_epoch_number_gives_the_same_order(x64):
    expected = data.shuffled_indices(KEY, 5, 30)
    with jax.enable_x64(x64):
        for epoch in (np.int64(5), np.int32(5), jnp.int32(5), jnp.uint32(5)):
            order = data.shuffled_indices(KEY, epoch, 30)
            assert order.dtype == jnp.int32
            np.testing.assert_array_equal(order, expected)


def test_many_keys_by_vmap_are_the_keys_one_by_one():
    keys = jax.random.split(KEY, 5)
    together = jax.vmap(lambda key: data.shuffled_indices(key, 1, 30))(keys)
    np.testing.assert_array_equal(together, [data.shuffled_indices(key, 1, 30) for key in keys])


def test_another_process_finds_the_same_order():
    program = (
        "import jax; from nnkit.data import shuffled_indices as order; "
        "print([order(jax.random.key(s), e, 30).tolist() for s in (0, 1) for e in (0, 7)])"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    here = [data.shuffled_indices(jax.random.key(s), e, 30).tolist() for s in (0, 1) for e in (0, 7)]
    assert out.strip() == str(here)


def test_the_order_is_drawn_apart_from_the_steps():
    """No step's key is the root of the orders, or an epoch's key."""
    steps = jax.vmap(lambda step: jax.random.fold_in(KEY, step))(jnp.arange(5000))
    root = jax.random.fold_in(KEY, 0xFFFFFFFF)
    epochs = jax.vmap(lambda epoch: jax.random.fold_in(root, epoch))(jnp.arange(5000))
    words = np.concatenate([jax.random.key_data(keys) for keys in (steps, root[None], epochs)])
    assert len(np.unique(words, axis=0)) == len(words)
    bits = jax.random.bits(jax.random.fold_in(root, 2), (30,), jnp.uint32)
    np.testing.assert_array_equal(data.shuffled_indices(KEY, 2, 30), np.argsort(bits))


def check_uniform(orders: np.ndarray) -> None:
    """Chi-square over all permutations of 4, and over where each of them lands in the next epoch.

    The seeds are fixed, so this is decided once: a sound source fails one seed in a thousand.
    """
    all_of_them = {order: i for i, order in enumerate(itertools.permutations(range(4)))}
    seen = np.array([all_of_them[tuple(order)] for order in orders.tolist()])
    for values, cells in ((seen, 24), (seen[:-1] * 24 + seen[1:], 576)):
        counts = np.bincount(values, minlength=cells)
        expected = len(values) / cells
        statistic = ((counts - expected) ** 2 / expected).sum()
        # Wilson and Hilferty's 99.9% point of chi-square.
        free = cells - 1
        assert statistic < free * (1 - 2 / (9 * free) + 3.09 * math.sqrt(2 / (9 * free))) ** 3


EPOCHS = jnp.arange(12_000)


def test_all_orders_are_equally_likely():
    check_uniform(np.asarray(jax.jit(jax.vmap(lambda epoch: data.shuffled_indices(KEY, epoch, 4)))(EPOCHS)))


def _few_bits(epoch):
    bits = jax.random.bits(jax.random.fold_in(KEY, epoch), (4,), jnp.uint32) >> 29
    return jax.lax.sort((bits, jnp.arange(4, dtype=jnp.int32)), num_keys=2)[1]


def _rotations(epoch):
    return (jnp.arange(4) + jax.random.randint(jax.random.fold_in(KEY, epoch), (), 0, 4)) % 4


def _swaps_with_any(epoch):
    order = jnp.arange(4)
    for i, j in enumerate(jax.random.randint(jax.random.fold_in(KEY, epoch), (4,), 0, 4)):
        order = order.at[jnp.array([i, j])].set(order[jnp.array([j, i])])
    return order


def _same_every_other_epoch(epoch):
    return data.shuffled_indices(KEY, epoch // 2, 4)


def _same_always(epoch):
    return data.shuffled_indices(KEY, 0 * epoch, 4)


@pytest.mark.parametrize(
    "mutant", [_few_bits, _rotations, _swaps_with_any, _same_every_other_epoch, _same_always]
)
def test_wrong_shuffles_are_caught(mutant):
    with pytest.raises(AssertionError):
        check_uniform(np.asarray(jax.jit(jax.vmap(mutant))(EPOCHS)))


def test_where_an_example_lands_does_not_depend_on_where_it_was():
    n, epochs = 50, 4000
    orders = np.asarray(
        jax.jit(jax.vmap(lambda epoch: data.shuffled_indices(KEY, epoch, n)))(jnp.arange(epochs))
    )
    counts = np.stack([np.bincount(orders[:, i], minlength=n) for i in range(n)])
    # 2,500 counts of mean 80 and deviation 8.9: the largest is some 3.5 deviations off.
    assert np.abs(counts - epochs / n).max() < 5 * math.sqrt(epochs / n)


@pytest.mark.parametrize("n", [0, -1, 2**31])
def test_lengths_without_an_order(n):
    with pytest.raises(ValueError, match=rf"shuffled_indices needs n from 1 to 2\*\*31 - 1, got {n}"):
        data.shuffled_indices(KEY, 0, n)


def test_a_key_is_a_key():
    with pytest.raises(
        TypeError, match=r"shuffled_indices got the number 0 for a key: pass jax.random.key\(0\)"
    ):
        data.shuffled_indices(0, 0, 5)
    with pytest.raises(TypeError, match="shuffled_indices got an old-style uint32 key"):
        data.shuffled_indices(jax.random.PRNGKey(0), 0, 5)


# Batches


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 40),
    batch_size=st.integers(1, 50),
    drop_last=st.booleans(),
    order=st.one_of(st.none(), st.randoms(use_true_random=False)),
)
def test_batches_are_the_data_in_order(n, batch_size, drop_last, order):
    if drop_last and batch_size > n:
        return
    arrays = {"x": np.arange(2 * n).reshape(n, 2), "y": (np.arange(n), np.arange(n) % 3)}
    if order is not None:
        order = np.array(order.sample(range(n), n))
    got = list(data.batches(arrays, batch_size, order=order, drop_last=drop_last))
    count = data.num_batches(n, batch_size, drop_last)
    assert len(got) == count == (n // batch_size if drop_last else math.ceil(n / batch_size))
    expected = (np.arange(n) if order is None else order)[: count * batch_size]
    np.testing.assert_array_equal(np.concatenate([batch["y"][0] for batch in got]), expected)
    np.testing.assert_array_equal(np.concatenate([batch["y"][1] for batch in got]), expected % 3)
    np.testing.assert_array_equal(np.concatenate([batch["x"] for batch in got]), arrays["x"][expected])
    sizes = [len(batch["x"]) for batch in got]
    assert sizes[:-1] == [batch_size] * (count - 1)
    assert sizes[-1] == (batch_size if drop_last or n % batch_size == 0 else n % batch_size)


def test_arrays_on_the_device_are_cut_there():
    batches = list(data.batches(jnp.arange(5), 2, order=np.array([4, 3, 2, 1, 0])))
    assert all(isinstance(batch, jax.Array) for batch in batches)
    assert [batch.tolist() for batch in batches] == [[4, 3], [2, 1], [0]]


def test_batches_in_order_are_views():
    x = np.zeros((5, 2))
    assert all(np.shares_memory(batch, x) for batch in data.batches(x, 2))


def test_the_order_of_an_epoch_can_be_used_as_it_is():
    dataset = data.load("digits").train.take(slice(0, 30))
    order = data.shuffled_indices(KEY, 0, len(dataset))
    labels = np.concatenate([y for _, y in data.batches(dataset.arrays, 8, order=order)])
    np.testing.assert_array_equal(labels, dataset.y[np.asarray(order)])


@pytest.mark.parametrize(
    ("arrays", "options", "error", "message"),
    [
        (np.zeros(5), {"batch_size": 0}, ValueError, "batch_size must be 1 or more, got 0"),
        (np.zeros(5), {"batch_size": 2.0}, TypeError, "batch_size must be an integer, got 2.0"),
        (
            np.zeros(5),
            {"batch_size": 6, "drop_last": True},
            ValueError,
            "batch_size is 6 and there are 5 examples",
        ),
        (
            (np.zeros(5), np.zeros(4)),
            {"batch_size": 2},
            ValueError,
            r"arrays of one length, got lengths \[4, 5\]",
        ),
        ((), {"batch_size": 2}, ValueError, r"arrays of one length, got lengths \[\]"),
    ],
)
def test_mistakes_are_found_before_the_first_batch(arrays, options, error, message):
    with pytest.raises(error, match=message):
        data.batches(arrays, **options)


@given(hnp.arrays(np.int32, st.integers(1, 20)), st.integers(1, 30))
@settings(max_examples=20, deadline=None)
def test_one_pass_over_batches_ends(x, batch_size):
    iterator = data.batches(x, batch_size)
    assert sum(len(batch) for batch in iterator) == len(x)
    assert list(iterator) == []


@pytest.mark.parametrize("n", [1, 2, 257, 2**16, 2**16 + 1])
def test_both_ways_to_sort_give_the_order_of_the_random_words(n):
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(7), 0xFFFFFFFF), 3)
    words = np.asarray(jax.random.bits(key, (n,), np.uint32))
    order = np.asarray(data.shuffled_indices(jax.random.key(7), 3, n))
    np.testing.assert_array_equal(order, np.argsort(words, kind="stable"))
