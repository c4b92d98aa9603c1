"""Cutting a data set into parts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnkit import data
from nnkit.data.splits import _rounded

TOLERANCE = 1e-6


def numbered(labels) -> data.Dataset:
    """Examples that know their place, so that a part says which ones it took."""
    labels = np.asarray(labels)
    return data.Dataset(np.arange(len(labels))[:, None], labels, "numbers")


def check_partition(cut, labels, fractions, seed, stratify) -> None:
    """What any way to cut has to do; the wrong ones below fail here."""
    dataset = numbered(labels)
    parts = [part for part in cut(dataset, fractions, seed=seed, stratify=stratify) if part is not None]
    n, shares = len(dataset), np.array([share for share in fractions if share > 0])
    assert len(parts) == len(shares)
    taken = [part.x[:, 0] for part in parts]
    # Complete and disjoint: sorted together they are 0 ... n - 1.
    np.testing.assert_array_equal(np.sort(np.concatenate(taken)), np.arange(n))
    for part, indices in zip(parts, taken, strict=True):
        np.testing.assert_array_equal(part.y, dataset.y[indices])
        np.testing.assert_array_equal(np.sort(indices), indices)
    sizes = np.array([len(part) for part in parts])
    assert (np.abs(sizes - shares * n) < 1 + TOLERANCE).all()
    if stratify:
        for label in np.unique(dataset.y):
            counts = np.array([(part.y == label).sum() for part in parts])
            assert (np.abs(counts - shares * (dataset.y == label).sum()) < 1 + TOLERANCE).all()
    again = [part for part in cut(dataset, fractions, seed=seed, stratify=stratify) if part is not None]
    for part, same in zip(parts, again, strict=True):
        np.testing.assert_array_equal(part.x, same.x)
    if n > 50:
        other = [
            part for part in cut(dataset, fractions, seed=seed + 1, stratify=stratify) if part is not None
        ]
        assert any(not np.array_equal(a.x, b.x) for a, b in zip(parts, other, strict=True))
        # Random: no part is a run of neighbours.
        assert all(np.ptp(indices) > len(indices) for indices in taken[1:])


FRACTIONS = [
    (0.6, 0.2, 0.2),
    (0.8, 0, 0.2),
    (1 / 3, 1 / 3, 1 / 3),
    (0.7, 0.3, 0),
    (0.29, 0.71, 0),
    (0.5, 0.25, 0.25),
]
FRACTIONS_AND_ALL = [*FRACTIONS, (1, 0, 0)]


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.integers(-3, 12), min_size=12, max_size=150),
    fractions=st.sampled_from(FRACTIONS_AND_ALL),
    seed=st.integers(0, 2**40),
    stratify=st.booleans(),
)
def test_every_cut_is_a_partition(labels, fractions, seed, stratify):
    check_partition(data.split, labels, fractions, seed, stratify)


# 30 classes of 4: 60/20/20 of each is 2.4, 0.8 and 0.8, and every class by itself would round to 2, 1, 1.
MANY_CLASSES = np.repeat(np.arange(30), 4)


@pytest.mark.parametrize("fractions", FRACTIONS)
@pytest.mark.parametrize("stratify", [False, True])
def test_many_small_classes(fractions, stratify):
    check_partition(data.split, MANY_CLASSES, fractions, 3, stratify)


def _by_position(dataset, fractions, *, seed, stratify):
    edges = np.round(np.cumsum((0, *fractions)) * len(dataset)).astype(int)
    return [dataset.take(slice(a, b)) if b > a else None for a, b in itertools.pairwise(edges)]


def _each_example_by_lot(dataset, fractions, *, seed, stratify):
    part = np.random.default_rng(seed).choice(3, len(dataset), p=fractions)
    return [dataset.take(part == i) if (part == i).any() else None for i in range(3)]


def _each_class_by_itself(dataset, fractions, *, seed, stratify):
    rng, part = np.random.default_rng(seed), np.zeros(len(dataset), int)
    for label in np.unique(dataset.y):
        members = rng.permutation(np.flatnonzero(dataset.y == label))
        exact = np.array(fractions) * len(members)
        counts = np.floor(exact).astype(int)
        counts[np.argsort(counts - exact, kind="stable")[: len(members) - counts.sum()]] += 1
        part[members] = np.repeat(np.arange(3), counts)
    return [dataset.take(part == i) for i in range(3)]


def _without_strata(dataset, fractions, *, seed, stratify):
    return data.split(dataset, fractions, seed=seed, stratify=False)


def _unseeded(dataset, fractions, *, seed, stratify):
    return data.split(dataset, fractions, seed=np.random.default_rng().integers(2**30), stratify=stratify)


def _one_seed(dataset, fractions, *, seed, stratify):
    return data.split(dataset, fractions, seed=0, stratify=stratify)


def _one_left_out(dataset, fractions, *, seed, stratify):
    return data.split(dataset.take(slice(1, None)), fractions, seed=seed, stratify=stratify)


def _test_part_also_in_training(dataset, fractions, *, seed, stratify):
    parts = data.split(dataset, fractions, seed=seed, stratify=stratify)
    return parts._replace(train=dataset.take(np.sort(np.concatenate([parts.train.x, parts.test.x])[:, 0])))


@pytest.mark.parametrize(
    "mutant",
    [
        _by_position,
        _each_example_by_lot,
        _each_class_by_itself,
        _without_strata,
        _unseeded,
        _one_seed,
        _one_left_out,
        _test_part_also_in_training,
    ],
)
def test_wrong_cuts_are_caught(mutant):
    with pytest.raises(AssertionError):
        check_partition(mutant, MANY_CLASSES, (0.6, 0.2, 0.2), 1, True)


@settings(max_examples=80, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=25),
    shares=st.lists(st.integers(0, 12), min_size=2, max_size=6).filter(any),
)
def test_controlled_rounding_keeps_rows_columns_and_entries(sizes, shares):
    sizes, fractions = np.array(sizes), np.array(shares) / sum(shares)
    table, exact = _rounded(sizes, fractions), np.outer(sizes, fractions)
    np.testing.assert_array_equal(table.sum(1), sizes)
    assert (table >= 0).all()
    assert (np.abs(table - exact) < 1).all()
    assert (np.abs(table.sum(0) - exact.sum(0)) < 1).all()


def test_60_20_20_of_the_digits():
    parts = data.split(data.load("digits").train, stratify=True)
    assert [len(part) for part in parts] == [1078, 360, 359]
    assert all(part.name == "digits" and len(part.classes) == 10 for part in parts)
    counts = np.stack([np.bincount(part.y) for part in parts])
    whole = np.bincount(data.load("digits").train.y)
    assert (np.abs(counts - np.outer((0.6, 0.2, 0.2), whole)) < 1).all()


def test_the_parts_of_a_seed_never_change():
    """Written down once: another platform or NumPy must give the same."""
    parts = data.split(numbered(np.arange(20) % 4), seed=7)
    assert [part.x[:, 0].tolist() for part in parts] == [
        [0, 3, 4, 6, 9, 10, 11, 12, 13, 14, 15, 18],
        [2, 7, 8, 17],
        [1, 5, 16, 19],
    ]
    parts = data.split(numbered(np.arange(20) % 4), seed=7, stratify=True)
    assert [part.x[:, 0].tolist() for part in parts] == [
        [0, 3, 4, 6, 9, 10, 11, 12, 13, 14, 15, 17],
        [5, 7, 8, 18],
        [1, 2, 16, 19],
    ]


def test_every_example_is_as_likely_to_be_tested():
    n, seeds = 20, 2000
    tested = np.zeros(n)
    for seed in range(seeds):
        tested[data.split(numbered(np.zeros(n)), seed=seed).test.x[:, 0]] += 1
    expected = 0.2 * seeds
    # Draws without replacement vary less than binomial ones: 4.5 of their deviations for 20 numbers.
    assert np.abs(tested - expected).max() < 4.5 * np.sqrt(seeds * 0.2 * 0.8)


def test_hold_out_cuts_the_training_part_alone():
    published = data.Splits(numbered(MANY_CLASSES), test=numbered([1, 2]))
    parts = data.hold_out(published, 0.25, seed=5, stratify=True)
    assert parts.test is published.test
    assert (len(parts.train), len(parts.validation)) == (90, 30)
    np.testing.assert_array_equal(np.bincount(parts.validation.y), np.ones(30))
    joined = np.concatenate([parts.train.x, parts.validation.x])[:, 0]
    np.testing.assert_array_equal(np.sort(joined), np.arange(120))


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ((0.8, 0.2), r"fractions has 2 numbers and needs 3: .* for instance \(0.8, 0, 0.2\)"),
        (
            (0.6, 0.2, 0.3),
            r"fractions are \(0.6, 0.2, 0.3\) and sum to 1.1: they must be 0 or more and sum to 1",
        ),
        ((1.2, -0.4, 0.2), "they must be 0 or more and sum to 1"),
        ((0.6, float("nan"), 0.4), "they must be 0 or more and sum to 1"),
        ((60, 20, 20), "sum to 100: they must be"),
        ((0, 0.5, 0.5), "the training part needs a share"),
        ((0.9, 0.05, 0.05), "the validation part would be empty: 0.05 of the 5 examples of numbers"),
    ],
)
def test_fractions_that_make_no_sense(fractions, message):
    with pytest.raises(ValueError, match=message):
        data.split(numbered(np.arange(5)), fractions)


@pytest.mark.parametrize("labels", [np.linspace(0, 1, 30), np.zeros((30, 2), np.int32)])
def test_strata_need_labels(labels):
    with pytest.raises(
        ValueError, match=r"stratify=True needs one integer label an example, and numbers has y of shape"
    ):
        data.split(numbered(labels), stratify=True)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 20, float("nan")])
def test_a_share_that_makes_no_sense(fraction):
    with pytest.raises(
        ValueError, match=r"fraction must be between 0 and 1, got .*: it is the share that is held out"
    ):
        data.hold_out(data.Splits(numbered(np.arange(5))), fraction)


def test_nothing_is_held_out_twice():
    parts = data.hold_out(data.Splits(numbered(np.arange(50))), 0.2)
    with pytest.raises(ValueError, match="numbers has a validation part of 10 examples already"):
        data.hold_out(parts, 0.2)


def test_an_empty_part_is_no_validation_part():
    with pytest.raises(ValueError, match=r"the validation part would be empty: 0.1 of the 3 examples"):
        data.hold_out(data.Splits(numbered(np.arange(3))), 0.1)
