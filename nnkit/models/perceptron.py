"""Networks of dense layers."""

from __future__ import annotations

from collections.abc import Sequence

from nnkit import initializers, layers
from nnkit.checks import is_static_number
from nnkit.types import Array, Layer

__all__ = ["mlp", "mlp_bn_dropout"]


def mlp(classes: int, *, hidden: Sequence[int] = (256, 128), dropout: float | Array = 0.0) -> Layer:
    """The lecture's network: dense layers with ReLU between them, He-normal kernels.

    Takes images or rows, gives logits. With a dropout rate there is a dropout layer after each
    ReLU.

    >>> print(layers.summary(mlp(10, hidden=(32,)), jnp.zeros((1, 8, 8, 1))))
    path       layer    output  params  state  bytes
    ---------  -------  ------  ------  -----  -----
    flatten_0  flatten  (1,64)       0      0      0
    dense_0    dense    (1,32)   2,080      0  8,320
    relu_0     relu     (1,32)       0      0      0
    dense_1    dense    (1,10)     330      0  1,320
    ---------  -------  ------  ------  -----  -----
    total                        2,410      0  9,640
    """
    return _stack(classes, hidden, dropout, normalise=False)


def mlp_bn_dropout(
    classes: int, *, hidden: Sequence[int] = (256, 128), dropout: float | Array = 0.5
) -> Layer:
    """As :func:`mlp`, with batch normalisation before each ReLU and dropout after it."""
    return _stack(classes, hidden, dropout, normalise=True)


def _stack(classes: int, hidden: Sequence[int], dropout: float | Array, normalise: bool) -> Layer:
    he = initializers.he_normal()
    body: list[Layer] = [layers.flatten]
    for features in hidden:
        # Batch normalisation subtracts the mean, so a bias before it would do nothing.
        body.append(layers.dense(features, kernel_init=he, use_bias=not normalise))
        if normalise:
            body.append(layers.batch_norm())
        body.append(layers.relu)
        if not (is_static_number(dropout) and dropout == 0):
            body.append(layers.dropout(dropout))
    return layers.serial(*body, layers.dense(classes))
