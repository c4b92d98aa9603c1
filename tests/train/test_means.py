"""Means in float32 programs against float64 on the host."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnkit.train.means import epoch_means, weighted_mean

RNG = np.random.default_rng(0)


def _oracle(values, weights):
    return np.float32(np.sum(values.astype(np.float64) * weights) / np.sum(weights.astype(np.float64)))


def _check(mean):
    for n in (1, 2, 3, 7, 100, 1001):
        values = (RNG.normal(size=n) * 10.0 ** RNG.integers(-3, 4, n)).astype(np.float32)
        weights = np.r_[np.full(n - 1, 64), 17].astype(np.float32)
        assert np.float32(jax.jit(mean)(values, weights)) == _oracle(values, weights), n


def test_it_is_the_mean_in_float64_rounded_once():
    _check(weighted_mean)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda v, w: jnp.sum(v * w) / jnp.sum(w),  # in float32
        lambda v, w: weighted_mean(v, jnp.ones_like(w)),  # an uneven last batch counts as much as the others
    ],
)
def test_a_wrong_mean_is_found(wrong):
    with pytest.raises(AssertionError):
        _check(wrong)


def test_what_is_not_finite_stays_so():
    ones = jnp.ones(3)
    assert float(weighted_mean(jnp.array([1, jnp.inf, 2]), ones)) == jnp.inf
    assert float(weighted_mean(jnp.array([1, -jnp.inf, 2]), ones)) == -jnp.inf
    assert jnp.isnan(weighted_mean(jnp.array([1, jnp.nan, 2]), ones))
    assert jnp.isnan(weighted_mean(ones, 0 * ones))


def test_its_derivative_is_the_means():
    values, weights = jnp.arange(4.0), jnp.array([2.0, 2.0, 2.0, 1.0])
    np.testing.assert_allclose(jax.grad(weighted_mean)(values, weights), weights / 7, 1e-7)
    np.testing.assert_allclose(jax.jacfwd(weighted_mean)(values, weights), weights / 7, 1e-7)
    stacked = jax.vmap(weighted_mean, (0, None))(jnp.stack([values, 2 * values]), weights)
    assert float(stacked[1]) == 2 * float(stacked[0])


def test_metrics_of_any_dtype_and_steps_that_were_skipped():
    metrics = {
        "loss": jnp.array([1.0, jnp.nan, 4.0]),
        "hits": jnp.array([True, True, False]),
        "half": jnp.array([1, 2, 4], jnp.bfloat16),
        "skipped": jnp.array([0, 1, 0]),
    }
    means = jax.jit(lambda m: epoch_means(m, np.array([4, 4, 2])))(metrics)
    assert {name: float(m) for name, m in means.items()} == pytest.approx(
        {"loss": 2.0, "hits": 4 / 6, "half": 2.0, "skipped": 1.0}
    )
    assert {m.dtype for m in means.values()} == {jnp.dtype("float32")}
