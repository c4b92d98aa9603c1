"""Pytrees seen by path: names, norms, counts and masks.

Everything that tells one parameter from another goes by its path (``dense_0/kernel``), never by
the number of its axes: in a stacked population of networks a bias has one axis more.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nnkit.packing import unpack
from nnkit.types import PyTree

__all__ = [
    "NOT_DECAYED",
    "count",
    "decayed",
    "flatten",
    "global_norm",
    "map_with_path",
    "mask",
    "nbytes",
    "path_str",
]

NOT_DECAYED = frozenset({"bias", "scale", "slope"})
"""Last names of parameters that weight decay and penalties leave alone unless asked."""


def path_str(path: tuple[Any, ...]) -> str:
    """A key path of ``jax.tree_util`` as ``a/b/0``.

    >>> [path_str(p) for p, _ in jax.tree_util.tree_leaves_with_path({"a": {"b": [1, 2]}})]
    ['a/b/0', 'a/b/1']
    """
    return "/".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)


def flatten(tree: PyTree) -> dict[str, Any]:
    """The leaves of ``tree`` by path, in the tree's order.

    >>> flatten({"dense_0": {"kernel": 1, "bias": 2}})
    {'dense_0/bias': 2, 'dense_0/kernel': 1}
    """
    leaves = jax.tree_util.tree_leaves_with_path(unpack(tree))
    flat = {path_str(path): leaf for path, leaf in leaves}
    if len(flat) < len(leaves):
        paths = [path_str(path) for path, _ in leaves]
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(f"two leaves of the tree have the path {twice!r}: use names without '/'")
    return flat


def map_with_path(f: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """``jax.tree.map`` whose function gets the path as a string first.

    >>> map_with_path(lambda path, x: f"{path}={x}", {"a": {"b": 1}})
    {'a': {'b': 'a/b=1'}}
    """
    whole, *more = map(unpack, (tree, *rest))
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: f(path_str(path), *leaves), whole, *more)


def mask(tree: PyTree, where: str | Callable[[str], bool]) -> PyTree:
    """A tree of bools shaped like ``tree``: which leaves ``where`` selects by their path.

    Args:
      tree: any pytree.
      where: a regular expression that must match the whole path, or a predicate of the path.

    >>> mask({"dense_0": {"kernel": 1, "bias": 2}}, r".*/kernel")
    {'dense_0': {'bias': False, 'kernel': True}}
    """
    if isinstance(where, str):
        pattern = re.compile(where)
        return map_with_path(lambda path, _: pattern.fullmatch(path) is not None, tree)
    return map_with_path(lambda path, _: bool(where(path)), tree)


def decayed(tree: PyTree) -> PyTree:
    """The default mask of weight decay and penalties: all but biases, scales and slopes.

    >>> decayed({"dense_0": {"kernel": 1, "bias": 2}, "batch_norm_0": {"scale": 3, "bias": 4}})
    {'batch_norm_0': {'bias': False, 'scale': False}, 'dense_0': {'bias': False, 'kernel': True}}
    """
    return mask(tree, lambda path: path.rsplit("/", 1)[-1] not in NOT_DECAYED)


def count(tree: PyTree) -> int:
    """How many numbers the leaves hold together.

    >>> count({"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(4)})
    16
    """
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def nbytes(tree: PyTree) -> int:
    """How many bytes the leaves take.

    >>> nbytes({"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(4)})
    64
    """
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def global_norm(tree: PyTree) -> Float[Array, ""]:
    """The Euclidean norm of all leaves taken as one vector, sqrt(sum of |x|²).

    It has the leaves' dtype; half precision is summed in float32. Its derivative at 0 is 0, not NaN.

    >>> float(global_norm({"a": jnp.array([3.0]), "b": jnp.array([4.0])}))
    5.0
    """
    leaves = jax.tree.leaves(tree)
    with jax.numpy_dtype_promotion("standard"):  # leaves may differ in dtype
        dtype = jnp.zeros([], jnp.result_type(*leaves)).real.dtype if leaves else jnp.float32
        return root([sum_of_squares(x) for x in leaves]).astype(dtype)


def wide(dtype: Any) -> Any:
    """The dtype to sum in: float32 for the half precisions."""
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype


def sum_of_squares(x: Any, axis: Any = None, keepdims: bool = False) -> Array:
    """The sum of |x|² over the axes, in the dtype of :func:`wide`.

    >>> float(sum_of_squares(jnp.array([3.0, 4.0j])))
    25.0
    """
    x = jnp.asarray(x)
    x = x.astype(wide(x.dtype))
    squares = jnp.square(x.real) + jnp.square(x.imag) if jnp.iscomplexobj(x) else jnp.square(x)
    return jnp.sum(squares, axis=axis, keepdims=keepdims)


def root(sums: list[Array]) -> Array:
    """The root of the sum, with the derivative 0 where it is 0.

    >>> float(root([jnp.float32(9.0), jnp.float32(16.0)]))
    5.0
    """
    total = functools.reduce(jnp.add, sums) if sums else jnp.zeros([], jnp.float32)
    zero = total == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, total)))
