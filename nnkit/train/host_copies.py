"""Copies of trees in host memory, which can be written to a file while the device computes on."""

from __future__ import annotations

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnkit.packing import Packed
from nnkit.train.saving import describe
from nnkit.tree import flatten, path_str
from nnkit.types import PyTree

__all__ = ["HostArray", "HostCopies"]


class HostArray:
    """A copy in host memory of a JAX array: ``save_tree`` writes it as the JAX array that it was."""

    def __init__(self, array: np.ndarray):
        self.array = array

    dtype = property(lambda self: self.array.dtype)
    shape = property(lambda self: self.array.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.array, dtype=dtype, copy=copy)


class HostCopies:
    """Makes copies of one tree after another in the same host memory.

    Memory that was just taken from the system costs a page fault for every 4 KiB, ten times as much as
    the copy itself, so the buffers are used again: a copy holds until the next is made.

    >>> copies = HostCopies()
    >>> x = jnp.arange(3.0)
    >>> copy = copies.copy({"x": x})
    >>> x.delete()
    >>> np.asarray(copy["x"])
    array([0., 1., 2.], dtype=float32)
    """

    def __init__(self) -> None:
        self._layout: Any = None
        self._buffers: list[np.ndarray | None] = []

    def copy(self, tree: PyTree, *, keep: bool = True) -> PyTree:
        """A copy of ``tree`` that no computation touches, with its packed parts taken apart.

        Arrays that are spread over several processes are gathered, for which each process has to make
        the same call; one that will not use the result passes ``keep=False`` and gets None.

        Raises:
          ValueError, TypeError: a leaf was donated, or cannot be saved.
        """
        leaves, structure = jax.tree.flatten(tree)
        if any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in leaves):
            raise _donated(tree)
        whole = _gathered([_data(leaf) for leaf in leaves])
        if not keep:
            return None
        for leaf in whole:
            if isinstance(leaf, jax.Array):
                leaf.copy_to_host_async()  # All on their way before the first is waited for.
        layout = [structure, *((leaf.shape, leaf.dtype) if _is_array(leaf) else None for leaf in whole)]
        is_new = layout != self._layout
        if is_new:
            self.forget()
            self._buffers = [np.empty(leaf.shape, leaf.dtype) if _is_array(leaf) else None for leaf in whole]
        copies = list(map(_copied, leaves, whole, self._buffers))
        copy = jax.tree.map(_split, structure.unflatten(copies), is_leaf=lambda x: isinstance(x, Packed))
        if is_new:
            for name, leaf in flatten(copy).items():
                describe(name, leaf)
            self._layout = layout
        return copy

    def forget(self) -> None:
        """Gives the memory back."""
        self._layout, self._buffers = None, []


def _donated(tree: PyTree) -> ValueError:
    named = jax.tree_util.tree_leaves_with_path(tree)
    gone = next(path for path, leaf in named if isinstance(leaf, jax.Array) and leaf.is_deleted())
    return ValueError(
        f"leaf {path_str(gone)!r} was donated to a compiled function: save the state which that returned"
    )


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _data(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _gathered(leaves: list[Any]) -> list[Any]:
    """The leaves, each of which this process can now read whole."""
    spread = {}
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            if leaf.is_fully_replicated:
                leaves[i] = leaf.addressable_data(0)
            else:
                spread[i] = leaf
    if spread:
        from jax.experimental import multihost_utils  # Costs time to import, and few runs need it.

        for i, leaf in multihost_utils.process_allgather(spread, tiled=True).items():
            leaves[i] = np.asarray(leaf)
    return leaves


def _copied(leaf: Any, whole: Any, buffer: np.ndarray | None) -> Any:
    if buffer is None:
        return leaf  # A number of Python's.
    np.copyto(buffer, np.asarray(whole))
    if _is_key(leaf):
        return jax.random.wrap_key_data(jnp.array(buffer), impl=jax.random.key_impl(leaf))
    return HostArray(buffer) if isinstance(leaf, jax.Array) else buffer


def _split(part: Any) -> Any:
    """What ``nnkit.packing.unpack`` gives, without a computation on the device for each leaf."""
    if not isinstance(part, Packed):
        return part
    layout = part.layout
    leaves: list[Any] = [None] * len(layout.shapes)
    buffers = zip(part.parts, layout.groups.values(), strict=False)
    for buffer, members in buffers:
        sizes = [math.prod(layout.shapes[i]) for i in members]
        for i, start, size in zip(members, itertools.accumulate(sizes, initial=0), sizes, strict=False):
            piece = np.asarray(buffer)[..., start : start + size]
            leaves[i] = HostArray(piece.reshape(*piece.shape[:-1], *layout.shapes[i]))
    for i, leaf in zip(layout.large, part.parts[len(layout.groups) :], strict=True):
        leaves[i] = leaf
    return layout.structure.unflatten(leaves)
