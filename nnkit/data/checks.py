"""What users get wrong about data, found on the host before any work starts.

Inside compiled code the same mistakes are silent: a label out of range is NaN or wraps around, NaN
wins every argmax, and an unscaled image merely trains badly.
"""

from __future__ import annotations

import operator
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, Shaped

from nnkit.data.dataset import chunks
from nnkit.tree import flatten
from nnkit.types import PyTree

__all__ = ["check_batch_size", "check_data"]


def check_data(
    x: PyTree,
    y: PyTree | None = None,
    *,
    num_classes: int | None = None,
    ignored_label: int | None = None,
    name: str = "data",
) -> None:
    """Raises unless the arrays can be trained on; warns of what is legal and rarely meant.

    One pass over the arrays in pieces, about 0.1 s for a gigabyte, and no copy of them.

    Args:
      x: the inputs, an array or a pytree of arrays (n, ...).
      y: the labels or targets, likewise; ``None`` if there are none.
      num_classes: give it where ``y`` are labels of that many classes: then they must be integers in
        [0, num_classes), or probabilities (n, ..., num_classes).
      ignored_label: a label that the loss leaves out and that may be out of range.
      name: what to call the data in the messages.

    Raises:
      TypeError: something that is no array, or an array of objects or strings.
      ValueError: no examples; arrays of different length; NaN or Inf; float labels, or labels out of
        range; integers that JAX would wrap around or numbers it would make infinite, since it
        keeps 32 bits unless ``jax_enable_x64`` is set.

    Warns:
      UserWarning: images of 0..255, which train badly unscaled; float64, which becomes float32.

    >>> check_data(np.zeros((3, 2), np.float32), np.array([0, 2, 1]), num_classes=2)
    Traceback (most recent call last):
    ...
    ValueError: data.y holds the label 2 at index 1: with num_classes=2 the labels are 0 to 1
    """
    leaves = [(f"{name}.x/{path}" if path else f"{name}.x", leaf) for path, leaf in flatten(x).items()]
    labels = [(f"{name}.y/{path}" if path else f"{name}.y", leaf) for path, leaf in flatten(y).items()]
    if not leaves:
        raise ValueError(f"{name}.x has no arrays in it: {x!r}")
    for where, array in leaves + labels:
        _check_is_array(array, where)
    _check_lengths(leaves + labels)
    for where, array in leaves + labels:
        _check_values(np.asarray(array), where)
    if num_classes is not None:
        for where, array in labels:
            _check_labels(np.asarray(array), where, num_classes, ignored_label)
    for where, array in leaves:
        _warn_if_unscaled(np.asarray(array), where)


def check_batch_size(batch_size: Any, n: int) -> None:
    """Raises unless ``batch_size`` is an integer from 1 to ``n``, the number of examples.

    >>> check_batch_size(128, 100)
    Traceback (most recent call last):
    ...
    ValueError: batch_size is 128 and there are 100 examples: a batch cannot be larger than the data
    """
    try:
        size = operator.index(batch_size)
    except TypeError:
        size = None
    if size is None or isinstance(batch_size, bool):
        raise TypeError(f"batch_size must be an integer, got {batch_size!r}")
    if size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {size}")
    if size > n:
        raise ValueError(
            f"batch_size is {size} and there are {n} examples: a batch cannot be larger than the data"
        )


def _check_is_array(array: Any, where: str) -> None:
    dtype = getattr(array, "dtype", None)
    if dtype is None or not hasattr(array, "shape"):
        raise TypeError(
            f"{where} is of type {type(array).__name__} and must be an array: pass np.asarray(...)"
        )
    if not (jnp.issubdtype(dtype, np.number) or jnp.issubdtype(dtype, np.bool_)):
        if np.dtype(dtype).kind in "US":
            hint = "number the classes with np.unique(labels, return_inverse=True)"
        else:
            hint = "it must hold numbers, and all examples must have one shape"
        raise TypeError(f"{where} has dtype {dtype}: {hint}")


