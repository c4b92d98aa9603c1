"""Feeding the device from a source: the next chunk is on its way while this one computes."""

from __future__ import annotations

import collections
import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from nnkit.data.batch_source import Source, check_source, checked_batches, is_finite
from nnkit.train.feed import Chunk
from nnkit.train.preflight import whole
from nnkit.types import Array, PyTree

__all__ = ["Streaming"]

_PATIENCE = 5.0
"""Seconds that closing waits for a source that is in the middle of a batch."""


class Streaming:
    """Chunks of a source's batches, read and put onto the device by a thread, ahead of their use.

    The thread is one chunk ahead of the loop, and goes on into the next epoch while the last chunk of
    this one computes, so that the device waits only for a source that is slower than it. At most four
    chunks are in memory, each of ``chunk_bytes`` at most or one batch. Host memory is used again as soon as
    no array on the device uses it, and never before.

    The first chunks have 1, 2, 3, 5, 8, 12, ... batches, so that the device starts at once. How batches are
    cut into chunks changes no bit of a result.

    Args:
      source: where the batches come from.
      steps_per_call: the most batches in a chunk.
      epochs: the number of epochs of the run: where to stop reading ahead. None to read ahead within an
        epoch only.
      sharding: how a batch is divided among devices; then a chunk is one batch. Where there are several
        processes each one's source gives its part of every batch.
      chunk_bytes: the most bytes in a chunk.

    Attributes:
      steps: batches in an epoch.
      waited: the seconds that the loop has waited for chunks, in all; never less than the device has.

    Raises:
      ValueError: the source's numbers do not agree, its batches cannot be divided by ``sharding``, or a
        number of steps or bytes is no whole number of at least 1.

    >>> source = data.stream((np.ones((10, 2), "f"), np.ones((10, 1), "f")), 4)
    >>> with train.Streaming(source, steps_per_call=100) as feed:
    ...     [(c.batch_size, c.steps) for c in feed.chunks(jax.random.key(0), epoch=0, start=0)]
    [(4, 1), (4, 1), (2, 1)]
    """

    def __init__(
        self,
        source: Source,
        *,
        steps_per_call: int,
        epochs: int | None = None,
        sharding: jax.sharding.Sharding | None = None,
        chunk_bytes: int = 2**26,
    ):
        self.steps, self.waited = source.steps, 0.0
        self._plan = _Plan(source, steps_per_call, epochs, sharding, chunk_bytes)
        self._line: _Line | None = None
        self._closer: Any = None

    def chunks(self, key: Array, epoch: int, start: int) -> Iterator[Chunk]:
        """The batches of an epoch from number ``start`` on; ``key`` is the run's, for the order.

        What the source raises is raised here. A loop that leaves early ends the thread.
        """
        line = self._line
        root = np.asarray(jax.random.key_data(key)).tobytes()
        if line is None or line.next != (root, epoch, start):
            self.close()
            line = self._line = _Line(self._plan, key, epoch, start)
            # The thread knows nothing of this object, so it ends also with it and with the process.
            self._closer = weakref.finalize(self, line.close)
            line.start()
        line.next = None
        finished = False
        try:
            while True:
                began = time.perf_counter()
                chunk = line.get()
                self.waited += time.perf_counter() - began
                if chunk is None:
                    break
                yield chunk
                del chunk
            line.next = root, epoch + 1, 0
            finished = not line.last(epoch)
        finally:
            if not finished and line is self._line:
                self.close()

    def close(self) -> None:
        """Ends the thread, if there is one. A later call of :meth:`chunks` starts another."""
        if self._closer is not None:
            self._closer()
        self._line = self._closer = None

    def __enter__(self) -> Streaming:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()


