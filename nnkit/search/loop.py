"""The loop of a sweep: ask, copy what is known, train the rest, tell, until enough trials are there."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import FrameType
from typing import Any

from nnkit.search.engine import Engine, Finished
from nnkit.search.progress import Callback, View
from nnkit.search.records import Trial, configuration, known, tell, tell_repeat
from nnkit.search.study import Study
from nnkit.search.workers import Lease, counted
from nnkit.train.interrupt import Wish, interruptible
from nnkit.train.runs import provenance

__all__ = ["MOST", "Loop"]

Train = Callable[[Sequence[Mapping[str, Any]]], Iterator[Finished]]


class Loop:
    """One worker's part of a study.

    Args:
      study: the record.
      engine: what knows the space and how trials are run.
      train: trains a batch: the engine's ``run``, or with a pruner.
      target: how many trials the study shall have.
      batch: how many are asked for together.
      grows: whether ``batch`` is only how many at first, and then as many as take some ten seconds.
      together: whether a batch is told as a whole, because its trials were judged by each other. Were a part of
        it told when a worker dies, the rest would be judged among themselves.
      max_time: seconds after which nothing more is begun.
      callbacks: called with (event, view).
    """

    def __init__(
        self,
        study: Study,
        engine: Engine,
        train: Train,
        *,
        target: int,
        batch: int,
        grows: bool,
        together: bool,
        max_time: float | None,
        callbacks: Sequence[Callback],
    ):
        self.study, self.engine, self.train, self.target = study, engine, train, target
        self.max_time, self.callbacks = max_time, callbacks
        self._size, self._grows, self._together = batch, grows, together
        self._begun = time.monotonic()
        self._done = len(counted(study.optuna))
        self._running = 0
        self._provenance: Future[dict[str, Any]] = Future()

    def run(self) -> None:
        """Goes on until the study has its trials, time is up, or somebody wishes it to end.

        Raises:
          KeyboardInterrupt: for Ctrl-C, SystemExit for SIGTERM. What is finished is kept by then, and what was
            begun is released for whoever goes on.
        """
        with interruptible() as wish, ThreadPoolExecutor(1) as aside:
            self._provenance = aside.submit(provenance)  # asks git, while the first program is compiled
            self._call("start")
            with Lease(self.study.optuna) as lease:
                while not lease.finished(self.target) and not self._over(wish):
                    lease.reclaim()
                    trials, flats = self._asked(lease)
                    if trials:
                        self._batch(lease, trials, flats, wish)
                    else:
                        lease.pause()  # Others have begun what is left, and may die with it.
            where = f"which are kept in {self.study.where}: call sweep again to go on"
            if self.study.where == "memory":
                where = "which were in memory alone: pass run_dir= to keep them"
            wish.grant(f"stopped with {self._done} of {self.target} trials, {where}")
        self._call("end")

    def _asked(self, lease: Lease) -> tuple[list[Any], list[dict[str, Any]]]:
        """The trials of the next batch, and their hyper-parameters."""
        flats: list[dict[str, Any]] = []

        def then(trial: Any) -> None:  # before the next one is drawn, so that the sampler knows of it
            flats.append(self.engine.space.suggest(trial))

        return lease.ask(self.target, self._size, then=then), flats

    def _batch(self, lease: Lease, trials: list[Any], flats: list[dict[str, Any]], wish: Wish) -> None:
        began = time.monotonic()
        self._done = len(counted(self.study.optuna))
        self._running = len(trials)
        new: dict[str, list[int]] = {}  # the trials of each configuration that nobody has trained
        for i, flat in enumerate(flats):
            original = known(self.study, flat, refresh=not i)
            if original is None:
                new.setdefault(configuration(flat), []).append(i)
            else:
                self._told(tell_repeat(self.study, trials[i], flat, original, worker=lease.id))
        self._call("batch")
        same = list(new.values())
        finished = self.train([flats[first] for first, *_ in same]) if same else iter(())
        with contextlib.closing(self._results(finished, wish)) as results:
            for result in results:
                self._tell(lease, [(trials[i], flats[i]) for i in same[result.index]], result)
        self._running = 0
        if self._grows:
            self._size = _next_size(self._size, len(trials), time.monotonic() - began, self.engine.workers)

    def _results(self, finished: Iterator[Finished], wish: Wish) -> Generator[Finished, None, None]:
        """What is finished, until somebody wishes an end."""
        held = []
        try:
            while self._together or not self._over(wish):
                with _promptly(wish):
                    result = next(finished, None)
                if result is None:
                    break
                if self._together:
                    held.append(result)
                else:
                    yield result
        except _Now:
            held.clear()
        finally:
            close = getattr(finished, "close", None)
            if close is not None:
                close()
        yield from held

    def _tell(self, lease: Lease, same: list[tuple[Any, Any]], result: Finished) -> None:
        """Tells the trials of one configuration: the first that is still ours was trained, the others repeat it."""
        original = None
        for trial, flat in same:
            if original is None:
                found = self._provenance.result()
                original = tell(self.study, trial, flat, result, provenance=found, worker=lease.id)
                self._told(original)
            else:
                self._told(tell_repeat(self.study, trial, flat, original, worker=lease.id))

    def _told(self, trial: Trial | None) -> None:
        self._running -= 1
        if trial is not None:  # None: another worker took it for lost, and has it now
            self._done += 1
            self._call("trial", trial)

    def _over(self, wish: Wish) -> bool:
        late = self.max_time is not None and time.monotonic() - self._begun > self.max_time
        return late or wish.signal is not None

    def _call(self, event: str, trial: Trial | None = None) -> None:
        if not self.callbacks:
            return
        seconds = time.monotonic() - self._begun
        view = View(self.study, trial, self.target, self._done, self._running, self.engine.choice, seconds)
        for callback in self.callbacks:
            callback(event, view)


MOST = 1024
"""Trials that are asked for together at most: there is no more to be gained, and a list of them to be kept."""

_SECONDS = 10.0
"""How long a batch should take: what a killed worker loses, and what a faster one cannot take over."""


def _next_size(size: int, trials: int, seconds: float, workers: int) -> int:
    wanted = trials * _SECONDS / max(seconds, 1e-3)
    return max(workers, min(math.ceil(wanted), 4 * size, MOST))


class _Now(BaseException):
    """Raised by a signal where the main thread waits for a trial."""


@contextlib.contextmanager
def _promptly(wish: Wish) -> Iterator[None]:
    """While it lasts, a signal that ``wish`` notes is raised at once: a trial may take an hour.

    Only around the wait: a signal that interrupts a write to the storage would leave it half done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    noting: dict[int, Any] = {}

    def act(number: int, frame: FrameType | None) -> None:
        noting[number](number, frame)
        if wish.signal is not None:
            raise _Now

    for number in (signal.SIGINT, signal.SIGTERM):
        handler = signal.getsignal(number)
        if callable(handler):
            noting[number] = handler
            signal.signal(number, act)
    try:
        yield
    finally:
        if wish.signal is None:  # a wish has given the signals back to whom they belonged
            for number, handler in noting.items():
                signal.signal(number, handler)
