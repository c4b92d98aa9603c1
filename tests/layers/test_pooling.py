"""Pooling against Flax, PyTorch and stax."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch.nn.functional as F
from jax.example_libraries import stax

from nnkit import layers, ops
from nnkit.checks import LayerError
from nnkit.layers import pooling
from tests.layers.spatial_oracles import check_layer, data

MAX = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
AVG = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}

# Input shape, window, arguments of nnkit; PyTorch's follow where it has the same.
FLAX = {
    "1d_overlapping": ((2, 9, 3), (3,), {"strides": (1,)}),
    "1d_same_even": ((2, 9, 3), (4,), {"strides": (2,), "padding": "SAME"}),
    "2d_pairs": ((2, 5, 6, 3), (3, 2), {"strides": (2, 1), "padding": ((1, 2), (0, 1))}),
    "2d_gaps": ((2, 8, 7, 2), (2, 1), {"strides": (3, 2)}),
    "3d_same": ((2, 4, 3, 5, 2), (2, 3, 2), {"strides": (2, 1, 2), "padding": "SAME"}),
}
TORCH = {
    "1d_side_by_side": ((2, 9, 3), (3,), {}),
    "1d_ceil": ((2, 8, 3), (3,), {"strides": 2, "ceil_mode": True}),
    "2d_number": ((2, 7, 6, 3), (3, 3), {"strides": 2, "padding": 1}),
    "2d_numbers": ((2, 7, 6, 3), (2, 3), {"padding": (0, 1)}),
    "2d_ceil": ((2, 8, 8, 2), (3, 2), {"strides": (2, 3), "padding": 1, "ceil_mode": True}),
    "2d_ceil_whose_last_window_would_be_padding": (
        (2, 5, 6, 2), (2, 2), {"strides": (3, 2), "padding": 1, "ceil_mode": True}
    ),
    "3d_ceil": ((2, 4, 3, 5, 2), (2, 2, 3), {"ceil_mode": True}),
}  # fmt: skip
KINDS = {"max": layers.max_pool, "min": layers.min_pool, "sum": layers.sum_pool, "avg": layers.avg_pool}


def of_flax(kind: str, window: Any, options: Any) -> Any:
    if kind == "sum":
        padding = options.get("padding", "VALID")
        return lambda _, x: nn.pool(x, 0.0, jax.lax.add, window, options["strides"], padding)

    def pool(_: Any, x: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):  # its divisor is an integer
            return getattr(nn.pooling, f"{kind}_pool")(x, window, **options)

    return pool


def of_torch(kind: str, window: Any, options: Any) -> Any:
    named = {"stride" if name == "strides" else name: value for name, value in options.items()}
    n = len(window)
    return {
        "max": lambda _, x: MAX[n](x, window, **named),
        "min": lambda _, x: -MAX[n](-x, window, **named),
        "avg": lambda _, x: AVG[n](x, window, **named),
    }[kind]


def check_flax(kind: str, name: str) -> None:
    shape, window, options = FLAX[name]
    check_layer(KINDS[kind](window, **options), data(*shape), in_jax=of_flax(kind, window, options))


def check_torch(kind: str, name: str, **more: Any) -> None:
    shape, window, options = TORCH[name]
    options = {**options, **more}
    check_layer(KINDS[kind](window, **options), data(*shape), in_torch=of_torch(kind, window, options))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FLAX)
def test_equals_flax(name, kind):
    check_flax(kind, name)


@pytest.mark.parametrize("kind", ["max", "min", "avg"])
@pytest.mark.parametrize("name", TORCH)
def test_equals_pytorch(name, kind):
    check_torch(kind, name)


@pytest.mark.parametrize("name", ["2d_number", "2d_ceil", "3d_ceil"])
def test_the_mean_without_padding_equals_pytorch(name):
    check_torch("avg", name, count_include_pad=False)


def test_the_mean_without_padding_equals_flax():
    shape, window, options = FLAX["2d_pairs"]
    options = {**options, "count_include_pad": False}
    check_layer(layers.avg_pool(window, **options), data(*shape), in_jax=of_flax("avg", window, options))


def test_sums_in_ceil_mode_are_means_times_their_counts():
    x = data(2, 8, 8, 2)
    options = {"strides": (2, 3), "padding": 1, "ceil_mode": True}

    def in_jax(_, x):
        # Padded far enough that every window is whole; the extra ones are cut off.
        padded = jnp.pad(x, ((0, 0), (1, 9), (1, 9), (0, 0)))
        return nn.pool(padded, 0.0, jax.lax.add, (3, 2), (2, 3), "VALID")[:, :5, :3]

    check_layer(layers.sum_pool((3, 2), **options), x, in_jax=in_jax)


@pytest.mark.parametrize("padding", ["VALID", "SAME"])
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (stax.MaxPool, layers.max_pool),
        (stax.SumPool, layers.sum_pool),
        (stax.AvgPool, lambda *args, **options: layers.avg_pool(*args, count_include_pad=False, **options)),
    ],
)
def test_equals_stax(theirs, ours, padding):
    _, pool = theirs((2, 3), (2, 1), padding)
    check_layer(
        ours((2, 3), strides=(2, 1), padding=padding), data(2, 5, 6, 3), in_jax=lambda _, x: pool((), x)
    )


def test_one_number_stands_for_every_spatial_axis_and_for_the_strides():
    for n in (1, 2, 3):
        y, _ = layers.max_pool(2).apply({}, {}, jnp.zeros((2, *(7,) * n, 3)), train=False)
        assert y.shape == (2, *(3,) * n, 3)


def test_the_first_of_equal_elements_gets_the_gradient_as_in_pytorch():
    x = np.zeros((1, 4, 4, 2))
    x[0, 1, 1, 0] = x[0, 3, 2, 1] = 1
    for options in ({}, {"strides": 1}):
        check_layer(
            layers.max_pool(2, **options),
            x,
            in_torch=lambda _, x, options=options: F.max_pool2d(x, 2, stride=options.get("strides")),
        )


def test_nothing_is_infinite_where_a_window_reaches_over_the_border():
    x = jnp.full((1, 3, 1), -1e30, jnp.float32)
    for layer in (layers.max_pool(3, strides=1, padding=1), layers.max_pool(2, ceil_mode=True)):
        y, back = jax.vjp(lambda x, layer=layer: layer.apply({}, {}, x, train=True)[0], x)
        np.testing.assert_array_equal(y, jnp.full_like(y, -1e30))
        assert float(back(jnp.ones_like(y))[0].sum()) == y.size


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_means_are_those_of_float32_rounded_once(dtype):
    x = jnp.asarray(100 + data(2, 64, 64, 2), dtype)
    y, _ = layers.avg_pool(32).apply({}, {}, x, train=False)
    wide, _ = layers.avg_pool(32).apply({}, {}, x.astype(jnp.float32), train=False)
    np.testing.assert_array_equal(y, wide.astype(dtype))


@pytest.mark.parametrize(
    ("check", "change"),
    [
        (lambda: check_flax("max", "2d_pairs"), lambda pads: tuple(pair[::-1] for pair in pads)),
        (lambda: check_flax("avg", "1d_same_even"), lambda pads: tuple(pair[::-1] for pair in pads)),
        (lambda: check_torch("max", "2d_ceil"), lambda pads: tuple((a, b - 1) for a, b in pads)),
    ],
)
def test_a_wrong_padding_is_caught(check, change, monkeypatch):
    for name in ("max_pool", "avg_pool"):
        true = getattr(ops, name)
        wrong = lambda x, window, *, padding, true=true, **options: true(
            x, window, padding=change(padding), **options
        )
        monkeypatch.setattr(ops, name, wrong)
    with pytest.raises(AssertionError):
        check()


def test_a_wrong_divisor_is_caught(monkeypatch):
    monkeypatch.setattr(pooling, "_counted", lambda y, *_: y)
    with pytest.raises(AssertionError):
        check_torch("avg", "2d_ceil")


def made(layer, *shape):
    return lambda: layer.apply({}, {}, jnp.zeros(shape), train=False)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: layers.max_pool(0), ValueError, "max_pool(window_shape=...) must be at least 1, got 0"),
        (
            lambda: layers.avg_pool(2, padding="SAM"),
            ValueError,
            "avg_pool(padding=...): unknown padding 'SAM'; did you mean 'SAME'",
        ),
        (
            lambda: layers.avg_pool(2, padding="CIRCULAR"),
            ValueError,
            "avg_pool(padding=...): unknown padding 'CIRCULAR'. Known: SAME, SAME_LOWER, VALID, a number",
        ),
        (
            made(layers.max_pool((2, 2)), 8, 28, 28),
            LayerError,
            "max_pool takes (batch, height, width, channels), got shape (8, 28, 28): add a channel axis with "
            "x[..., None]",
        ),
        (
            made(layers.sum_pool(5), 8, 4, 6, 1),
            LayerError,
            "sum_pool has a window of 5 over a height of 4 with 0 + 0 of padding (input of shape (8, 4, 6, 1))",
        ),
        (
            made(layers.min_pool(2, padding=2), 8, 4, 6, 1),
            LayerError,
            "min_pool has padding (2, 2) for a window of 2, some of which would see nothing but padding: it must "
            "be smaller than the window",
        ),
        (
            lambda: layers.max_pool(2).apply({}, {}, jnp.zeros((1, 4, 4, 1), jnp.uint8), train=False),
            LayerError,
            "max_pool takes floating-point input, got uint8",
        ),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error) as raised:
        make()
    assert message in str(raised.value)
