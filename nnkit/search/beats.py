"""Which workers of a study live: each beats, and each watches by its own clock whether the others do."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, Any

from nnkit.search.presence import Presence, is_gone, this_machine

if TYPE_CHECKING:
    import optuna

__all__ = ["Beats", "Watch", "worker_name"]

_KEY = "worker:"


class Watch:
    """For how many seconds each of several signs has stayed the same, as one observer saw it.

    The signs of other machines are only compared with each other, and seconds are the observer's own, so that
    it does not matter what their clocks say. A pause between two looks counts for ``longest`` seconds at most:
    an observer that was stopped has seen nothing in the meantime, and must look again before it judges.
    """

    def __init__(self, longest: float, clock: Callable[[], float] = time.monotonic):
        self._longest, self._clock = longest, clock
        self._last = clock()
        self._seen: dict[Hashable, tuple[Any, float]] = {}

    def look(self, signs: Mapping[Any, Any]) -> None:
        now = self._clock()
        passed, self._last = min(now - self._last, self._longest), now
        before = self._seen
        # What is not there any more is forgotten, and begins anew when it comes back.
        self._seen = {
            name: (sign, before[name][1] + passed if name in before and before[name][0] == sign else 0.0)
            for name, sign in signs.items()
        }

    def unchanged(self, name: Hashable) -> float:
        return self._seen[name][1] if name in self._seen else 0.0


class Beats:
    """The beats of one worker, and what it sees of the others'.

    A beat is the study's user attribute ``worker:<id>``: a number that grows, by a thread that also looks.
    """

    def __init__(self, study: optuna.Study, worker: str, interval: float, grace: float):
        self._study, self._worker, self._interval, self._grace = study, worker, interval, grace
        self._watch = Watch(2 * interval)
        self._notes: dict[str, Any] = {}
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._count = 0
        self._presence: Presence | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        # First the lock, then the beat that speaks of it: who is known and not locked is gone.
        self._presence = Presence(self._worker)
        try:
            self._beat(ended=False)
        except BaseException:
            self._presence.close()
            raise
        self._thread = threading.Thread(target=self._keep_on, name="nnkit search beats", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            # It may be waiting for a server that is away; then it ends with the process.
            self._thread.join(timeout=self._interval)
        try:
            self._beat(ended=True)
        finally:
            if self._presence is not None:
                self._presence.close()

    def look(self) -> list[optuna.trial.FrozenTrial]:
        """Looks at all workers and at the trials that run; returns the study's trials."""
        trials = self._study.get_trials(deepcopy=False)
        with self._lock:
            self._notes = {
                name.removeprefix(_KEY): note
                for name, note in self._study.user_attrs.items()
                if name.startswith(_KEY)
            }
            signs: dict[Any, Any] = {name: note.get("beat") for name, note in self._notes.items()}
            signs |= {t.number: (owner(t), t.datetime_start) for t in trials if t.state.name == "RUNNING"}
            self._watch.look(signs)
        return trials

    def is_dead(self, worker: str) -> bool:
        """Whether ``worker``, which has beaten, will not beat again, by what the last look saw."""
        note = self._notes.get(worker)
        if note is None or worker == self._worker:
            return False
        if note.get("ended") or is_gone(worker, note.get("machine")):
            return True
        return self._watch.unchanged(worker) > max(self._grace, 3 * note.get("every", 0.0))

    def is_abandoned(self, trial: optuna.trial.FrozenTrial) -> bool:
        """Whether the running ``trial`` has an owner that is dead, or for longer than the grace none."""
        name = owner(trial)
        if name is not None and name in self._notes:
            return self.is_dead(name)
        return name != self._worker and self._watch.unchanged(trial.number) > self._grace

    def _keep_on(self) -> None:
        while not self._stop.wait(self._interval):
            # A storage that is away longer than is waited for ends the worker where it asks or tells, not here.
            with contextlib.suppress(Exception):
                self._beat(ended=False)
                self.look()

    def _beat(self, *, ended: bool) -> None:
        self._count += 1
        note = {
            "beat": self._count,
            "every": self._interval,
            "ended": ended,
            "host": socket.gethostname(),
            "process": os.getpid(),
            "machine": this_machine(),
        }
        self._study.set_user_attr(_KEY + self._worker, note)


def owner(trial: optuna.trial.FrozenTrial) -> str | None:
    """The worker that has ``trial``, or had it last; None where nobody has."""
    return trial.user_attrs.get("worker")


def worker_name() -> str:
    """A name that no other worker has: host, process and chance."""
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
