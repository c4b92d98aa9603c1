"""Group and instance normalisation against Flax and PyTorch."""

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

SHAPE = (3, 4, 2, 6)
BY_POSITION = np.arange(24).reshape(3, 4, 2, 1) % 4 != 1
BY_ENTRY = np.arange(144).reshape(SHAPE) % 5 != 1
CASES = {
    "group": (lambda: layers.group_norm(3), nn.GroupNorm(3, use_fast_variance=False)),
    "group, by size": (
        lambda: layers.group_norm(None, group_size=3, epsilon=1e-2),
        nn.GroupNorm(None, 3, epsilon=1e-2, use_fast_variance=False),
    ),
    "instance": (lambda: layers.instance_norm(), nn.InstanceNorm(use_fast_variance=False)),
}


def _check(layer, name, dtype, mask=None):
    theirs = CASES[name][1]
    with precision(dtype):
        x, params = jnp.asarray(draw(SHAPE), dtype), affine(SHAPE[-1:], dtype)
        # Flax's groups want a mask with its channels.
        full = None if mask is None else jnp.asarray(np.broadcast_to(mask, SHAPE))
        want = value_and_gradients(lambda p, x: flax_apply(theirs, {"params": p}, x, mask=full), params, x)
        got = value_and_gradients(
            lambda p, x: layer.apply(p, {}, x if mask is None else (x, jnp.asarray(mask)), train=True)[0],
            params,
            x,
        )
        close(got, want, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_equals_flax(name, dtype):
    _check(CASES[name][0](), name, dtype)


@pytest.mark.parametrize("mask", [BY_POSITION, BY_ENTRY], ids=["by position", "by entry"])
@pytest.mark.parametrize("name", CASES)
def test_masks_equal_flax(name, mask):
    _check(CASES[name][0](), name, "float64", mask)


@pytest.mark.parametrize(
    ("wrong", "name", "mask"),
    [
        (layers.group_norm(2), "group", None),
        (layers.group_norm(None, group_size=3), "group, by size", None),
        (layers.group_norm(6), "group", None),
        (layers.layer_norm(reduction_axes=(1, 2)), "group", None),
        (layers.layer_norm(), "instance", None),
        (
            layers.group_norm(3)._replace(
                apply=lambda p, s, x, **k: layers.group_norm(3).apply(p, s, x[0], **k)
            ),
            "group",
            BY_POSITION,
        ),
    ],
)
def test_a_wrong_normalisation_is_caught(wrong, name, mask):
    with pytest.raises(AssertionError):
        _check(wrong, name, "float64", mask)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_pytorch(dtype):
    def last(f):
        return lambda p, x: f(p, x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    functional = torch.nn.functional
    with precision(dtype):
        x, params = jnp.asarray(draw(SHAPE), dtype), affine(SHAPE[-1:], dtype)
        for ours, theirs in (
            (
                layers.group_norm(3, epsilon=1e-5),
                lambda p, x: functional.group_norm(x, 3, p["scale"], p["bias"]),
            ),
            (
                layers.instance_norm(epsilon=1e-5),
                lambda p, x: functional.instance_norm(x, weight=p["scale"], bias=p["bias"]),
            ),
        ):
            got = value_and_gradients(lambda p, x, f=ours: f.apply(p, {}, x, train=True)[0], params, x)
            close(got, torch_value_and_gradients(last(theirs), params, x), dtype)


def test_groups_of_all_channels_and_of_one_are_layer_and_instance_normalisation():
    x = jnp.asarray(draw(SHAPE), jnp.float32)
    for a, b in (
        (layers.group_norm(1), layers.layer_norm(reduction_axes=(1, 2, 3))),
        (layers.group_norm(6), layers.instance_norm()),
    ):
        params, _ = a.init(jax.random.key(0), x)
        ya, yb = (f.apply(params, {}, x, train=True)[0] for f in (a, b))
        np.testing.assert_allclose(ya, yb, rtol=1e-5, atol=1e-6)


def test_options():
    x = jnp.asarray(draw((2, 3, 64)), jnp.float32)
    layer = layers.group_norm(use_scale=False)  # 32 groups
    assert set(layer.init(jax.random.key(0), x)[0]) == {"bias"}
    y, _ = layer.apply({"bias": jnp.zeros(64)}, {}, x, train=False)
    np.testing.assert_allclose(y.reshape(2, 3, 32, 2).mean((1, 3)), 0, atol=1e-6)
    assert set(layers.instance_norm(use_bias=False).init(jax.random.key(0), x)[0]) == {"scale"}


def test_mean_1e4_and_deviation_1():
    x = np.asarray(draw((2, 256, 4), mean=1e4, spread=1.0), np.float32)
    for layer, axes in ((layers.group_norm(1), (1, 2)), (layers.instance_norm(), (1,))):
        params, _ = layer.init(jax.random.key(0), x)
        y, _ = layer.apply(params, {}, jnp.asarray(x), train=True)
        np.testing.assert_allclose(np.std(y, axes), 1, atol=1e-3)
        np.testing.assert_allclose(np.mean(y, axes), 0, atol=2e-3)  # the rounding of the mean in float32


def test_over_a_mapped_axis_it_is_that_of_the_whole():
    """An image cut in stripes."""
    x, params = jnp.asarray(draw(SHAPE), jnp.float32), affine(SHAPE[-1:], "float32")
    whole, _ = layers.group_norm(3).apply(params, {}, x, train=True)
    cut = layers.group_norm(3, axis_name="stripes")
    stripes = jax.vmap(
        lambda x: cut.apply(params, {}, x, train=True)[0], in_axes=1, out_axes=1, axis_name="stripes"
    )(x.reshape(3, 2, 2, 2, 6))
    np.testing.assert_allclose(stripes.reshape(SHAPE), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: layers.group_norm(group_size=2),
            ValueError,
            r"group_norm takes num_groups or group_size, got 32 and 2: write group_norm\(None, group_size=...\)",
        ),
        (lambda: layers.group_norm(None), ValueError, r"takes num_groups or group_size, got None and None"),
        (lambda: layers.group_norm(0), ValueError, r"group_norm\(num_groups\) must be at least 1, got 0"),
        (
            lambda: layers.group_norm(None, group_size=1.5),
            TypeError,
            r"group_norm\(group_size=...\) must be a whole number, got 1.5",
        ),
        (
            lambda: layers.group_norm().init(jax.random.key(0), jnp.zeros((1, 3, 6))),
            LayerError,
            r"group_norm cannot cut 6 channels into 32 groups: use one of \[1, 2, 3, 6\]",
        ),
        (
            lambda: layers.group_norm(None, group_size=4).init(jax.random.key(0), jnp.zeros((1, 3, 6))),
            LayerError,
            r"cannot cut 6 channels into groups of 4: use one of \[1, 2, 3, 6\]",
        ),
        (
            lambda: layers.group_norm(2).init(jax.random.key(0), jnp.zeros(6)),
            LayerError,
            r"group_norm takes \(batch, ..., channels\), got input of shape \(6,\)",
        ),
        (
            lambda: layers.instance_norm().init(jax.random.key(0), jnp.zeros((2, 6))),
            LayerError,
            r"instance_norm takes \(batch, ..., channels\) with positions between, got input of shape \(2, 6\)",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
