"""Dropout of channels and of examples, Gaussian and alpha dropout: what they draw, by exact bounds."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy import stats

from nnkit import layers
from nnkit.checks import LayerError
from nnkit.layers.dropout import keep_mask

KEY = jax.random.key(11)
CHANCE = 1e-6
"""How often a right layer would fall outside a bound, were its key not fixed."""


def _run(layer, x, key=KEY, train=True):
    return layer.apply({}, {}, x, key=key, train=train)[0]


def _binomial(dropped, n, rate):
    """Raises unless the number that was dropped lies where Binomial(n, rate) has all but CHANCE of its mass."""
    low, high = stats.binom.ppf([CHANCE / 2, 1 - CHANCE / 2], n, rate)
    assert low <= dropped <= high, (dropped, low, high)


# What one draw stands for, as the axes of x (batch, height, width, channels) along which draws are shared.
SHARED = {
    "dropout": (lambda rate: layers.dropout(rate), ()),
    "dropout over time": (lambda rate: layers.dropout(rate, broadcast_dims=(1, -2)), (1, 2)),
    "dropout over the batch": (lambda rate: layers.dropout(rate, broadcast_dims=(0,)), (0,)),
    "spatial_dropout": (lambda rate: layers.spatial_dropout(rate), (1, 2)),
    "stochastic_depth": (lambda rate: layers.stochastic_depth(rate), (1, 2, 3)),
    "stochastic_depth of the batch": (lambda rate: layers.stochastic_depth(rate, mode="batch"), (0, 1, 2, 3)),
}
SHAPE = (40, 3, 2, 8)


def _check_shared(layer, name, rate):
    """One draw for what is shared, another elsewhere; the share that is dropped; what is kept is scaled."""
    shared = SHARED[name][1]
    keys = jax.random.split(KEY, 200)
    y = np.asarray(jax.jit(jax.vmap(lambda key: _run(layer, jnp.ones(SHAPE), key)))(keys))
    np.testing.assert_allclose(y[y != 0], 1 / (1 - rate), rtol=1e-6)
    dropped = y == 0
    axes = tuple(a + 1 for a in shared)
    first = dropped[tuple(slice(None) if a not in axes else slice(1) for a in range(5))]
    np.testing.assert_array_equal(dropped, np.broadcast_to(first, dropped.shape))
    _binomial(first.sum(), first.size, rate)
    for axis in range(5):  # draws next to each other, along every axis that has its own: both dropped
        if first.shape[axis] > 1:
            a, b = (np.take(first, np.arange(i, first.shape[axis] - 1 + i, 2), axis) for i in (0, 1))
            n = min(a.shape[axis], b.shape[axis])
            both = np.take(a, np.arange(n), axis) & np.take(b, np.arange(n), axis)
            _binomial(both.sum(), both.size, rate**2)


@pytest.mark.parametrize("rate", [0.25, 0.3])
@pytest.mark.parametrize("name", SHARED)
def test_what_is_dropped_together_and_how_often(name, rate):
    _check_shared(SHARED[name][0](rate), name, rate)


def _biased(layer):
    """Keeps its scale and drops 1% more."""

    def apply(params, state, x, *, key=None, train):
        y, state = layer.apply(params, state, x, key=key, train=train)
        more = keep_mask(jax.random.fold_in(key, 1), 0.01, x.shape)
        return jnp.where(more, y, 0), state

    return layer._replace(apply=apply)


def _same_for_all(layer):
    def apply(params, state, x, *, key=None, train):
        return layer.apply(params, state, x, key=KEY, train=train)

    return layer._replace(apply=apply)


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        (layers.dropout(0.25), "spatial_dropout"),
        (layers.spatial_dropout(0.25), "dropout"),
        (layers.spatial_dropout(0.25), "stochastic_depth"),
        (layers.stochastic_depth(0.25), "stochastic_depth of the batch"),
        (layers.stochastic_depth(0.25, mode="batch"), "stochastic_depth"),
        (layers.dropout(0.26), "dropout"),
        (layers.dropout(0.25, scale_at="test"), "dropout"),
        (_biased(layers.dropout(0.25)), "dropout"),
        (_same_for_all(layers.dropout(0.25)), "dropout"),
    ],
)
def test_a_wrong_layer_is_caught(wrong, name):
    with pytest.raises(AssertionError):
        _check_shared(wrong, name, 0.25)


ALL = {
    **{name: make for name, (make, _) in SHARED.items()},
    "gaussian_dropout": layers.gaussian_dropout,
    "alpha_dropout": layers.alpha_dropout,
}
X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3, 2, 5)), jnp.float32)


@pytest.mark.parametrize("name", ALL)
def test_rates_of_0_and_1_and_traced_ones(name):
    """A rate of 0 is the identity and needs no key; a traced 1 gives 0; no gradient is NaN, that by the rate too."""
    make = ALL[name]
    np.testing.assert_array_equal(make(0.0).apply({}, {}, X, train=True)[0], X)
    np.testing.assert_array_equal(make(0.4).apply({}, {}, X, train=False)[0], X)

    @jax.jit
    def run(rate):
        def total(x, rate):
            y = _run(make(rate), x)
            return jnp.sin(y).sum(), y

        grads, y = jax.grad(total, (0, 1), has_aux=True)(X, rate)
        return y, *grads

    for rate, want in ((0.0, X), (0.4, _run(make(0.4), X)), (1.0, jnp.zeros_like(X))):
        y, *grads = run(jnp.float32(rate))
        np.testing.assert_allclose(y, want, rtol=1e-6, atol=1e-6)
        assert all(np.isfinite(g).all() for g in grads)
        if rate == 1:
            np.testing.assert_array_equal(grads[0], 0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ALL)
def test_half_precision_stays_half(name, dtype):
    assert _run(ALL[name](0.3), X.astype(dtype)).dtype == dtype


def _moments_within(samples, mean, variance, fourth):
    """The sample's mean and variance within five of their own standard deviations, for independent samples.

    ``fourth`` is the fourth central moment: the variance of a sample variance is (fourth - variance²)/n.
    """
    n = samples.size
    samples = np.asarray(samples, np.float64)
    assert abs(samples.mean() - mean) < 5 * (variance / n) ** 0.5
    assert abs(samples.var() - variance) < 5 * ((fourth - variance**2) / n) ** 0.5


def _check_gaussian(layer, rate):
    variance = rate / (1 - rate)
    y = _run(layer, jnp.full((400, 500), 2.0))
    _moments_within(y / 2, 1, variance, 3 * variance**2)
    assert stats.kstest(np.ravel((y / 2 - 1) / variance**0.5), "norm").pvalue > CHANCE


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8])
def test_gaussian_dropout_has_the_moments_of_dropout(rate):
    _check_gaussian(layers.gaussian_dropout(rate), rate)


def test_a_wrong_gaussian_is_caught():
    for wrong in (layers.gaussian_dropout(0.51), layers.dropout(0.5), layers.gaussian_noise(1.0)):
        with pytest.raises(AssertionError):
            _check_gaussian(wrong, 0.5)


def test_gaussian_noise():
    x = jnp.full((400, 500), 3.0)
    _moments_within(_run(layers.gaussian_noise(0.5), x), 3, 0.25, 3 * 0.25**2)
    np.testing.assert_array_equal(_run(layers.gaussian_noise(0.5), x, train=False), x)
    np.testing.assert_array_equal(layers.gaussian_noise(0.0).apply({}, {}, x, train=True)[0], x)
    traced = jax.jit(lambda s: _run(layers.gaussian_noise(s), x))(jnp.float32(0.5))
    np.testing.assert_allclose(traced, _run(layers.gaussian_noise(0.5), x), rtol=1e-6)


def _check_alpha(layer, rate):
    """PyTorch's two values of y at a given x, how often each comes, and the moments where x is standard normal."""
    x = np.array([0.7])
    kept, dropped = (
        float(y)
        for y in np.unique(torch.nn.functional.alpha_dropout(torch.tensor(np.repeat(x, 500)), rate, True))[
            ::-1
        ]
    )
    y = np.asarray(_run(layer, jnp.full((300, 500), 0.7)))
    is_kept = np.isclose(y, kept, rtol=1e-5)
    np.testing.assert_allclose(y, np.where(is_kept, kept, dropped), rtol=1e-5)
    _binomial((~is_kept).sum(), y.size, rate)
    normal = jax.random.normal(jax.random.key(2), (300, 500))
    # All of y lies within that of a normal of deviation 2: its fourth moment is less than 3·2⁴.
    _moments_within(_run(layer, normal), 0, 1, 48)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_alpha_dropout_has_pytorchs_values_and_keeps_the_moments(rate):
    _check_alpha(layers.alpha_dropout(rate), rate)


