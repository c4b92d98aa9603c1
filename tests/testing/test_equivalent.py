"""Distances in ulp, and two runs side by side: what agrees passes, what does not is located."""

from __future__ import annotations

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import torch

from nnkit import layers, optim, testing
from nnkit.testing.trees import random_tree, rough_gradients

# ---- ulp -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_ulp_distance_of_all_16_bit_floats(dtype):
    """Sorted, each is one step from the next, and the distance of any two is that of their places."""
    every = np.arange(2**16, dtype=np.uint16).view(dtype)
    with np.errstate(invalid="ignore"):
        wide = every.astype(np.float64)
    kept = np.isfinite(wide) & ~((wide == 0) & np.signbit(wide))
    numbers = every[kept][np.argsort(wide[kept])]
    assert (testing.ulp_distance(numbers[1:], numbers[:-1]) == 1).all()
    i, j = np.random.default_rng(0).integers(0, len(numbers), (2, 5000))
    np.testing.assert_array_equal(testing.ulp_distance(numbers[i], numbers[j]), np.abs(i - j))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ulp_distance_of_wide_floats(dtype):
    x = np.array([0.0, -0.0, 1.0, -1.0, 1e-30, 3e8, np.finfo(dtype).tiny], dtype)
    up = np.nextafter(np.nextafter(x, dtype(np.inf)), dtype(np.inf))
    np.testing.assert_array_equal(testing.ulp_distance(x, up), 2)
    small = np.nextafter(dtype(0), dtype(1))
    assert testing.ulp_distance(small, -small) == 2
    assert testing.ulp_distance(np.finfo(dtype).max, dtype(np.inf)) == 1
    bits = 8 * np.dtype(dtype).itemsize
    exponent = {32: 8, 64: 11}[bits]
    farthest = 2 * ((2**exponent - 1) * 2 ** (bits - 1 - exponent))
    assert int(testing.ulp_distance(dtype(np.inf), dtype(-np.inf))) == farthest


def test_nan_and_bad_arguments():
    nan, one = np.float32(np.nan), np.float32(1)
    assert testing.ulp_distance(nan, nan) == 0
    assert testing.ulp_distance(nan, one) == 2**64 - 1
    with pytest.raises(TypeError, match="one floating dtype and got float32 and float64"):
        testing.ulp_distance(one, np.float64(1))
    with pytest.raises(ValueError, match="one shape"):
        testing.ulp_distance(one, np.ones(2, np.float32))
    with pytest.raises(AssertionError, match="NaN on one side only"):
        testing.ulps({"a": nan}, {"a": one})
    with pytest.raises(AssertionError):
        testing.ulps({"n": jnp.int32(1)}, {"n": jnp.int32(2)})


# ---- side by side --------------------------------------------------------------------------------------------


def from_step(tx, n, change):
    """``tx`` whose updates change at step ``n``."""

    def update(u, state, params=None):
        inner, count = state
        u, inner = tx.update(u, inner, params)
        return jax.tree.map(lambda x: jnp.where(count >= n, change(x), x), u), (inner, count + 1)

    return optim.GradientTransformation(lambda p: (tx.init(p), jnp.int32(0)), update)


def _same(x):
    return x


def test_the_first_step_and_path_are_told():
    make = lambda change: testing.of_transformation(from_step(optim.sgd(0.1, 0.9), 3, change))
    with pytest.raises(testing.EquivalenceError) as caught:
        testing.assert_equivalent(make(lambda x: x * (1 + 2**-22)), make(_same), inputs=5, max_ulps=1)
    text = str(caught.value)
    assert text.startswith("equivalence: the two part at step 3\n  at        updates/dense_0/bias[")
    assert "(theirs) within 1 ulp\n" in text
    assert re.search(r": [2-4] ulp, ", text)
    assert "numbers of this leaf" in text
    assert "not the first step: a count, a bias correction" in text


def test_bounds_in_ulp_or_relative():
    near = testing.of_transformation(from_step(optim.sgd(0.1), 0, lambda x: x * (1 + 2**-22)))
    same = testing.of_transformation(from_step(optim.sgd(0.1), 0, _same))
    for bound in ({"max_ulps": 4}, {"rtol": 3e-7}, {"max_ulps": 1, "rtol": 3e-7}):
        distance = testing.assert_equivalent(near, same, inputs=2, **bound)
        assert distance.ulps in (2, 3, 4)
        assert 1e-7 < distance.relative < 3e-7
    for bound in ({}, {"max_ulps": 1}, {"rtol": 1e-8}, {"max_ulps": 1, "rtol": 1e-8}):
        with pytest.raises(testing.EquivalenceError, match="the two part at step 0"):
            testing.assert_equivalent(near, same, inputs=2, **bound)


