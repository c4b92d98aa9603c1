"""The confusion matrix and its scores against scikit-learn."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st

from nnkit import metrics

N, C = 60, 5
RNG = np.random.default_rng(0)
SCORES = RNG.normal(size=(N, C)).astype(np.float32)
SCORES[:, 3:] = -9  # never predicted
LABELS = RNG.choice([0, 1, 2, 3], N)  # 4 never occurs
PREDICTED = SCORES.argmax(1)
SCORERS = {
    "precision": (metrics.precision, sklearn.metrics.precision_score),
    "recall": (metrics.recall, sklearn.metrics.recall_score),
    "f1": (metrics.f1, sklearn.metrics.f1_score),
}


def sklearns(labels, predicted):
    return sklearn.metrics.confusion_matrix(labels, predicted, labels=range(C))


def test_confusion_is_scikit_learns():
    expected = sklearns(LABELS, PREDICTED)
    got = metrics.confusion_matrix(SCORES, LABELS)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, expected)
    assert expected[1, 2] != expected[2, 1]  # or rows could be columns
    for predictions, targets, classes in [
        (PREDICTED, LABELS, C),
        (PREDICTED.astype(np.uint8), LABELS, C),
        (SCORES, np.eye(C)[LABELS], None),
        (PREDICTED, np.eye(C)[LABELS], None),
        (SCORES.reshape(6, 10, C), LABELS.reshape(6, 10), C),
    ]:
        np.testing.assert_array_equal(metrics.confusion_matrix(predictions, targets, classes), expected)
    np.testing.assert_array_equal(jax.jit(metrics.confusion_matrix)(SCORES, LABELS), expected)


def test_counts_of_many_classes_do_not_wrap():
    predicted, labels = np.array([254, 255], np.uint8), np.array([255, 255], np.uint8)
    confusion = metrics.confusion_matrix(predicted, labels, 256)
    assert confusion[255, 254] == confusion[255, 255] == 1
    assert confusion.sum() == 2


def test_counts_of_uneven_batches_add_up():
    total = sum(metrics.confusion_matrix(SCORES[i : i + 16], LABELS[i : i + 16]) for i in range(0, N, 16))
    np.testing.assert_array_equal(total, sklearns(LABELS, PREDICTED))
    padded = np.concatenate([SCORES, np.ones((4, C), np.float32)])
    labels = np.concatenate([LABELS, np.zeros(4, int)])
    mask = np.arange(64) < N
    for m in (mask, mask.astype(int), mask.astype(np.float32)):
        np.testing.assert_array_equal(metrics.confusion_matrix(padded, labels, mask=m), total)
    stacked = jax.vmap(lambda p, y, m: metrics.confusion_matrix(p, y, mask=m))(
        padded.reshape(4, 16, C), labels.reshape(4, 16), mask.reshape(4, 16)
    )
    np.testing.assert_array_equal(stacked.sum(0), total)


def test_what_is_no_class_is_left_out():
    predicted, labels = np.array([0, 1, -1, 5, 1]), np.array([0, -1, 1, 1, 5])
    np.testing.assert_array_equal(metrics.confusion_matrix(predicted, labels, 2), [[1, 0], [0, 0]])
    scores = SCORES.copy()
    scores[:7, 0] = np.nan
    got = metrics.confusion_matrix(scores, LABELS)
    np.testing.assert_array_equal(got, sklearns(LABELS[7:], PREDICTED[7:]))
    assert int(jnp.trace(got)) == metrics.accuracy(scores, LABELS).sum()


@pytest.mark.parametrize("average", [None, "macro", "micro", "weighted"])
@pytest.mark.parametrize("name", SCORERS)
def test_scores_are_scikit_learns(name, average):
    ours, theirs = SCORERS[name]
    expected = theirs(LABELS, PREDICTED, labels=range(C), average=average, zero_division=0)
    confusion = metrics.confusion_matrix(SCORES, LABELS)
    got = ours(confusion, average=average)
    assert got.shape == (() if average else (C,))
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(lambda c: ours(c, average=average))(confusion), expected, rtol=1e-6)
    nothing = ours(np.zeros((C, C), int), average=average)
    np.testing.assert_array_equal(nothing, np.zeros_like(nothing))


@given(st.integers(0, 2**31), st.integers(1, 12))
def test_scores_of_small_random_data(seed, size):
    rng = np.random.default_rng(seed)
    labels, predicted = rng.integers(0, 3, size), rng.integers(0, 3, size)
    confusion = sklearn.metrics.confusion_matrix(labels, predicted, labels=range(3))
    for ours, theirs in SCORERS.values():
        for average in (None, "macro", "micro", "weighted"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                expected = theirs(labels, predicted, labels=range(3), average=average, zero_division=0)
            np.testing.assert_allclose(ours(confusion, average=average), expected, rtol=1e-6)


def check_f1(f1) -> None:
    confusion = metrics.confusion_matrix(SCORES, LABELS)
    expected = sklearn.metrics.f1_score(LABELS, PREDICTED, labels=range(C), average="macro", zero_division=0)
    np.testing.assert_allclose(f1(confusion), expected, rtol=1e-6)


def test_the_check_passes_ours():
    check_f1(metrics.f1)


@pytest.mark.parametrize(
    "mutant",
    [
        lambda c: metrics.f1(c, average="micro"),
        lambda c: metrics.f1(c, average="weighted"),
        lambda c: 2 / (1 / metrics.precision(c) + 1 / metrics.recall(c)),
        lambda c: metrics.f1(c[:4, :4]),
        lambda c: metrics.recall(c.T),
        lambda c: jnp.mean(2 * jnp.diag(c) / (c.sum(0) + c.sum(1))),
    ],
    ids=["micro", "weighted", "of the means", "without the empty class", "precision", "NaN"],
)
def test_mutants_are_caught(mutant):
    with pytest.raises(AssertionError):
        check_f1(mutant)


def test_errors_say_what_to_write():
    with pytest.raises(ValueError, match="got classes for predictions: pass num_classes="):
        metrics.confusion_matrix(PREDICTED, LABELS)
    with pytest.raises(ValueError, match="got num_classes=4 and predictions for 5 classes"):
        metrics.confusion_matrix(SCORES, LABELS, 4)
    with pytest.raises(ValueError, match=r"a mask of shape \(3,\) for values of shape \(60,\)"):
        metrics.confusion_matrix(SCORES, LABELS, mask=np.ones(3))
    with pytest.raises(
        ValueError, match=r"got shape \(60, 5\): pass confusion_matrix\(predictions, targets\)"
    ):
        metrics.f1(SCORES)
    with pytest.raises(ValueError, match="got average='binary': pass 'macro', 'micro', 'weighted' or None"):
        metrics.recall(np.eye(2, dtype=int), average="binary")  # pyright: ignore[reportArgumentType]
