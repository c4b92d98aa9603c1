"""Trees of numbers for tests: casting, perturbing, random and rough ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnkit.types import PyTree

__all__ = [
    "batch_of",
    "cast",
    "is_float",
    "map_floats",
    "noise",
    "off_ties",
    "random_tree",
    "rough_gradients",
    "same_batch",
    "size_of",
    "smooth_gradients",
    "specs_of",
    "stack",
    "sum_of_sines",
    "tree_of",
]


def is_float(leaf: Any) -> bool:
    """Whether a leaf is a floating array; integers, bools and keys are left as they are everywhere."""
    return jnp.issubdtype(getattr(leaf, "dtype", np.dtype(bool)), jnp.floating)


def map_floats(f: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """``jax.tree.map`` over the floating leaves only.

    >>> from nnkit.testing.trees import map_floats
    >>> map_floats(lambda a: a + 1, (jnp.zeros(2), jnp.arange(2)))
    (Array([1., 1.], dtype=float32), Array([0, 1], dtype=int32))
    """
    return jax.tree.map(lambda leaf, *more: f(leaf, *more) if is_float(leaf) else leaf, tree, *rest)


def cast(tree: PyTree, dtype: Any) -> PyTree:
    """The floating leaves in another dtype, made anew (float64 only under ``jax.enable_x64``)."""
    return map_floats(lambda a: jnp.asarray(np.asarray(a), dtype), tree)


def specs_of(tree: PyTree) -> PyTree:
    """The tree with a ``jax.ShapeDtypeStruct`` for each array."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(jnp.shape(a), a.dtype), tree)


def noise(tree: PyTree, seed: int, scale: float = 1.0) -> PyTree:
    """Normal numbers like the floating leaves, zeros like the others; drawn by numpy in float64."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda a: (
            jnp.asarray(rng.normal(size=jnp.shape(a)) * scale * is_float(a), a.dtype)
            if is_float(a) or jnp.issubdtype(a.dtype, jnp.number)
            else a
        ),
        tree,
    )


def size_of(leaf: Any) -> float:
    """How large a leaf's numbers are, in steps that matter to a difference: 1 unless very large or small."""
    sizes = np.abs(np.asarray(leaf, np.float64)).reshape(-1)
    sizes = sizes[(sizes > 0) & (sizes < 1e8)]  # a mask's -1e9 is no size
    largest, median = (float(f(sizes)) if sizes.size else 1.0 for f in (np.max, np.median))
    return largest if largest < 0.01 else median if median > 100 else 1.0


def off_ties(tree: PyTree, seed: int) -> PyTree:
    """Leaves with a 0 or with equal numbers moved off them: relu has no slope at 0, a maximum none at a tie."""

    def move(a: Any, d: Any) -> Any:
        numbers = np.asarray(a, np.float64)
        tied = (numbers == 0).any() or np.unique(numbers).size < numbers.size
        return a + 0.1 * size_of(a) * d if tied else a

    return map_floats(move, tree, noise(tree, seed))


def sum_of_sines(tree: PyTree, sizes: PyTree = None) -> jax.Array:
    """A scalar on which every floating leaf has an influence, and not through its sum alone.

    Args:
      tree: the leaves.
      sizes: a tree of the same form whose leaves' sizes these are divided by.
    """
    by = jax.tree.leaves(tree if sizes is None else sizes)
    pairs = [(a, b) for a, b in zip(jax.tree.leaves(tree), by, strict=True) if is_float(a)]
    terms = [jnp.sum(jnp.sin((a if sizes is None else a / size_of(b)) + 0.3)) for a, b in pairs]
    return sum(terms, jnp.zeros((), terms[0].dtype)) if terms else jnp.zeros(())


def stack(trees: list[PyTree]) -> PyTree:
    """Trees of one form as one, with a new leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def batch_of(tree: PyTree) -> int | None:
    """The length of the leading axis of the first leaf that has one."""
    return next((leaf.shape[0] for leaf in jax.tree.leaves(tree) if jnp.ndim(leaf)), None)


def same_batch(leaf: Any, batch: int | None) -> bool:
    """Whether the leaf's leading axis is the batch's."""
    return batch is not None and jnp.ndim(leaf) > 0 and leaf.shape[0] == batch


def tree_of(make: Callable[[int, tuple[int, ...]], Any]) -> PyTree:
    """A tree with nested, scalar, empty and None leaves; ``make(i, shape)`` gives the leaves.

    Several leaves matter: of a tree with one leaf XLA compiles optax's Adam with rounded reciprocals
    in place of divisions, up to 5 ulp from what it makes of optax's Adam on a larger tree.
    """
    return {
        "dense_0": {"kernel": make(0, (3, 67)), "bias": make(1, (129,))},
        "more": [make(2, ()), {"empty": make(3, (0, 4)), "none": None}],
    }


def random_tree(dtype: Any = jnp.float32, seed: int = 1) -> PyTree:
    """Normal numbers in the form of :func:`tree_of`: parameters to try an optimizer on."""
    rng = np.random.default_rng(seed)
    return tree_of(lambda i, shape: jnp.asarray(rng.normal(size=shape), dtype))


def rough_gradients(dtype: Any = jnp.float32, steps: int = 200, seed: int = 0) -> list[PyTree]:
    """Gradients over eight decades, with zeros, sparsity, sign flips, 1e-20 and 1e20 (where it fits)."""
    rng = np.random.default_rng(seed)
    huge, decades = (1e4, 2) if dtype == jnp.float16 else (1e20, 4)

    def make(step: int, i: int, shape: tuple[int, ...]) -> jax.Array:
        g = rng.normal(size=shape) * 10.0 ** rng.uniform(-decades, decades, size=shape)
        flat = np.asarray(g).reshape(-1)
        if i == 1:
            flat[:20] = 0.0
            flat[20:40] = 1e-20
            flat[40:60] = huge
            flat[60:80] = 3.0 * (-1) ** step
            flat[80:100] *= rng.random(20) < 0.1
            flat[100:120] = 1e-3 if step < 50 else 0.0
        return jnp.asarray(flat.reshape(shape), dtype)

    return [tree_of(lambda i, shape, step=step: make(step, i, shape)) for step in range(steps)]


def smooth_gradients(dtype: Any = jnp.float32, steps: int = 200, seed: int = 0) -> list[PyTree]:
    """Gradients of one size, some of which keep their sign and some not."""
    rng = np.random.default_rng(seed)
    return [tree_of(lambda i, shape: jnp.asarray(rng.normal(size=shape) + i, dtype)) for _ in range(steps)]
