"""The one place where an optimizer walks over trees.

Every optimizer here is a function of one parameter's arrays, ``leaf(gradient, *states) ->
(update, *states)``. :func:`leafwise` maps it, and is where mismatched trees are found and named, and
where the many small leaves of a large tree are gone through as one buffer (:mod:`nnkit.packing`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from nnkit import packing, tree
from nnkit.types import PyTree

__all__ = ["abs_sq", "check_params", "check_state", "filled", "leafwise"]

NamedState = TypeVar("NamedState", bound=tuple[Any, ...])


def leafwise(
    where: str,
    leaf: Callable[..., tuple[Any, ...]],
    updates: dict[str, PyTree],
    reads: dict[str, PyTree] | None = None,
    states: dict[str, PyTree] | None = None,
    none: bool = False,
) -> tuple[Any, ...]:
    """Maps ``leaf(u, *reads, *states) -> (u, *states)`` over trees: ``(updates, *states)``.

    A None among the updates is a parameter without a gradient: it and its states stay as they are.

    Args:
      where: whose trees these are, to begin an error.
      leaf: the function of one parameter's arrays, elementwise in all of them. It may mix dtypes; its
        states come back in the dtypes that they had.
      updates: the tree that says which leaves there are, under the name that errors give it.
      reads: further trees by name, for the leaves' use; a None in them is passed on.
      states: the trees that come back changed, by name.
      none: whether ``leaf`` is to be called where the first tree has None too.

    Raises:
      ValueError: where a tree or a leaf's shape differs from the first tree's, naming the path.
      TypeError: for leaves that are not floating-point.

    >>> trees = {"updates": {"w": jnp.ones(2)}}, {}, {"sum": {"w": jnp.ones(2)}}
    >>> leafwise("here", lambda u, s: (-u, s + u), *trees)
    ({'w': Array([-1., -1.], dtype=float32)}, {'w': Array([2., 2.], dtype=float32)})
    """
    updates = {n: packing.unpack(u) for n, u in updates.items()}
    reads = {n: packing.unpack(r) for n, r in (reads or {}).items()}
    states = states or {}
    layouts = {s.layout for s in states.values() if isinstance(s, packing.Packed)}
    if not layouts:
        return _by_leaf(where, leaf, updates, reads, states, none)
    layout, [(name, tree_of_updates)] = layouts.pop(), updates.items()
    together = not layouts and all(isinstance(s, packing.Packed) for s in states.values())
    if together and not reads and packing.fits(tree_of_updates, layout):
        parts = {n: s.parts for n, s in states.items()}
        inputs = {name: packing.pack(tree_of_updates, layout).parts}
        result, *new = _by_leaf(where, leaf, inputs, {}, parts, none)
        result = jax.lax.optimization_barrier(result)
        return packing.unpack(packing.Packed(result, layout)), *(packing.Packed(s, layout) for s in new)
    plain = {n: packing.unpack(s) for n, s in states.items()}
    result, *new = _by_leaf(where, leaf, updates, reads, plain, none)
    return result, *(packing.packed_like(s, old) for s, old in zip(new, states.values(), strict=True))


def _by_leaf(
    where: str,
    leaf: Callable[..., tuple[Any, ...]],
    updates: dict[str, PyTree],
    reads: dict[str, PyTree],
    states: dict[str, PyTree],
    none: bool,
) -> tuple[Any, ...]:
    """:func:`leafwise` over trees as they are."""
    [(first, tree_of_updates)] = updates.items()
    leaves, structure = jax.tree.flatten(tree_of_updates, is_leaf=_is_none)
    columns = [leaves]
    for name, other in (*reads.items(), *states.items()):
        try:
            columns.append(structure.flatten_up_to(other))
        except ValueError:
            raise _mismatch(where, first, tree_of_updates, name, other) from None
    results: list[tuple[Any, ...]] = []
    for row in zip(*columns, strict=True):
        if row[0] is None:
            results.append(leaf(*row) if none else (None, *row[1 + len(reads) :]))
            continue
        for x, (name, other) in zip(row, (*updates.items(), *reads.items(), *states.items()), strict=True):
            if x is None and name in reads:
                continue
            if not _same_shape(row[0], x):
                raise _mismatch(where, first, tree_of_updates, name, other)
            if not _is_inexact(x):
                raise _not_inexact(where, name, other)
        arrays: list[Any] = [x if x is None or isinstance(x, jax.Array) else jnp.asarray(x) for x in row]
        # Mixed dtypes (bfloat16 parameters, a float32 accumulator, a traced float32 rate) are meant
        # here and promote as in optax, also for those who forbid it in their own code.
        with jax.numpy_dtype_promotion("standard"):
            update, *new = leaf(*arrays)
        kept = [x.astype(old.dtype) for x, old in zip(new, arrays[1 + len(reads) :], strict=True)]
        results.append((update, *kept))
    return tuple(structure.unflatten([r[i] for r in results]) for i in range(1 + len(states)))


def abs_sq(x: Array) -> Array:
    """|x|², in the dtype of ``x`` for complex arrays too.

    >>> abs_sq(jnp.array([-3.0])).tolist(), abs_sq(jnp.array([3.0 + 4.0j])).tolist()
    ([9.0], [(25+0j)])
    """
    return (x.conj() * x).real.astype(x.dtype) if jnp.iscomplexobj(x) else x * x


def filled(params: PyTree, value: Any = 0.0, dtype: Any = None) -> PyTree:
    """A tree like ``params`` of the one ``value``; ``dtype`` is each parameter's own by default.

    Where ``params`` has many small leaves the result is :class:`nnkit.packing.Packed`.

    >>> filled({"w": jnp.ones(2, jnp.bfloat16)}, 0.5)
    {'w': Array([0.5, 0.5], dtype=bfloat16)}
    """
    layout = packing.plan(params)
    if layout is not None:
        params = packing.pack(params, layout)
    return jax.tree.map(lambda x: jnp.full_like(x, value, dtype=dtype), params)


def check_params(where: str, params: PyTree) -> None:
    """Raises TypeError unless every parameter is floating-point."""
    if not all(_is_inexact(x) for x in jax.tree.leaves(params)):
        raise _not_inexact(where, "params", params)


def check_state(where: str, state: Any, kind: type[NamedState]) -> NamedState:
    """``state``, or TypeError when it is another transformation's.

    What counts are the fields, so optax's state of the same name is welcome.
    """
    fields = getattr(kind, "_fields", ())
    if getattr(state, "_fields", None) != fields:
        raise TypeError(
            f"{where} got the state of another transformation: {type(state).__name__} in place of "
            f"{kind.__name__}({', '.join(fields)}); pass what this optimizer's own init or update returned"
        )
    return state


def _is_none(x: Any) -> bool:
    return x is None


def _is_inexact(x: Any) -> bool:
    dtype = getattr(x, "dtype", None)
    return isinstance(x, float | complex) if dtype is None else jnp.issubdtype(dtype, jnp.inexact)


def _same_shape(x: Any, y: Any) -> bool:
    return jax.tree.structure(y) == _LEAF and jnp.shape(x) == jnp.shape(y)


_LEAF = jax.tree.structure(0)


def _not_inexact(where: str, name: str, params: PyTree) -> TypeError:
    path, x = next((p, x) for p, x in tree.flatten(params).items() if not _is_inexact(x))
    kind = f"a value of type {type(x).__name__}"
    if hasattr(x, "dtype"):
        no_gradient = x.dtype == jax.dtypes.float0
        kind = "dtype float0 (the gradient of an integer)" if no_gradient else f"dtype {x.dtype}"
    return TypeError(
        f"{where}: {name} has {kind} at {path or 'the root'}: only floating-point parameters can be "
        "optimized, keep the rest out of the parameter tree"
    )


def _mismatch(where: str, first: str, updates: PyTree, name: str, other: PyTree) -> ValueError:
    """The error for two trees that should be of one form, at the first path where they are not."""
    left, right = _shapes(updates), _shapes(other)
    missing = [(first, p, name) for p in left if p not in right] + [
        (name, p, first) for p in right if p not in left
    ]
    unequal = [p for p in left if left[p] != right.get(p)]
    if missing:
        text = "{} has {}, which {} has not".format(*missing[0])
    elif unequal:
        path = unequal[0]
        text = f"{first} has {left[path]} at {path}, {name} has {right[path]}"
    else:
        text = (
            f"{first} and {name} hold the same paths in different containers, "
            f"{jax.tree.structure(updates)} and {jax.tree.structure(other)}"
        )
    return ValueError(f"{where}: {text}; gradients, optimizer state and parameters must be trees of one form")


def _shapes(params: PyTree) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_none)
    return {
        tree.path_str(path) or "the root": "None" if x is None else f"shape {jnp.shape(x)}"
        for path, x in leaves
    }
