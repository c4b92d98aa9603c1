"""Layer and RMS normalisation against Flax and PyTorch."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from nnkit import layers
from nnkit.checks import LayerError
from tests.layers.normalization_oracles import (
    DTYPES,
    affine,
    close,
    draw,
    flax_apply,
    precision,
    torch_value_and_gradients,
    value_and_gradients,
)

SHAPE = (4, 3, 5, 6)
MASK = np.arange(60).reshape(4, 3, 5, 1) % 4 != 1

# use_fast_variance=False: Flax's default variance E[x²] - m² loses digits.
CASES = {
    "layer": (layers.layer_norm, nn.LayerNorm, {}),
    "layer, over positions": (
        layers.layer_norm,
        nn.LayerNorm,
        {"reduction_axes": (1, 2, 3), "feature_axes": (1, -1), "epsilon": 1e-2},
    ),
    "layer, no bias": (layers.layer_norm, nn.LayerNorm, {"use_bias": False}),
    "RMS": (layers.rms_norm, nn.RMSNorm, {}),
    "RMS, over positions": (
        layers.rms_norm,
        nn.RMSNorm,
        {"reduction_axes": (-2, -1), "feature_axes": (-2, -1), "epsilon": 1e-2},
    ),
}


def _params(layer, x):
    made, _ = layer.init(jax.random.key(0), x)
    return {
        name: jnp.asarray(draw(p.shape, 7 + i), p.dtype) for i, (name, p) in enumerate(sorted(made.items()))
    }


def _check_against_flax(layer, name, dtype, masked):
    _, module, options = CASES[name]
    theirs = module(use_fast_variance=False, **options)
    with precision(dtype):
        x = jnp.asarray(draw(SHAPE), dtype)
        mask = jnp.asarray(MASK) if masked and options else None
        if masked and not options:
            mask = jnp.asarray(np.arange(360).reshape(SHAPE) % 4 != 1)
        params = _params(CASES[name][0](**options), x)
        want = value_and_gradients(lambda p, x: flax_apply(theirs, {"params": p}, x, mask=mask), params, x)
        got = value_and_gradients(
            lambda p, x: layer.apply(p, {}, x if mask is None else (x, mask), train=True)[0], params, x
        )
        close(got, want, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_equals_flax(name, dtype):
    make, _, options = CASES[name]
    _check_against_flax(make(**options), name, dtype, masked=False)


@pytest.mark.parametrize("name", ["layer", "layer, over positions", "RMS"])
def test_masks_equal_flax(name):
    make, _, options = CASES[name]
    _check_against_flax(make(**options), name, "float64", masked=True)


def _one_pass(params, state, x, *, key=None, train):
    if isinstance(x, tuple):
        x = x[0]
    mean, square = x.mean(-1, keepdims=True), jnp.square(x).mean(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(square - mean**2 + 1e-6) * params["scale"] + params["bias"], state


@pytest.mark.parametrize(
    ("wrong", "name", "masked"),
    [
        (layers.layer_norm(epsilon=1e-5), "layer", False),
        (
            layers.layer_norm(reduction_axes=(2, 3), feature_axes=(1, -1), epsilon=1e-2),
            "layer, over positions",
            False,
        ),
        (layers.rms_norm(epsilon=1e-5), "RMS", False),
        (layers.layer_norm(use_bias=False), "layer", False),
        (layers.layer_norm()._replace(apply=_one_pass), "layer", True),
    ],
)
def test_a_wrong_normalisation_is_caught(wrong, name, masked):
    with pytest.raises(AssertionError):
        _check_against_flax(wrong, name, "float64", masked)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_pytorch(dtype):
    with precision(dtype):
        x = jnp.asarray(draw(SHAPE), dtype)
        last = affine((5, 6), dtype)
        ours = layers.layer_norm(epsilon=1e-5, reduction_axes=(-2, -1), feature_axes=(-2, -1))
        theirs = lambda p, x: torch.nn.functional.layer_norm(x, (5, 6), p["scale"], p["bias"])
        got = value_and_gradients(lambda p, x: ours.apply(p, {}, x, train=True)[0], last, x)
        close(got, torch_value_and_gradients(theirs, last, x), dtype)

        scale = {"scale": affine((6,), dtype)["scale"]}
        rms = layers.rms_norm(epsilon=float(jnp.finfo(dtype).eps))
        theirs = lambda p, x: torch.nn.functional.rms_norm(x, (6,), p["scale"])
        got = value_and_gradients(lambda p, x: rms.apply(p, {}, x, train=True)[0], scale, x)
        close(got, torch_value_and_gradients(theirs, scale, x), dtype)


def test_initial_parameters_are_flaxs():
    x = jnp.zeros(SHAPE)
    for make, module, options in CASES.values():
        params, state = make(**options).init(jax.random.key(0), x)
        want = module(**options).init(jax.random.key(0), x)["params"]
        assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, want)
        assert state == {}


def test_mean_1e4_and_deviation_1():
    """The inputs have 1e4·2⁻²⁴ = 6e-4 of rounding of their own, which the test shares with the oracle in float64."""
    x = np.asarray(draw((3, 512), mean=1e4, spread=1.0), np.float32)
    y, _ = layers.layer_norm(use_scale=False, use_bias=False).apply({}, {}, jnp.asarray(x), train=True)
    wide = x.astype(np.float64)
    want = (wide - wide.mean(-1, keepdims=True)) / wide.std(-1, keepdims=True)
    np.testing.assert_allclose(y, want, atol=2e-3)  # the mean's own rounding in float32 is up to 1e-3
    fast = nn.LayerNorm(use_scale=False, use_bias=False).apply({}, jnp.asarray(x))
    assert np.abs(np.asarray(fast) - want).max() > 0.1  # the check would see it


@pytest.mark.parametrize("make", [layers.layer_norm, layers.rms_norm])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_normalised_in_float32(make, dtype):
    x = jnp.asarray(draw((4, 2048), mean=300), dtype)  # squares beyond float16
    layer = make()
    params, _ = layer.init(jax.random.key(0), x)
    assert params["scale"].dtype == jnp.float32
    y, _ = layer.apply(params, {}, x, train=True)
    want, _ = layer.apply(params, {}, x.astype(jnp.float32), train=True)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, want.astype(dtype))
    low = jax.tree.map(lambda p: p.astype(dtype), params)  # as a policy of low-precision parameters has them
    np.testing.assert_array_equal(layer.apply(low, {}, x, train=True)[0], y)


def test_over_a_mapped_axis_it_is_that_of_the_whole():
    """Channels cut in two, as in a tensor-parallel model."""
    x, params = jnp.asarray(draw((4, 6)), jnp.float32), affine((6,), "float32")
    whole, _ = layers.layer_norm().apply(params, {}, x, train=True)
    cut = layers.layer_norm(axis_name="parts")
    parts = jax.vmap(
        lambda p, x: cut.apply(p, {}, x, train=True)[0], in_axes=(0, 1), out_axes=1, axis_name="parts"
    )(jax.tree.map(lambda p: p.reshape(2, 3), params), x.reshape(4, 2, 3))
    np.testing.assert_allclose(parts.reshape(4, 6), whole, rtol=1e-5, atol=1e-6)


def test_epsilon_may_be_traced_and_has_its_gradient():
    with jax.enable_x64(True):
        x = jnp.asarray(draw((3, 4)))

        def total(epsilon):
            layer = layers.layer_norm(epsilon=epsilon, use_scale=False, use_bias=False)
            return jnp.sin(layer.apply({}, {}, x, train=True)[0]).sum()

        slope = jax.jit(jax.grad(total))(0.5)
        np.testing.assert_allclose(slope, (total(0.5 + 1e-6) - total(0.5 - 1e-6)) / 2e-6, rtol=1e-7)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf])
def test_what_is_masked_may_be_anything(garbage):
    """Masked entries, and examples of nothing else, with values that no arithmetic survives."""
    mask = jnp.asarray([[1, 1, 0, 0], [0, 0, 0, 0]]) == 1
    x = jnp.where(mask, jnp.asarray(draw((2, 4)), jnp.float32), garbage)
    layer = layers.layer_norm()

    def loss(params, x):
        y, _ = layer.apply(params, {}, (x, mask), train=True)
        return jnp.sum(jnp.where(mask, jnp.sin(y), 0))

    params = affine((4,), "float32")
    want = jax.grad(loss, (0, 1))(params, jnp.where(mask, x, 0))
    got = jax.grad(loss, (0, 1))(params, x)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(got))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)


X = jnp.zeros((2, 3, 4))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: layers.layer_norm(epsilon=-1),
            ValueError,
            r"layer_norm\(epsilon=...\) must not be negative, got -1",
        ),
        (
            lambda: layers.layer_norm(reduction_axes=3).init(jax.random.key(0), X),
            LayerError,
            r"layer_norm has reduction_axes=3 for input of shape \(2, 3, 4\): name axes that it has",
        ),
        (
            lambda: layers.rms_norm(feature_axes=(1, -2)).init(jax.random.key(0), X),
            LayerError,
            r"rms_norm has feature_axes=\(1, -2\), which names one of 3 axes twice",
        ),
        (
            lambda: layers.layer_norm().apply({}, {}, X, train=True),
            LayerError,
            r"layer_norm has no 'scale' among \[\]",
        ),
        (
            lambda: layers.layer_norm().init(jax.random.key(0), (X, X, X)),
            LayerError,
            r"layer_norm takes x or \(x, mask\), got a tuple of 3",
        ),
        (
            lambda: layers.rms_norm().init(jax.random.key(0), (X, jnp.ones((3, 4), bool))),
            LayerError,
            r"rms_norm got a mask of shape \(3, 4\) for input of shape \(2, 3, 4\): its axes are those of x from",
        ),
        (
            lambda: layers.rms_norm().init(jax.random.key(0), (X, jnp.full((2, 3), 0.5))),
            LayerError,
            r"rms_norm takes a boolean mask, True where an entry counts, got float32: write mask > 0",
        ),
        (
            lambda: layers.rms_norm().init(jax.random.key(0), X.astype(jnp.complex64)),
            LayerError,
            r"rms_norm takes real input, got complex64: normalise x.real and x.imag apart",
        ),
        (
            lambda: layers.layer_norm(axis_name="parts", use_scale=False, use_bias=False).apply(
                {}, {}, X, train=True
            ),
            LayerError,
            r"layer_norm has axis_name='parts' and is not inside an axis of that name: call it in jax.vmap\(",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
