"""A source of batches: what is read while training goes on, where the data do not fit into memory.

A source stands at a position (epoch, batch), and its batches are a function of (key, epoch, batch). So
a run that is taken up again needs no more than its key and its step number.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from nnkit.tree import flatten
from nnkit.types import Array, PyTree

__all__ = ["Source", "batch_size_of", "check_source", "checked_batches", "is_finite", "shapes_of"]


@runtime_checkable
class Source(Protocol):
    """Batches of an epoch, from any of them on, as numpy arrays on the host.

    All batches look like ``spec``, but for a last one that has fewer examples where ``examples`` is no
    multiple of its batch size.
    """

    @property
    def steps(self) -> int:
        """Batches in an epoch, an uneven last one included."""
        ...

    @property
    def examples(self) -> int:
        """Examples in an epoch."""
        ...

    @property
    def spec(self) -> PyTree:
        """A full batch, as a pytree of ``jax.ShapeDtypeStruct`` with one leading axis."""
        ...

    def batches(self, key: Array, epoch: int, start: int = 0) -> Iterator[PyTree]:
        """The batches of an epoch from number ``start`` on; ``key`` is the run's root key."""
        ...


def shapes_of(batch: PyTree) -> PyTree:
    """What a source gives as its ``spec`` for batches like this one.

    >>> shapes_of((np.zeros((4, 2), np.float32), np.zeros(4, np.int32)))[1]
    ShapeDtypeStruct(shape=(4,), dtype=int32)
    """
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(np.shape(a), _native(np.asarray(a).dtype)), batch)


def batch_size_of(spec: PyTree) -> int:
    """The length of the leading axis that the leaves of a source's ``spec`` have in common.

    >>> batch_size_of({"image": jax.ShapeDtypeStruct((4, 28, 28), np.uint8)})
    4
    """
    sizes = {leaf.shape[0] if leaf.shape else 0 for leaf in jax.tree.leaves(spec)}
    if len(sizes) != 1 or not min(sizes):
        raise ValueError(
            f"a batch of the source must be arrays with one common leading axis, its spec has {sorted(sizes)}"
        )
    return sizes.pop()


def check_source(source: Source) -> tuple[int, int]:
    """The batch size and the size of the uneven last batch (0 without), if the source's numbers agree.

    Raises:
      ValueError: ``spec`` has no one leading axis, or ``steps`` are not those that ``examples`` make.
    """
    size = batch_size_of(source.spec)
    steps = -(-source.examples // size)
    if steps != source.steps or steps < 1:
        raise ValueError(
            f"the source says that an epoch has {source.steps} batches of {size} and {source.examples} examples, "
            f"which make {steps}: give it the numbers of one epoch"
        )
    return size, source.examples % size


def checked_batches(source: Source, key: Array, epoch: int, start: int = 0) -> Generator[PyTree]:
    """``source.batches(key, epoch, start)``, each looked at; what is wrong is said with epoch and batch.

    Raises:
      ValueError: the source ends early, or a batch has another structure, shape or dtype than the
        source's ``spec``, holds NaN or Inf, or integers that JAX would wrap around in 32 bits.
      Exception: what the source itself raises, with a note that says where it was.

    >>> source = data.stream((np.zeros((5, 2), np.float32),), 2)
    >>> [batch[0].shape for batch in checked_batches(source, jax.random.key(0), 0, start=1)]
    [(2, 2), (1, 2)]
    """
    size, tail = check_source(source)
    steps, structure = source.steps, jax.tree.structure(source.spec)
    wanted = [(path, leaf.shape[1:], leaf.dtype) for path, leaf in flatten(source.spec).items()]
    batches = iter(source.batches(key, epoch, start))
    try:
        for number in range(start, steps):
            try:
                batch = next(batches)
            except StopIteration:
                raise ValueError(_ended(source, epoch, start, number)) from None
            except Exception as error:
                error.add_note(f"in {_place(epoch, number)} of the data source")
                raise
            leaves, found = jax.tree.flatten(batch)
            if found != structure:
                raise ValueError(f"{_place(epoch, number)} is a {found} and the source's spec a {structure}")
            rows = tail if tail and number == steps - 1 else size
            leaves = [np.asarray(leaf) for leaf in leaves]
            for (path, shape, dtype), leaf in zip(wanted, leaves, strict=True):
                _check(_place(epoch, number) + (f", {path}" if path else ""), leaf, (rows, *shape), dtype)
            yield jax.tree.unflatten(structure, leaves)
    finally:
        close = getattr(batches, "close", None)
        if close is not None:
            close()


def _place(epoch: int, number: int) -> str:
    return f"batch {number} of epoch {epoch} (both from 0)"


def _ended(source: Source, epoch: int, start: int, number: int) -> str:
    after = f", skipping to batch {start}" if start else ""
    return (
        f"the source ended early, before {_place(epoch, number)}{after}: an epoch should have {source.steps} "
        "batches; give it that many in every epoch, or say how many there are (steps=)"
    )


def _check(where: str, array: np.ndarray, shape: tuple[int, ...], dtype: Any) -> None:
    if array.shape != shape:
        raise ValueError(
            f"{where}: shape {array.shape} where {shape} was expected; every batch must have the shape of the "
            "first, and only the last of an epoch fewer examples, as many as examples= says"
        )
    if _native(array.dtype) != dtype:
        raise ValueError(
            f"{where}: dtype {array.dtype} where {dtype} was expected; convert it with .astype(np.{dtype})"
        )
    if jnp.issubdtype(dtype, np.inexact):
        if not is_finite(array):
            bad = np.argwhere(~np.isfinite(array))
            place = bad[0].tolist()
            raise ValueError(
                f"{where}: NaN or Inf in {len(bad)} of {array.size} places, the first {array[tuple(place)]} at "
                f"index {place[0] if len(place) == 1 else tuple(place)}: drop or fill those examples"
            )
    elif (kept := jax.dtypes.canonicalize_dtype(dtype)) != dtype and np.issubdtype(dtype, np.integer):
        limits, low, high = np.iinfo(kept), array.min(), array.max()
        if low < limits.min or high > limits.max:
            raise ValueError(
                f"{where}: {dtype} with values from {low} to {high}, which {kept} cannot hold: renumber them, "
                "or enable 64 bits with jax.config.update('jax_enable_x64', True)"
            )


def is_finite(array: np.ndarray) -> bool:
    """Whether there is no inf and no NaN in the array."""
    # One pass that writes nothing. A sum of squares that overflows is looked at again.
    if array.dtype in (np.float32, np.float64) and array.flags.c_contiguous:
        flat = array.reshape(-1)
        with np.errstate(all="ignore"):
            if np.isfinite(np.dot(flat, flat)):
                return True
    return bool(np.isfinite(array).all())


def _native(dtype: np.dtype) -> np.dtype:
    return dtype.newbyteorder("=")
