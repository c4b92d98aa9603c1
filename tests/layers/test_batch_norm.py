from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from nnkit import layers
from nnkit.checks import LayerError

RNG = np.random.default_rng(0)
BATCHES = [jnp.asarray(RNG.normal(2 * i, 1 + i, (6, 3, 3, 4)), jnp.float32) for i in range(20)]


def _trajectory(layer, batches):
    params, state = layer.init(jax.random.key(0), batches[0])
    for x in batches:
        y, state = layer.apply(params, state, x, train=True)
    return y, layer.apply(params, state, batches[0], train=False)[0], state


def test_trajectory_equals_flax():
    # use_fast_variance=False: Flax's default variance E[x²] - m² has other rounding.
    theirs = nn.BatchNorm(use_fast_variance=False)
    variables = theirs.init(jax.random.key(0), BATCHES[0], use_running_average=False)
    for x in BATCHES:
        flax_y, new = theirs.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
        variables = {**variables, **new}
    y, at_test, state = _trajectory(layers.batch_norm(), BATCHES)
    np.testing.assert_allclose(y, flax_y, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        at_test, theirs.apply(variables, BATCHES[0], use_running_average=True), rtol=1e-5
    )
    for name in ("mean", "var"):
        np.testing.assert_allclose(state[name], variables["batch_stats"][name], rtol=1e-6)