def test_a_wrong_alpha_dropout_is_caught():
    for wrong in (layers.alpha_dropout(0.11), layers.dropout(0.1)):
        with pytest.raises(AssertionError):
            _check_alpha(wrong, 0.1)


def test_stochastic_depth_in_a_residual_block():
    """An example whose branch is dropped passes unchanged; in the mean over masks the block is as at test time."""
    block = layers.residual(layers.serial(layers.dense(4), layers.stochastic_depth(0.25)))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(6, 4)), jnp.float32)
    params, state = block.init(KEY, x)
    ys = jax.jit(jax.vmap(lambda key: block.apply(params, state, x, key=key, train=True)[0]))(
        jax.random.split(KEY, 2000)
    )
    through = np.asarray((ys == x).all(-1))
    _binomial(through.sum(), through.size, 0.25)
    expected, _ = block.apply(params, state, x, train=False)
    assert (abs(ys.mean(0) - expected) < 5 * ys.std(0) / 2000**0.5).all()


NAMES = ["spatial_dropout", "stochastic_depth", "gaussian_dropout", "alpha_dropout"]


@pytest.mark.parametrize("name", NAMES)
def test_bad_input(name):
    make = getattr(layers, name)
    with pytest.raises(ValueError, match=rf"{name}\(rate\) must be in \[0, 1\), got 1"):
        make(1)
    with pytest.raises(LayerError, match=rf"{name} needs a key when train=True: pass apply\(..., key=key\)"):
        make(0.5).apply({}, {}, X, train=True)
    with pytest.raises(LayerError, match=rf"{name} takes floating-point input, got int32"):
        make(0.5).apply({}, {}, jnp.ones((2, 3), jnp.int32), key=KEY, train=True)
    with pytest.raises(TypeError, match=rf"{name}.apply got the number 7 for a key"):
        make(0.5).apply({}, {}, X, key=7, train=True)


def test_bad_arguments():
    with pytest.raises(
        ValueError, match=r"stochastic_depth\(mode=...\) must be 'row' or 'batch', got 'rows'"
    ):
        layers.stochastic_depth(0.5, mode="rows")
    with pytest.raises(ValueError, match=r"gaussian_noise\(stddev\) must not be negative, got -1"):
        layers.gaussian_noise(-1)
    with pytest.raises(LayerError, match=r"gaussian_noise needs a key when train=True"):
        layers.gaussian_noise(1.0).apply({}, {}, X, train=True)
    with pytest.raises(
        LayerError, match=r"dropout has broadcast_dims=\[4\] for input of shape \(4, 3, 2, 5\)"
    ):
        _run(layers.dropout(0.5, broadcast_dims=(1, 4)), X)
