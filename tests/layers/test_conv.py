"""conv, depthwise_conv and separable_conv against Flax and PyTorch."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nnkit import initializers, layers, ops
from nnkit.checks import LayerError
from nnkit.layers import spatial
from tests.layers.spatial_oracles import check_layer, data

CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def torch_conv(params: Any, x: Any, *, before: Any = None, mode: str = "constant", **options: Any) -> Any:
    """PyTorch's convolution with nnkit's kernel; ``before`` pads first, last axis first as F.pad does."""
    weight = params["kernel"].movedim((-1, -2), (0, 1))
    x = x if before is None else F.pad(x, before, mode=mode)
    return CONVS[x.ndim - 2](x, weight, params.get("bias"), **options)


# Input shape, kernel, arguments of nnkit and Flax, and what PyTorch needs instead (None: has nothing).
CASES = {
    "1d_same_odd": ((2, 9, 3), (3,), {}, {"padding": "same"}),
    "1d_same_even_strided": ((2, 9, 3), (4,), {"strides": 2}, {"before": (1, 2), "stride": 2}),
    "1d_same_lower": ((2, 9, 3), (4,), {"padding": "SAME_LOWER"}, {"before": (2, 1)}),
    "1d_causal": ((2, 9, 3), (3,), {"padding": "CAUSAL"}, {"before": (2, 0)}),
    "1d_causal_dilated": (
        (2, 9, 3), (2,), {"padding": "CAUSAL", "kernel_dilation": 3, "strides": 2},
        {"before": (3, 0), "dilation": 3, "stride": 2},
    ),
    "1d_circular": ((2, 9, 3), (3,), {"padding": "CIRCULAR"}, {"before": (1, 1), "mode": "circular"}),
    "1d_circular_around_twice": ((2, 2, 3), (7,), {"padding": "CIRCULAR"}, None),
    "1d_reflect_even": ((2, 9, 3), (4,), {"padding": "REFLECT"}, {"before": (1, 2), "mode": "reflect"}),
    "2d_same": ((2, 5, 6, 3), (3, 3), {}, {"padding": "same"}),
    "2d_valid_strides": ((2, 7, 6, 3), (3, 2), {"padding": "VALID", "strides": (2, 1)}, {"stride": (2, 1)}),
    "2d_number": ((2, 5, 6, 3), (3, 3), {"padding": 1, "strides": 2}, {"padding": 1, "stride": 2}),
    "2d_numbers": ((2, 5, 6, 3), (3, 4), {"padding": (1, 2)}, {"padding": (1, 2)}),
    "2d_pairs": ((2, 5, 6, 3), (3, 3), {"padding": ((0, 2), (1, 0))}, {"before": (1, 0, 0, 2)}),
    "2d_pairs_beyond_the_window": (
        (2, 3, 4, 2), (2, 1), {"padding": ((3, 0), (0, 2))}, {"before": (0, 2, 3, 0)}
    ),
    "2d_same_dilated_strided": (
        (2, 9, 8, 2), (3, 3), {"kernel_dilation": 2, "strides": 2},
        {"before": (1, 2, 2, 2), "dilation": 2, "stride": 2},
    ),
    "2d_kernel_dilations": (
        (2, 7, 8, 2), (2, 3), {"kernel_dilation": (3, 2), "padding": "VALID"}, {"dilation": (3, 2)}
    ),
    "2d_input_dilation": ((2, 4, 5, 2), (3, 3), {"input_dilation": (2, 3), "padding": 1}, None),
    "2d_input_dilation_strided": ((2, 4, 5, 2), (3, 2), {"input_dilation": 2, "strides": (2, 3), "padding": 0}, None),
    "2d_groups": (
        (2, 5, 5, 4), (3, 3), {"feature_group_count": 2, "strides": 2, "padding": 1},
        {"groups": 2, "stride": 2, "padding": 1},
    ),
    "2d_circular_dilated": (
        (2, 6, 7, 2), (3, 2), {"padding": "CIRCULAR", "kernel_dilation": 2},
        {"before": (1, 1, 2, 2), "mode": "circular", "dilation": 2},
    ),
    "2d_reflect_strided": (
        (2, 6, 7, 2), (3, 5), {"padding": "REFLECT", "strides": 2},
        {"before": (2, 2, 1, 1), "mode": "reflect", "stride": 2},
    ),
    "2d_window_as_large": ((2, 4, 5, 2), (4, 5), {"padding": "VALID", "use_bias": False}, {}),
    "2d_strides_beyond_the_window": ((2, 8, 7, 3), (2, 2), {"strides": 3}, {"before": (0, 1, 0, 0), "stride": 3}),
    "3d_same": ((2, 4, 3, 5, 2), (3, 2, 3), {}, {"before": (1, 1, 0, 1, 1, 1)}),
    "3d_groups": (
        (2, 4, 5, 4, 2), (2, 2, 2), {"strides": (1, 2, 2), "padding": "VALID", "feature_group_count": 2},
        {"stride": (1, 2, 2), "groups": 2},
    ),
}  # fmt: skip
# Its input gradient reads beyond an array; see nnkit.layers.spatial.within_reach.
WRONG_IN_XLA = {"2d_pairs_beyond_the_window"}


def check_case(name: str, make=layers.conv) -> None:
    shape, window, options, torch_options = CASES[name]
    module = nn.Conv(4, window, **options)
    check_layer(
        make(4, window, **options),
        data(*shape),
        in_jax=None if name in WRONG_IN_XLA else lambda params, x: module.apply({"params": params}, x),
        in_torch=None if torch_options is None else lambda params, x: torch_conv(params, x, **torch_options),
    )


@pytest.mark.parametrize("name", CASES)
def test_equals_flax_and_pytorch(name):
    check_case(name)


def _with_ops_conv(monkeypatch, change):
    true = ops.conv
    monkeypatch.setattr(ops, "conv", lambda x, kernel, **options: change(true, x, kernel, dict(options)))


def _swapped(true, x, kernel, options):
    return true(x, kernel, **{**options, "padding": tuple(pair[::-1] for pair in options["padding"])})


def _flipped(true, x, kernel, options):
    return true(x, jnp.flip(kernel, tuple(range(kernel.ndim - 2))), **options)


def _without(argument):
    return lambda true, x, kernel, options: true(x, kernel, **{**options, argument: (1,) * (x.ndim - 2)})


def _mixed_groups(true, x, kernel, options):
    return true(x[..., jnp.array([0, 2, 1, 3])], kernel, **options)


def _half_gradient(true, x, kernel, options):
    return true((x + jax.lax.stop_gradient(x)) / 2, kernel, **options)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("1d_same_even_strided", _swapped),
        ("1d_same_lower", _swapped),
        ("1d_causal", _swapped),
        ("2d_pairs", _swapped),
        ("2d_same", _flipped),
        ("2d_number", _without("strides")),
        ("2d_kernel_dilations", _without("kernel_dilation")),
        ("2d_input_dilation", _without("input_dilation")),
        ("2d_groups", _mixed_groups),
        ("2d_valid_strides", _half_gradient),
    ],
)
def test_a_wrong_convolution_is_caught(name, change, monkeypatch):
    _with_ops_conv(monkeypatch, change)
    with pytest.raises(AssertionError):
        check_case(name)


@pytest.mark.parametrize(("name", "mode"), [("1d_circular", "reflect"), ("1d_reflect_even", "wrap")])
def test_a_wrong_border_is_caught(name, mode, monkeypatch):
    true = spatial.pad_by_mode
    monkeypatch.setattr(spatial, "pad_by_mode", lambda x, window, _: true(x, window, mode))
    with pytest.raises(AssertionError):
        check_case(name)


def test_one_number_stands_for_every_spatial_axis():
    for shape in ((2, 5, 3), (2, 5, 6, 3), (2, 4, 5, 3, 2), (1, 3, 2, 3, 2, 2)):
        layer = layers.conv(4, 3, strides=2, padding=1)
        n = len(shape) - 2
        x = jax.ShapeDtypeStruct(shape, jnp.float32)
        params, _ = jax.eval_shape(layer.init, jax.random.key(0), x)
        assert params["kernel"].shape == (*(3,) * n, shape[-1], 4)
        y = jax.eval_shape(lambda p, x, layer=layer: layer.apply(p, {}, x, train=False)[0], params, x)
        assert y.shape == (shape[0], *((size - 1) // 2 + 1 for size in shape[1:-1]), 4)


@pytest.mark.parametrize(
    "make",
    [
        lambda **more: layers.conv(4, 3, **more),
        lambda **more: layers.depthwise_conv(3, **more),
        lambda **more: layers.separable_conv(4, 3, **more),
        lambda **more: layers.conv_transpose(4, 3, **more),
    ],
)
def test_the_algorithm_goes_on_to_the_operation(make):
    x = jnp.zeros((1, 5, 5, 2))
    params, state = make().init(jax.random.key(0), x)

    def run(layer):
        return jax.make_jaxpr(lambda p: layer.apply(p, state, x, train=False)[0])(params)

    assert "Algorithms(forward='shift'" in str(run(make(algorithm=ops.Algorithms(forward="shift"))))
    with pytest.raises(ValueError, match="unknown algorithm of forward 'shfit'; did you mean 'shift'"):
        run(make(algorithm="shfit"))


def test_padding_names_may_be_lower_case():
    x = jnp.asarray(data(1, 6, 6, 2), jnp.float32)
    params, _ = layers.conv(2, 3).init(jax.random.key(0), x)
    upper, lower = (
        layers.conv(2, 3, padding=name).apply(params, {}, x, train=False)[0] for name in ("VALID", "valid")
    )
    np.testing.assert_array_equal(upper, lower)


def test_draws_as_flax_and_pytorch_do():
    spec = jax.ShapeDtypeStruct((1, 8, 8, 32), jnp.float32)
    kernel = layers.conv(64, 3, feature_group_count=2).init(jax.random.key(0), spec)[0]["kernel"]
    module = nn.Conv(64, (3, 3), feature_group_count=2)
    theirs = module.init(jax.random.key(1), jnp.zeros(spec.shape))["params"]["kernel"]
    assert kernel.shape == theirs.shape
    # A truncated normal of variance 1/(9·16): 9216 draws have the deviation to 1%, and one largest value.
    assert float(kernel.std()) == pytest.approx((9 * 16) ** -0.5, rel=0.02)
    assert float(abs(kernel).max()) == pytest.approx(float(abs(theirs).max()), rel=1e-2)
    uniform = initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    kernel = layers.conv(64, 3, kernel_init=uniform).init(jax.random.key(0), spec)[0]["kernel"]
    weight = torch.nn.Conv2d(32, 64, 3).weight.detach()
    assert float(abs(kernel).max()) == pytest.approx(float(weight.abs().max()), rel=1e-3)


# ---- depthwise and separable -------------------------------------------------------------------


@pytest.mark.parametrize("multiplier", [1, 3])
@pytest.mark.parametrize(("shape", "window"), [((2, 9, 4), (3,)), ((2, 5, 6, 4), (2, 3))])
def test_depthwise_equals_flax_and_pytorch(shape, window, multiplier):
    groups = shape[-1]
    options = {"strides": 2, "padding": 1}
    module = nn.Conv(groups * multiplier, window, feature_group_count=groups, **options)
    check_layer(
        layers.depthwise_conv(window, channel_multiplier=multiplier, **options),
        data(*shape),
        in_jax=lambda params, x: module.apply({"params": params}, x),
        in_torch=lambda params, x: torch_conv(params, x, stride=2, padding=1, groups=groups),
    )


def test_depthwise_outputs_of_one_channel_stand_together():
    x = jnp.asarray(data(1, 6, 6, 3), jnp.float32)
    layer = layers.depthwise_conv(3, channel_multiplier=2)
    params, _ = layer.init(jax.random.key(0), x)
    y, _ = layer.apply(params, {}, x, train=False)
    moved, _ = layer.apply(params, {}, x.at[..., 1].add(1), train=False)
    assert [bool(changed) for changed in (y != moved).any((0, 1, 2))] == [0, 0, 1, 1, 0, 0]


def test_separable_equals_its_two_parts_in_flax_and_pytorch():
    shape, window = (2, 6, 5, 3), (3, 3)
    first = nn.Conv(6, window, strides=2, feature_group_count=3, use_bias=False, kernel_dilation=1)
    second = nn.Conv(4, (1, 1))

    def in_jax(params, x):
        return second.apply({"params": params["pointwise"]}, first.apply({"params": params["depthwise"]}, x))

    def in_torch(params, x):
        h = torch_conv({"kernel": params["depthwise/kernel"]}, x, before=(1, 1, 0, 1), stride=2, groups=3)
        return torch_conv({name: params[f"pointwise/{name}"] for name in ("kernel", "bias")}, h)

    layer = layers.separable_conv(4, window, channel_multiplier=2, strides=2)
    check_layer(layer, data(*shape), in_jax=in_jax, in_torch=in_torch)
    assert layer.name == "separable_conv_"


# ---- errors ------------------------------------------------------------------------------------

KEY = jax.random.key(0)


def init(layer, *shape):
    return lambda: layer.init(KEY, jax.ShapeDtypeStruct(shape, jnp.float32))


def apply(layer, made_for, given):
    """Parameters made for one shape, and another one given."""

    def run():
        params, state = layer.init(KEY, jax.ShapeDtypeStruct(made_for, jnp.float32))
        return layer.apply(params, state, jnp.zeros(given), train=False)

    return run


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: layers.conv(0, 3), ValueError, "conv(features=...) must be at least 1, got 0"),
        (lambda: layers.conv(8, 2.5), TypeError, "conv(kernel_size=...) must be a whole number, got 2.5"),
        (lambda: layers.conv(8, (3, 0)), ValueError, "conv(kernel_size=...) must be at least 1, got 0"),
        (lambda: layers.conv(8, ()), ValueError, "conv(kernel_size=...) must have a number for each spatial axis"),
        (lambda: layers.conv(8, 3, strides=0), ValueError, "conv(strides=...) must be at least 1, got 0"),
        (
            lambda: layers.conv(8, 3, padding="SAMEE"),
            ValueError,
            "conv(padding=...): unknown padding 'SAMEE'; did you mean 'SAME' or 'SAME_LOWER'? Known: CAUSAL, "
            "CIRCULAR, REFLECT, SAME, SAME_LOWER, VALID, a number, or a pair of numbers for each spatial axis",
        ),
        (
            lambda: layers.conv(8, 3, padding=((1, 1, 1), (0, 0))),
            TypeError,
            "conv(padding=...) takes a name, a number, or for each axis (before, after); got (1, 1, 1)",
        ),
        (lambda: layers.conv(8, 3, padding=-1), ValueError, "conv(padding=...) must not be negative, got -1"),
        (
            lambda: layers.conv(9, 3, feature_group_count=2),
            ValueError,
            "conv(features=9, feature_group_count=2): the groups must divide the features",
        ),
        (
            init(layers.conv(8, 3, feature_group_count=2), 1, 8, 8, 3),
            LayerError,
            "conv has feature_group_count=2, which does not divide the 3 channels of its input of shape (1, 8, 8, 3)",
        ),
        (
            init(layers.conv(8, (3, 3)), 8, 28, 28),
            LayerError,
            "conv takes (batch, height, width, channels), got shape (8, 28, 28): add a channel axis with "
            "x[..., None], or a batch axis with x[None]",
        ),
        (
            init(layers.conv(8, (3,)), 8, 5, 28, 28),
            LayerError,
            "conv takes (batch, length, channels), got shape (8, 5, 28, 28): give sizes for 2 spatial axes, or "
            "map over the others with jax.vmap",
        ),
        (
            init(layers.conv(8, 3), 8, 28),
            LayerError,
            "conv takes (batch, *spatial, channels), got shape (8, 28): add a channel axis with x[..., None]",
        ),
        (
            init(layers.conv(8, (3, 3, 3)), 8, 28),
            LayerError,
            "conv takes (batch, depth, height, width, channels), got shape (8, 28): reshape it to have these axes",
        ),
        (
            init(layers.conv(8, 3), 8, 0, 5, 3),
            LayerError,
            "conv takes spatial axes that are not empty, got shape (8, 0, 5, 3)",
        ),
        (
            apply(layers.conv(8, (3, 3), strides=(1, 2, 1)), (1, 8, 8, 3), (1, 8, 8, 3)),
            LayerError,
            "conv has strides=(1, 2, 1) where there are 2 spatial axes: give one number, or 2",
        ),
        (
            apply(layers.conv(8, 3, padding=((1, 1),)), (1, 8, 8, 3), (1, 8, 8, 3)),
            LayerError,
            "conv has padding=((1, 1),) where there are 2 spatial axes: give one number, or a pair for each",
        ),
        (
            apply(layers.conv(8, 3, padding="CAUSAL"), (1, 8, 8, 3), (1, 8, 8, 3)),
            LayerError,
            "conv has padding='CAUSAL', which is for one spatial axis, and its input has 2: pass pairs",
        ),
        (
            apply(layers.conv(8, 3, padding="VALID", kernel_dilation=4), (1, 9, 8, 3), (1, 9, 8, 3)),
            LayerError,
            "conv has a window of 9 over a width of 8 with 0 + 0 of padding (input of shape (1, 9, 8, 3)): take a "
            "smaller window or fewer strided layers before it, or pad with 'SAME'",
        ),
        (
            apply(layers.conv(8, 3), (1, 28, 28, 1), (8, 28, 28)),
            LayerError,
            "conv takes (batch, height, width, channels), got shape (8, 28, 28): add a channel axis",
        ),
        (
            apply(layers.conv(8, 3), (1, 32, 32, 3), (1, 3, 32, 32)),
            LayerError,
            "conv has a kernel of shape (3, 3, 3, 8) and needs (3, 3, 32, 8): its input has shape (1, 3, 32, 32). "
            "Channels come last here: write jnp.moveaxis(x, 1, -1) if axis 1 holds them",
        ),
        (
            lambda: layers.conv(8, 3).init(KEY, jnp.zeros((1, 8, 8, 3), jnp.uint8)),
            LayerError,
            "conv takes floating-point input, got uint8 of shape (1, 8, 8, 3): write x.astype(jnp.float32)",
        ),
        (
            init(layers.serial(layers.conv(8, 3), layers.conv(8, 3, feature_group_count=1)), 2, 8),
            LayerError,
            "conv_0 takes (batch, *spatial, channels), got shape (2, 8)",
        ),
        (
            lambda: layers.depthwise_conv(3, channel_multiplier=0),
            ValueError,
            "depthwise_conv(channel_multiplier=...) must be at least 1, got 0",
        ),
        (
            init(layers.separable_conv(8, (3, 3)), 8, 28, 28),
            LayerError,
            "depthwise takes (batch, height, width, channels), got shape (8, 28, 28)",
        ),
    ],
)  # fmt: skip
def test_bad_input(make, error, message):
    with pytest.raises(error) as raised:
        make()
    assert message in str(raised.value)