def test_trajectory_equals_pytorch():
    theirs = torch.nn.BatchNorm2d(4)
    for x in BATCHES:
        torch_y = theirs(torch.tensor(np.asarray(x)).permute(0, 3, 1, 2))
    y, at_test, state = _trajectory(layers.batch_norm(momentum=0.9, unbiased=True), BATCHES)
    np.testing.assert_allclose(y, torch_y.detach().permute(0, 2, 3, 1), rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(state["mean"], theirs.running_mean, rtol=1e-5)
    np.testing.assert_allclose(state["var"], theirs.running_var, rtol=1e-5)
    theirs.eval()
    torch_test = theirs(torch.tensor(np.asarray(BATCHES[0])).permute(0, 3, 1, 2)).detach()
    np.testing.assert_allclose(at_test, torch_test.permute(0, 2, 3, 1), rtol=1e-5, atol=1e-6)


def test_gradients_equal_pytorch():
    x = BATCHES[3]
    theirs = torch.nn.BatchNorm2d(4)
    tx = torch.tensor(np.asarray(x), requires_grad=True)
    theirs(tx.permute(0, 3, 1, 2)).sin().sum().backward()
    layer = layers.batch_norm()
    params, state = layer.init(jax.random.key(0), x)

    def loss(params, x):
        return jnp.sin(layer.apply(params, state, x, train=True)[0]).sum()

    grads, dx = jax.grad(loss, argnums=(0, 1))(params, x)
    np.testing.assert_allclose(dx, tx.grad, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(grads["scale"], theirs.weight.grad, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grads["bias"], theirs.bias.grad, rtol=1e-5, atol=1e-5)


def test_derivatives_are_those_of_the_formula():
    """First and second, forward and reverse, by every argument: the layer has a rule of its own."""

    def formula(x, scale, bias, epsilon):
        mean = jnp.mean(x, (0, 1))
        return (x - mean) / jnp.sqrt(jnp.mean((x - mean) ** 2, (0, 1)) + epsilon) * scale + bias

    def layer(x, scale, bias, epsilon):
        bn = layers.batch_norm(epsilon=epsilon)
        params, state = {"scale": scale, "bias": bias}, {"mean": jnp.zeros(3), "var": jnp.ones(3)}
        return bn.apply(params, state, x, train=True)[0]

    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        args = [jnp.asarray(a) for a in (rng.normal(2, 3, (4, 2, 3)), *rng.normal(1, 1, (2, 3)), 0.3)]
        weights = jnp.asarray(rng.normal(size=(4, 2, 3)))
        for of in (
            lambda f: jax.jacrev(f, range(4)),
            lambda f: jax.jacfwd(f, range(4)),
            lambda f: jax.hessian(lambda *a: jnp.sum(weights * f(*a)), range(4)),
            lambda f: jax.jacrev(jax.jacrev(lambda *a: jnp.sum(weights * f(*a)), range(4)), range(4)),
        ):
            for got, want in zip(
                jax.tree.leaves(of(layer)(*args)), jax.tree.leaves(of(formula)(*args)), strict=True
            ):
                np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-13)


def test_no_digits_are_lost_where_the_mean_is_large():
    """At mean 1e4 and spread 1 the one-pass variance E[x²] - m² has nothing left in float32."""
    x = jnp.asarray(RNG.normal(1e4, 1, (512, 1)), jnp.float32)
    y, _ = layers.batch_norm(use_scale=False, use_bias=False).apply(
        {}, {"mean": jnp.zeros(1), "var": jnp.ones(1)}, x, train=True
    )
    assert float(y.std()) == pytest.approx(1, abs=1e-3)
    one_pass = jnp.mean(x**2) - jnp.mean(x) ** 2
    assert abs(float(one_pass) - float(x.var())) > 0.5  # the check would see it


def test_half_precision_is_normalised_in_float32():
    x = jnp.asarray(RNG.normal(100, 1, (256, 2)), jnp.float16)
    layer = layers.batch_norm()
    params, state = layer.init(jax.random.key(0), x)
    assert state["var"].dtype == params["scale"].dtype == jnp.float32
    y, state = layer.apply(params, state, x, train=True)
    assert y.dtype == jnp.float16
    np.testing.assert_allclose(y.astype(jnp.float32).std(axis=0), 1, atol=5e-3)
    assert state["mean"].dtype == jnp.float32


def test_options():
    key = jax.random.key(0)
    assert set(layers.batch_norm(use_scale=False).init(key, BATCHES[0])[0]) == {"bias"}
    assert set(layers.batch_norm(use_bias=False).init(key, BATCHES[0])[0]) == {"scale"}
    y, _ = layers.batch_norm(epsilon=3.0).apply(
        {"scale": jnp.ones(1), "bias": jnp.zeros(1)}, {"mean": jnp.zeros(1), "var": jnp.ones(1)}, jnp.ones((2, 1)),
        train=False,
    )  # fmt: skip
    np.testing.assert_allclose(y, 0.5)


def test_no_gradient_flows_into_the_running_statistics():
    layer = layers.batch_norm()
    params, state = layer.init(jax.random.key(0), BATCHES[0])
    grad = jax.grad(lambda x: layer.apply(params, state, x, train=True)[1]["mean"].sum())(BATCHES[0])
    np.testing.assert_array_equal(grad, 0)


@pytest.mark.parametrize("shape", [(1, 4), (1, 1, 1, 4)])
def test_one_value_per_channel_is_an_error_in_training_only(shape):
    model = layers.serial(layers.dense(4), layers.batch_norm())
    params, state = model.init(jax.random.key(0), jnp.zeros(shape))
    with pytest.raises(
        LayerError,
        match=r"batch_norm_0 got input of shape .* one value per channel, whose variance is 0: pass a larger",
    ):
        model.apply(params, state, jnp.zeros(shape), train=True)
    model.apply(params, state, jnp.zeros(shape), train=False)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layers.batch_norm(momentum=1.5), r"batch_norm\(momentum=...\) must be in \[0, 1\], got 1.5"),
        (lambda: layers.batch_norm(momentum=float("nan")), r"must be in \[0, 1\], got nan"),
        (
            lambda: layers.batch_norm(epsilon=-1.0),
            r"batch_norm\(epsilon=...\) must not be negative, got -1.0",
        ),
        (
            lambda: layers.batch_norm().apply({}, {}, BATCHES[0], train=False),
            r"batch_norm has no 'mean' among \[\]: pass the parameters and the state that this model's init made",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
