"""``remat``: the same numbers from less memory."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnkit import layers, tree
from nnkit.types import Layer

KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)


def body() -> Layer:
    wide = layers.serial(layers.dense(32), layers.tanh, layers.dropout(0.5), layers.batch_norm())
    return layers.serial(wide, layers.dense(32), layers.tanh, layers.dense(4))


def run(layer: Layer, x: Any) -> Any:
    params, state = layer.init(KEY, x)

    def value(params: Any, x: Any) -> Any:
        y, new = layer.apply(params, state, x, key=jax.random.key(1), train=True)
        return jnp.sum(jnp.sin(y)), (y, new)

    return jax.jit(jax.grad(value, (0, 1), has_aux=True))(params, x)


def kept(layer: Layer) -> int:
    """How many numbers the forward pass leaves for the backward pass, beside parameters and input."""
    params, state = layer.init(KEY, X)

    def f(params: Any, x: Any) -> Any:
        return layer.apply(params, state, x, key=jax.random.key(1), train=True)[0]

    pullback = jax.vjp(f, params, X)[1]
    # By identity: what is kept of the arguments is no memory of the pass's own.
    own = {id(leaf) for leaf in jax.tree.leaves((params, X))}
    return sum(leaf.size for leaf in jax.tree.leaves(pullback) if id(leaf) not in own)


def test_values_state_and_gradients_are_the_same():
    """To rounding: XLA fuses the second computation otherwise."""
    for x, rtol in ((X, 1e-5), (np.asarray(X, np.float64), 1e-10)):
        with jax.enable_x64(rtol == 1e-10):
            ours, theirs = (run(layer, jnp.asarray(x)) for layer in (layers.remat(body()), body()))
            for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
                assert a.dtype == b.dtype
                np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(jnp.abs(b).max()))


def test_less_is_kept_and_the_policy_says_what():
    nothing, plain = kept(layers.remat(body())), kept(body())
    dots = kept(layers.remat(body(), jax.checkpoint_policies.dots_with_no_batch_dims_saveable))
    assert nothing < dots < plain
    assert nothing < X.shape[0] * 32, "not even one hidden activation"


def test_the_paths_are_those_of_the_layer():
    model = layers.serial(layers.remat(layers.dense(4)), layers.named("top", layers.remat(body())))
    params, state = model.init(KEY, X)
    plain = layers.serial(layers.dense(4), layers.named("top", body()))
    assert list(tree.flatten(params)) == list(tree.flatten(plain.init(KEY, X)[0]))
    _, _, outputs = layers.observe(model, params, state, X, key=KEY, train=True)
    expected = layers.observe(plain, params, state, X, key=KEY, train=True)[2]
    assert list(outputs) == list(expected)
    for path, output in outputs.items():
        np.testing.assert_allclose(output, expected[path], rtol=1e-5, atol=1e-6)
    assert layers.summary(model, X) == layers.summary(plain, X)


def test_observed_inside_it_may_be_differentiated_and_nothing_leaks():
    model = layers.remat(body())
    params, state = model.init(KEY, X)

    def value(params: Any, layer: Layer) -> jax.Array:
        return layers.observe(layer, params, state, X, key=KEY, train=True)[2]["serial_0/tanh_0"].sum()

    with jax.checking_leaks():
        grads = jax.grad(value)(params, model)
    expected = jax.grad(value)(params, body())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), grads, expected)


def test_bad_input():
    with pytest.raises(
        TypeError, match=r"remat\(policy=...\) must be a function, got 'dots': pass one of jax.che"
    ):
        layers.remat(layers.relu, "dots")
    with pytest.raises(TypeError, match="remat got the function dense: call it"):
        layers.remat(layers.dense)
    model = layers.serial(layers.remat(layers.serial(layers.dropout(0.5))))
    with pytest.raises(ValueError, match=r"^serial_0/dropout_0 needs a key when train=True"):
        model.apply({}, {}, X, train=True)
