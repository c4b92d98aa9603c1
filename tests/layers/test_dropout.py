from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnkit import layers
from nnkit.checks import LayerError
from nnkit.layers.dropout import keep_mask

KEY = jax.random.key(3)
ONES = jnp.ones((200, 500))


@pytest.mark.parametrize("rate", [0.5, 0.25, 5 / 16, 3 / 256, 0.1, 0.3, 12345 / 65536, 1 / 3, 0.999])
def test_the_rate_is_the_share_that_is_dropped(rate):
    """Each width of random bits; the bound is five standard deviations of the share."""
    dropped = 1 - float(keep_mask(KEY, rate, ONES.shape).mean())
    assert abs(dropped - rate) < 5 * (rate * (1 - rate) / ONES.size) ** 0.5


@pytest.mark.parametrize("rate", [0.5, 0.25, 0.125, 3 / 256, 12345 / 65536, 0.3])
def test_elements_are_independent(rate):
    """Neighbours, which may come from one word of random bits, agree as often as chance has it."""
    m = np.asarray(keep_mask(KEY, rate, (1000, 64)), np.float64) - (1 - rate)
    for lag in (1, 2, 3, 4):
        for a, b in ((m[:, lag:], m[:, :-lag]), (m[lag:], m[:-lag])):
            assert abs(np.mean(a * b)) < 5 * rate * (1 - rate) / a.size**0.5


@pytest.mark.parametrize("shape", [(), (1,), (3,), (5, 7), (2, 3, 4), (0, 4), (4, 0)])
@pytest.mark.parametrize("rate", [0.5, 1000 / 65536, 0.3])
def test_masks_of_any_shape(shape, rate):
    mask = keep_mask(KEY, rate, shape)
    assert mask.shape == shape
    assert mask.dtype == bool


def test_training_scales_what_it_keeps_so_that_the_mean_stays():
    y, _ = layers.dropout(0.25).apply({}, {}, ONES, key=KEY, train=True)
    assert set(np.unique(y)) == {0.0, np.float32(1 / 0.75)}
    assert float(y.mean()) == pytest.approx(1, abs=0.01)
    np.testing.assert_array_equal(layers.dropout(0.25).apply({}, {}, ONES, train=False)[0], ONES)


def test_the_lectures_form_scales_at_test_time():
    layer = layers.dropout(0.25, scale_at="test")
    y, _ = layer.apply({}, {}, ONES, key=KEY, train=True)
    assert set(np.unique(y)) == {0.0, 1.0}
    np.testing.assert_array_equal(layer.apply({}, {}, ONES, train=False)[0], 0.75 * ONES)
    inverted, _ = layers.dropout(0.25).apply({}, {}, ONES, key=KEY, train=True)
    np.testing.assert_array_equal(y > 0, inverted > 0)


def test_a_rate_of_zero_changes_nothing_and_needs_no_key():
    np.testing.assert_array_equal(layers.dropout(0.0).apply({}, {}, ONES, train=True)[0], ONES)


def test_the_gradient_is_the_mask():
    layer = layers.dropout(0.5)
    grad = jax.grad(lambda x: layer.apply({}, {}, x, key=KEY, train=True)[0].sum())(ONES)
    np.testing.assert_array_equal(grad, layer.apply({}, {}, ONES, key=KEY, train=True)[0])


def test_a_traced_rate_gives_what_a_static_one_gives():
    def run(rate):
        return layers.dropout(rate).apply({}, {}, ONES, key=KEY, train=True)[0]

    static = run(0.3)
    traced = jax.jit(run)(jnp.float32(0.3))
    np.testing.assert_array_equal(static > 0, traced > 0)
    np.testing.assert_allclose(static, traced, rtol=1e-6)


def test_a_traced_rate_of_one_drops_all_and_has_gradient_zero():
    def run(x, rate):
        return layers.dropout(rate).apply({}, {}, x, key=KEY, train=True)[0].sum()

    value, grad = jax.jit(jax.value_and_grad(run))(ONES, jnp.float32(1))
    assert float(value) == 0
    np.testing.assert_array_equal(grad, 0)


def test_the_mean_over_masks_is_the_test_output_of_a_linear_layer():
    """Why both forms are right for one layer: E[mask] x W = x W (inverted), q x W (the lecture's)."""
    rng = np.random.default_rng(0)
    x, w = jnp.asarray(rng.normal(size=20), jnp.float32), jnp.asarray(rng.normal(size=(20, 3)), jnp.float32)
    for scale_at in ("train", "test"):
        layer = layers.dropout(0.5, scale_at=scale_at)
        outputs = jax.vmap(lambda k, f=layer: f.apply({}, {}, x, key=k, train=True)[0] @ w)(
            jax.random.split(KEY, 20000)
        )
        spread = outputs.std(axis=0) / 20000**0.5
        expected = layer.apply({}, {}, x, train=False)[0] @ w
        assert (abs(outputs.mean(axis=0) - expected) < 5 * spread).all()


@pytest.mark.parametrize("rate", [-0.1, 1, 1.0, 1.5, float("nan"), jnp.float32(1.5)])
def test_a_rate_outside_its_range(rate):
    with pytest.raises(ValueError, match=r"dropout\(rate\) must be in \[0, 1\), got"):
        layers.dropout(rate)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: layers.dropout("half"),
            TypeError,
            r"dropout\(rate\) must be a number in \[0, 1\), got 'half'",
        ),
        (
            lambda: layers.dropout(0.5, scale_at="never"),
            ValueError,
            r"must be 'train' or 'test', got 'never'",
        ),
        (
            lambda: layers.dropout(0.5).apply({}, {}, ONES, train=True),
            LayerError,
            r"dropout needs a key when train=True: pass apply\(..., key=key\)",
        ),
        (
            lambda: layers.dropout(0.5).apply({}, {}, ONES, key=jax.random.PRNGKey(0), train=True),
            TypeError,
            r"dropout.apply got an old-style uint32 key: make it with jax.random.key\(seed\)",
        ),
        (
            lambda: layers.dropout(0.5).apply({}, {}, ONES, key=jax.random.split(KEY), train=True),
            ValueError,
            r"takes one key and got an array of keys of shape \(2,\)",
        ),
        (
            lambda: layers.dropout(0.5).apply({}, {}, ONES, key=7, train=True),
            TypeError,
            r"got the number 7 for a key: pass jax.random.key\(7\)",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
