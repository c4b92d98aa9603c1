"""Dropout of whole channels."""

from __future__ import annotations

from nnkit.layers.dropout import dropping
from nnkit.types import Array, Layer

__all__ = ["spatial_dropout"]


def spatial_dropout(rate: float | Array) -> Layer:
    """Sets each channel of each example to 0, at all positions together, with probability ``rate`` while training.

    ``y = m x / (1 - rate)`` with one Bernoulli(1 - rate) draw m for an example and a channel. Neighbouring
    pixels of a feature map say nearly the same: dropped one by one, they would fill in for each other.

    Shapes: x (batch, ..., channels), y as x.

    Args:
      rate: the probability of dropping, in [0, 1); may be a traced scalar.

    Raises:
      ValueError: for a rate outside [0, 1).
      LayerError: without a key when train=True.

    Source: Tompson et al. 2015, "Efficient object localization using convolutional networks"; PyTorch's
    ``Dropout1d``, ``Dropout2d`` and ``Dropout3d``.

    >>> y, _ = layers.spatial_dropout(0.5).apply({}, {}, jnp.ones((1, 3, 3, 8)), key=jax.random.key(1), train=True)
    >>> bool((y == y[:, :1, :1]).all()), sorted(set(y.ravel().tolist()))
    (True, [0.0, 2.0])
    """
    return dropping("spatial_dropout", rate, _channels)


def _channels(x: Array) -> tuple[int, ...]:
    return x.shape if x.ndim < 2 else (x.shape[0], *(1,) * (x.ndim - 2), x.shape[-1])
