"""What the losses and metrics take in: dtypes and shapes, looked at while tracing.

Nothing here looks at values, except that of labels which are at hand outside of compiled code.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from nnkit import checks

__all__ = [
    "as_float",
    "as_labels",
    "check_classes",
    "check_label_range",
    "check_positive",
    "check_same_shape",
    "first_bad",
    "mean_over_examples",
    "one_hot",
]


def as_float(x: Any, what: str) -> jax.Array:
    """``x`` as a floating array of at least 32 bits; half precision is too coarse to sum in."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{what} must be floating, got {x.dtype}: write {what}.astype(jnp.float32)")
    return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x


def as_labels(labels: Any) -> jax.Array:
    """Integer labels wide enough for any class number and for a negative ``ignore_label``."""
    labels = jnp.asarray(labels)
    return labels if labels.dtype == jnp.int64 else labels.astype(jnp.int32)


def one_hot(labels: jax.Array, classes: int) -> jax.Array:
    """Bools of shape (..., classes); a label out of range gives a row of False."""
    shape = (*labels.shape, classes)
    return labels[..., None] == jax.lax.broadcasted_iota(labels.dtype, shape, labels.ndim)


def check_same_shape(name: str, predictions: Any, targets: Any) -> None:
    """Raises unless the shapes are equal, saying what to write where one axis of size 1 is too many."""
    p, t = jnp.shape(predictions), jnp.shape(targets)
    if p == t:
        return
    said = f"{name} got predictions of shape {p} and targets of shape {t}; the shapes must be equal"
    if p == (*t, 1):
        raise ValueError(f"{said}: write {_last(p, 'predictions', '0')} or {_last(p, 'targets', 'None')}")
    if t == (*p, 1):
        raise ValueError(f"{said}: write {_last(t, 'predictions', 'None')} or {_last(t, 'targets', '0')}")
    if p[:1] != t[:1] and p[1:] == t[1:]:
        raise ValueError(f"{said}: the batch sizes differ, take both from the same rows")
    raise ValueError(f"{said}: reshape one of them")


def _last(shape: tuple[int, ...], array: str, index: str) -> str:
    return f"{array}[{':' if len(shape) == 2 else '...'}, {index}]"


def mean_over_examples(name: str, values: jax.Array, reduce: str = "mean") -> jax.Array:
    """(batch, ...) to (batch,): the mean or the sum of each example's values."""
    if values.ndim == 0:
        raise ValueError(
            f"{name} gives one value for each example and got scalars, without a batch axis: "
            "write predictions[None] and targets[None]"
        )
    if 0 in values.shape[1:]:
        raise ValueError(f"{name} got predictions of shape {values.shape}: an example with no values")
    if reduce not in ("mean", "sum"):
        raise ValueError(f"{name} got reduce={reduce!r}: pass 'mean' or 'sum'")
    axes = tuple(range(1, values.ndim))
    return jnp.mean(values, axes) if reduce == "mean" else jnp.sum(values, axes)


def check_classes(name: str, scores: Any, targets: Any, *, soft: bool = True) -> bool:
    """Whether ``targets`` are integer labels (True) or distributions (False); raises if they fit neither.

    Args:
      name: the function on whose behalf this is asked; begins every message.
      scores: array of shape (..., classes).
      targets: integers of shape (...), or, where ``soft``, floats of shape (..., classes).
      soft: whether distributions are taken at all.
    """
    z, t, dtype = jnp.shape(scores), jnp.shape(targets), jnp.result_type(targets)
    if not z:
        raise ValueError(f"{name} got a scalar for predictions: it needs shape (..., classes)")
    got = f"{name} got predictions of shape {z} and {dtype} targets of shape {t}"
    integers = jnp.issubdtype(dtype, jnp.integer)
    if z[-1] < 2 or (len(z) == 1 and t == z and integers):
        raise ValueError(
            f"{got}; classes belong on the last axis. One output for each example answers yes or no: "
            "use binary_cross_entropy_with_logits, or (predictions > 0).astype(jnp.int32) in a metric"
        )
    if integers:
        if t == z[:-1]:
            return True
        raise ValueError(f"{got}; integer labels need shape {z[:-1]}: {_label_hint(z, t, soft)}")
    if jnp.issubdtype(dtype, jnp.floating) and soft:
        if t == z:
            return False
        if t == z[:-1]:
            raise TypeError(f"{got}; labels must be integers: write targets.astype(jnp.int32)")
        raise ValueError(f"{got}; probabilities need the predictions' shape, integer labels {z[:-1]}")
    if not soft and t == z:
        raise TypeError(f"{got}; it takes integer labels: write jnp.argmax(targets, -1)")
    wanted = "integer labels or floating probabilities" if soft else "integer labels"
    cast = "float32" if t == z else "int32"
    raise TypeError(f"{got}; it takes {wanted}: write targets.astype(jnp.{cast})")


def _label_hint(z: tuple[int, ...], t: tuple[int, ...], soft: bool) -> str:
    if t == z:
        return "write targets.astype(jnp.float32)" if soft else "write jnp.argmax(targets, -1)"
    if t == (*z[:-1], 1):
        return f"write {_last(t, 'targets', '0')}"
    for axis in range(len(z) - 1):
        if t == z[:axis] + z[axis + 1 :]:
            return f"the class axis must come last, write jnp.moveaxis(predictions, {axis}, -1)"
    if t[1:] == z[1:-1] and t[:1] != z[:1]:
        return "the batch sizes differ, take both from the same rows"
    return "one label for each row of predictions"


def check_label_range(name: str, labels: Any, classes: int, ignore_label: int | None = None) -> None:
    """Raises for a label outside 0..classes-1, if the values are at hand; a traced array passes."""
    if isinstance(labels, Tracer):
        return
    if isinstance(labels, jax.Array) and not labels.is_fully_addressable:
        return  # values that lie with another process
    labels = np.asarray(labels)
    bad = (labels < 0) | (labels >= classes)
    if ignore_label is not None:
        bad &= labels != ignore_label
    if bad.any():
        where = first_bad(labels, bad)
        but = "" if ignore_label is None else f" (or ignore_label={ignore_label})"
        raise ValueError(
            f"{name}: label {where}, and {classes} classes have labels 0..{classes - 1}{but}: "
            "renumber the labels, or pass ignore_label= for those that stand for 'no label'"
        )


def first_bad(targets: np.ndarray, bad: np.ndarray) -> str:
    """``targets[17] is 10 (3 of 100 are so)`` for the first place where ``bad`` is true."""
    index = tuple(int(i) for i in np.unravel_index(np.argmax(bad), bad.shape))
    at = f"targets[{', '.join(map(str, index))}]" if index else "targets"
    return f"{at} is {targets[index]!s} ({np.count_nonzero(bad)} of {bad.size} are out of place)"


def check_positive(name: str, argument: str, value: Any, *, zero: bool = False) -> None:
    """Raises unless ``value`` is positive and finite, or traced; ``zero`` allows 0 too."""
    if checks.is_static_number(value) and not (0 < value < np.inf or (zero and value == 0)):
        least = "at least 0" if zero else "positive"
        raise ValueError(f"{name} got {argument}={value}: it must be {least} and finite")
