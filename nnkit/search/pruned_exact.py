"""A cohort member by member: threads train up to the next decision, and the host decides."""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnkit.search.asked import Asked, finished, keys_and_folds
from nnkit.search.engine import Engine, Finished, Group
from nnkit.search.member import Member
from nnkit.search.pool import Workers
from nnkit.search.pruning import curves, decided
from nnkit.search.segments import Segments
from nnkit.types import Array

__all__ = ["exact"]


class _Step(NamedTuple):
    """A member that is to go on."""

    place: int
    segments: Segments
    numbers: Mapping[str, Any]
    member: Member | None
    until: int


def exact(
    engine: Engine, groups: list[tuple[Group, Segments]], epochs: int, asked: Asked
) -> Iterator[Finished]:
    """The trials as they are finished or stopped."""
    keys, folds = keys_and_folds(engine)
    of = {t: (s, n) for group, s in groups for t, n in zip(group.indices, group.numbers, strict=True)}
    books = _Books(len(of), len(keys), epochs)
    with Workers(engine.workers, engine.devices) as workers:

        def go_on(step: _Step, device: Any) -> tuple[Member, _Seen, float]:
            stages, member = step.segments.on(device), step.member
            begun = time.perf_counter()
            if member is None:
                fold = None if folds is None else folds[step.place]
                member = stages.begin(keys[step.place], step.numbers, fold)
            member, ended = stages.advance(member, step.numbers, step.until)
            seen = workers.wait(_Seen(member.history[asked.metric], member.had, ended))
            return member, jax.device_get(seen), time.perf_counter() - begun

        def told(trial: int, stopped: int | None) -> Finished:
            segments, numbers = of[trial]
            close = segments.on(engine.devices[0]).close
            columns = [close(books.members.pop((trial, p)), numbers)[1] for p in range(len(keys))]
            columns = jax.tree.map(lambda *rows: np.stack(rows), *jax.device_get(columns))
            return finished(engine, trial, columns, float(books.seconds[trial].sum()), stopped)

        for until in (*asked.pruner.decisions(epochs), epochs):
            due = [(t, p) for t in sorted(of) for p in range(len(keys)) if books.due[t, p]]
            steps = [_Step(p, *of[t], books.members.get((t, p)), until) for t, p in due]
            left = Counter(trial for trial, _ in due)
            for position, found in workers.map(go_on, steps):
                trial, place = due[position]
                books.enter(trial, place, *found)
                left[trial] -= 1
                if not left[trial] and not books.due[trial].any():
                    yield told(trial, None)
            if until < epochs:
                for trial in books.stop(asked, until):
                    yield told(trial, until)


class _Seen(NamedTuple):
    """What the host asks about a member."""

    row: Any
    had: Any
    ended: Any


class _Books:
    """What the host knows of a cohort in exact mode; arrays have a row for each trial, one entry a member."""

    def __init__(self, trials: int, members: int, epochs: int):
        self.members: dict[tuple[int, int], Member] = {}
        self.rows = np.full((trials, members, epochs), np.nan)
        self.had, self.ended = np.zeros((trials, members), np.int32), np.zeros((trials, members), bool)
        self.seconds, self.alive = np.zeros((trials, members)), np.ones(trials, bool)

    @property
    def due(self) -> np.ndarray:
        """Which members have more to do."""
        return self.alive[:, None] & ~self.ended & (self.had < self.rows.shape[-1])

    def enter(self, trial: int, place: int, member: Member, seen: _Seen, seconds: float) -> None:
        at = trial, place
        self.members[at] = member
        self.rows[at], self.had[at], self.ended[at] = seen
        self.seconds[at] += seconds

    def stop(self, asked: Asked, done: int) -> list[int]:
        """Asks the rule, and returns the trials that it stops."""
        at = (jnp.asarray(a) for a in (self.rows, self.had, self.ended, self.alive))
        before, self.alive = self.alive, np.array(_decided(asked, *at, jnp.int32(done)))
        return [int(trial) for trial in np.flatnonzero(before & ~self.alive & ~self.ended.all(axis=1))]


@functools.partial(jax.jit, static_argnums=0)
def _decided(asked: Asked, rows: Array, had: Array, ended: Array, alive: Array, done: Array) -> Array:
    return decided(asked.pruner, curves(rows, had, ended, asked.mode), alive, done)
