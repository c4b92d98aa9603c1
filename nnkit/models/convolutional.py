"""Networks of convolutions and pooling."""

from __future__ import annotations

from collections.abc import Sequence

from nnkit import initializers, layers
from nnkit.checks import is_static_number
from nnkit.types import Array, Layer

__all__ = ["cnn", "lenet"]


def cnn(
    classes: int,
    *,
    channels: Sequence[int] = (32, 64),
    hidden: Sequence[int] = (128,),
    dropout: float | Array = 0.0,
) -> Layer:
    """Convolutions with ReLU and max pooling, then dense layers.

    For each number of ``channels`` a 3×3 convolution, ReLU and 2×2 max pooling; for each width of
    ``hidden`` a dense layer, ReLU and, with a rate, dropout; then the logits. He-normal kernels.

    >>> model = cnn(10)
    >>> params, _ = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    >>> sum(p.size for p in jax.tree.leaves(params))
    421642
    """
    he = initializers.he_normal()
    body: list[Layer] = []
    for features in channels:
        body += [layers.conv(features, (3, 3), kernel_init=he), layers.relu, layers.max_pool((2, 2))]
    body.append(layers.flatten)
    for features in hidden:
        body += [layers.dense(features, kernel_init=he), layers.relu]
        if not (is_static_number(dropout) and dropout == 0):
            body.append(layers.dropout(dropout))
    return layers.serial(*body, layers.dense(classes))


def lenet(classes: int) -> Layer:
    """LeNet-5 in its present-day form, for images of 28×28 pixels: 61,706 parameters for ten classes.

    Two 5×5 convolutions of 6 (padded to the image's size) and 16 channels, tanh, 2×2 average pooling after
    each; dense layers of 120 and 84 units with tanh. The original of 1998 has trainable pooling, a second
    convolution that sees some of the channels only, and radial basis functions for an output layer.

    Source: LeCun, Bottou, Bengio & Haffner 1998, "Gradient-based learning applied to document recognition".

    >>> params, _ = jax.eval_shape(lenet(10).init, jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    >>> sum(p.size for p in jax.tree.leaves(params))
    61706
    """
    xavier = initializers.xavier_uniform()
    body: list[Layer] = []
    for features, padding in ((6, "SAME"), (16, "VALID")):
        body += [
            layers.conv(features, (5, 5), padding=padding, kernel_init=xavier),
            layers.tanh,
            layers.avg_pool((2, 2)),
        ]
    body.append(layers.flatten)
    for features in (120, 84):
        body += [layers.dense(features, kernel_init=xavier), layers.tanh]
    return layers.serial(*body, layers.dense(classes, kernel_init=xavier))
