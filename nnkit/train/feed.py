"""Where the batches of an epoch come from, a dispatch's worth at a time."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from nnkit.data import shuffled_indices
from nnkit.train.preflight import number_of_examples
from nnkit.types import PyTree

__all__ = ["Chunk", "Feed", "Resident"]


class Chunk(NamedTuple):
    """The batches of one dispatch.

    Attributes:
      arrays: examples on the device, a pytree of arrays with one leading axis.
      order: which rows of the arrays the batches are made of; None where the batches lie one behind
        another in the arrays.
      offset: where in ``order``, or in the arrays, the first batch starts.
      steps: how many batches.
      batch_size: examples in each.
      capacity: the most batches that a chunk of this batch size has. Programs are compiled for it.
    """

    arrays: PyTree
    order: Int[Array, " n"] | None
    offset: int
    steps: int
    batch_size: int
    capacity: int


class Feed(Protocol):
    """What a training loop takes its chunks from."""

    @property
    def steps(self) -> int:
        """Batches in an epoch."""
        ...

    def chunks(self, key: Array, epoch: int, start: int) -> Iterator[Chunk]:
        """The batches of an epoch from number ``start`` on; ``key`` is the run's, for the order."""
        ...


class Resident:
    """Batches gathered from arrays that stay on the device.

    Args:
      arrays: on the device, a pytree of arrays with one leading axis.
      batch_size: examples in a batch, at most as many as there are.
      shuffle: whether each epoch has an order of its own, a function of (key, epoch).
      drop_last: whether to leave out a last batch that is not full.
      steps_per_call: the most batches in a chunk.
    """

    def __init__(
        self, arrays: PyTree, batch_size: int, *, shuffle: bool, drop_last: bool, steps_per_call: int
    ):
        self._arrays, self._batch_size, self._shuffle = arrays, batch_size, shuffle
        self._n = number_of_examples(arrays)
        self._full, tail = divmod(self._n, batch_size)
        self._tail = 0 if drop_last else tail
        self._capacity = min(steps_per_call, self._full)

    @property
    def steps(self) -> int:
        return self._full + (self._tail > 0)

    def chunks(self, key: Array, epoch: int, start: int) -> Iterator[Chunk]:
        size = self._batch_size
        if self._shuffle:
            order = _shuffled(key, jnp.int32(epoch), self._n)
        else:
            order = jnp.arange(self._n, dtype=jnp.int32)
        for at in range(start, self._full, self._capacity):
            count = min(self._capacity, self._full - at)
            yield Chunk(self._arrays, order, at * size, count, size, self._capacity)
        if self._tail:
            yield Chunk(self._arrays, order, self._full * size, 1, self._tail, 1)


_shuffled = functools.partial(jax.jit, static_argnums=2)(shuffled_indices)
