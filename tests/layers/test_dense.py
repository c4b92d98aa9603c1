from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from nnkit import initializers, layers
from nnkit.checks import LayerError

X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 7, 4)), jnp.float32)


def test_equals_flax_with_the_same_parameters():
    params, state = layers.dense(3).init(jax.random.key(0), X)
    ours, _ = layers.dense(3).apply(params, state, X, train=False)
    np.testing.assert_array_equal(ours, nn.Dense(3).apply({"params": params}, X))


def test_draws_as_flax_does():
    draw = np.asarray(layers.dense(400).init(jax.random.key(0), jnp.zeros((1, 300)))[0]["kernel"])
    flax_draw = nn.Dense(400).init(jax.random.key(1), jnp.zeros((1, 300)))["params"]["kernel"]
    # Truncated at two standard deviations before rescaling: same spread and same largest value.
    assert draw.std() == pytest.approx(300**-0.5, rel=0.01)
    assert abs(draw).max() == pytest.approx(float(abs(flax_draw).max()), rel=1e-3)


def test_equals_pytorch_forward_and_gradients():
    params, state = layers.dense(3).init(jax.random.key(0), X)
    linear = torch.nn.Linear(4, 3)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor(np.asarray(params["kernel"]).T))
        linear.bias.copy_(torch.tensor(np.asarray(params["bias"]) + 0.5))
    params = {**params, "bias": params["bias"] + 0.5}
    x = torch.tensor(np.asarray(X), requires_grad=True)
    y = linear(x)
    y.square().sum().backward()

    def loss(params, x):
        return jnp.sum(jnp.square(layers.dense(3).apply(params, state, x, train=True)[0]))

    grads, dx = jax.grad(loss, argnums=(0, 1))(params, X)
    close = {"rtol": 1e-5, "atol": 1e-5}
    np.testing.assert_allclose(layers.dense(3).apply(params, state, X, train=True)[0], y.detach(), **close)
    np.testing.assert_allclose(grads["kernel"], linear.weight.grad.T, **close)
    np.testing.assert_allclose(grads["bias"], linear.bias.grad, **close)
    np.testing.assert_allclose(dx, x.grad, **close)


def test_biases_start_at_zero_and_can_be_left_out_or_set():
    key = jax.random.key(0)
    assert not layers.dense(3).init(key, X)[0]["bias"].any()
    assert set(layers.dense(3, use_bias=False).init(key, X)[0]) == {"kernel"}
    ones = layers.dense(3, bias_init=initializers.ones).init(key, X)[0]["bias"]
    np.testing.assert_array_equal(ones, 1)


def test_parameters_take_the_inputs_dtype():
    with jax.enable_x64(True):
        params, _ = layers.dense(3).init(jax.random.key(0), jnp.zeros((1, 4), jnp.float64))
        assert params["kernel"].dtype == params["bias"].dtype == jnp.float64


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: layers.dense(0), ValueError, r"dense\(features=...\) must be at least 1, got 0"),
        (lambda: layers.dense(2.5), TypeError, r"dense\(features=...\) must be a whole number, got 2.5"),
        (
            lambda: layers.dense(3).init(jax.random.key(0), jnp.zeros((2, 4), jnp.uint8)),
            LayerError,
            r"dense takes floating-point input, got uint8 of shape \(2, 4\): write x.astype\(jnp.float32\)",
        ),
        (
            lambda: layers.dense(3).init(jax.random.key(0), "image"),
            LayerError,
            "dense takes an array, got str",
        ),
        (
            lambda: layers.dense(3).apply(
                layers.dense(3).init(jax.random.key(0), X)[0], {}, jnp.zeros((2, 5)), train=False
            ),
            LayerError,
            r"dense has a kernel of shape \(4, 3\) and needs \(5, 3\): its input has shape \(2, 5\)",
        ),
        (
            lambda: layers.dense(3).apply({"weight": X}, {}, X, train=False),
            LayerError,
            r"dense has no 'kernel' among \['weight'\]: pass the parameters and the state that this model's init made",
        ),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
