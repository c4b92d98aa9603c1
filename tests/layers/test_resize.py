"""Resizing, upsampling, pixel shuffling and patches against jax.image, PyTorch and Flax."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch.nn.functional as F

from nnkit import layers
from nnkit.checks import LayerError
from tests.layers.spatial_oracles import check_layer, data

LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


@pytest.mark.parametrize(
    ("shape", "scale"), [((2, 4, 2), 3), ((2, 3, 4, 2), (2, 3)), ((1, 2, 3, 2, 2), 2), ((2, 1, 1, 2), 4)]
)
def test_upsampling_equals_pytorch(shape, scale):
    n = len(shape) - 2
    for method, mode in (("nearest", "nearest"), ("linear", LINEAR[n])):
        given = {} if mode == "nearest" else {"align_corners": False}
        check_layer(
            layers.upsample(scale, method=method),
            data(*shape),
            in_torch=lambda _, x, mode=mode, given=given: F.interpolate(
                x, scale_factor=scale, mode=mode, **given
            ),
        )


@pytest.mark.parametrize(
    ("method", "mode", "antialias", "goal"),
    [
        ("bilinear", "bilinear", False, (9, 4)),
        ("bilinear", "bilinear", True, (9, 4)),
        ("nearest", "nearest-exact", False, (9, 4)),
        ("linear", "bilinear", False, (3, 2)),
        ("linear", "bilinear", True, (3, 2)),
    ],
)
def test_resizing_equals_pytorch(method, mode, antialias, goal):
    given = {} if "nearest" in mode else {"align_corners": False, "antialias": antialias}
    check_layer(
        layers.resize(goal, method=method, antialias=antialias),
        data(2, 6, 7, 2),
        in_torch=lambda _, x: F.interpolate(x, size=goal, mode=mode, **given),
    )


@pytest.mark.parametrize("method", ["nearest", "linear", "cubic", "lanczos3", "lanczos5"])
@pytest.mark.parametrize("antialias", [True, False])
def test_resizing_equals_jax_image(method, antialias):
    check_layer(
        layers.resize((3, 9), method=method, antialias=antialias),
        data(2, 6, 7, 2),
        in_jax=lambda _, x: jax.image.resize(x, (2, 3, 9, 2), method, antialias=antialias),
    )


def test_a_wrong_resampling_is_caught():
    x, torchs = (
        data(2, 6, 7, 2),
        lambda _, x: F.interpolate(x, size=(3, 2), mode="bilinear", align_corners=False),
    )
    for wrong in (layers.resize((3, 2)), layers.resize((3, 2), method="nearest", antialias=False)):
        with pytest.raises(AssertionError):
            check_layer(wrong, x, in_torch=torchs)


def test_half_precision_is_resampled_in_float32():
    x = jnp.asarray(1000 + data(1, 64, 2), jnp.bfloat16)
    y, _ = layers.resize(5).apply({}, {}, x, train=False)
    wide, _ = layers.resize(5).apply({}, {}, x.astype(jnp.float32), train=False)
    np.testing.assert_array_equal(y, wide.astype(jnp.bfloat16))


# ---- pixel shuffle -----------------------------------------------------------------------------


def test_pixel_shuffling_equals_pytorch():
    check_layer(layers.pixel_shuffle(3), data(2, 2, 4, 18), in_torch=lambda _, x: F.pixel_shuffle(x, 3))
    check_layer(layers.pixel_unshuffle(3), data(2, 6, 9, 2), in_torch=lambda _, x: F.pixel_unshuffle(x, 3))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_unshuffling_undoes_shuffling(n):
    x = jnp.asarray(data(2, *range(2, 2 + n), 3 * 2**n), jnp.float32)
    both = layers.serial(layers.pixel_shuffle(2), layers.pixel_unshuffle(2))
    np.testing.assert_array_equal(both.apply({}, {}, x, train=False)[0], x)


def test_another_order_of_channels_is_caught():
    def depth_to_space(x):
        batch, h, w, c = x.shape
        x = x.reshape(batch, h, w, 3, 3, c // 9)
        return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, 3 * h, 3 * w, c // 9)

    with pytest.raises(AssertionError):
        check_layer(
            layers.stateless(depth_to_space), data(2, 2, 4, 18), in_torch=lambda _, x: F.pixel_shuffle(x, 3)
        )


# ---- patches -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "patch"), [((2, 8, 3), (4,)), ((2, 6, 8, 3), (3, 2)), ((1, 4, 2, 6, 2), (2, 1, 3))]
)
@pytest.mark.parametrize("use_bias", [True, False])
def test_patches_equal_a_strided_convolution(shape, patch, use_bias):
    module = nn.Conv(5, patch, strides=patch, padding="VALID", use_bias=use_bias)
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(patch)]
    check_layer(
        layers.patch_embed(5, patch, use_bias=use_bias),
        data(*shape),
        in_jax=lambda params, x: module.apply({"params": params}, x).reshape(x.shape[0], -1, 5),
        in_torch=lambda params, x: conv(
            x, params["kernel"].movedim((-1, -2), (0, 1)), params.get("bias"), stride=patch
        ).flatten(2),
    )


def test_patches_have_the_convolution_s_parameters():
    spec = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    ours = layers.patch_embed(5, 4).init(jax.random.key(0), spec)[0]
    conv = layers.conv(5, 4).init(jax.random.key(0), spec)[0]
    assert ours.keys() == conv.keys()
    np.testing.assert_array_equal(ours["kernel"], conv["kernel"])


def made(layer, *shape):
    return lambda: layer.apply({}, {}, jnp.zeros(shape), train=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: layers.resize(4, method="linaer"),
            "resize(method=...): unknown method 'linaer'; did you mean 'linear'",
        ),
        (lambda: layers.upsample(2, method="box"), "upsample(method=...): unknown method 'box'. Known: bicubic,"),
        (lambda: layers.upsample(1.5), "upsample(scale=...) must be a whole number, got 1.5"),
        (
            made(layers.resize((4, 4)), 8, 28, 28),
            "resize takes (batch, height, width, channels), got shape (8, 28, 28)",
        ),
        (made(layers.resize(4), 8, 0, 3), "resize takes spatial axes that are not empty, got shape (8, 0, 3)"),
        (
            made(layers.pixel_shuffle(2), 1, 4, 4, 6),
            "pixel_shuffle with factor 2 needs a multiple of 4 channels and got 6 (input of shape (1, 4, 4, 6))",
        ),
        (
            made(layers.pixel_unshuffle(2), 1, 4, 5, 6),
            "pixel_unshuffle with factor 2 needs spatial axes that it divides and got an input of shape (1, 4, 5, 6)",
        ),
        (
            made(layers.patch_embed(8, 4), 1, 28, 30, 3),
            "patch_embed cuts into patches of (4, 4) and got an input of shape (1, 28, 30, 3), which they do not "
            "divide: resize or pad it first",
        ),
        (lambda: layers.patch_embed(8, 0), "patch_embed(patch_size=...) must be at least 1, got 0"),
    ],
)  # fmt: skip
def test_bad_input(make, message):
    with pytest.raises((LayerError, ValueError, TypeError)) as raised:
        make()
    assert message in str(raised.value)
