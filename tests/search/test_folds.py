"""Cross-validation: the folds are a partition, whatever is traced."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnkit import data, losses, optim, train
from nnkit.layers import dense
from nnkit.search.folds import fold_of


def parts_of(n: int, folds: int, **options) -> list[tuple[np.ndarray, np.ndarray]]:
    """All folds of the indices, by one program."""
    both = jax.jit(jax.vmap(lambda fold: fold_of(jnp.arange(n), fold, folds, **options)))
    training, held_out = both(jnp.arange(folds))
    return list(zip(np.asarray(training), np.asarray(held_out), strict=True))


def check_partition(parts: list[tuple[np.ndarray, np.ndarray]], n: int, folds: int) -> None:
    """Every example in exactly one validation part but the remainder, which is in every training part."""
    validated = np.bincount(np.concatenate([held_out for _, held_out in parts]), minlength=n)
    assert validated.max() == 1
    assert (validated == 0).sum() == n % folds
    for training, held_out in parts:
        assert (len(training), len(held_out)) == (n - n // folds, n // folds)
        np.testing.assert_array_equal(np.sort(np.concatenate([training, held_out])), np.arange(n))
        assert (np.diff(training) > 0).all()
        assert (np.diff(held_out) > 0).all()


def check_strata(parts: list[tuple[np.ndarray, np.ndarray]], labels: np.ndarray, folds: int) -> None:
    n = len(labels)
    validated = np.concatenate([held_out for _, held_out in parts])
    for c in np.unique(labels):
        of_class, dealt = (labels == c).sum(), (labels[validated] == c).sum()
        assert of_class - dealt <= -(-(n % folds) * of_class // n)
        for _, held_out in parts:
            assert dealt // folds <= (labels[held_out] == c).sum() <= -(-dealt // folds)


@pytest.mark.parametrize(("n", "folds"), [(2, 2), (17, 5), (20, 4), (9, 9)])
def test_folds_are_a_partition_with_a_stated_remainder(n, folds):
    """For any mixture of classes: one class, one of each, a rare one."""
    draw = np.random.default_rng(n)
    labels = np.stack([np.zeros(n), np.arange(n), np.arange(n) < 3, *draw.integers(-1, 3, (20, n))]).astype(
        int
    )

    @jax.jit
    def all_folds(labels):
        one = lambda fold: fold_of(jnp.arange(n), fold, folds, seed=n, labels=labels)
        return jax.vmap(one)(jnp.arange(folds))

    for row in labels:
        parts = list(zip(*map(np.asarray, all_folds(row)), strict=True))
        check_partition(parts, n, folds)
        check_strata(parts, row, folds)


def test_the_checks_find_a_split_that_is_none():
    """What the naive splits get wrong: a last fold that takes the remainder, strata by blocks of the data."""
    indices, labels = np.arange(11), np.array([0] * 6 + [1] * 5)
    naive = [(np.setdiff1d(indices, part), part) for part in np.array_split(indices, 3)]
    with pytest.raises(AssertionError):
        check_partition(naive, 11, 3)
    blocks = [(np.setdiff1d(indices, part), part) for part in indices[:9].reshape(3, 3)]
    check_partition(blocks, 11, 3)
    with pytest.raises(AssertionError):
        check_strata(blocks, labels, 3)
    overlapping = [(indices[3:], indices[:3]), (indices[3:], indices[:3]), (indices[:8], indices[8:])]
    with pytest.raises(AssertionError):
        check_partition(overlapping, 11, 3)


def test_a_mapped_and_a_traced_fold_are_the_number_s():
    labels = np.arange(23) % 3
    x = data.Dataset(np.arange(46.0, dtype="f").reshape(23, 2), labels)
    one = lambda fold: fold_of(x, fold, 4, seed=3, labels=labels)
    mapped, compiled = jax.jit(jax.vmap(one))(jnp.arange(4)), jax.jit(one)
    for fold in (0, 3):
        alone = one(fold)
        jax.tree.map(np.testing.assert_array_equal, compiled(jnp.int32(fold)), alone)
        jax.tree.map(lambda m, a, i=fold: np.testing.assert_array_equal(m[i], a), mapped, alone)
        np.testing.assert_array_equal(alone[1][0][:, 0] / 2 % 3, alone[1][1])
    assert compiled._cache_size() == 1


def test_the_split_is_a_function_of_the_seed_or_the_key():
    first, again, another = (fold_of(np.arange(12), 0, 4, seed=seed)[1] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, another)
    keyed = parts_of(12, 4, key=jax.random.key(1))
    check_partition(keyed, 12, 4)
    np.testing.assert_array_equal(keyed[0][1], another)
    # A key that is traced, as in a training function: each seed has a split of its own.
    keys = jax.random.split(jax.random.key(0), 2)
    held_out = jax.jit(jax.vmap(lambda key: fold_of(jnp.arange(12), 0, 4, key=key)[1]))(keys)
    assert not np.array_equal(*held_out)


def test_the_split_stays_what_it_is():
    """A study that is taken up again in a later version has the folds that it began with."""
    assert fold_of(np.arange(12), 1, 4, seed=0)[1].tolist() == [1, 2, 3]
    assert fold_of(np.arange(12), 1, 4, seed=0, labels=np.arange(12) // 6)[1].tolist() == [4, 5, 9]


def test_folds_of_a_training_run():
    """In a training function, with the fold mapped: each fold trains on its own part."""
    x = np.linspace(-1, 1, 21, dtype="f")[:, None]

    def train_fn(key, *, fold):
        part, held_out = fold_of((x, 2 * x), fold, 3, key=key)
        trainer = train.trainer(dense(1), losses.mean_squared_error, optim.sgd(0.1))
        return train.run(trainer, key, part, epochs=2, batch_size=7, validation=held_out)[1]

    history = jax.jit(jax.vmap(lambda fold: train_fn(jax.random.key(0), fold=fold)))(jnp.arange(3))
    assert history["val_loss"].shape == (3, 2)
    assert len(np.unique(history["val_loss"][:, -1])) == 3


@pytest.mark.parametrize(
    ("arguments", "options", "error", "text"),
    [
        (
            (np.arange(4), 0, 1),
            {"seed": 0},
            ValueError,
            r"from 2 folds to as many as there are examples \(4\), got 1",
        ),
        ((np.arange(4), 0, 5), {"seed": 0}, ValueError, "got 5"),
        (
            (np.arange(4), 2, 2),
            {"seed": 0},
            ValueError,
            "fold is 2 and must be from 0 to 1, the last of 2 folds",
        ),
        ((np.arange(4), -1, 2), {"seed": 0}, ValueError, "fold is -1"),
        ((np.arange(4), 0, 2), {}, TypeError, "needs a key or a seed, and got neither: pass seed=0"),
        ((np.arange(4), 0, 2), {"seed": 0, "key": jax.random.key(0)}, TypeError, "got both"),
        ((np.arange(4), 0, 2), {"seed": -1}, ValueError, r"fold_of\(seed=-1\) needs a number from 0 on"),
        ((np.arange(4), 0, 2), {"key": 0}, TypeError, "pass jax.random.key"),
        (((np.arange(4), np.arange(5)), 0, 2), {"seed": 0}, ValueError, r"shapes \[\(4,\), \(5,\)\]"),
        (((np.arange(4), np.float32(1)), 0, 2), {"seed": 0}, ValueError, "one leading axis"),
        (
            (np.arange(4), 0, 2),
            {"seed": 0, "labels": np.zeros(4)},
            TypeError,
            "labels must be class numbers, got float",
        ),
        (
            (np.arange(4), 0, 2),
            {"seed": 0, "labels": [0, 1, 0]},
            ValueError,
            r"each of the 4 examples, got the shape \(3,\)",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments, options, error, text):
    with pytest.raises(error, match=text):
        fold_of(*arguments, **options)
