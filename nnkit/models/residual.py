"""Residual networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from nnkit import initializers, layers
from nnkit.types import Layer

__all__ = ["resnet", "resnet18", "resnet20", "resnet50"]

Stem = Literal["imagenet", "cifar"]


def resnet(
    classes: int,
    *,
    stages: Sequence[int],
    width: int = 64,
    stem: Stem = "imagenet",
    bottleneck: bool = False,
    zero_init_residual: bool = False,
) -> Layer:
    """A residual network: a stem, stages of blocks, the mean over all pixels, and a dense layer.

    Each stage after the first halves height and width and doubles the channels. A basic block is two 3×3
    convolutions, each with batch normalisation, ReLU between them and after the sum with the shortcut; a
    bottleneck is 1×1, 3×3, 1×1 with four times the width at its end, and strides in its 3×3 (torchvision's
    "v1.5"). The shortcut is a 1×1 convolution with batch normalisation where the shape changes, else the
    input.

    Args:
      classes: how many logits.
      stages: blocks in each stage.
      width: channels of the first stage.
      stem: ``"imagenet"`` is a 7×7 convolution with stride 2 and 3×3 max pooling with stride 2, for images of
        224 pixels; ``"cifar"`` a 3×3 convolution, for images of 32.
      bottleneck: which kind of block.
      zero_init_residual: whether the last scale of each block begins at 0, so that it begins as the
        identity (Goyal et al. 2017).

    Source: He et al. 2015, "Deep Residual Learning for Image Recognition".

    >>> model = resnet(10, stages=(1, 1), width=8, stem="cifar")
    >>> params, _ = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    >>> sorted(params), sorted(params["stage_1"])
    (['head', 'stage_0', 'stage_1', 'stem'], ['block_0'])
    """
    if stem not in ("imagenet", "cifar"):
        raise ValueError(f"resnet(stem=...) must be 'imagenet' or 'cifar', got {stem!r}")
    expansion = 4 if bottleneck else 1
    body = {"stem": _stem(stem, width)}
    channels = width
    for i, blocks in enumerate(stages):
        features = width * 2**i
        stage = {}
        for j in range(blocks):
            strides = 2 if i > 0 and j == 0 else 1
            main = (_bottleneck if bottleneck else _basic)(features, strides, zero_init_residual)
            changes = strides > 1 or channels != features * expansion
            shortcut = (
                layers.serial(_conv(features * expansion, 1, strides), layers.batch_norm(momentum=0.9))
                if changes
                else layers.identity
            )
            stage[f"block_{j}"] = layers.serial(residual=layers.residual(main, shortcut), relu=layers.relu)
            channels = features * expansion
        body[f"stage_{i}"] = layers.serial(**stage)
    return layers.serial(**body, pool=layers.global_avg_pool(), head=layers.dense(classes))


def resnet18(classes: int, *, stem: Stem = "imagenet", zero_init_residual: bool = False) -> Layer:
    """ResNet-18: 11,689,512 parameters for 1,000 classes, as torchvision counts them.

    >>> params, _ = jax.eval_shape(resnet18(1000).init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    >>> sum(p.size for p in jax.tree.leaves(params))
    11689512
    """
    return resnet(classes, stages=(2, 2, 2, 2), stem=stem, zero_init_residual=zero_init_residual)


def resnet20(classes: int) -> Layer:
    """The ResNet-20 of the paper's experiments on CIFAR-10: 0.27 million parameters, three narrow stages.

    Shortcuts that change the shape are 1×1 convolutions (the paper's option B), which are 2,752 parameters
    more than its padding with zeros.

    >>> params, _ = jax.eval_shape(resnet20(10).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    >>> sum(p.size for p in jax.tree.leaves(params))
    272474
    """
    return resnet(classes, stages=(3, 3, 3), width=16, stem="cifar")


def resnet50(classes: int, *, stem: Stem = "imagenet", zero_init_residual: bool = False) -> Layer:
    """ResNet-50: 25,557,032 parameters for 1,000 classes, as torchvision counts them.

    >>> params, _ = jax.eval_shape(resnet50(1000).init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    >>> sum(p.size for p in jax.tree.leaves(params))
    25557032
    """
    return resnet(
        classes, stages=(3, 4, 6, 3), stem=stem, bottleneck=True, zero_init_residual=zero_init_residual
    )


def _conv(features: int, size: int, strides: int = 1) -> Layer:
    # Explicit padding: with strides, "SAME" would pad on the right alone, and differ from the paper's code.
    return layers.conv(
        features,
        (size, size),
        strides=strides,
        padding=size // 2,
        use_bias=False,
        kernel_init=initializers.he_normal(),
    )


def _stem(stem: Stem, width: int) -> Layer:
    norm = layers.batch_norm(momentum=0.9)
    if stem == "cifar":
        return layers.serial(_conv(width, 3), norm, layers.relu)
    return layers.serial(
        _conv(width, 7, 2), norm, layers.relu, layers.max_pool((3, 3), strides=(2, 2), padding=1)
    )


def _last_norm(zero: bool) -> Layer:
    return layers.batch_norm(momentum=0.9, scale_init=initializers.zeros if zero else initializers.ones)


def _basic(features: int, strides: int, zero: bool) -> Layer:
    norm = layers.batch_norm(momentum=0.9)
    return layers.serial(_conv(features, 3, strides), norm, layers.relu, _conv(features, 3), _last_norm(zero))


def _bottleneck(features: int, strides: int, zero: bool) -> Layer:
    norm = layers.batch_norm(momentum=0.9)
    return layers.serial(
        _conv(features, 1),
        norm,
        layers.relu,
        _conv(features, 3, strides),
        norm,
        layers.relu,
        _conv(features * 4, 1),
        _last_norm(zero),
    )
