"""k-fold cross-validation inside a training function: the parts of a fold whose number is traced."""

from __future__ import annotations

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, Key

from nnkit.checks import check_key
from nnkit.types import Array, PyTree

__all__ = ["fold_of"]


def fold_of(
    data: PyTree,
    fold: int | Int[Array, ""],
    folds: int,
    *,
    key: Key[Array, ""] | None = None,
    seed: int | None = None,
    labels: Int[Array, " n"] | None = None,
) -> tuple[PyTree, PyTree]:
    """The training and the validation part of one of ``folds`` folds; which one may be traced.

    All folds have the same shapes, so that they are members of one program. Of n examples
    m = n // folds are in each validation part, and n - m in the training part. Every example is in
    exactly one validation part, but for the n % folds that are left over: those are in every training
    part. Within a part the order of the data is kept.

    With ``labels`` the folds are stratified. What is left over is spread over the classes in proportion
    (at most ceil((n % folds) * n_c / n) of a class of n_c), and of the rest of each class every validation
    part has the floor or the ceiling of an equal share.

    A part is a copy: of k folds that are mapped together, each holds one of its own. Of data that are too
    large for that take ``fold_of(jnp.arange(n), ...)``, whose parts are indices.

    Args:
      data: arrays with one leading axis n, in any pytree, or a dataset.
      fold: from 0 to folds - 1. A traced one out of range is taken for the nearest.
      folds: how many, at least 2; static.
      key: what the split is a function of: ``train_fn``'s own key gives each seed a split of its own, which
        repeats the cross-validation (M. Stone 1974, "Cross-validatory choice and assessment").
      seed: instead of ``key``, a number: one split for all seeds.
      labels: one class number for each example.

    Raises:
      ValueError: fewer than 2 folds or more than examples, a fold out of range, arrays of several lengths,
        labels of another length, or a negative seed.
      TypeError: neither or both of ``key`` and ``seed``; labels that are no integers.

    >>> x = jnp.arange(10)
    >>> training, held_out = search.fold_of(x, 0, 5, seed=0)
    >>> training.shape, held_out.shape
    ((8,), (2,))
    >>> held_out = jax.vmap(lambda fold: search.fold_of(x, fold, 5, seed=0)[1])(jnp.arange(5))
    >>> sorted(held_out.ravel().tolist())
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    arrays = getattr(data, "arrays", data)
    n, folds = _length(arrays), operator.index(folds)
    if not 2 <= folds <= n:
        raise ValueError(f"fold_of needs from 2 folds to as many as there are examples ({n}), got {folds}")
    fold = _checked_fold(fold, folds)
    key, labels = _checked_key(key, seed), _checked_labels(labels, n)
    training, held_out = _indices(key, fold, labels, n=n, folds=folds)
    return _taken(arrays, training), _taken(arrays, held_out)


@functools.partial(jax.jit, static_argnames=("n", "folds"))
def _indices(key: Array, fold: Array, labels: Array | None, *, n: int, folds: int) -> tuple[Array, Array]:
    """The sorted indices of the training and of the validation part."""
    fold = jnp.clip(fold, 0, folds - 1)
    bits = jax.random.bits(jax.random.fold_in(key, _FOLDS), (n,), jnp.uint32)
    # By class and within a class at random, the ties of 32 random bits by index.
    keys = (bits,) if labels is None else (labels, bits)
    order = jax.lax.sort((*keys, jax.lax.iota(jnp.int32, n)), num_keys=len(keys), is_stable=True)[-1]
    left = (np.arange(n % folds) * n // max(n % folds, 1)).astype(np.int32)
    # Dealt in turn, as cards are: neighbours in the order, which are of one class, go to different folds.
    dealt = np.delete(np.arange(n, dtype=np.int32), left).reshape(-1, folds)
    held_out = jnp.take(dealt, fold, axis=1)
    others = (fold + jnp.arange(1, folds, dtype=jnp.int32)) % folds
    training = jnp.concatenate([jnp.take(dealt, others, axis=1).ravel(), jnp.asarray(left)])
    return jnp.sort(order[training]), jnp.sort(order[held_out])


# A trainer folds step numbers, 0 <= step < 2**31, into its key, and an epoch's order is of 2**32 - 1: what
# train_fn's key is used for here is none of these.
_FOLDS = 0xFFFFFFF0


def _length(arrays: PyTree) -> int:
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(arrays)]
    lengths = {shape[0] if shape else None for shape in shapes}
    if len(lengths) != 1 or None in lengths:
        raise ValueError(f"fold_of needs arrays with one leading axis, got the shapes {shapes}")
    return shapes[0][0]


def _checked_fold(fold: Any, folds: int) -> Array:
    if not isinstance(fold, jax.Array):
        fold = operator.index(fold)
        if not 0 <= fold < folds:
            raise ValueError(f"fold is {fold} and must be from 0 to {folds - 1}, the last of {folds} folds")
    return jnp.asarray(fold, jnp.int32)


def _checked_key(key: Any, seed: Any) -> Array:
    if (key is None) == (seed is None):
        raise TypeError(
            f"fold_of needs a key or a seed, and got {'neither' if key is None else 'both'}: pass seed=0 for "
            "one split that all seeds share, or key=key for one of each seed's own"
        )
    if key is not None:
        check_key(key, "fold_of")
        return key
    if operator.index(seed) < 0:
        raise ValueError(f"fold_of(seed={seed}) needs a number from 0 on")
    return jax.random.key(seed)


def _checked_labels(labels: Any, n: int) -> Array | None:
    if labels is None:
        return None
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer) and labels.dtype != bool:
        raise TypeError(f"labels must be class numbers, got {labels.dtype}: leave them out for a regression")
    if labels.shape != (n,):
        raise ValueError(
            f"labels must be one number for each of the {n} examples, got the shape {labels.shape}"
        )
    return labels


def _taken(arrays: PyTree, indices: Array) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[indices], arrays)
