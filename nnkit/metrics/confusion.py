"""The confusion matrix, and the scores made of it."""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nnkit.metrics.inputs import Mask, classes_and_labels, kept

__all__ = ["confusion_matrix", "f1", "precision", "recall"]

Average = Literal["macro", "micro", "weighted"]


def confusion_matrix(
    predictions: Float[Array, "*batch classes"] | Int[Array, "*batch"],
    targets: Int[Array, "*batch"] | Float[Array, "*batch classes"],
    num_classes: int | None = None,
    *,
    mask: Mask | None = None,
) -> Int[Array, "classes classes"]:
    """Counts of (true class, predicted class): rows are true, columns predicted, as scikit-learn's.

    Counts of batches add up, and scores of their sum are exact whatever the batches' sizes. Left out
    are masked examples, labels that are no class, and rows of scores with NaN; so the sum of the
    matrix falls short of the number of examples if there were any.

    Args:
      predictions: scores, or predicted classes (integers of the labels' shape).
      targets: integer labels or one-hot rows.
      num_classes: C; needed where neither scores nor one-hot rows show it.
      mask: what is not 0 counts.

    >>> print(confusion_matrix(jnp.array([0, 1, 1]), jnp.array([0, 0, 1]), num_classes=2))
    [[1 1]
     [0 1]]
    """
    predicted, labels, classes = classes_and_labels("confusion_matrix", predictions, targets)
    if classes is None:
        classes = num_classes
    if classes is None:
        raise ValueError("confusion_matrix got classes for predictions: pass num_classes=")
    if num_classes not in (None, classes):
        raise ValueError(
            f"confusion_matrix got num_classes={num_classes} and predictions for {classes} classes"
        )
    valid = (labels >= 0) & (labels < classes) & (predicted >= 0) & (predicted < classes)
    valid &= kept("confusion_matrix", mask, labels.shape)
    cell = jnp.where(valid, labels * classes + predicted, classes * classes)
    counts = jnp.zeros(classes * classes, jnp.int32).at[cell.ravel()].add(1, mode="drop")
    return counts.reshape(classes, classes)


def precision(
    confusion: Int[Array, "classes classes"], *, average: Average | None = "macro"
) -> Float[Array, ""] | Float[Array, " classes"]:
    """Of those predicted as a class, the part that belongs to it; 0/0 is 0.

    Args:
      confusion: counts, rows true, columns predicted: a sum of :func:`confusion_matrix`.
      average: "macro", the plain mean over classes; "weighted", by the classes' true counts;
        "micro", over all examples, which is the accuracy; None, one number for each class. As in
        scikit-learn with ``labels=range(C), zero_division=0``: a class that never occurs is a 0 in
        the macro mean.

    >>> print(precision(jnp.array([[3, 1], [0, 0]]), average=None))
    [1. 0.]
    """
    hits, _, predicted = _counts("precision", confusion)
    return _average("precision", hits, predicted, confusion, average)


def recall(
    confusion: Int[Array, "classes classes"], *, average: Average | None = "macro"
) -> Float[Array, ""] | Float[Array, " classes"]:
    """Of those that belong to a class, the part predicted as it; as :func:`precision`.

    >>> print(recall(jnp.array([[3, 1], [0, 0]]), average=None))
    [0.75 0.  ]
    """
    hits, true, _ = _counts("recall", confusion)
    return _average("recall", hits, true, confusion, average)


def f1(
    confusion: Int[Array, "classes classes"], *, average: Average | None = "macro"
) -> Float[Array, ""] | Float[Array, " classes"]:
    """The harmonic mean of precision and recall, 2 hits / (true + predicted); as :func:`precision`.

    >>> print(f1(jnp.array([[3, 1], [1, 0]]), average=None))
    [0.75 0.  ]
    """
    hits, true, predicted = _counts("f1", confusion)
    return _average("f1", 2 * hits, true + predicted, confusion, average)


def _counts(name: str, confusion: Any) -> tuple[Array, Array, Array]:
    """Per class: how many were hit, how many there are, how many were predicted."""
    shape = jnp.shape(confusion)
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(
            f"{name} takes a confusion matrix (classes, classes), got shape {shape}: "
            "pass confusion_matrix(predictions, targets)"
        )
    counts = jnp.asarray(confusion)
    return jnp.diagonal(counts), jnp.sum(counts, 1), jnp.sum(counts, 0)


def _average(name: str, over: Array, under: Array, confusion: Any, average: str | None) -> Array:
    if average == "micro":
        return _ratio(jnp.sum(over), jnp.sum(under))
    each = _ratio(over, under)
    if average is None:
        return each
    if average == "macro":
        return jnp.mean(each)
    if average == "weighted":
        true = jnp.sum(jnp.asarray(confusion), 1)
        return jnp.sum(each * _ratio(true, jnp.sum(true)))
    raise ValueError(f"{name} got average={average!r}: pass 'macro', 'micro', 'weighted' or None")


def _ratio(over: Array, under: Array) -> Array:
    over, under = over.astype(jnp.float32), under.astype(jnp.float32)
    return jnp.where(under == 0, 0, over / jnp.where(under == 0, 1, under))