def test_from_their_state_a_difference_does_not_add_up():
    ours, theirs = optim.sgd(0.1, 0.9), optax.sgd(0.1, 0.9)
    near = from_step(ours, 0, lambda x: x * (1 + 2**-23))
    mine = testing.of_transformation(near)
    peer = testing.of_transformation(from_step(theirs, 0, _same), strict=False)
    grads = rough_gradients(steps=20)
    assert testing.assert_equivalent(mine, peer, random_tree(), grads, max_ulps=4, from_theirs=True).ulps <= 4
    with pytest.raises(testing.EquivalenceError, match="the two carry different trees"):
        testing.assert_equivalent(
            testing.of_transformation(optim.adam(0.1)), peer, inputs=1, from_theirs=True
        )


def test_other_forms_are_told():
    with pytest.raises(testing.EquivalenceError, match="what is compared at step 0 has another structure"):
        testing.assert_equivalent(
            testing.of_transformation(optim.adam(0.1)), testing.of_transformation(optim.sgd(0.1)), inputs=1
        )


def test_counts_must_be_equal():
    ahead = optim.GradientTransformation(lambda p: jnp.int32(1), lambda u, s, p=None: (u, s + 1))
    right = ahead._replace(init=lambda p: jnp.int32(0))
    with pytest.raises(testing.EquivalenceError, match="at        state/0"):
        testing.assert_equivalent(*map(testing.of_transformation, (ahead, right)), inputs=1, max_ulps=10)


def test_torch_optimizers():
    ours = testing.of_transformation(optim.sgd(0.1, 0.9), trajectory=True)
    make = lambda momentum: testing.of_torch_optimizer(lambda p: torch.optim.SGD(p, 0.1, momentum=momentum))
    grads = [{"w": jnp.arange(4.0) + i} for i in range(5)]
    assert testing.assert_equivalent(ours, make(0.9), {"w": jnp.ones(4)}, grads, rtol=1e-6).relative < 1e-6
    with pytest.raises(testing.EquivalenceError, match="the two part at step 1"):
        testing.assert_equivalent(ours, make(0.8), {"w": jnp.ones(4)}, grads, rtol=1e-6)


def test_layers_of_flax_and_torch():
    layer, x = layers.dense(3), jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)), jnp.float32)
    start = layer.init(jax.random.key(0), x)
    ours = testing.of_layer(layer, train=True)
    right = testing.of_torch_module(lambda p, s, x: x @ p["kernel"] + p["bias"])
    no_gradient = testing.of_torch_module(lambda p, s, x: x @ p["kernel"] + p["bias"].detach())
    testing.assert_equivalent(ours, testing.of_flax(nn.Dense(3)), start, [x], max_ulps=2, rtol=1e-6)
    testing.assert_equivalent(ours, right, start, [x], rtol=1e-6)
    with pytest.raises(testing.EquivalenceError, match="at        gradient/params/bias"):
        testing.assert_equivalent(ours, no_gradient, start, [x], rtol=1e-6)


def test_a_batch_norm_of_another_momentum_is_told_by_its_state():
    layer, xs = layers.batch_norm(), [jnp.arange(12.0).reshape(4, 3) ** i for i in range(3)]
    start = layer.init(jax.random.key(0), xs[0])
    ours = testing.of_layer(layer, train=True)
    theirs = lambda momentum: testing.of_flax(
        nn.BatchNorm(momentum=momentum, use_fast_variance=False), train=True
    )
    testing.assert_equivalent(ours, theirs(0.99), start, xs, rtol=1e-5)
    with pytest.raises(testing.EquivalenceError, match="at        state/"):
        testing.assert_equivalent(ours, theirs(0.9), start, xs, rtol=1e-5)


def test_no_inputs_are_refused():
    ours = testing.of_transformation(optim.sgd(0.1))
    for inputs in (0, []):
        with pytest.raises(ValueError, match="inputs= has no step to compare"):
            testing.assert_equivalent(ours, ours, inputs=inputs)


def test_complex_numbers_and_keys_are_compared():
    def steps(factor, seed):
        z = jnp.array([1 + 2j, 3 - 4j]) * jnp.asarray(factor, jnp.complex64)
        return testing.Steps(lambda start: 0, lambda carry, x: (0, {"z": z, "key": jax.random.key(seed)}))

    assert testing.assert_equivalent(steps(1, 0), steps(1, 0), inputs=1).ulps == 0
    near = testing.assert_equivalent(steps(1 + 2**-20, 0), steps(1, 0), inputs=1, rtol=1e-5)
    assert 0 < near.relative < 2e-6
    with pytest.raises(testing.EquivalenceError, match="at        z"):
        testing.assert_equivalent(steps(1 + 2**-20, 0), steps(1, 0), inputs=1)
    with pytest.raises(testing.EquivalenceError, match="at        key"):
        testing.assert_equivalent(steps(1, 1), steps(1, 0), inputs=1)
    ignored = lambda _: [np.array(False), np.array([False, True])]
    testing.assert_equivalent(steps([1, 1.1], 0), steps(1, 0), inputs=1, ignore=ignored)
