"""Accuracy, top-k accuracy, masked means and perplexity."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st

from nnkit import metrics

N, C = 50, 6
RNG = np.random.default_rng(0)
SCORES, LABELS = RNG.normal(size=(N, C)).astype(np.float32), RNG.integers(0, C, N)


def test_accuracy_is_scikit_learns():
    value = metrics.accuracy(SCORES, LABELS)
    assert value.dtype == jnp.float32
    np.testing.assert_array_equal(value, SCORES.argmax(1) == LABELS)
    assert value.mean() == pytest.approx(sklearn.metrics.accuracy_score(LABELS, SCORES.argmax(1)), rel=1e-6)


@pytest.mark.parametrize(
    ("predictions", "targets"),
    [
        (SCORES, np.eye(C, dtype=np.float32)[LABELS]),
        (SCORES.argmax(1), LABELS),
        (SCORES.argmax(1).astype(np.uint8), LABELS),
        (SCORES.argmax(1), np.eye(C, dtype=np.float32)[LABELS]),
        (SCORES.reshape(5, 10, C), LABELS.reshape(5, 10)),
        (jnp.asarray(SCORES), LABELS.astype(np.int8)),
    ],
)
def test_accuracy_of_every_form_of_predictions_and_targets(predictions, targets):
    expected = SCORES.argmax(1) == LABELS
    np.testing.assert_array_equal(jnp.ravel(metrics.accuracy(predictions, targets)), expected)
    np.testing.assert_array_equal(jnp.ravel(jax.jit(metrics.accuracy)(predictions, targets)), expected)
    np.testing.assert_array_equal(jnp.ravel(jax.vmap(metrics.accuracy)(predictions, targets)), expected)


def test_accuracy_of_yes_or_no_and_wide_labels():
    np.testing.assert_array_equal(metrics.accuracy(jnp.array([True, False]), jnp.array([True, True])), [1, 0])
    np.testing.assert_array_equal(metrics.accuracy(jnp.array([1.0, -1.0]) > 0, jnp.array([1, 1])), [1, 0])
    with jax.enable_x64(True):
        wide = jnp.asarray(LABELS)
        assert wide.dtype == jnp.int64
        np.testing.assert_array_equal(
            metrics.accuracy(SCORES.argmax(1).astype(np.int32), wide), SCORES.argmax(1) == LABELS
        )
        assert metrics.accuracy(SCORES, wide).shape == (N,)


def check_wrong_where_it_must_be(accuracy) -> None:
    nan, inf = jnp.nan, jnp.inf
    scores = jnp.array([[nan, 1.0], [1.0, nan], [nan, nan], [2.0, 1.0], [1.0, 1.0], [inf, 0.0], [-inf, -inf]])
    np.testing.assert_array_equal(accuracy(scores, jnp.zeros(7, int)), [0, 0, 0, 1, 1, 1, 1])
    np.testing.assert_array_equal(accuracy(scores[3:5], jnp.array([-1, 2])), [0, 0])


def test_a_negative_label_is_no_class_even_if_it_is_predicted():
    np.testing.assert_array_equal(metrics.accuracy(jnp.array([-1, 1]), jnp.array([-1, 1])), [0, 1])
    nan = jnp.full((1, 2), jnp.nan)
    np.testing.assert_array_equal(metrics.accuracy(nan, jnp.array([-1])), [0])


def test_nan_and_labels_that_are_no_class_are_wrong():
    check_wrong_where_it_must_be(metrics.accuracy)
    check_wrong_where_it_must_be(lambda p, t: metrics.top_k_accuracy(p, t, k=1))


@pytest.mark.parametrize(
    "mutant",
    [
        lambda p, t: (jnp.argmax(p, -1) == t).astype(float),
        lambda p, t: (jnp.nanargmax(p, -1) == t).astype(float),
        lambda p, t: (p[jnp.arange(len(t)), t] >= jnp.max(p, -1)).astype(float),
    ],
    ids=["argmax picks NaN", "NaN forgiven", "label wraps"],
)
def test_mutants_are_caught(mutant):
    with pytest.raises(AssertionError):
        check_wrong_where_it_must_be(mutant)


@pytest.mark.parametrize("k", range(1, C + 1))
def test_top_k_is_scikit_learns_without_ties(k):
    got = metrics.top_k_accuracy(SCORES, LABELS, k)
    expected = sklearn.metrics.top_k_accuracy_score(LABELS, SCORES, k=k, labels=range(C)) if k < C else 1.0
    assert got.mean() == pytest.approx(expected, rel=1e-6)


@given(st.integers(0, 2**31), st.integers(1, 5))
def test_top_k_is_lax_top_k_with_ties(seed, k):
    rng = np.random.default_rng(seed)
    scores, labels = rng.integers(0, 3, (8, 5)).astype(np.float32), rng.integers(0, 5, 8)
    best = jax.lax.top_k(scores, k)[1]
    np.testing.assert_array_equal(metrics.top_k_accuracy(scores, labels, k), (best == labels[:, None]).any(1))


def test_top_k_one_hot_jit_vmap_and_traced_k():
    one_hot = jnp.eye(C)[LABELS]
    expected = metrics.top_k_accuracy(SCORES, LABELS, 2)
    np.testing.assert_array_equal(metrics.top_k_accuracy(SCORES, one_hot, k=2), expected)
    np.testing.assert_array_equal(jax.jit(metrics.top_k_accuracy)(SCORES, LABELS, 2), expected)
    per_example = jax.vmap(lambda s, y: metrics.top_k_accuracy(s, y, k=2))
    np.testing.assert_array_equal(per_example(SCORES, LABELS), expected)


def test_masked_mean_over_batches_is_the_mean_over_the_data():
    values = metrics.accuracy(SCORES, LABELS)
    batches = np.split(np.asarray(values), [16, 32, 48])  # the last has 2
    total = sum(batch.sum() for batch in batches) / N
    np.testing.assert_allclose(total, metrics.masked_mean(values), rtol=1e-6)
    padded = np.concatenate([values, np.full(14, np.nan)])
    mask = np.arange(64) < N
    for m in (mask, mask.astype(int), mask.astype(np.float32)):
        np.testing.assert_allclose(metrics.masked_mean(padded, m), values.mean(), rtol=1e-6)


def test_masks_of_zeros_give_no_nan():
    none = np.zeros(3, bool)
    assert metrics.masked_mean(np.full(3, np.nan), none) == 0
    assert metrics.perplexity(np.full(3, np.nan), none) == 1
    assert metrics.masked_mean(jnp.zeros((0,))) == 0
    slope = jax.grad(lambda x: metrics.masked_mean(x, none))(jnp.ones(3))
    np.testing.assert_array_equal(slope, [0, 0, 0])


def test_perplexity():
    tokens = np.array([[1.0, 2.0, 3.0], [4.0, np.nan, np.inf]])
    mask = np.array([[1, 1, 1], [1, 0, 0]])
    np.testing.assert_allclose(metrics.perplexity(tokens, mask), np.exp(2.5), rtol=1e-6)
    np.testing.assert_allclose(metrics.perplexity(tokens[:1]), np.exp(2), rtol=1e-6)
    uniform = jnp.full(9, np.log(7.0))
    np.testing.assert_allclose(metrics.perplexity(uniform), 7, rtol=1e-6)
    rows = metrics.masked_mean(jnp.array([[1.0, 3.0], [9.0, 9.0]]), jnp.array([True, False]))
    assert rows == 2


def test_half_precision_is_summed_in_float32():
    ones = jnp.ones(3000, jnp.float16)
    assert metrics.masked_mean(ones).dtype == jnp.float32
    assert metrics.masked_mean(ones) == 1
    assert metrics.accuracy(jnp.asarray(SCORES, jnp.bfloat16), LABELS).dtype == jnp.float32


@pytest.mark.parametrize(
    ("predictions", "targets", "error", "text"),
    [
        (
            SCORES,
            LABELS.astype(float),
            TypeError,
            "accuracy .* labels must be integers: write targets.astype",
        ),
        (SCORES, LABELS[:, None], ValueError, r"write targets\[:, 0\]"),
        (SCORES, LABELS[:9], ValueError, "the batch sizes differ"),
        (SCORES[:, 0], LABELS, ValueError, r"\(predictions > 0\).astype\(jnp.int32\) in a metric"),
        (SCORES[:, :1], LABELS, ValueError, r"\(predictions > 0\).astype\(jnp.int32\) in a metric"),
        (LABELS[:, None], LABELS, ValueError, r"write predictions\[:, 0\] or targets\[:, None\]"),
        (
            LABELS,
            LABELS.astype(float),
            TypeError,
            r"labels must be integers: write targets.astype\(jnp.int32\)",
        ),
        (np.ones((N, C), complex), LABELS, TypeError, "got complex64 predictions: pass floating scores"),
    ],
)
def test_errors_say_what_arrived_and_what_to_write(predictions, targets, error, text):
    with pytest.raises(error, match=text):
        jax.eval_shape(metrics.accuracy, predictions, targets)


def test_other_errors():
    for k in (0, 7):
        with pytest.raises(ValueError, match=f"got k={k} for 6 classes: k must be in 1..6"):
            metrics.top_k_accuracy(SCORES, LABELS, k=k)
    with pytest.raises(
        ValueError, match=r"masked_mean got a mask of shape \(3,\) for values of shape \(4,\)"
    ):
        metrics.masked_mean(jnp.ones(4), jnp.ones(3))
    with pytest.raises(TypeError, match="values must be floating, got int32"):
        metrics.masked_mean(jnp.ones(4, int))
