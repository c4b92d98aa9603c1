"""The compiled programs of a training function, group by group."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nnkit.search.hparams import adapt
from nnkit.search.program import Program, Static, trace
from nnkit.search.segments import Segments
from nnkit.search.space import Space
from nnkit.search.training import Training
from nnkit.types import Array

__all__ = ["Compiled", "Programs", "name_of"]

_MOST = 128
"""How many groups keep their programs, those used last; a search over widths may have hundreds."""


class Compiled:
    """What there is of a training function: the :class:`Programs` of its groups, and the data they share.

    Args:
      train_fn: in one of the forms of :func:`adapt`.
      space: of its hyper-parameters.
      folds: whether it is given the number of a fold.
    """

    def __init__(self, train_fn: Callable[..., Any], space: Space, *, folds: bool):
        self.train_fn, self.space, self.folds = train_fn, space, folds
        self.shared: dict[int, tuple[Any, Array]] = {}
        self._call = adapt(train_fn, space.names, folds=folds)
        self._groups: dict[Any, Programs] = {}
        self._lock = threading.Lock()

    def of(self, static: Static, numbers: Mapping[str, Any]) -> Programs:
        """The programs of a group; of ``numbers`` the names and types matter alone."""
        name = name_of(static, numbers)
        with self._lock:
            found = self._groups.pop(name, None) or Programs(self, static, numbers)
            self._groups[name] = found  # the one that was used last is the last to go
            if len(self._groups) > _MOST:
                del self._groups[next(iter(self._groups))]
            return found

    def trace(self, static: Static, numbers: Mapping[str, Any]) -> Program:
        """The whole training of one member of a group."""
        return trace(self._call, self.space, static, numbers, fold=self.folds, shared=self.shared)


class Programs:
    """What was traced and compiled for one group; each form once, by whichever thread needs it first."""

    def __init__(self, source: Compiled, static: Static, numbers: Mapping[str, Any]):
        self._source, self._static, self._numbers = source, static, dict(numbers)
        self._lock = threading.Lock()
        self._whole: Program | None = None
        self._segments: Segments | None = None
        self._exact: dict[Any, Callable[..., Any]] = {}
        self._mapped: dict[int, Callable[..., Any]] = {}

    def whole(self) -> Program:
        """The training from its beginning to its end, traced."""
        with self._lock:
            return self._traced()

    def segments(self) -> Segments:
        """The parts of a :class:`Training`, traced."""
        with self._lock:
            return self._parts()

    def prepare(self, members: str) -> None:
        """Traces what :meth:`exact` or :meth:`mapped` will compile.

        By the caller's thread, since a function of the user's may depend on what JAX keeps to a thread.
        """
        with self._lock:
            self._of_one() if members == "exact" else self._traced()

    def exact(self, device: Any) -> Callable[..., Any]:
        """The program of one member on ``device``, ``(key, numbers, fold) -> (result, history)``."""
        with self._lock:
            if device not in self._exact:
                self._exact[device] = self._of_one().exact(device)
            return self._exact[device]

    def mapped(self, devices: Sequence[Any], members: int) -> tuple[int, Callable[..., Any]]:
        """A program for at least so many members, and for how many."""
        members = -(-members // len(devices)) * len(devices)
        with self._lock:
            # Computing up to twice as many is cheaper than compiling anew.
            sizes = sorted(size for size in self._mapped if members <= size <= 2 * members)
            if not sizes:
                self._mapped[members] = self._traced().mapped(devices, members)
            size = sizes[0] if sizes else members
            return size, self._mapped[size]

    def _of_one(self) -> Program | Segments:
        """A Training is run by the executables that prune, since only the same ones give the same bits."""
        return self._parts() if isinstance(self._source.train_fn, Training) else self._traced()

    def _parts(self) -> Segments:
        training, space = self._source.train_fn, self._source.space
        assert isinstance(training, Training)
        if self._segments is None:
            self._segments = Segments(
                training,
                space,
                self._static,
                self._numbers,
                fold=self._source.folds,
                shared=self._source.shared,
            )
        return self._segments

    def _traced(self) -> Program:
        if self._whole is None:
            self._whole = self._source.trace(self._static, self._numbers)
        return self._whole


def name_of(static: Static, numbers: Mapping[str, Any]) -> Any:
    """What tells groups apart; by how values are written, since True is 1 and 1 is 1.0 for Python."""
    return repr(static), tuple(numbers)
