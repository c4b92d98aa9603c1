"""Sequences of different lengths in one padded array."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from nnkit.checks import LayerError
from nnkit.types import Array

__all__ = ["Sequence", "as_sequence", "last_valid", "reverse_valid", "valid_steps", "zero_padding"]


class Sequence(NamedTuple):
    """What a recurrent layer takes where there is more than the padded array.

    Attributes:
      x: (batch, time, ...); sequence b is ``x[b, :lengths[b]]``, the rest is padding of any value.
      lengths: (batch,), whole numbers from 0 to time; None where all sequences fill the array.
      carry: where the recurrence starts, as a layer with ``return_carry=True`` returned it; None for
        the cell's own initial carry.

    >>> x, lengths = jnp.ones((2, 5, 3)), jnp.array([5, 2])
    >>> layer = layers.gru(4)
    >>> params, state = layer.init(jax.random.key(0), layers.Sequence(x, lengths))
    >>> y, _ = layer.apply(params, state, layers.Sequence(x, lengths), train=False)
    >>> (y != 0).any(axis=2).sum(axis=1).tolist()
    [5, 2]
    """

    x: Any
    lengths: Any = None
    carry: Any = None


def as_sequence(layer: str, x: Any) -> Sequence:
    """``x`` as a Sequence, checked; ``lengths`` are looked at only where their values are known."""
    sequence = x if isinstance(x, Sequence) else Sequence(x)
    shape, lengths = getattr(sequence.x, "shape", None), sequence.lengths
    if shape is None:
        raise LayerError(
            layer, f"takes an array or layers.Sequence(x, lengths, carry), got {type(sequence.x).__name__}"
        )
    if len(shape) < 2:
        raise LayerError(layer, f"takes an array (batch, time, ...), got shape {shape}")
    if lengths is None:
        return sequence
    dtype = getattr(lengths, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
        got = type(lengths).__name__ if dtype is None else dtype
        raise LayerError(
            layer, f"takes lengths as an array of whole numbers, got {got}: pass jnp.array([...])"
        )
    if lengths.shape != shape[:1]:
        raise LayerError(
            layer,
            f"got lengths of shape {lengths.shape} for input of shape {shape}: one for each sequence, "
            f"{shape[:1]}",
        )
    if not isinstance(lengths, Tracer | jax.ShapeDtypeStruct) and lengths.size:
        known = np.asarray(lengths)  # NumPy's, which is not traced
        least, most = int(known.min()), int(known.max())
        if least < 0 or most > shape[1]:
            raise LayerError(
                layer,
                f"got lengths from {least} to {most} for {shape[1]} time steps: they must be in [0, {shape[1]}]",
            )
    return sequence


def valid_steps(lengths: Array, time: int) -> Array:
    """Which steps belong to their sequence, bool (batch, time).

    >>> valid_steps(jnp.array([1, 3]), 3).tolist()
    [[True, False, False], [True, True, True]]
    """
    return jnp.arange(time, dtype=jnp.int32) < jnp.asarray(lengths).astype(jnp.int32)[:, None]


def zero_padding(x: Array, lengths: Array | None) -> Array:
    """``x`` (batch, time, ...) with 0 in place of what lies beyond each sequence's length."""
    if lengths is None:
        return x
    valid = valid_steps(lengths, x.shape[1])
    return jnp.where(valid.reshape(valid.shape + (1,) * (x.ndim - 2)), x, jnp.zeros((), x.dtype))


def reverse_valid(x: Array, lengths: Array | None) -> Array:
    """``x`` (batch, time, ...) with each sequence reversed within its length.

    The padding stays at the end, itself reversed, so that doing it twice gives ``x`` back.

    >>> reverse_valid(jnp.array([[1, 2, 3, 4]]), jnp.array([2])).tolist()
    [[2, 1, 4, 3]]
    """
    time = x.shape[1]
    if lengths is None or time == 0:
        return jnp.flip(x, 1)
    index = (jnp.asarray(lengths).astype(jnp.int32)[:, None] - 1 - jnp.arange(time, dtype=jnp.int32)) % time
    return jnp.take_along_axis(x, index.reshape(index.shape + (1,) * (x.ndim - 2)), axis=1)


def last_valid(x: Array, lengths: Array | None) -> Array:
    """The last step of each sequence of ``x`` (batch, time, ...); 0 where it has none.

    >>> last_valid(jnp.array([[1, 2, 3], [4, 5, 6]]), jnp.array([2, 0])).tolist()
    [2, 0]
    """
    if x.shape[1] == 0:
        return jnp.zeros((x.shape[0], *x.shape[2:]), x.dtype)
    if lengths is None:
        return x[:, -1]
    last = jnp.maximum(jnp.asarray(lengths).astype(jnp.int32) - 1, 0)
    picked = jnp.take_along_axis(x, last.reshape(-1, *(1,) * (x.ndim - 1)), axis=1)
    return zero_padding(picked, jnp.minimum(lengths, 1))[:, 0]
