from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnkit import layers, ops
from nnkit.checks import LayerError
from tests.properties import made

KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 4)), jnp.float32)


def test_learned_positions_are_added():
    layer = layers.learned_positions(7)
    params, state = layer.init(KEY, X)
    assert (params["embedding"].shape, state) == ((7, 4), {})
    y, _ = layer.apply(params, state, X, train=True)
    np.testing.assert_array_equal(y, X + params["embedding"][:5])
    grads = jax.grad(lambda p: jnp.sum(layer.apply(p, state, X, train=True)[0]))(params)
    np.testing.assert_array_equal(grads["embedding"], [[2.0] * 4] * 5 + [[0.0] * 4] * 2)
    wide = layers.learned_positions(500).init(KEY, jnp.zeros((1, 1, 100)))[0]["embedding"]
    # 50000 draws: the standard error of their deviation is 0.3 %.
    assert float(wide.std()) == pytest.approx(0.02, rel=0.02)


def test_sinusoidal_positions_are_added():
    layer = layers.sinusoidal_positions(base=100.0)
    assert layer.init(KEY, X) == ({}, {})
    y, _ = layer.apply({}, {}, X, train=True)
    np.testing.assert_array_equal(y, X + ops.sinusoidal(jnp.arange(5), 4, base=100.0))


def goes_on_where_it_ended(layer):
    params, start = made(layer, X)
    whole, after = layer.apply(params, start, X, train=True)
    assert after is start
    step = jax.jit(partial(layer.apply, train=False))
    first, state = step(params, start, X[:, :3])
    last, state = step(params, state, X[:, 3:])
    assert state["index"].dtype == jnp.int32
    assert int(state["index"]) == 5
    np.testing.assert_allclose(jnp.concatenate([first, last], 1), whole, rtol=1e-6, atol=1e-6)
    return params, state


def test_sinusoidal_positions_go_on_where_they_ended():
    goes_on_where_it_ended(layers.sinusoidal_positions(cache=True))


def test_learned_positions_go_on_where_they_ended_and_end():
    layer = layers.learned_positions(6, cache=True)
    params, state = goes_on_where_it_ended(layer)
    with pytest.raises(
        LayerError, match="learned_positions has room for 6 positions and got 2 after 5: make it larger"
    ):
        layer.apply(params, state, X[:, :2], train=False)
    y, _ = jax.jit(partial(layer.apply, train=False))(params, state, X[:, :2])
    np.testing.assert_array_equal(jnp.isnan(y).all((0, 2)), [False, True])


def test_positions_that_start_again_are_told_from_those_that_go_on():
    layer = layers.learned_positions(6, cache=True)

    def again(params, state, x, *, key=None, train):
        y, after = layer.apply(params, {"index": state["index"] * 0}, x, train=train)
        return y, (state if train else {"index": state["index"] + after["index"]})

    with pytest.raises(AssertionError):
        goes_on_where_it_ended(layer._replace(apply=again))


@pytest.mark.parametrize("make", [partial(layers.learned_positions, 6), layers.sinusoidal_positions])
def test_run_in_float64(make):
    with jax.enable_x64(True):
        x = jnp.asarray(np.asarray(X), jnp.float64)
        layer = make(cache=True)
        params, state = layer.init(KEY, x)
        y, state = layer.apply(params, state, x, train=False)
        assert (y.dtype, state["index"].dtype) == (jnp.float64, jnp.int32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: layers.learned_positions(0),
            ValueError,
            r"learned_positions\(max_length\) must be at least 1",
        ),
        (
            lambda: layers.learned_positions(4).apply({"embedding": jnp.zeros((4, 4))}, {}, X, train=False),
            LayerError,
            "has room for 4 positions and got 5 after 0",
        ),
        (
            lambda: layers.learned_positions(5).apply({"embedding": jnp.zeros((4, 4))}, {}, X, train=False),
            LayerError,
            r"has a embedding of shape \(4, 4\) and needs \(5, 4\): its input has shape \(2, 5, 4\)",
        ),
        (
            lambda: layers.sinusoidal_positions().init(KEY, X[0]),
            LayerError,
            r"sinusoidal_positions takes \(batch, time, features\), got shape \(5, 4\)",
        ),
        (
            lambda: layers.sinusoidal_positions(cache=True).apply({}, {}, X, train=False),
            LayerError,
            r"has no 'index' among \[\]: pass the parameters and the state",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
