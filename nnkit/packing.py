"""Many small arrays in few buffers, which still read and save as the tree that they are.

A compiled step costs some microseconds for each buffer that goes in and out, and its compilation some
milliseconds for each: of a network with two thousand biases and scales, an optimizer's averages would
cost more than the arithmetic. So the small leaves of a large tree lie behind one another in one buffer
for each dtype. Only elementwise functions may work on the buffers.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from nnkit.types import PyTree

__all__ = ["FEWEST", "SMALL", "Packed", "fits", "pack", "packed_like", "plan", "unpack"]

SMALL = 4096
"""Leaves of so many numbers at most are packed."""
FEWEST = 64
"""Fewer small leaves than this stay as they are, and so do trees without them."""


class Layout:
    """Where each leaf of a tree lies: static, made once a tree by :func:`plan`."""

    def __init__(self, structure: Any, shapes: tuple[tuple[int, ...], ...], dtypes: tuple[Any, ...]):
        self.structure, self.shapes = structure, shapes
        self.groups: dict[Any, list[int]] = {}  # of the small leaves, by dtype
        self.large: list[int] = []
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True)):
            small = math.prod(shape) <= SMALL
            (self.groups.setdefault(dtype, []) if small else self.large).append(i)
        self.names = [f"packed {dtype}" for dtype in self.groups] + [f"leaf {i}" for i in self.large]
        self.widths = [sum(math.prod(shapes[i]) for i in members) for members in self.groups.values()]
        self._key = (structure, shapes, dtypes)
        self._hash = hash(self._key)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Layout) and self._key == other._key)


_layout = functools.lru_cache(maxsize=256)(Layout)


@jax.tree_util.register_pytree_with_keys_class
class Packed:
    """A tree whose small leaves lie in shared buffers. It reads as the tree: ``packed["dense_0"]``.

    To JAX it is a tuple of few arrays, so that ``jax.tree.map`` with an elementwise function is right;
    the leaves by path are those of :func:`unpack`. ``nnkit.tree.flatten`` and ``train.save_tree`` see
    the tree.

    Attributes:
      parts: a buffer for each dtype, (..., n), then the large leaves.
      layout: which leaf lies where.
    """

    def __init__(self, parts: tuple[Any, ...], layout: Layout):
        self.parts, self.layout = parts, layout

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], Layout]:
        keys = [jax.tree_util.DictKey(name) for name in self.layout.names]
        return list(zip(keys, self.parts, strict=True)), self.layout

    def tree_flatten(self) -> tuple[tuple[Any, ...], Layout]:
        return self.parts, self.layout

    @classmethod
    def tree_unflatten(cls, layout: Layout, parts: Any) -> Packed:
        return cls(tuple(parts), layout)

    def __getitem__(self, key: Any) -> Any:
        return unpack(self)[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(unpack(self))

    def __len__(self) -> int:
        return len(unpack(self))

    def __contains__(self, key: object) -> bool:
        return key in unpack(self)

    def __getattr__(self, name: str) -> Any:
        # For trees read by attribute, and for a dict's items(). JAX and pickle ask for private names.
        if name.startswith("_") or name in ("parts", "layout"):
            raise AttributeError(name)
        return getattr(unpack(self), name)

    def __repr__(self) -> str:
        # A map over the tree may have put anything in the parts' places.
        widths = self.layout.widths
        shapes = [getattr(part, "shape", ()) for part in self.parts[: len(widths)]]
        if [tuple(shape)[-1:] for shape in shapes] == [(width,) for width in widths]:
            return f"Packed({unpack(self)!r})"
        return f"Packed({dict(zip(self.layout.names, self.parts, strict=True))!r})"


def plan(tree: PyTree) -> Layout | None:
    """How to pack a tree like ``tree``, or None where that would not pay or move an array between devices.

    >>> plan({"bias": jnp.zeros(3)}) is None
    True
    >>> layout = plan([jnp.zeros(3)] * 70 + [jnp.zeros((100, 100))])
    >>> {str(dtype): len(small) for dtype, small in layout.groups.items()}, layout.large
    ({'float32': 70}, [70])
    """
    leaves, structure = jax.tree.flatten(tree)
    if len(leaves) < FEWEST or not all(hasattr(x, "shape") and hasattr(x, "dtype") for x in leaves):
        return None
    if any(_is_spread(x) for x in leaves):
        return None
    layout = _layout(structure, tuple(map(jnp.shape, leaves)), tuple(str(x.dtype) for x in leaves))
    return layout if sum(map(len, layout.groups.values())) >= FEWEST else None


def fits(tree: PyTree, layout: Layout) -> bool:
    """Whether ``tree`` has the layout's structure and shapes, and in each group one floating dtype."""
    leaves, structure = jax.tree.flatten(tree)
    if structure != layout.structure or any(not hasattr(x, "dtype") for x in leaves):
        return False
    if any(_is_spread(x) or not jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves):
        return False
    if tuple(map(jnp.shape, leaves)) != layout.shapes:
        return False
    return all(len({leaves[i].dtype for i in members}) == 1 for members in layout.groups.values())


