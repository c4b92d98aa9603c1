"""``Engine``: trains batches of trials as compiled programs."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from nnkit.search.compiled import Compiled, Programs, name_of
from nnkit.search.pool import Workers
from nnkit.search.preflight import check_seeds, check_training, how_to_run
from nnkit.search.program import Program, Static
from nnkit.search.segments import Segments
from nnkit.search.space import Space, as_space
from nnkit.train.preflight import whole
from nnkit.types import PyTree

__all__ = ["Engine", "Finished"]


class Finished(NamedTuple):
    """A trial that was trained, all its seeds and folds.

    Attributes:
      index: its position in the batch.
      history: metrics by name, arrays of (seeds, [folds,] epochs), or (seeds, [folds]) of scalars.
      seconds: of device time: exact, the sum over its members; mapped, its share of the program's.
        Compilation is not in it.
      stopped: after how many epochs it was pruned; None where it was not.
      how: "exact" or "mapped".
    """

    index: int  # type: ignore[assignment]  # a tuple's own method of this name is of no use here
    history: dict[str, np.ndarray]
    seconds: float
    stopped: int | None
    how: str


class Group(NamedTuple):
    """The trials of a batch that share a program.

    Attributes:
      static: the values they share.
      indices: their positions in the batch.
      numbers: of each, its traced values.
    """

    static: Static
    indices: list[int]
    numbers: list[dict[str, Any]]


class Engine:
    """Trains trials, each with several seeds and folds, in as few compiled programs as there can be.

    A member is one training: a trial with one seed and one fold. The members that agree in what is static
    share a program, of which the traced hyper-parameters, the seed's key and the fold are arguments.

    Exact: the program is compiled for one member, and threads call it, one member at a time each. What a
    member gives is a function of its hyper-parameters, seed and fold alone, bit for bit: no matter how many
    threads there are, which members are beside it, and in which order. Mapped: the program is compiled for
    all members of a batch side by side by ``jax.vmap``, shared out over devices. Then XLA adds up in another
    order, and members are equal to their exact selves to rounding, see docs/search.md for how near.

    Args:
      train_fn: ``train_fn(key, hparams) -> history`` or ``(result, history)``, pure, and traced; or in one
        of the forms of :func:`adapt`.
      space: of its hyper-parameters.
      seeds: the member with seed s gets ``jax.random.key(s)``; the same seeds for all trials.
      folds: how many; then ``train_fn`` is called with ``fold=`` too, an int32 from 0 on.
      members: "exact" or "mapped"; by default exact on a CPU, mapped on accelerators.
      workers: how many threads, in exact mode; by default one for each core of a CPU, and at least one for
        each device.
      devices: what to train on; by default the first CPU, or all accelerators.

    Raises:
      ValueError, TypeError: for arguments of which one cannot be meant, or a signature of ``train_fn`` that
        does not go with the space.

    >>> def train_fn(key, hparams):
    ...     return {"val_loss": (hparams["lr"] - 0.1) ** 2 + 0.01 * jax.random.uniform(key)}
    >>> engine = search.Engine(train_fn, {"lr": search.log_uniform(1e-3, 1.0)}, seeds=[0, 1])
    >>> trials = sorted(engine.run([{"lr": 0.1}, {"lr": 0.5}]))
    >>> [trial.history["val_loss"].shape for trial in trials]
    [(2,), (2,)]
    """

    def __init__(
        self,
        train_fn: Callable[..., Any],
        space: Mapping[str, Any] | Space,
        *,
        seeds: Sequence[int],
        folds: int | None = None,
        members: Literal["exact", "mapped"] | None = None,
        workers: int | None = None,
        devices: Sequence[Any] | None = None,
    ):
        self.train_fn, self.space = train_fn, as_space(space)
        self.seeds = check_seeds(seeds)
        self.folds = None if folds is None else whole(folds, "folds", 2)
        self.members, self.workers, self.devices, self.choice = how_to_run(members, workers, devices)
        self._compiled = Compiled(train_fn, self.space, folds=folds is not None)
        self._keys = {seed: jax.random.key(seed) for seed in self.seeds}

    def check(self, metric: str | None = None) -> None:
        """Looks for everything that can be wrong with the training function before anything is trained.

        It is traced with a value of each hyper-parameter, and once for each kind of a conditional.

        Raises:
          ValueError, TypeError: it does not read a hyper-parameter of the space, or reads one that is not
            there; it needs the value of a traced one in Python; it returns no history, or none with ``metric``.
        """
        check_training(self.space, self.traced, metric)

    def traced(self, flat: Mapping[str, Any], python: frozenset[str] = frozenset()) -> Program:
        """The program of the group that ``flat`` belongs to, traced; ``python`` are paths that are not."""
        static, numbers = self._split(flat)
        if not python:
            return self._compiled.of(static, numbers).whole()
        return self._compiled.trace(*_fixed(static, numbers, python))

    def segments(self, flat: Mapping[str, Any]) -> Segments:
        """The executables of ``flat``'s group that take a member from epoch to epoch; for a :class:`Training`."""
        return self._compiled.of(*self._split(flat)).segments()

    def groups(self, flats: Sequence[Mapping[str, Any]]) -> list[Group]:
        """The trials by the program they share, groups and trials in the order of the batch."""
        groups: dict[Any, Group] = {}
        for index, flat in enumerate(flats):
            static, numbers = self._split(flat)
            group = groups.setdefault(name_of(static, numbers), Group(static, [], []))
            group.indices.append(index)
            group.numbers.append(numbers)
        return list(groups.values())

    def run(self, flats: Sequence[Mapping[str, Any]]) -> Iterator[Finished]:
        """Trains the trials, and yields each as it is finished.

        Args:
          flats: of each trial the values by path, those that are active.

        Raises:
          ValueError, TypeError: for values that the space does not have. Whatever ``train_fn`` raises when it
            is traced.
        """
        flats = [self.space.check(flat) for flat in flats]
        groups = self.groups(flats)
        return self._exact(groups) if self.members == "exact" else self._mapped(groups)

    def retrain(
        self, flat: Mapping[str, Any], seed: int, fold: int | None = None
    ) -> tuple[PyTree, dict[str, np.ndarray]]:
        """Trains one member again: ``(result, history)``, the result None where train_fn returns a history alone.

        By the very program that :meth:`run` calls in exact mode, so the history is the recorded one bit for
        bit, given the same machine and versions. What was trained in mapped mode comes back to rounding.

        Args:
          flat: its values by path.
          seed: any.
          fold: from 0 on; with folds it is needed.
        """
        self._check_fold(fold)
        check_seeds([seed])
        static, numbers = self._split(self.space.check(flat))
        programs = self._compiled.of(static, numbers)
        programs.prepare("exact")

        def train(seed: int, device: Any) -> tuple[PyTree, dict[str, Any]]:
            return workers.wait(programs.exact(device)(jax.random.key(seed), numbers, fold))

        # A thread of its own, since the main one could not be interrupted within a compiled program.
        with Workers(1, self.devices[:1]) as workers:
            ((_, (result, history)),) = workers.map(train, [seed])
        return result, _host(history)

    def _exact(self, groups: list[Group]) -> Iterator[Finished]:
        each = len(self.seeds) * (self.folds or 1)
        parts: dict[int, dict[tuple[int, int], tuple[dict[str, np.ndarray], float]]] = {}
        with Workers(self.workers, self.devices) as workers:

            def train(task: _Task, device: Any) -> tuple[_Task, dict[str, np.ndarray], float]:
                member = task.programs.exact(device)
                begun = time.perf_counter()
                fold = None if self.folds is None else task.fold
                _, history = member(self._keys[self.seeds[task.seed]], task.numbers, fold)
                history = _host(workers.wait(history))
                return task, history, time.perf_counter() - begun

            for _, (task, history, seconds) in workers.map(train, self._in_turns(groups)):
                found = parts.setdefault(task.trial, {})
                found[task.seed, task.fold] = history, seconds
                if len(found) == each:
                    histories = [found[at][0] for at in sorted(found)]
                    columns = {name: np.stack([h[name] for h in histories]) for name in history}
                    yield self._finished(task.trial, columns, sum(seconds for _, seconds in found.values()))
                    del parts[task.trial]

    def _in_turns(self, groups: list[Group]) -> Iterator[_Task]:
        """Members of several groups in turn, so that threads compile different programs at once.

        A group is traced when one before it is through, so that of hundreds only a few are there at a time.
        """
        coming = (deque(self._tasks(group)) for group in groups)
        some: deque[deque[_Task]] = deque()
        while True:
            tasks = next(coming, None) if len(some) < 2 * self.workers else None
            if tasks is None:
                if not some:
                    return
                tasks = some.popleft()
            yield tasks.popleft()
            if tasks:
                some.append(tasks)

    def _mapped(self, groups: list[Group]) -> Iterator[Finished]:
        each = len(self.seeds) * (self.folds or 1)
        with Workers(1) as workers:

            def train(tasks: list[_Task], device: Any) -> tuple[list[_Task], dict[str, np.ndarray], float]:
                del device
                return tasks, *self._side_by_side(tasks, workers)

            for _, (tasks, columns, seconds) in workers.map(train, map(self._tasks, groups)):
                for at in range(0, len(tasks), each):
                    mine = {name: column[at : at + each] for name, column in columns.items()}
                    yield self._finished(tasks[at].trial, mine, seconds * each / len(tasks))

    def _side_by_side(self, tasks: list[_Task], workers: Workers) -> tuple[dict[str, np.ndarray], float]:
        size, program = tasks[0].programs.mapped(self.devices, len(tasks))
        # What fills up the devices is thrown away.
        tasks = tasks + [tasks[-1]] * (size - len(tasks))
        begun = time.perf_counter()
        keys = jax.numpy.stack([self._keys[self.seeds[task.seed]] for task in tasks])
        numbers = {path: [task.numbers[path] for task in tasks] for path in tasks[0].numbers}
        columns = _host(workers.wait(program(keys, numbers, [task.fold for task in tasks])))
        return columns, time.perf_counter() - begun

    def _finished(self, index: int, columns: dict[str, np.ndarray], seconds: float) -> Finished:
        """The trial whose members are the rows of the columns."""
        first = (len(self.seeds),) if self.folds is None else (len(self.seeds), self.folds)
        history = {name: column.reshape(*first, *column.shape[1:]) for name, column in columns.items()}
        return Finished(index, history, seconds, None, self.members)

    def _tasks(self, group: Group) -> list[_Task]:
        """The group's members, those of a trial together, and their program, traced."""
        programs = self._compiled.of(group.static, group.numbers[0])
        programs.prepare(self.members)
        return [
            _Task(programs, numbers, index, seed, fold)
            for index, numbers in zip(group.indices, group.numbers, strict=True)
            for seed in range(len(self.seeds))
            for fold in range(self.folds or 1)
        ]

    def _split(self, flat: Mapping[str, Any]) -> tuple[Static, dict[str, Any]]:
        static, numbers = self.space.split(flat)
        whole = {path: self.space.dimensions[path].dtype.kind == "i" for path in numbers}
        return static, {path: int(n) if whole[path] else float(n) for path, n in numbers.items()}

    def _check_fold(self, fold: int | None) -> None:
        if self.folds is None and fold is not None:
            raise ValueError(f"retrain got fold={fold}, and the search has no folds: leave it out")
        if self.folds is not None and (fold is None or not 0 <= fold < self.folds):
            raise ValueError(f"retrain(fold=...) must be a fold from 0 to {self.folds - 1}, got {fold!r}")


class _Task(NamedTuple):
    programs: Programs
    numbers: dict[str, Any]
    trial: int
    seed: int
    fold: int


def _fixed(static: Static, numbers: dict[str, Any], python: frozenset[str]) -> tuple[Static, dict[str, Any]]:
    """``static`` and ``numbers`` with those of ``python`` among the static ones."""
    taken = tuple((path, number) for path, number in numbers.items() if path in python)
    return (*static, *taken), {path: number for path, number in numbers.items() if path not in python}


def _host(history: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in history.items()}
