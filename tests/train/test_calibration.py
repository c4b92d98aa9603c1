from __future__ import annotations

import inspect
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special

from nnkit import metrics, train
from nnkit.train import calibration

RNG = np.random.default_rng(0)


def problem(temperature, n=2000, classes=5, seed=0):
    """Labels drawn from softmax(z); the logits are temperature * z, too sure by that factor."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, classes)) * 2
    labels = (z + rng.gumbel(size=z.shape)).argmax(-1)
    return temperature * z, labels.astype(np.int32)


def slope(logits, labels, log_t):
    """d(mean negative log-likelihood)/d(1/T), in float64."""
    p = scipy.special.softmax(logits * np.exp(-log_t), axis=-1)
    return ((p * logits).sum(-1) - logits[np.arange(len(labels)), labels]).mean()


def scipys(logits, labels):
    logits = np.float64(logits)
    return np.exp(scipy.optimize.brentq(lambda t: slope(logits, labels, t), -30, 30, xtol=1e-14))


SCALES = [0.01, 0.3, 1.0, 2.5, 100.0, 1e6]


def check(fit):
    for scale in SCALES:
        logits, labels = problem(scale)
        logits = logits.astype(np.float32)
        # The mean of 2000 slopes that nearly cancel carries some 10 roundings of 6e-8 of terms near 1, on a
        # curvature of the same size.
        np.testing.assert_allclose(fit(logits, labels), scipys(logits, labels), rtol=3e-6)


def test_the_temperature_is_scipys():
    check(train.fit_temperature)


def test_it_is_the_smallest_value_on_a_fine_grid():
    logits, labels = problem(2.5)
    found = float(train.fit_temperature(jnp.asarray(logits, jnp.float32), labels))
    assert abs(found - 2.5) < 0.2  # that by which the labels were drawn, for 2000 of them
    value = lambda t: (
        scipy.special.logsumexp(logits / t, axis=-1) - logits[np.arange(2000), labels] / t
    ).mean()
    grid = found * (1 + np.linspace(-0.01, 0.01, 201))
    assert np.argmin([value(t) for t in grid]) == 100


def check_float64(fit):
    with jax.enable_x64(True):
        logits, labels = problem(2.5)
        found = fit(jnp.asarray(logits), labels)
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found, scipys(logits, labels), rtol=1e-12)


def test_float64_is_solved_to_its_own_rounding():
    check_float64(train.fit_temperature)


def test_half_precision_and_offsets_do_no_harm():
    logits, labels = problem(2.0)
    half = jnp.asarray(logits, jnp.bfloat16)
    np.testing.assert_allclose(
        train.fit_temperature(half, labels), scipys(np.float64(half), labels), rtol=3e-6
    )
    # A constant for each row says nothing; at 2^10 of it float32 still has 13 bits of the logits.
    shifted = np.float32(np.round(logits * 64) / 64)
    offset = shifted + np.float32(1024)
    np.testing.assert_allclose(
        train.fit_temperature(offset, labels), train.fit_temperature(shifted, labels), rtol=3e-6
    )


def test_it_can_be_compiled_and_mapped():
    logits, labels = zip(*(problem(s, n=200) for s in (0.5, 3.0)), strict=True)
    logits, labels = jnp.asarray(np.stack(logits), jnp.float32), jnp.asarray(np.stack(labels))
    found = jax.jit(jax.vmap(train.fit_temperature))(logits, labels)
    for i in range(2):
        np.testing.assert_allclose(found[i], train.fit_temperature(logits[i], labels[i]), rtol=1e-6)


def test_the_calibration_error_falls_and_the_classes_stay():
    logits, labels = problem(3.0, n=4000)
    logits = logits.astype(np.float32)
    temperature = train.fit_temperature(logits[:2000], labels[:2000])

    def calibration_error(z):
        return float(metrics.expected_calibration_error(metrics.calibration_bins(z, labels[2000:])))

    before, after = calibration_error(logits[2000:]), calibration_error(logits[2000:] / temperature)
    assert before > 0.1
    assert after < 0.03  # of 2000 examples in 15 bins chance alone makes some 0.02
    np.testing.assert_array_equal((logits / temperature).argmax(-1), logits.argmax(-1))


MUTANTS = {
    "1/T": ("jnp.where(scale > 0, scale, 1) / b", "b / jnp.where(scale > 0, scale, 1)"),
    "the scale forgotten": ("jnp.where(scale > 0, scale, 1) / b", "1 / b"),
    "the other half": ("jnp.where(is_above, low, middle)", "jnp.where(is_above, middle, low)"),
    "no Newton": ("_NEWTON_STEPS = 4", "_NEWTON_STEPS = 0"),
    "Newton's step the wrong way": ("b - step", "b + step"),
    "the first class for the label": ("labels[:, None], axis=1", "0 * labels[:, None], axis=1"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_wrong_temperatures_are_noticed(name):
    right, wrong = MUTANTS[name]
    source = inspect.getsource(calibration)
    assert source.count(right) == 1
    module = types.ModuleType("mutant")
    exec(compile(source.replace(right, wrong), "mutant", "exec"), module.__dict__)
    with pytest.raises((AssertionError, ValueError)):
        (check_float64 if "Newton" in name else check)(module.fit_temperature)


Z = np.float32([[3, 0, 0], [0, 3, 0], [0, 0, 3]])


@pytest.mark.parametrize(
    ("logits", "labels", "error", "message"),
    [
        (Z, np.array([0, 1, 2]), ValueError, "all examples are right, so the lower it is the better"),
        (Z, np.array([1, 2, 0]), ValueError, "are not above the average of their rows"),
        (Z * 0, np.array([1, 2, 0]), ValueError, "are not above the average of their rows"),
        (Z, np.array([0, 1, 3]), ValueError, r"label targets\[2\] is 3 .* labels 0..2"),
        (Z, np.array([0.0, 1.0, 2.0]), TypeError, "softmax_cross_entropy"),
        (Z, np.array([0, 1]), ValueError, r"takes logits \(examples, classes\) and labels \(examples,\), got \(3, 3\)"),
        (Z[0], np.array([0, 1, 2]), ValueError, r"got \(3,\) and \(3,\)"),
        (Z[:0], np.zeros(0, int), ValueError, r"got no logits, their shape is \(0, 3\)"),
        (np.int32(Z), np.array([0, 1, 1]), TypeError, "logits must be floating, got int32"),
        (np.where(Z == 3, np.nan, Z), np.array([0, 1, 1]), ValueError, "not finite in 3 of 3 rows, the first of them"),
    ],
)  # fmt: skip
def test_what_has_no_temperature_is_said(logits, labels, error, message):
    with pytest.raises(error, match=message):
        train.fit_temperature(logits, labels)