def pack(tree: PyTree, layout: Layout) -> Packed:
    """The tree in the layout, which it :func:`fits`; axes in front, as ``jax.vmap`` leaves them, stay there.

    >>> leaves = [jnp.full(2, i) for i in range(70)]
    >>> packed = pack(leaves, plan(leaves))
    >>> [part.shape for part in packed.parts], packed[69]
    ([(140,)], Array([69, 69], dtype=int32...))
    """
    leaves = jax.tree.leaves(tree)
    shapes = layout.shapes
    buffers = [_join([leaves[i] for i in g], [shapes[i] for i in g]) for g in layout.groups.values()]
    return Packed((*buffers, *(leaves[i] for i in layout.large)), layout)


def unpack(tree: PyTree) -> PyTree:
    """``tree`` with every :class:`Packed` in it as the tree that it stands for.

    Axes in front, as ``jax.vmap`` leaves them, stay in front.

    >>> unpack({"w": jnp.ones(1)})
    {'w': Array([1.], dtype=float32)}
    """
    return jax.tree.map(lambda x: _unpack(x) if _is_packed(x) else x, tree, is_leaf=_is_packed)


def packed_like(tree: PyTree, like: PyTree) -> PyTree:
    """``tree``, a form of ``unpack(like)``, packed where ``like`` is."""
    whole = jax.tree.structure(like, is_leaf=_is_packed)
    models = jax.tree.leaves(like, is_leaf=_is_packed)
    parts = whole.flatten_up_to(tree)
    packed = [pack(part, m.layout) if _is_packed(m) else part for part, m in zip(parts, models, strict=True)]
    return whole.unflatten(packed)


def _unpack(packed: Packed) -> PyTree:
    layout = packed.layout
    leaves: list[Any] = [None] * len(layout.shapes)
    for buffer, members in zip(packed.parts, layout.groups.values(), strict=False):
        sizes = [math.prod(layout.shapes[i]) for i in members]
        starts: Any = list(itertools.accumulate(sizes, initial=0))[:-1]
        if isinstance(buffer, Tracer):
            starts = _hidden(starts)
        for i, start, size in zip(members, starts, sizes, strict=True):
            leaves[i] = _cut(buffer, start, size, layout.shapes[i])
    for i, leaf in zip(layout.large, packed.parts[len(layout.groups) :], strict=True):
        leaves[i] = leaf
    return layout.structure.unflatten(leaves)


def _hidden(starts: list[int]) -> tuple[Any, ...]:
    """The numbers as scalars that XLA cannot see through.

    It compiles equal kernels once. A kernel that cuts a leaf out at a known place equals no other, and
    XLA would need 12 ms of compilation for each leaf; where the place comes as an argument, leaves of one
    shape share a kernel. A conditional is what keeps it an argument: constants would be
    compiled into the kernels, and the barrier keeps the conditional from being decided in advance.
    """
    never = jax.lax.optimization_barrier(jnp.bool_(False))
    return jax.lax.cond(
        never, lambda: tuple(jnp.int32(0) for _ in starts), lambda: tuple(jnp.int32(at) for at in starts)
    )


def _cut(buffer: Any, start: Any, size: int, shape: tuple[int, ...]) -> Any:
    shape = (*buffer.shape[:-1], *shape)
    if isinstance(buffer, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, buffer.dtype)
    piece = jax.lax.dynamic_slice_in_dim(buffer, start, size, axis=-1, allow_negative_indices=False)
    return piece.reshape(shape)


def _join(leaves: list[Any], shapes: list[tuple[int, ...]]) -> Any:
    """Arrays (..., *shape) behind one another on a last axis."""
    flat = [jnp.asarray(x) for x in leaves]
    flat = [x.reshape(*x.shape[: x.ndim - len(s)], math.prod(s)) for x, s in zip(flat, shapes, strict=True)]
    return jnp.concatenate(flat, axis=-1)


def _is_packed(x: Any) -> bool:
    return isinstance(x, Packed)


def _is_spread(x: Any) -> bool:
    """Whether an array is divided among devices; one that is traced tells where its mesh is explicit."""
    if isinstance(x, Tracer):
        spec = getattr(getattr(jax.typeof(x), "sharding", None), "spec", ())
        return any(axis is not None for axis in spec)
    sharding = getattr(x, "sharding", None)
    return sharding is not None and not sharding.is_fully_replicated
