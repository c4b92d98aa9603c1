"""conv_transpose against Flax and PyTorch, each in its own convention."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
import torch.nn.functional as F

from nnkit import layers, ops
from nnkit.checks import LayerError
from tests.layers.spatial_oracles import check_layer, data

FLAX = {
    "1d_same": ((2, 5, 3), (3,), {"strides": (2,)}),
    "1d_same_stride_beyond_window": ((2, 5, 3), (2,), {"strides": (4,)}),
    "1d_valid": ((2, 5, 3), (4,), {"strides": (2,), "padding": "VALID"}),
    "1d_circular_even": ((2, 5, 3), (4,), {"strides": (2,), "padding": "CIRCULAR"}),
    "1d_circular_transposed": (
        (2, 5, 3), (4,), {"strides": (2,), "padding": "CIRCULAR", "transpose_kernel": True}
    ),
    "1d_circular_around_twice": ((2, 2, 3), (7,), {"padding": "CIRCULAR"}),
    "1d_number_beyond_the_window": ((2, 5, 2), (2,), {"strides": (2,), "padding": 3}),
    "2d_same_even": ((2, 4, 5, 2), (4, 2), {"strides": (2, 3)}),
    "2d_same_dilated": ((2, 4, 5, 2), (3, 2), {"strides": (2, 1), "kernel_dilation": (2, 3)}),
    "2d_transposed": ((2, 4, 5, 2), (3, 3), {"strides": (2, 2), "transpose_kernel": True}),
    "2d_pairs": ((2, 4, 5, 2), (3, 3), {"strides": (2, 2), "padding": ((1, 2), (0, 1))}),
    "2d_circular": ((2, 4, 3, 2), (3, 4), {"strides": (1, 2), "padding": "CIRCULAR", "use_bias": False}),
    "3d_valid": ((1, 3, 2, 3, 2), (2, 3, 2), {"strides": (1, 2, 2), "padding": "VALID"}),
}  # fmt: skip
TORCH = {
    "1d": ((2, 5, 3), (3,), {"strides": 2, "padding": 0}),
    "1d_padding_beyond_the_window": ((2, 9, 4), (2,), {"strides": 2, "padding": 3, "output_padding": 1}),
    "2d_same_by_numbers": ((2, 4, 5, 2), (4, 4), {"strides": 2, "padding": 1}),
    "2d_output_padding": (
        (2, 4, 5, 2), (3, 3), {"strides": (2, 3), "padding": (1, 0), "output_padding": (1, 2)}
    ),
    "2d_groups_dilated": (
        (2, 4, 5, 4), (3, 2), {"strides": 2, "padding": 1, "kernel_dilation": 2, "feature_group_count": 2}
    ),
    "3d": ((1, 3, 2, 3, 2), (2, 3, 2), {"strides": (1, 2, 2), "padding": (0, 1, 0), "use_bias": False}),
}  # fmt: skip
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
NAMES = {"strides": "stride", "kernel_dilation": "dilation", "feature_group_count": "groups"}


def check_flax(name: str) -> None:
    shape, window, options = FLAX[name]
    module = nn.ConvTranspose(4, window, **options)
    check_layer(
        layers.conv_transpose(4, window, **options),
        data(*shape),
        in_jax=lambda params, x: module.apply({"params": params}, x),
    )


def check_torch(name: str) -> None:
    shape, window, options = TORCH[name]
    named = {NAMES.get(name, name): value for name, value in options.items() if name != "use_bias"}

    def in_torch(params: Any, x: Any) -> Any:
        weight = params["kernel"].movedim((-1, -2), (0, 1))  # (in, out // groups, *window)
        return TRANSPOSED[len(window)](x, weight, params.get("bias"), **named)

    check_layer(
        layers.conv_transpose(4, window, convention="torch", **options), data(*shape), in_torch=in_torch
    )


@pytest.mark.parametrize("name", FLAX)
def test_equals_flax(name):
    check_flax(name)


@pytest.mark.parametrize("name", TORCH)
def test_equals_pytorch(name):
    check_torch(name)


@pytest.mark.parametrize(
    ("check", "name", "change"),
    [
        (check_flax, "1d_same", lambda kernel, pads: (kernel, [pair[::-1] for pair in pads])),
        (check_flax, "1d_valid", lambda kernel, pads: (jnp.flip(kernel, 0), pads)),
        (check_flax, "2d_transposed", lambda kernel, pads: (jnp.flip(kernel, (0, 1)), pads)),
        (check_flax, "1d_circular_even", lambda kernel, pads: (kernel, [(a + 1, b) for a, b in pads])),
        (check_torch, "2d_groups_dilated", lambda kernel, pads: (kernel[..., jnp.array([0, 2, 1, 3])], pads)),
        (check_torch, "2d_output_padding", lambda kernel, pads: (kernel, [(a, b - 1) for a, b in pads])),
    ],
)
def test_a_wrong_transposed_convolution_is_caught(check, name, change, monkeypatch):
    true = ops.conv_transpose

    def wrong(x, kernel, *, padding, **options):
        kernel, padding = change(kernel, padding)
        return true(x, kernel, padding=tuple(padding), **options)

    monkeypatch.setattr(ops, "conv_transpose", wrong)
    with pytest.raises((AssertionError, TypeError)):
        check(name)


def test_it_is_the_transpose_of_the_convolution_with_the_same_arguments():
    """What ``convention="torch"`` says: ⟨conv(x), y⟩ = ⟨x, conv_transpose(y)⟩ under the same kernel."""
    options = {"strides": 2, "padding": (1, 0), "use_bias": False}
    x, y = jnp.asarray(data(1, 7, 8, 3), jnp.float32), jnp.asarray(data(1, 4, 3, 4), jnp.float32)
    down = layers.conv(4, (3, 4), **options)
    up = layers.conv_transpose(3, (3, 4), convention="torch", **options)
    params, _ = down.init(jax.random.key(0), x)
    there, _ = down.apply(params, {}, x, train=False)
    back, _ = up.apply(params, {}, y, train=False)  # (3, 4, 3, 4): (*window, its features, its channels)
    assert there.shape == y.shape
    assert back.shape == x.shape
    # Sums of some hundred products of size 1, 6e-8 each.
    assert float(jnp.vdot(there, y)) == pytest.approx(float(jnp.vdot(x, back)), rel=1e-4, abs=1e-4)


def test_the_sizes_are_the_docstring_s():
    for n, k, s, d in [(5, 3, 2, 1), (4, 2, 3, 1), (3, 4, 1, 2), (6, 1, 2, 1)]:
        reach = d * (k - 1) + 1
        sizes = {
            ("SAME", "flax"): s * n,
            ("CIRCULAR", "flax"): s * n,
            ("VALID", "flax"): s * n + max(reach - s, 0),
            (((2, 4),), "flax"): (n - 1) * s + 2 - reach + 6,
            (0, "torch"): (n - 1) * s + reach,
            (((0, 1),), "torch"): (n - 1) * s + reach - 1,
        }
        for (padding, convention), expected in sizes.items():
            layer = layers.conv_transpose(
                2, (k,), strides=s, kernel_dilation=d, padding=padding, convention=convention
            )
            x = jax.ShapeDtypeStruct((1, n, 2), jnp.float32)
            params, _ = jax.eval_shape(layer.init, jax.random.key(0), x)
            y = jax.eval_shape(lambda p, x, layer=layer: layer.apply(p, {}, x, train=False)[0], params, x)
            assert y.shape == (1, expected, 2), (n, k, s, d, padding)


def made(layer, *shape):
    def run():
        x = jnp.zeros(shape)
        return layer.apply(layer.init(jax.random.key(0), x)[0], {}, x, train=False)

    return run


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: layers.conv_transpose(8, 3, convention="keras"),
            ValueError,
            "conv_transpose(convention=...) must be 'flax' or 'torch', got 'keras'",
        ),
        (
            lambda: layers.conv_transpose(8, 3, convention="torch"),
            ValueError,
            "conv_transpose(padding='SAME', convention='torch'): PyTorch's padding is a number, 0 by default: "
            "write padding=0",
        ),
        (
            lambda: layers.conv_transpose(8, 3, output_padding=1),
            ValueError,
            "conv_transpose(output_padding=1) is PyTorch's: write convention='torch', or add it to the second "
            "number of each pair of padding",
        ),
        (
            lambda: layers.conv_transpose(8, 3, padding="CAUSAL"),
            ValueError,
            "conv_transpose(padding=...): unknown padding 'CAUSAL'",
        ),
        (
            lambda: layers.conv_transpose(9, 3, feature_group_count=2),
            ValueError,
            "conv_transpose(features=9, feature_group_count=2): the groups must divide the features",
        ),
        (
            made(layers.conv_transpose(8, 3, feature_group_count=2), 1, 8, 8, 3),
            LayerError,
            "conv_transpose has feature_group_count=2, which does not divide the 3 channels of its input of shape",
        ),
        (
            made(
                layers.conv_transpose(8, 3, strides=2, padding=0, output_padding=2, convention="torch"),
                1,
                8,
                3,
            ),
            LayerError,
            "conv_transpose has output_padding=2, which must be smaller than the stride 2 or the dilation 1",
        ),
        (
            made(layers.conv_transpose(8, 2, padding=4, convention="torch"), 1, 3, 2),
            LayerError,
            "conv_transpose has a window of 2 over a length of 3 with -3 + -3 of padding (input of shape (1, 3, 2))",
        ),
        (
            made(layers.conv_transpose(8, (3, 3)), 8, 28, 28),
            LayerError,
            "conv_transpose takes (batch, height, width, channels), got shape (8, 28, 28): add a channel axis",
        ),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error) as raised:
        make()
    assert message in str(raised.value)
