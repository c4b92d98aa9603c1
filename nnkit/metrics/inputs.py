"""What the metrics take in, looked at while tracing."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nnkit.losses.inputs import as_labels, check_classes, check_same_shape

__all__ = ["Mask", "classes_and_labels", "kept", "labels_of"]

Mask = Bool[Array, " batch"] | Int[Array, " batch"] | Float[Array, " batch"]
"""What is not 0 counts; over the leading axes of the labels."""


def labels_of(name: str, predictions: Any, targets: Any) -> Array:
    """Integer labels, of one-hot rows the place of the largest entry."""
    if check_classes(name, predictions, targets):
        return as_labels(targets)
    return jnp.argmax(jnp.asarray(targets), -1).astype(jnp.int32)


def classes_and_labels(name: str, predictions: Any, targets: Any) -> tuple[Array, Array, int | None]:
    """The predicted class (-1 for a row with NaN), the label, and how many classes, if that shows."""
    p, t = jnp.asarray(predictions), jnp.asarray(targets)
    if jnp.issubdtype(p.dtype, jnp.floating):
        labels = labels_of(name, p, t)
        predicted = jnp.where(jnp.any(jnp.isnan(p), -1), -1, jnp.argmax(p, -1).astype(labels.dtype))
        return predicted, labels, p.shape[-1]
    if not _countable(p):
        raise TypeError(f"{name} got {p.dtype} predictions: pass floating scores, or classes as integers")
    if jnp.issubdtype(t.dtype, jnp.floating) and t.ndim == p.ndim + 1:
        check_same_shape(name, p, t[..., 0])
        return as_labels(p), jnp.argmax(t, -1).astype(as_labels(p).dtype), t.shape[-1]
    if not _countable(t):
        raise TypeError(
            f"{name} got {t.dtype} targets; labels must be integers: write targets.astype(jnp.int32)"
        )
    check_same_shape(name, p, t)
    p, t = as_labels(p), as_labels(t)
    wider = max(p.dtype, t.dtype, key=lambda dtype: dtype.itemsize)
    return p.astype(wider), t.astype(wider), None


def _countable(x: Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.integer) or x.dtype == jnp.bool_


def kept(name: str, mask: Any, shape: tuple[int, ...]) -> Array:
    """The mask as bools of ``shape``; all True for None."""
    if mask is None:
        return jnp.ones(shape, bool)
    mask = jnp.asarray(mask)
    if mask.shape != shape[: mask.ndim]:
        raise ValueError(
            f"{name} got a mask of shape {mask.shape} for values of shape {shape}: "
            "pass one entry for each example"
        )
    mask = mask.astype(bool).reshape(mask.shape + (1,) * (len(shape) - mask.ndim))
    return jnp.broadcast_to(mask, shape)