def _check_lengths(arrays: list[tuple[str, Any]]) -> None:
    first, reference = arrays[0]
    for where, array in arrays:
        if array.ndim == 0:
            raise ValueError(f"{where} is a single number and must be an array with a first axis of examples")
        if array.size == 0:
            raise ValueError(f"{where} is empty, its shape is {array.shape}")
        if array.shape[0] != reference.shape[0]:
            raise ValueError(
                f"{first} has {reference.shape[0]} examples and {where} has {array.shape[0]}: "
                "every array needs one entry for each example"
            )


def _check_values(array: np.ndarray, where: str) -> None:
    if jnp.issubdtype(array.dtype, np.inexact):
        _check_finite(array, where)
    # What JAX will keep of it: 32 bits, unless 64 are enabled.
    kept = jax.dtypes.canonicalize_dtype(array.dtype)
    if kept == array.dtype:
        return
    limits = np.iinfo(kept) if np.issubdtype(kept, np.integer) else np.finfo(kept)
    for _, block in chunks(array):
        parts = (np.real(block), np.imag(block)) if np.iscomplexobj(block) else (block,)
        low, high = min(part.min() for part in parts), max(part.max() for part in parts)
        if low < limits.min or high > limits.max:
            raise ValueError(
                f"{where} is {array.dtype} with values from {low} to {high}, which {kept} cannot hold: "
                "rescale it or renumber it, or enable 64 bits with jax.config.update('jax_enable_x64', True)"
            )
    if jnp.issubdtype(array.dtype, np.inexact):
        warnings.warn(
            f"{where} is {array.dtype} and JAX will make it {kept}: pass it as .astype(np.{kept})",
            stacklevel=3,
        )


def _check_finite(array: np.ndarray, where: str) -> None:
    count = 0
    first: tuple[int, ...] = ()
    for part, block in chunks(array):
        finite = np.isfinite(block)
        if not finite.all():
            bad = np.argwhere(~finite)
            first = first or (part.start + int(bad[0, 0]), *bad[0, 1:].tolist())
            count += len(bad)
    if count:
        raise ValueError(
            f"{where} holds NaN or Inf in {count} of {array.size} places, the first {array[first]} at index "
            f"{_index(first)}: drop or fill those examples"
        )


def _check_labels(
    labels: Int[np.ndarray, "n ..."], where: str, num_classes: int, ignored_label: int | None
) -> None:
    if not np.issubdtype(labels.dtype, np.integer):
        if labels.ndim > 1 and labels.shape[-1] == num_classes:
            _check_probabilities(labels, where)
            return
        raise ValueError(f"{where} is {labels.dtype} and labels are integers: pass y.astype(np.int32)")
    wrong = (labels < 0) | (labels >= num_classes)
    if ignored_label is not None:
        wrong &= labels != ignored_label
    if wrong.any():
        first = tuple(np.argwhere(wrong)[0].tolist())
        raise ValueError(
            f"{where} holds the label {labels[first]} at index {_index(first)}: "
            f"with num_classes={num_classes} the labels are 0 to {num_classes - 1}"
        )


def _check_probabilities(y: Shaped[np.ndarray, "n classes"], where: str) -> None:
    low, high = float(y.min()), float(y.max())
    if low < 0 or high > 1:
        raise ValueError(
            f"{where} of shape {y.shape} are taken for probabilities of classes and go from {low:g} to {high:g}: "
            "pass integer labels, or numbers in [0, 1]"
        )


def _warn_if_unscaled(array: np.ndarray, where: str) -> None:
    if array.ndim < 2 or not _looks_unscaled(array):
        return
    warnings.warn(
        f"{where} is unscaled, {array.dtype} of up to {array.max():g}: call data.standardize(splits) or "
        "data.rescale(splits) first",
        stacklevel=3,
    )


def _looks_unscaled(array: np.ndarray) -> bool:
    """Whether these are an image's bytes, as bytes or already as floats."""
    if array.dtype == np.uint8:
        return any(block.max() > 1 for _, block in chunks(array))
    if not np.issubdtype(array.dtype, np.floating):
        return False
    # Whole numbers up to 255 and well beyond 1 in the first examples; scaled ones are fractions there.
    some = np.asarray(array[:256])
    return bool(some.min() >= 0 and 128 <= some.max() <= 255 and (some == np.rint(some)).all())


def _index(place: tuple[int, ...]) -> str:
    return str(place[0] if len(place) == 1 else place)
