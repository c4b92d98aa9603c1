"""Batches read from arrays on disk, in the order that training on the device itself would have."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from nnkit.data.batch_source import Source, shapes_of
from nnkit.data.batching import num_batches, shuffled_indices
from nnkit.data.checks import check_batch_size
from nnkit.data.dataset import Splits
from nnkit.tree import flatten
from nnkit.types import Array, PyTree

__all__ = ["from_records", "stream"]

_BLOCK = 2**25
"""Bytes that are read in sorted order at a time."""


def stream(
    arrays: Any,
    batch_size: int,
    *,
    shuffle: bool = True,
    drop_last: bool = False,
    map: Callable[[Any], Any] | None = None,
    read_ahead: int | None = None,
) -> Source:
    """A source that reads its batches from memory-mapped arrays, so that they need not fit into memory.

    The order of an epoch is ``shuffled_indices(key, epoch, n)``: the same batches, to the bit, as of
    training on the arrays themselves.

    Args:
      arrays: a pytree of arrays with one leading axis (``np.load(path, mmap_mode="r")``, ``np.memmap``,
        or arrays in memory), or a dataset, which may be memory-mapped.
      batch_size: examples in a batch.
      shuffle: whether each epoch has an order of its own.
      drop_last: whether to leave out a last batch that is not full.
      map: a numpy function of a batch, applied after reading: ``lambda b: (b[0] / np.float32(255), b[1])``
        for images of bytes. Its value depends on the batch alone.
      read_ahead: how many batches to read at once, in the order of their places on the disk. None for 1
        where the arrays fit into half of the memory, else for 32 megabytes of them.

    Raises:
      TypeError: leaves that are no numpy arrays, or a ``batch_size`` that is no integer.
      ValueError: arrays of different lengths, a ``batch_size`` larger than they are, a ``read_ahead`` below
        1, or a ``map`` that does not keep the number of examples.

    >>> source = data.stream((np.arange(10.0, dtype="f")[:, None], np.arange(10)), 4)
    >>> source.steps, source.spec[0]
    (3, ShapeDtypeStruct(shape=(4, 1), dtype=float32))
    >>> [y.tolist() for x, y in source.batches(jax.random.key(0), 0, start=1)]
    [[7, 4, 5, 9], [2, 0]]
    """
    if isinstance(arrays, Splits):
        raise TypeError(
            "stream got all the splits of a data set: pass one of them, splits.train for instance"
        )
    arrays = getattr(arrays, "arrays", arrays)
    arrays = tuple(arrays) if isinstance(arrays, list) else arrays
    arrays = jax.tree.map(lambda a: np.asarray(a) if isinstance(a, np.ndarray | jax.Array) else a, arrays)
    n = _length(arrays)

    def read(rows: Int[np.ndarray, " m"]) -> PyTree:
        return jax.tree.map(lambda a: _native(np.take(a, rows, axis=0)), arrays)

    row_bytes = sum(a.nbytes for a in jax.tree.leaves(arrays)) // n
    if read_ahead is not None and (not isinstance(read_ahead, int) or read_ahead < 1):
        raise ValueError(f"read_ahead must be a whole number of batches, at least 1, got {read_ahead!r}")
    if read_ahead is None:
        pays = n * row_bytes > _memory() / 2
        read_ahead = max(1, _BLOCK // max(1, row_bytes * batch_size)) if pays else 1

    def into(rows: Int[np.ndarray, " m"], out: PyTree) -> None:
        # "clip" writes straight into its place; the rows are within bounds.
        jax.tree.map(lambda a, o: np.take(a, rows, axis=0, out=o, mode="clip"), arrays, out)

    plain = map is None and read_ahead == 1 and all(a.dtype.isnative for a in jax.tree.leaves(arrays))
    return _Indexed(read, n, batch_size, shuffle, drop_last, map, read_ahead, into if plain else None)


def from_records(
    records: Any,
    batch_size: int,
    *,
    fields: Sequence[str] | None = None,
    shuffle: bool = True,
    drop_last: bool = False,
    map: Callable[[Any], Any] | None = None,
) -> Source:
    """A source that stacks single examples, read by their number: TensorFlow Datasets without conversion.

    For image sets that fit on the disk as arrays, ``data.load`` and :func:`stream` are faster: records are
    decoded one by one.

    Args:
      records: anything with ``len`` and ``records[i]``: ``tfds.data_source("cifar10", split="train")`` or
        ``builder.as_data_source("train")``, a PyTorch data set, a list. Where it has TFDS's
        ``__getitems__``, that reads a batch at once.
      batch_size: examples in a batch.
      fields: where a record is a dict, which entries make up the batch, as a tuple in this order:
        ``("image", "label")``. None for the record as it is.
      shuffle: whether each epoch has an order of its own, that of :func:`stream`.
      drop_last: whether to leave out a last batch that is not full.
      map: a numpy function of a batch.

    Raises:
      TypeError: ``records`` cannot be read by number.
      ValueError: a record without one of the fields, or records of different shapes.

    >>> records = [{"image": np.full((2, 2), i), "label": i} for i in range(5)]
    >>> source = data.from_records(records, 2, fields=("image", "label"), shuffle=False)
    >>> [y.tolist() for x, y in source.batches(jax.random.key(0), 0)]
    [[0, 1], [2, 3], [4]]
    """
    if not hasattr(records, "__len__") or not hasattr(records, "__getitem__"):
        raise TypeError(
            f"from_records needs len(records) and records[i], which a {type(records).__name__} does not have: "
            "pass tfds.data_source(...), or use data.from_iterator for what can only be read in turn"
        )

    def read(rows: Int[np.ndarray, " m"]) -> PyTree:
        numbers = rows.tolist()
        several = getattr(records, "__getitems__", None)
        found = [records[i] for i in numbers] if several is None else several(numbers)
        chosen = [_fields(record, fields, i) for record, i in zip(found, numbers, strict=True)]
        try:
            return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *chosen)
        except ValueError as error:
            raise ValueError(
                f"the records {numbers[0]} ... {numbers[-1]} cannot be stacked to a batch ({error}): bring them to "
                "one shape first"
            ) from error

    return _Indexed(read, len(records), batch_size, shuffle, drop_last, map, 1)


class _Indexed:
    """Batches of examples that are read by their numbers."""

    def __init__(
        self,
        read: Callable[[Int[np.ndarray, " m"]], PyTree],
        n: int,
        batch_size: int,
        shuffle: bool,
        drop_last: bool,
        map: Callable[[Any], Any] | None,
        read_ahead: int,
        into: Callable[[Int[np.ndarray, " m"], PyTree], None] | None = None,
    ):
        check_batch_size(batch_size, n)
        self._read, self._map, self._n, self._size = read, map, n, batch_size
        self._shuffle, self._block, self._into = shuffle, read_ahead, into
        self.steps = num_batches(n, batch_size, drop_last)
        self.examples = self.steps * batch_size if drop_last else n
        self.spec = shapes_of(self._mapped(read(np.arange(batch_size))))
        sizes = {leaf.shape[:1] for leaf in jax.tree.leaves(self.spec)}
        if sizes != {(batch_size,)}:
            raise ValueError(
                f"map made a batch of {batch_size} examples into arrays of shapes "
                f"{[leaf.shape for leaf in jax.tree.leaves(self.spec)]}: it must keep the first axis"
            )

    def batches(self, key: Array, epoch: int, start: int = 0) -> Iterator[PyTree]:
        order = _order(key, epoch, self._n) if self._shuffle else np.arange(self._n)
        for first in range(start, self.steps, self._block):
            rows = order[first * self._size : min((first + self._block) * self._size, self.examples)]
            if self._block == 1:
                yield self._mapped(self._read(rows))
                continue
            by_place = np.argsort(rows)
            block = self._read(rows[by_place])
            where = np.empty_like(by_place)
            where[by_place] = np.arange(len(rows))
            for at in range(0, len(rows), self._size):
                part = where[at : at + self._size]
                yield self._mapped(jax.tree.map(functools.partial(np.take, indices=part, axis=0), block))

    def filler(self, key: Array, epoch: int) -> Callable[[int, PyTree], None] | None:
        """Reads batches from a number on straight into their place, where that is possible: for ``train.Streaming``."""
        into = self._into
        if into is None:
            return None
        order = _order(key, epoch, self._n) if self._shuffle else np.arange(self._n)

        def fill(start: int, out: PyTree) -> None:
            first = start * self._size
            into(order[first : first + len(jax.tree.leaves(out)[0])], out)

        return fill

    def _mapped(self, batch: PyTree) -> PyTree:
        return batch if self._map is None else self._map(batch)


_shuffled = jax.jit(shuffled_indices, static_argnums=2)


def _order(key: Array, epoch: int, n: int) -> Int[np.ndarray, " n"]:
    return np.asarray(_shuffled(key, jnp.int32(epoch), n))


def _length(arrays: PyTree) -> int:
    leaves = flatten(arrays)
    for path, leaf in leaves.items():
        if not isinstance(leaf, np.ndarray):
            raise TypeError(
                f"stream takes arrays and got a {type(leaf).__name__}{f' at {path}' if path else ''}: open a file "
                'with np.load(path, mmap_mode="r"), and give what is no numpy array to data.from_records'
            )
        if not (jnp.issubdtype(leaf.dtype, np.number) or leaf.dtype == bool):
            raise TypeError(
                f"stream takes arrays of numbers and got {leaf.dtype}{f' at {path}' if path else ''}"
            )
    lengths = {leaf.shape[0] if leaf.ndim else 0 for leaf in leaves.values()}
    if len(lengths) != 1 or lengths == {0}:
        raise ValueError(
            f"stream needs arrays with one common, non-empty leading axis, got lengths {sorted(lengths)}"
        )
    return lengths.pop()


def _fields(record: Any, fields: Sequence[str] | None, number: int) -> Any:
    if fields is None:
        return record
    try:
        return tuple(record[field] for field in fields)
    except (KeyError, TypeError, IndexError):
        has = ", ".join(map(str, record)) if isinstance(record, dict) else f"is a {type(record).__name__}"
        raise ValueError(
            f"record {number} has not all of the fields {tuple(fields)}: it "
            f"{'has ' + has if isinstance(record, dict) else has}"
        ) from None


def _native(array: np.ndarray) -> np.ndarray:
    """In the byte order of this machine, whatever that of the file is."""
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _memory() -> float:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Not on Windows.
        return math.inf