class _Plan:
    """What the thread has to do, and the memory that it does it in."""

    def __init__(
        self,
        source: Source,
        steps_per_call: int,
        epochs: int | None,
        sharding: jax.sharding.Sharding | None,
        chunk_bytes: int,
    ):
        self.source, self.epochs, self.sharding = source, epochs, sharding
        self.size, self.tail = check_source(source)
        self.full = source.examples // self.size
        leaves, self.structure = jax.tree.flatten(source.spec)
        # Buffers have the dtypes of the device: a double is rounded on the way in and not once more.
        dtypes = [jax.dtypes.canonicalize_dtype(leaf.dtype) for leaf in leaves]
        self.rows = [(leaf.shape[1:], dtype) for leaf, dtype in zip(leaves, dtypes, strict=True)]
        self.looked_at = False  # whether a whole epoch was found to be finite
        # Whether numbers go to the device as they are.
        self.plain = all(leaf.dtype == dtype for leaf, dtype in zip(leaves, dtypes, strict=True))
        if sharding is not None and jax.process_count() == 1:
            _check_sharding(sharding, leaves, self.tail)
        batch = sum(np.zeros(shape, dtype).nbytes for shape, dtype in self.rows) * self.size
        room = max(1, whole(chunk_bytes, "Streaming(chunk_bytes=...)") // max(1, batch))
        most = min(whole(steps_per_call, "Streaming(steps_per_call=...)"), room, max(1, self.full))
        most = 1 if sharding is not None else most
        # Chunks of like length: a short last one would leave little time to read the next epoch's first.
        self.capacity = -(-self.full // -(-self.full // most)) if self.full else 1
        self._free: dict[tuple[int, int], collections.deque[np.ndarray]] = collections.defaultdict(
            collections.deque
        )

    def cuts(self, start: int, most: int) -> Iterator[tuple[int, int, int]]:
        """(batches, examples in each, capacity) of the chunks from batch ``start`` on; the first has ``most``."""
        at = start
        while at < self.full:
            count = min(most, self.full - at)
            yield count, self.size, self.capacity
            at, most = at + count, self.after(most)
        if self.tail and start < self.source.steps:
            yield 1, self.tail, 1

    def after(self, most: int) -> int:
        """How many batches follow on ``most``: what a source twice as fast as the steps reads meanwhile, and
        some in reserve."""
        return min(-(-3 * most // 2), self.capacity)

    def borrow(self, examples: int) -> list[np.ndarray]:
        """An array for each leaf that nothing else uses, until the last use of it is gone."""
        return [self._borrow(leaf, examples) for leaf in range(len(self.rows))]

    def _borrow(self, leaf: int, examples: int) -> np.ndarray:
        free = self._free[leaf, examples]
        try:
            memory = free.popleft()
        except IndexError:
            shape, dtype = self.rows[leaf]
            memory = _aligned((examples, *shape), dtype)
        loan = _Loan(memory)
        # JAX keeps what it reads from alive: until a copy to the device is complete or, on a CPU, where an
        # array may be this very memory, until the last program that uses it is done.
        weakref.finalize(loan, free.append, memory).atexit = False
        return np.asarray(loan).view(memory.dtype).reshape(memory.shape)

    def put(self, leaves: list[np.ndarray]) -> PyTree:
        """The arrays on the device, or on the devices."""
        if self.sharding is None:
            arrays = jax.device_put(leaves)
        else:
            arrays = [jax.make_array_from_process_local_data(self.sharding, leaf) for leaf in leaves]
        return self.structure.unflatten(arrays)


class _Loan:
    """Memory that is lent out. Every array made of it holds on to this object, which numpy sees through an
    array that is a view of another."""

    def __init__(self, memory: np.ndarray):
        self.__array_interface__ = memory.reshape(-1).view(np.uint8).__array_interface__


class _Line(threading.Thread):
    """The thread and the one chunk that it has ready."""

    def __init__(self, plan: _Plan, key: Array, epoch: int, start: int):
        super().__init__(name="nnkit-streaming", daemon=True)
        self.next: tuple[bytes, int, int] | None = None  # where the loop may go on with what is ready
        self._plan, self._key, self._epoch, self._start = plan, _on_host(key), epoch, start
        self._changed = threading.Condition()
        self._ready: list[Chunk | None] = []  # None ends an epoch
        self._most = 1
        self._error: BaseException | None = None
        self._closed = False
        config: Any = jax.config
        self._settings = config.jax_enable_x64, config.jax_default_device

    def last(self, epoch: int) -> bool:
        """Whether the thread has nothing more to do after this epoch."""
        return self._plan.epochs is None or epoch + 1 >= self._plan.epochs

    def get(self) -> Chunk | None:
        """The next chunk, waited for; None at the end of an epoch."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._closed or self._error is not None)
            if not self._ready:
                raise self._error or RuntimeError(
                    "these chunks are closed: the feed was closed, or asked for others, while they were in use"
                )
            chunk = self._ready.pop(0)
            self._changed.notify_all()
            return chunk

    def close(self) -> None:
        """Ends the thread, at the latest when the source has given the batch that it is at."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        if self.is_alive() and threading.current_thread() is not self:
            self.join(_PATIENCE)

    def run(self) -> None:
        # A thread starts with JAX's settings of the process, whatever those of the loop are.
        x64, device = self._settings
        try:
            with jax.enable_x64(x64), jax.default_device(device):
                epoch, start = self._epoch, self._start
                while self._read(epoch, start) and not self.last(epoch):
                    epoch, start = epoch + 1, 0
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _read(self, epoch: int, start: int) -> bool:
        """Hands over the chunks of an epoch; False where nobody wants them any more."""
        plan = self._plan
        with contextlib.closing(_Reader(plan, self._key, epoch, start)) as reader:
            for count, size, capacity in plan.cuts(start, self._most):
                self._most = plan.after(count) if size == plan.size else self._most
                leaves = plan.borrow(capacity * size)
                if not reader.read(leaves, count, size, lambda: self._closed):
                    return False
                arrays = plan.put(leaves)
                del leaves
                # Where several processes give their parts the batch is larger than this one's.
                size = jax.tree.leaves(arrays)[0].shape[0] // capacity
                if not self._hand_over(Chunk(arrays, None, 0, count, size, capacity)):
                    return False
                del arrays
        return self._hand_over(None)

    def _hand_over(self, chunk: Chunk | None) -> bool:
        with self._changed:
            # The end of an epoch needs no place of its own.
            self._changed.wait_for(lambda: self._closed or not self._ready or chunk is None)
            if not self._closed:
                self._ready.append(chunk)
                self._changed.notify_all()
            return not self._closed


def _write(batch: PyTree, leaves: list[np.ndarray], rows: slice) -> None:
    for memory, leaf in zip(leaves, jax.tree.leaves(batch), strict=True):
        np.copyto(memory[rows], leaf, casting="same_kind")


class _Reader:
    """Reads an epoch's batches one after another, a chunk at once from a source that can."""

    def __init__(self, plan: _Plan, key: Array, epoch: int, start: int):
        self._plan, self._key, self._epoch = plan, key, epoch
        self._start = self._at = start
        filler = getattr(plan.source, "filler", None) if plan.plain else None
        self._fill = None if filler is None else filler(key, epoch)
        self._batches = None if self._fill else checked_batches(plan.source, key, epoch, start)

    def read(self, leaves: list[np.ndarray], count: int, size: int, closed: Callable[[], bool]) -> bool:
        """Fills the leaves with the next batches; False where nobody wants them any more."""
        if self._fill is not None:
            used = [memory[: count * size] for memory in leaves]
            self._fill(self._at, self._plan.structure.unflatten(used))
            # Once: an epoch that was finite, read again from the same arrays, is.
            if not self._plan.looked_at and not all(map(is_finite, used)):
                for _ in checked_batches(self._plan.source, self._key, self._epoch, self._at):
                    pass  # says in which batch, and of what
            self._at += count
            self._plan.looked_at |= self._start == 0 and self._at == self._plan.source.steps
            return not closed()
        assert self._batches is not None
        for at in range(count):
            if closed():
                return False
            for memory, leaf in zip(leaves, jax.tree.leaves(next(self._batches)), strict=True):
                np.copyto(memory[at * size : (at + 1) * size], leaf, casting="same_kind")
        return True

    def close(self) -> None:
        if self._batches is not None:
            self._batches.close()


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Uninitialised memory at a multiple of 64 bytes, which on a CPU is an array for JAX as it is."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    first = -raw.ctypes.data % 64
    return raw[first : first + size].view(dtype).reshape(shape)


def _on_host(key: Array) -> Array:
    """The key where a permutation drawn from it need not queue behind the steps that the device has to do.

    Threefry's numbers are the same on every device; those of other generators are not.
    """
    # A copy: the loop gives the state's key away with the rest of the state.
    data, kind, host = np.array(jax.random.key_data(key)), jax.random.key_impl(key), None
    if str(kind) == "threefry2x32":
        # In a process that was told to use no CPU the key stays where the default is.
        with contextlib.suppress(RuntimeError):
            host = jax.local_devices(backend="cpu")[0]
    return jax.random.wrap_key_data(jax.device_put(data, host), impl=kind)


def _check_sharding(sharding: jax.sharding.Sharding, leaves: list[Any], tail: int) -> None:
    for leaf in leaves:
        for rows in (leaf.shape[0], tail) if tail else (leaf.shape[0],):
            try:
                sharding.shard_shape((rows, *leaf.shape[1:]))
            except ValueError as error:
                what = (
                    f"the last batch of each epoch has {rows} examples"
                    if rows == tail
                    else f"a batch has {rows}"
                )
                raise ValueError(
                    f"{what}, which cannot be divided among {sharding.num_devices} devices ({error}): pass another "
                    "batch_size, or drop_last=True"
                ) from error
