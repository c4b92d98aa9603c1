"""Batches from what can only be read in turn: an iterator of one's own, a Grain loader."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from nnkit.data.batch_source import Source, batch_size_of, check_source, shapes_of
from nnkit.types import Array, PyTree

__all__ = ["from_grain", "from_iterator"]

_NAMES = ("key", "epoch", "start")


def from_iterator(
    make: Callable[..., Any], *, steps: int, examples: int | None = None, spec: PyTree | None = None
) -> Source:
    """A source out of a function that makes an epoch's iterator of batches.

    Args:
      make: ``make(epoch)``, ``make(key, epoch)`` or ``make(key, epoch, start)``: any of these three names, in
        any order. It returns an iterable of batches, pytrees of numpy arrays, and must give the same ones
        when asked again. With ``start`` it begins at that batch; without, a run that is taken up in the
        middle of an epoch reads the batches before and throws them away.
      steps: batches in an epoch; what an iterator has beyond is left.
      examples: examples in an epoch, where the last batch has fewer than the others.
      spec: what a full batch looks like, as ``data.Source`` has it. None to look at the first batch of an
        epoch 0, made once for that.

    Raises:
      TypeError: ``make`` cannot be called, or with arguments of other names.
      ValueError: ``steps`` and ``examples`` do not agree.

    >>> def make(epoch):
    ...     for i in range(3):
    ...         yield np.full((4, 2), i + 10 * epoch, np.float32)
    >>> source = data.from_iterator(make, steps=3)
    >>> [batch[0, 0].item() for batch in source.batches(jax.random.key(0), epoch=2, start=1)]
    [21.0, 22.0]
    """
    names = _arguments(make)
    return _FromIterator(make, names, steps, examples, spec)


def _arguments(make: Any) -> list[str]:
    if not callable(make):
        raise TypeError(
            f"from_iterator takes a function that makes an iterator and got a {type(make).__name__}, which can be "
            "read once: pass lambda epoch: ..., which makes one for each epoch"
        )
    parameters = inspect.signature(make).parameters.values()
    needed = [
        p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    wrong = [name for name in needed if name not in _NAMES]
    if wrong:
        raise TypeError(
            f"from_iterator calls make with arguments named key, epoch and start, as many of them as it has, and it "
            f"needs {', '.join(wrong)}: write def make(key, epoch)"
        )
    return [p.name for p in parameters if p.name in _NAMES]


class _FromIterator:
    def __init__(
        self,
        make: Callable[..., Any],
        names: list[str],
        steps: int,
        examples: int | None,
        spec: PyTree | None,
    ):
        self._make, self._names = make, names
        if spec is None:
            found = next(iter(self._call(jax.random.key(0), 0, 0)), None)
            if found is None:
                raise ValueError("the iterator of epoch 0 is empty: there must be at least one batch")
            spec = shapes_of(_tuple(found))
        self.spec, self.steps = spec, steps
        self.examples = steps * batch_size_of(spec) if examples is None else examples
        check_source(self)

    def batches(self, key: Array, epoch: int, start: int = 0) -> Iterator[PyTree]:
        made = iter(self._call(key, epoch, start))
        skipped = 0 if "start" in self._names else start
        try:
            yield from (_tuple(batch) for batch in itertools.islice(made, skipped, None))
        finally:
            close = getattr(made, "close", None)
            if close is not None:
                close()

    def _call(self, key: Array, epoch: int, start: int) -> Any:
        given = {"key": key, "epoch": epoch, "start": start}
        return self._make(**{name: given[name] for name in self._names})


def from_grain(loader: Any, *, steps: int | None = None, examples: int | None = None) -> Source:
    """A source out of a Grain ``MapDataset``, ``IterDataset`` or ``DataLoader`` that gives batches.

    The order is Grain's own, by its own seed; the run's key has no part in it. A ``MapDataset`` is read from
    any position on, each epoch in an order of its own (by ``repeat``). The others are endless streams, of
    which an epoch is the next ``steps`` batches: after a restart they are read from the beginning up to
    the position and thrown away, and within a process go on from the nearest state (``get_state``) that
    was seen before it.

    Args:
      loader: the loader, batched; an ``IterDataset`` or a ``DataLoader`` must not end before the run does
        (``MapDataset.repeat()`` before ``to_iter_dataset()``, ``IndexSampler(num_epochs=None)``).
      steps: batches in an epoch; a ``MapDataset`` knows.
      examples: examples in an epoch, where the last batch has fewer than the others; a ``MapDataset`` is
        asked for its last batch.

    Raises:
      ImportError: Grain is not installed.
      TypeError: another kind of loader, or one without ``steps``.
    """
    try:
        import grain  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("from_grain needs Grain: pip install nnkit[grain]") from error
    if isinstance(loader, grain.MapDataset):
        return _from_map_dataset(loader, steps, examples)
    if not isinstance(loader, grain.IterDataset | grain.DataLoader):
        raise TypeError(
            f"from_grain takes a grain.MapDataset, IterDataset or DataLoader and got a {type(loader).__name__}"
        )
    if steps is None:
        raise TypeError(f"a grain.{type(loader).__name__} has no length: pass from_grain(..., steps=...)")
    return _FromStream(loader, steps, examples)


def _from_map_dataset(dataset: Any, steps: int | None, examples: int | None) -> Source:
    length = len(dataset)
    if steps is not None and steps != length:
        raise ValueError(
            f"the MapDataset has {length} batches an epoch and steps= says {steps}: leave steps out"
        )
    first, last = (_tuple(dataset[i]) for i in (0, length - 1))
    size, rest = (jax.tree.leaves(batch)[0].shape[0] for batch in (first, last))

    def make(epoch: int, start: int) -> Any:
        part = dataset.repeat(epoch + 1).slice(slice(epoch * length + start, (epoch + 1) * length))
        return part.to_iter_dataset()

    if examples is None:
        examples = (length - 1) * size + rest
    return from_iterator(make, steps=length, examples=examples, spec=shapes_of(first))


class _FromStream:
    """Batch number ``start`` of ``epoch`` is number ``epoch * steps + start`` of the stream."""

    def __init__(self, loader: Any, steps: int, examples: int | None):
        self._loader, self.steps = loader, steps
        self._live: Any = iter(loader)
        self._states = {0: self._live.get_state()}  # by position; the starts of the last epochs
        first = next(self._live, None)
        if first is None:
            raise ValueError("the Grain loader is empty: there must be at least one batch")
        self._at: int | None = 1
        self.spec = shapes_of(_tuple(first))
        self.examples = steps * batch_size_of(self.spec) if examples is None else examples
        check_source(self)

    def batches(self, key: Array, epoch: int, start: int = 0) -> Iterator[PyTree]:
        self._go_to(epoch * self.steps + start)
        for number in range(start, self.steps):
            position = epoch * self.steps + number
            if number == 0:
                self._states[position] = self._live.get_state()
                for old in sorted(self._states)[1:-_REMEMBERED]:
                    del self._states[old]
            self._at = None  # unknown, should the loader raise
            batch = next(self._live, None)
            if batch is None:
                return
            self._at = position + 1
            yield _tuple(batch)

    def _go_to(self, position: int) -> None:
        nearest = max(at for at in self._states if at <= position)
        if self._at is None or not nearest <= self._at <= position:
            self._live = iter(self._loader)
            self._live.set_state(self._states[nearest])
            self._at = nearest
        for _ in range(position - self._at):
            next(self._live, None)
        self._at = position


_REMEMBERED = 4


def _tuple(batch: Any) -> Any:
    """Lists as tuples and leaves as numpy arrays, as batches are elsewhere."""
    batch = tuple(batch) if isinstance(batch, list) else batch
    return jax.tree.map(np.asarray, batch)
