"""Calibration sums and the expected calibration error against its definition, bin by bin."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnkit import metrics

N, C = 200, 4
RNG = np.random.default_rng(0)
LOGITS = (RNG.normal(size=(N, C)) * 2).astype(np.float32)
# Right in 7 of 10 cases whatever the confidence: too sure in some bins, not sure enough in others.
LABELS = np.where(RNG.uniform(size=N) < 0.7, LOGITS.argmax(1), RNG.integers(0, C, N))
PROBABILITIES = np.asarray(jax.nn.softmax(LOGITS))


def by_definition(p: np.ndarray, labels: np.ndarray, bins: int) -> float:
    """Guo et al., 2017, equations 2 to 5, in float64 and with loops."""
    confidence, right = p.max(1).astype(np.float64), p.argmax(1) == labels
    error = 0.0
    for m in range(1, bins + 1):
        inside = (confidence > (m - 1) / bins) & (confidence <= m / bins)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return error


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_error_is_its_definition(bins):
    expected = by_definition(PROBABILITIES, LABELS, bins)
    assert expected > 0.05
    for sums in (
        metrics.calibration_bins(LOGITS, LABELS, bins=bins),
        metrics.calibration_bins(PROBABILITIES, LABELS, bins=bins, from_logits=False),
        metrics.calibration_bins(LOGITS, np.eye(C)[LABELS], bins=bins),
        metrics.calibration_bins(LOGITS.reshape(10, 20, C), LABELS.reshape(10, 20), bins=bins),
        jax.jit(lambda z, y: metrics.calibration_bins(z, y, bins=bins))(LOGITS, LABELS),
    ):
        assert sums.examples.shape == (bins,)
        assert sums.examples.sum() == N
        # 200 confidences summed in float32: some 1e-6 of their sum.
        np.testing.assert_allclose(metrics.expected_calibration_error(sums), expected, rtol=3e-6)


def test_sums_of_uneven_and_padded_batches_add_up():
    whole = metrics.calibration_bins(LOGITS, LABELS)
    parts = [metrics.calibration_bins(LOGITS[i : i + 64], LABELS[i : i + 64]) for i in range(0, N, 64)]
    total = jax.tree.map(lambda *xs: sum(xs), *parts)
    padded = np.concatenate([LOGITS, np.full((8, C), np.nan, np.float32)])
    mask = np.arange(208) < N
    masked = metrics.calibration_bins(padded, np.append(LABELS, np.zeros(8, int)), mask=mask)
    for other in (total, masked):
        for a, b in zip(whole, other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)


def test_the_edges_of_bins_belong_below_and_certainty_to_the_last():
    p = np.array([[0.5, 0.5], [0.75, 0.25], [1.0, 0.0], [0.5000001, 0.4999999]])
    sums = metrics.calibration_bins(p, np.zeros(4, int), bins=4, from_logits=False)
    np.testing.assert_array_equal(sums.examples, [0, 1, 2, 1])
    np.testing.assert_array_equal(sums.correct, [0, 1, 2, 1])


def test_calibrated_is_zero_and_overconfident_is_what_it_is():
    p = np.tile([0.75, 0.25], (4, 1))
    right = metrics.calibration_bins(p, np.array([0, 0, 0, 1]), from_logits=False)
    assert metrics.expected_calibration_error(right) == 0
    sure = metrics.calibration_bins(np.tile([50.0, -50.0], (4, 1)), np.array([0, 0, 1, 1]))
    assert metrics.expected_calibration_error(sure) == 0.5


def test_nothing_and_nan_give_no_nan():
    none = metrics.calibration_bins(LOGITS, LABELS, mask=np.zeros(N))
    assert metrics.expected_calibration_error(none) == 0
    poisoned = LOGITS.copy()
    poisoned[:5, 0] = np.nan
    sums = metrics.calibration_bins(poisoned, LABELS)
    clean = metrics.calibration_bins(LOGITS[5:], LABELS[5:])
    assert sums.examples.sum() == N - 5
    for a, b in zip(sums, clean, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_dtypes_and_vmap():
    with jax.enable_x64(True):
        wide = metrics.calibration_bins(LOGITS.astype(np.float64), LABELS)
        assert wide.confidence.dtype == jnp.float64
        error = metrics.expected_calibration_error(wide)
        p = np.asarray(jax.nn.softmax(LOGITS.astype(np.float64)))
        np.testing.assert_allclose(error, by_definition(p, LABELS, 15), rtol=1e-13)
    assert metrics.calibration_bins(jnp.asarray(LOGITS, jnp.bfloat16), LABELS).confidence.dtype == jnp.float32
    each = jax.vmap(metrics.calibration_bins)(LOGITS.reshape(4, 50, C), LABELS.reshape(4, 50))
    assert each.examples.shape == (4, 15)
    np.testing.assert_array_equal(each.examples.sum(0), metrics.calibration_bins(LOGITS, LABELS).examples)


@pytest.mark.parametrize(
    "mutant",
    [
        lambda p, y: abs((p.argmax(1) == y).mean() - p.max(1).mean()),
        lambda p, y: by_definition(p, y, 14),
        lambda p, y: np.mean(np.abs((p.argmax(1) == y) - p.max(1))),
    ],
    ids=["one bin", "another number of bins", "no bins"],
)
def test_mutants_are_told_apart(mutant):
    ours = metrics.expected_calibration_error(metrics.calibration_bins(LOGITS, LABELS))
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(mutant(PROBABILITIES, LABELS), ours, rtol=3e-6)


def test_errors_say_what_arrived():
    with pytest.raises(ValueError, match="got bins=0: it must be at least 1"):
        metrics.calibration_bins(LOGITS, LABELS, bins=0)
    with pytest.raises(ValueError, match=r"a mask of shape \(3,\) for values of shape \(200,\)"):
        metrics.calibration_bins(LOGITS, LABELS, mask=np.ones(3))
    with pytest.raises(TypeError, match=r"calibration_bins .* labels must be integers"):
        metrics.calibration_bins(LOGITS, LABELS.astype(float))
    with pytest.raises(TypeError, match="predictions must be floating, got int32"):
        metrics.calibration_bins(LABELS[:, None] * np.ones(C, int), LABELS)
