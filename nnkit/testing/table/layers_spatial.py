"""Layers on images: convolutions, pooling, resizing."""

from __future__ import annotations

from typing import Any

from nnkit import layers
from nnkit.testing.table.layers_case import Case, Oracle
from nnkit.testing.table.layers_oracles import (
    channels_first,
    linen,
    linen_function,
    nnx,
    nnx_function,
    torch_function,
    torch_module,
)

__all__ = ["TABLE"]

SEQUENCE, IMAGE, VOLUME = (2, 9, 4), (2, 8, 8, 4), (2, 4, 5, 6, 4)


def _image(make: Any) -> Oracle:
    """PyTorch's module on channels-first images."""
    return torch_module(make, channels_first)


def _patches(f: Any, x: Any, train: bool) -> Any:
    """A convolution's output as a sequence."""
    return f(x).reshape(x.shape[0], -1, 5)


def _functional(name: str, *args: Any, **options: Any) -> Oracle:
    """A function of ``torch.nn.functional`` on channels-first images."""

    def call(T: Any, params: Any, state: Any, x: Any) -> Any:
        return channels_first(lambda a: getattr(T.nn.functional, name)(a, *args, **options), x)

    return torch_function(call)


def _pools(name: str, *args: Any) -> tuple[Oracle, Oracle]:
    """Flax's two on the same arguments."""

    def make(flax: Any) -> Any:
        return lambda x: getattr(getattr(flax, "pooling", flax), name)(x, *args)

    return linen_function(make), nnx_function(make)


def _reduced(name: str) -> Oracle:
    """``mean`` or ``amax`` over the window."""
    return torch_function(lambda T, p, s, x: getattr(T, name)(x, tuple(range(1, x.ndim - 1))))


