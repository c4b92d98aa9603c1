"""``Workers``: threads that run compiled programs, and can be left at any time."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import jax

from nnkit.train.preflight import whole

__all__ = ["Workers", "available_cores"]

Item = TypeVar("Item")
Result = TypeVar("Result")

# Those of JAX's settings that numbers depend on; each thread has its own, so those of the caller are passed on.
_SETTINGS: dict[str, Callable[[Any], Any]] = {
    "jax_enable_x64": jax.enable_x64,
    "jax_numpy_dtype_promotion": jax.numpy_dtype_promotion,
    "jax_default_matmul_precision": jax.default_matmul_precision,
    "jax_default_prng_impl": jax.default_prng_impl,
    "jax_threefry_partitionable": jax.threefry_partitionable,
}
_AHEAD = 32  # items a thread: whoever takes the results may need as long for one as 32 items take
_PATIENCE = 5.0  # seconds; a thread that compiles cannot be interrupted, and rarely takes longer


class Workers:
    """Threads that take items in turn; each may have a device of its own.

    A context manager. Left by an exception, Ctrl-C's among them, it drops what has not begun and does not
    wait for what the devices still compute: a compiled program cannot be stopped, and a thread that waits
    for one within XLA would hold up the end of the process, or abort it. So threads wait by :meth:`wait`. The
    process itself ends when its devices are done with what they have begun, one item a thread.

    Args:
      n: how many threads.
      devices: thread i gets device i of them, beginning anew where there are fewer; by default each gets None.

    Raises:
      ValueError, TypeError: for an ``n`` that is no positive whole number.

    >>> with search.Workers(2) as workers:
    ...     sorted(workers.map(lambda item, device: item**2, [1, 2, 3]))
    [(0, 1), (1, 4), (2, 9)]
    """

    def __init__(self, n: int, devices: Sequence[Any] | None = None):
        self.n = whole(n, "Workers(n)")
        self.devices = list(devices) if devices else [None]
        self._tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Workers:
        if self._threads:
            raise RuntimeError("these workers were used before: make others, with Workers(n) as workers")
        settings = {name: getattr(jax.config, name) for name in _SETTINGS}
        for i in range(self.n):
            device = self.devices[i % len(self.devices)]
            # Daemons, since the end of the process would wait for all others.
            thread = threading.Thread(
                target=self._work, args=(device, settings), name=f"nnkit-search-{i}", daemon=True
            )
            self._threads.append(thread)
            thread.start()
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        self._closed.set()
        for _ in self._threads:
            self._tasks.put(None)
        until = time.monotonic() + _PATIENCE
        for thread in self._threads:
            thread.join(None if kind is None else max(0.0, until - time.monotonic()))

    def map(self, f: Callable[[Item, Any], Result], items: Iterable[Item]) -> Iterator[tuple[int, Result]]:
        """``(index, f(item, device))`` of each item as they are done; the items begin in their order.

        An item is taken from ``items`` when it will soon be its turn, by the thread that takes the results.

        Raises:
          Whatever ``f`` raises first; no thread begins another item then, nor where the iterator is closed.
        """
        if not self._threads or self._closed.is_set():
            raise RuntimeError("no threads are there: write with Workers(n) as workers: workers.map(...)")
        return self._mapped(f, items)

    def _mapped(self, f: Callable[[Any, Any], Any], items: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        over = threading.Event()
        running, most = 0, _AHEAD * self.n

        def next_one() -> tuple[int, Any]:
            nonlocal running
            while True:
                # Ctrl-C may reach another thread first, which does not wake up this one.
                with contextlib.suppress(queue.Empty):
                    index, result, error = done.get(timeout=0.1)
                    break
            running -= 1
            if error is not None:
                raise error
            return index, result

        try:
            for index, item in enumerate(items):
                self._tasks.put((f, index, item, done, over))
                running += 1
                while running >= most or not done.empty():  # an item may take its time to be made
                    yield next_one()
            while running:
                yield next_one()
        finally:
            over.set()

    def wait(self, arrays: Any) -> Any:
        """``arrays`` once they are computed; ends the thread's item where the workers were closed meanwhile."""
        begun = time.monotonic()
        for leaf in jax.tree.leaves(arrays):
            if isinstance(leaf, jax.Array) and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                leaf = jax.random.key_data(leaf)  # keys cannot be asked
            while not leaf.is_ready():  # pyright: ignore[reportAttributeAccessIssue]
                if self._closed.is_set():
                    raise _Closed
                # A hundredth of what went by, so that waiting adds some half a percent.
                time.sleep(min(max((time.monotonic() - begun) / 100, 5e-5), 0.02))
        return arrays

    def _work(self, device: Any, settings: dict[str, Any]) -> None:
        with contextlib.ExitStack() as stack:
            for name, value in settings.items():
                stack.enter_context(_SETTINGS[name](value))
            self._take(device)

    def _take(self, device: Any) -> None:
        while (task := self._tasks.get()) is not None:
            f, index, item, done, over = task
            if self._closed.is_set() or over.is_set():
                continue
            try:
                done.put((index, f(item, device), None))
            except _Closed:
                return
            except BaseException as error:
                over.set()  # by whoever fails, since the caller may look much later
                done.put((index, None, error))


class _Closed(Exception):
    """The workers were closed while a thread waited."""


def available_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
