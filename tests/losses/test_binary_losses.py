"""Binary cross-entropy and hinge against PyTorch, optax, finite differences and closed forms."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from nnkit import losses

BCE = losses.binary_cross_entropy_with_logits
RNG = np.random.default_rng(0)
LOGITS, SOFT = RNG.normal(size=(5, 3)) * 4, RNG.uniform(size=(5, 3))
HARD = (SOFT > 0.5).astype(int)
INF = float("inf")


@pytest.mark.parametrize(
    "targets", [SOFT, HARD, HARD.astype(bool), HARD.astype(np.uint8)], ids=lambda t: t.dtype
)
def test_binary_cross_entropy_is_pytorchs(targets):
    leaf = torch.tensor(LOGITS, requires_grad=True)
    theirs = torch.nn.functional.binary_cross_entropy_with_logits(
        leaf, torch.tensor(targets.astype(float)), reduction="none"
    ).mean(1)
    theirs.sum().backward()
    with jax.enable_x64(True):
        values = BCE(LOGITS, targets)
        slope = jax.grad(lambda z: BCE(z, targets).sum())(jnp.asarray(LOGITS))
    np.testing.assert_allclose(values, theirs.detach(), rtol=1e-14)
    np.testing.assert_allclose(slope, leaf.grad, rtol=1e-13, atol=1e-16)


def test_binary_cross_entropy_is_optaxs():
    z, y = jnp.asarray(LOGITS), jnp.asarray(SOFT)
    elements = optax.sigmoid_binary_cross_entropy(z, y)
    np.testing.assert_allclose(BCE(z, y), elements.mean(1), rtol=1e-6)
    np.testing.assert_allclose(BCE(z, y, reduce="sum"), elements.sum(1), rtol=1e-6)


def test_two_classes_are_a_softmax_over_a_logit_and_zero():
    z = jnp.asarray(LOGITS[:, 0])
    two = jnp.stack([jnp.zeros_like(z), z], -1)
    np.testing.assert_allclose(BCE(z, HARD[:, 0]), losses.softmax_cross_entropy(two, HARD[:, 0]), rtol=1e-5)


def test_three_derivatives_at_zero_and_elsewhere():
    one = lambda x: BCE(x[:1], x[1:])[0]

    @jax.jit
    @jax.vmap
    def derivatives(x):
        second = jax.hessian(one)
        return jax.grad(one)(x), jax.jacfwd(one)(x), second(x), jax.jacrev(second)(x)[0, 0, 0]

    x = np.array([(0.0, 1.0), (0.0, 0.3), (-2.0, 0.0), (3.0, 0.25)])
    z, y = x.T
    p = 1 / (1 + np.exp(-z))
    with jax.enable_x64(True):
        reverse, forward, second, third = derivatives(x)
    np.testing.assert_allclose(reverse, np.stack([p - y, -z], -1), rtol=1e-14)
    np.testing.assert_allclose(forward, np.stack([p - y, -z], -1), rtol=1e-14)
    np.testing.assert_allclose(second[:, 0, 0], p * (1 - p), rtol=1e-14)
    np.testing.assert_array_equal(second[:, 0, 1], -np.ones(4))
    np.testing.assert_array_equal(second[:, 1], [[-1, 0]] * 4)
    np.testing.assert_allclose(third, p * (1 - p) * (1 - 2 * p), rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize(
    ("z", "y", "value", "slope"),
    [
        (1e4, 1.0, 0, 0),
        (1e4, 0.0, 1e4, 1),
        (-1e30, 0.0, 0, 0),
        (-1e30, 1.0, 1e30, -1),
        (-1e30, 0.25, 0.25e30, -0.25),
        (40.0, 1.0, math.exp(-40), None),
        (INF, 1.0, 0, 0),
        (-INF, 0.0, 0, 0),
        (INF, 0.0, INF, 1),
        (-INF, 1.0, INF, -1),
        (0.0, 1.0, math.log(2), -0.5),
    ],
)
def test_extreme_logits(z, y, value, slope):
    got, grad = jax.value_and_grad(lambda z: BCE(z, jnp.array([y]))[0])(jnp.array([z]))
    np.testing.assert_allclose(got, value, rtol=1e-6)
    if slope is not None:
        np.testing.assert_allclose(grad, [slope])


def test_nan_stays_nan():
    assert np.isnan(BCE(jnp.array([math.nan]), jnp.array([1.0]))[0])


def test_hinge_is_optaxs_and_its_slope_at_the_kink_is_zero():
    targets = 2 * HARD - 1
    z = jnp.asarray(LOGITS)
    y = jnp.asarray(targets, jnp.float32)
    for given in (targets, y, targets.astype(np.int8)):
        np.testing.assert_allclose(losses.hinge(z, given), optax.hinge_loss(z, y).mean(1), rtol=1e-6)
    slope = jax.grad(lambda z: losses.hinge(z, jnp.array([1.0, 1.0, -1.0])).sum())
    np.testing.assert_array_equal(slope(jnp.array([1.0, 0.5, 0.5])), [0, -1, 1])
    np.testing.assert_array_equal(
        losses.hinge(jnp.array([INF, -1e30]), jnp.array([1, 1])), [0, np.float32(1e30)]
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("loss", [BCE, losses.hinge])
def test_half_precision_is_computed_in_float32(loss, dtype):
    z, y = jnp.asarray(LOGITS, dtype), jnp.ones((5, 3), dtype)
    assert loss(z, y).dtype == jnp.float32
    np.testing.assert_array_equal(loss(z, y), loss(z.astype(jnp.float32), y.astype(jnp.float32)))
    assert jax.grad(lambda z: loss(z, y).sum())(z).dtype == dtype


@pytest.mark.parametrize("loss", [BCE, losses.hinge])
def test_errors_say_what_arrived_and_what_to_write(loss):
    name = loss.__name__
    with pytest.raises(
        ValueError, match=rf"{name} got predictions of shape \(4, 1\) and targets of shape \(4,\)"
    ):
        loss(jnp.zeros((4, 1)), jnp.ones(4))
    with pytest.raises(ValueError, match=r"the batch sizes differ"):
        loss(jnp.zeros((4, 2)), jnp.ones((3, 2)))
    with pytest.raises(ValueError, match="without a batch axis: write predictions"):
        loss(jnp.array(0.0), jnp.array(1.0))
    with pytest.raises(TypeError, match="must be floating, got int32"):
        loss(jnp.zeros(4, int), jnp.ones(4))


def test_errors_of_one_only():
    with pytest.raises(
        TypeError, match=r"which uint8 cannot hold: write 2 \* targets.astype\(jnp.float32\) - 1"
    ):
        losses.hinge(jnp.zeros(4), np.ones(4, np.uint8))
    with pytest.raises(ValueError, match=r"got reduce='none': pass 'mean' or 'sum'"):
        BCE(jnp.zeros(4), jnp.ones(4), reduce="none")  # pyright: ignore[reportArgumentType]


def check_binary(elements) -> None:
    """What any elementwise binary cross-entropy must do; the mutants below must not."""
    z = jnp.array([1e4, -1e4, 0.0, 40.0])
    y = jnp.array([1.0, 1.0, 1.0, 1.0])
    np.testing.assert_allclose(elements(z, y), [0, 1e4, math.log(2), math.exp(-40)], rtol=1e-6)
    slopes = jax.vmap(jax.value_and_grad(jax.grad(elements)))(z, y)
    np.testing.assert_allclose(slopes, [[0, -1, -0.5, 0], [0, 0, 0.25, 0]], atol=1e-7)


def test_the_check_passes_ours():
    check_binary(lambda z, y: BCE(z[..., None], y[..., None])[()] if z.ndim else BCE(z[None], y[None])[0])


@pytest.mark.parametrize(
    "mutant",
    [
        lambda z, y: -y * jnp.log(jax.nn.sigmoid(z)) - (1 - y) * jnp.log(1 - jax.nn.sigmoid(z)),
        lambda z, y: jax.nn.softplus(z) - y * z,
        lambda z, y: jnp.maximum(z, 0) - y * z + jnp.log1p(jnp.exp(-jnp.abs(z))),
        lambda z, y: jax.nn.softplus(-z) - y * z,
    ],
    ids=["log of sigmoid", "cancels at 40", "no second derivative at 0", "the other sign"],
)
def test_mutants_are_caught(mutant):
    with pytest.raises(AssertionError):
        check_binary(mutant)