CONVOLUTIONS: dict[str, Case] = {
    "conv": Case(
        layers.conv(3, (3, 3)),
        IMAGE,
        linen(lambda nn: nn.Conv(3, (3, 3))),
        nnx(lambda nnx, rngs: nnx.Conv(4, 3, (3, 3), rngs=rngs)),
        _image(lambda T: T.nn.Conv2d(4, 3, 3, padding="same")),
    ),
    "conv (strides, dilation, VALID)": Case(
        layers.conv(3, (3, 2), strides=2, padding="VALID", kernel_dilation=2),
        IMAGE,
        linen(lambda nn: nn.Conv(3, (3, 2), strides=2, padding="VALID", kernel_dilation=2)),
        nnx(lambda nnx, rngs: nnx.Conv(4, 3, (3, 2), 2, padding="VALID", kernel_dilation=2, rngs=rngs)),
        _image(lambda T: T.nn.Conv2d(4, 3, (3, 2), 2, dilation=2)),
    ),
    "conv (groups, one dimension)": Case(
        layers.conv(4, (3,), feature_group_count=2),
        SEQUENCE,
        linen(lambda nn: nn.Conv(4, (3,), feature_group_count=2)),
        nnx(lambda nnx, rngs: nnx.Conv(4, 4, (3,), feature_group_count=2, rngs=rngs)),
        _image(lambda T: T.nn.Conv1d(4, 4, 3, padding="same", groups=2)),
    ),
    "conv (CAUSAL)": Case(
        layers.conv(3, (3,), padding="CAUSAL", kernel_dilation=2),
        SEQUENCE,
        linen(lambda nn: nn.Conv(3, (3,), padding="CAUSAL", kernel_dilation=2)),
        nnx(lambda nnx, rngs: nnx.Conv(4, 3, (3,), padding="CAUSAL", kernel_dilation=2, rngs=rngs)),
    ),
    "conv (CIRCULAR)": Case(
        layers.conv(3, (3, 3), padding="CIRCULAR"),
        IMAGE,
        linen(lambda nn: nn.Conv(3, (3, 3), padding="CIRCULAR")),
        nnx(lambda nnx, rngs: nnx.Conv(4, 3, (3, 3), padding="CIRCULAR", rngs=rngs)),
        _image(lambda T: T.nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular")),
    ),
    "conv (three dimensions, explicit padding)": Case(
        layers.conv(3, (3, 2, 3), strides=(1, 2, 1), padding=((1, 1), (0, 0), (2, 2))),
        VOLUME,
        linen(lambda nn: nn.Conv(3, (3, 2, 3), strides=(1, 2, 1), padding=((1, 1), (0, 0), (2, 2)))),
        nnx(
            lambda nnx, rngs: nnx.Conv(
                4, 3, (3, 2, 3), (1, 2, 1), padding=((1, 1), (0, 0), (2, 2)), rngs=rngs
            )
        ),
        _image(lambda T: T.nn.Conv3d(4, 3, (3, 2, 3), (1, 2, 1), (1, 0, 2))),
    ),
    "depthwise_conv": Case(
        layers.depthwise_conv((3, 3), channel_multiplier=2),
        IMAGE,
        linen(lambda nn: nn.Conv(8, (3, 3), feature_group_count=4)),
        nnx(lambda nnx, rngs: nnx.Conv(4, 8, (3, 3), feature_group_count=4, rngs=rngs)),
        _image(lambda T: T.nn.Conv2d(4, 8, 3, padding="same", groups=4)),
    ),
    "separable_conv": Case(
        layers.separable_conv(3, (3, 3), strides=2, padding="VALID"),
        IMAGE,
        linen(
            lambda nn: nn.Sequential(
                [
                    nn.Conv(4, (3, 3), 2, padding="VALID", feature_group_count=4, use_bias=False),
                    nn.Conv(3, (1, 1)),
                ]
            )
        ),
        torch=_image(
            lambda T: T.nn.Sequential(
                T.nn.Conv2d(4, 4, 3, 2, groups=4, bias=False),
                T.nn.Conv2d(4, 3, 1),
            )
        ),
    ),
    "conv_transpose": Case(
        layers.conv_transpose(3, (3, 3), strides=2),
        IMAGE,
        linen(lambda nn: nn.ConvTranspose(3, (3, 3), (2, 2))),
        nnx(lambda nnx, rngs: nnx.ConvTranspose(4, 3, (3, 3), (2, 2), rngs=rngs)),
    ),
    "conv_transpose (kernel transposed, VALID)": Case(
        layers.conv_transpose(3, (3, 2), strides=2, padding="VALID", transpose_kernel=True),
        IMAGE,
        linen(lambda nn: nn.ConvTranspose(3, (3, 2), (2, 2), "VALID", transpose_kernel=True)),
        nnx(
            lambda nnx, rngs: nnx.ConvTranspose(
                4, 3, (3, 2), (2, 2), padding="VALID", transpose_kernel=True, rngs=rngs
            )
        ),
    ),
    "conv_transpose (PyTorch's)": Case(
        layers.conv_transpose(
            6,
            (3, 2),
            strides=(2, 3),
            padding=(1, 0),
            output_padding=(1, 2),
            feature_group_count=2,
            convention="torch",
        ),
        (2, 4, 5, 4),
        torch=_image(lambda T: T.nn.ConvTranspose2d(4, 6, (3, 2), (2, 3), (1, 0), (1, 2), 2)),
    ),
    "patch_embed": Case(
        layers.patch_embed(5, (4, 2)),
        IMAGE,
        linen(lambda nn: nn.Conv(5, (4, 2), (4, 2), "VALID"), _patches),
        nnx(lambda nnx, rngs: nnx.Conv(4, 5, (4, 2), (4, 2), padding="VALID", rngs=rngs), _patches),
        torch_module(
            lambda T: T.nn.Conv2d(4, 5, (4, 2), (4, 2)),
            lambda f, x, train: f(x.movedim(-1, 1)).flatten(2).movedim(-1, 1),
        ),
    ),
}

POOLS: dict[str, Case] = {
    "max_pool": Case(
        layers.max_pool((2, 2), strides=(2, 2)),
        IMAGE,
        *_pools("max_pool", (2, 2), (2, 2)),
        torch=_functional("max_pool2d", 2),
    ),
    "max_pool (overlapping, SAME)": Case(
        layers.max_pool((3, 3), strides=(2, 2), padding="SAME"),
        (2, 7, 9, 4),
        *_pools("max_pool", (3, 3), (2, 2), "SAME"),
        torch=_functional("max_pool2d", 3, 2, 1),
    ),
    "min_pool": Case(
        layers.min_pool((3, 2), strides=(2, 2)),
        IMAGE,
        *_pools("min_pool", (3, 2), (2, 2)),
        torch=torch_function(
            lambda T, p, s, x: -channels_first(lambda a: T.nn.functional.max_pool2d(a, (3, 2), 2), -x)
        ),
    ),
    "avg_pool": Case(
        layers.avg_pool((3, 3), strides=(2, 2), padding="SAME"),
        (2, 7, 9, 4),
        *_pools("avg_pool", (3, 3), (2, 2), "SAME"),
        torch=_functional("avg_pool2d", 3, 2, 1),
    ),
    "avg_pool (without the padding)": Case(
        layers.avg_pool((3, 3), strides=(2, 2), padding="SAME", count_include_pad=False),
        (2, 7, 9, 4),
        *_pools("avg_pool", (3, 3), (2, 2), "SAME", False),
        torch=_functional("avg_pool2d", 3, 2, 1, count_include_pad=False),
    ),
    "avg_pool (three dimensions, rounded up)": Case(
        layers.avg_pool((2, 2, 3), strides=(2, 2, 2), ceil_mode=True),
        VOLUME,
        torch=_functional("avg_pool3d", (2, 2, 3), 2, ceil_mode=True),
    ),
    "sum_pool": Case(
        layers.sum_pool((2, 3), strides=(2, 2)),
        IMAGE,
        torch=torch_function(
            lambda T, p, s, x: channels_first(
                lambda a: T.nn.functional.avg_pool2d(a, (2, 3), 2, divisor_override=1), x
            )
        ),
    ),
    "adaptive_avg_pool": Case(
        layers.adaptive_avg_pool((4, 3)), (2, 9, 7, 3), torch=_image(lambda T: T.nn.AdaptiveAvgPool2d((4, 3)))
    ),
    "adaptive_max_pool": Case(
        layers.adaptive_max_pool((4, 3)), (2, 9, 7, 3), torch=_image(lambda T: T.nn.AdaptiveMaxPool2d((4, 3)))
    ),
    "global_avg_pool": Case(
        layers.global_avg_pool(),
        (2, 5, 7, 3),
        linen_function(lambda nn: lambda x: nn.avg_pool(x, (5, 7))[:, 0, 0]),
        nnx_function(lambda nnx: lambda x: nnx.avg_pool(x, (5, 7))[:, 0, 0]),
        _reduced("mean"),
    ),
    "global_max_pool": Case(
        layers.global_max_pool(),
        (2, 5, 7, 3),
        linen_function(lambda nn: lambda x: nn.max_pool(x, (5, 7))[:, 0, 0]),
        nnx_function(lambda nnx: lambda x: nnx.max_pool(x, (5, 7))[:, 0, 0]),
        _reduced("amax"),
    ),
}

SIZES: dict[str, Case] = {
    "upsample (nearest)": Case(
        layers.upsample((2, 3)), (2, 3, 4, 2), torch=_image(lambda T: T.nn.Upsample(scale_factor=(2, 3)))
    ),
    "upsample (linear)": Case(
        layers.upsample((2, 3), method="linear"),
        (2, 3, 4, 2),
        torch=_image(lambda T: T.nn.Upsample(scale_factor=(2, 3), mode="bilinear")),
    ),
    "resize (smaller, antialiased)": Case(
        layers.resize((3, 2)),
        (2, 6, 7, 2),
        torch=_functional("interpolate", (3, 2), mode="bilinear", antialias=True),
    ),
    "pixel_shuffle": Case(
        layers.pixel_shuffle(3), (2, 2, 4, 18), torch=_image(lambda T: T.nn.PixelShuffle(3))
    ),
    "pixel_unshuffle": Case(
        layers.pixel_unshuffle(3), (2, 6, 9, 2), torch=_image(lambda T: T.nn.PixelUnshuffle(3))
    ),
}

TABLE: dict[str, Case] = {**CONVOLUTIONS, **POOLS, **SIZES}
