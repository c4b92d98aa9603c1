"""A cohort side by side: its compiled program, kept for the next batch of the same make."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nnkit.search.asked import Asked, finished, keys_and_folds
from nnkit.search.cohort import Outcome, cohort
from nnkit.search.engine import Engine, Finished, Group
from nnkit.search.hoisting import hoisted
from nnkit.search.pool import Workers
from nnkit.search.training import Training
from nnkit.train.epochs import compiler_options

__all__ = ["mapped"]


def mapped(engine: Engine, training: Training, groups: list[Group], asked: Asked) -> Iterator[Finished]:
    """The trials, when the cohort is at its end."""
    groups = sorted(groups, key=lambda group: repr(group.static))  # so that a program is found again
    mesh = Mesh(np.asarray(engine.devices), ("trials",))
    rooms = _rooms(groups, len(engine.devices))
    arguments = _arguments(engine, groups, rooms, mesh)
    compiled = _kept(engine, training, groups, rooms, asked, arguments, mesh)
    with Workers(1) as workers:

        def train(compiled: Callable[[], Callable[..., Outcome]], device: Any) -> tuple[Outcome, float]:
            del device
            program = compiled()
            begun = time.perf_counter()
            found = workers.wait(program(*arguments))
            return jax.device_get(found), time.perf_counter() - begun

        ((_, (found, seconds)),) = workers.map(train, [compiled])
    share = seconds / max(
        1, sum(int(had[: len(g.indices)].sum()) for g, had in zip(groups, found.had, strict=True))
    )
    for group, histories, had in zip(groups, found.histories, found.had, strict=True):
        for i, trial in enumerate(group.indices):
            columns: Any = {name: column[i] for name, column in histories.items()}
            stopped = int(found.stopped[trial]) or None
            yield finished(engine, trial, columns, share * int(had[i].sum()), stopped)


def _rooms(groups: list[Group], devices: int) -> list[int]:
    """For how many trials each group's program has room: as many as there are, or the next power of two.

    Where a cohort has several groups their sizes change from batch to batch. What fills up is not trained.
    """

    def room(trials: int) -> int:
        size = trials if len(groups) == 1 else 1 << (trials - 1).bit_length()
        return -(-size // devices) * devices

    return [room(len(group.indices)) for group in groups]


def _arguments(engine: Engine, groups: list[Group], rooms: Sequence[int], mesh: Mesh) -> tuple[Any, ...]:
    """What the program of a cohort takes, each device its share of every group's trials."""
    trials = sum(len(group.indices) for group in groups)
    columns, places = [], []
    for group, room in zip(groups, rooms, strict=True):
        spare = room - len(group.indices)
        rows = group.numbers + [group.numbers[-1]] * spare
        columns.append({path: _column([row[path] for row in rows]) for path in rows[0]})
        places.append(np.asarray(group.indices + [trials] * spare, np.int32))
    keys, folds = keys_and_folds(engine)
    common = jnp.stack(keys), None if folds is None else np.asarray(folds, np.int32)
    shared = NamedSharding(mesh, P("trials"))
    return *jax.device_put(common, NamedSharding(mesh, P())), *jax.device_put((columns, places), shared)


def _column(values: list[Any]) -> np.ndarray:
    return np.asarray(values, jax.dtypes.canonicalize_dtype(type(values[0])))


def _kept(
    engine: Engine,
    training: Training,
    groups: list[Group],
    rooms: Sequence[int],
    asked: Asked,
    arguments: tuple[Any, ...],
    mesh: Mesh,
) -> Callable[[], Callable[..., Outcome]]:
    """What gives the cohort's program: the one that there is, or one that is compiled then."""
    programs = _PROGRAMS.setdefault(engine, {})
    trials = sum(len(group.indices) for group in groups)
    makes = [(repr(g.static), *g.numbers[0], room) for g, room in zip(groups, rooms, strict=True)]
    name = asked, trials, tuple(makes)
    if name not in programs:
        several = len(engine.devices) > 1
        most = asked.pruner.sizes(trials, training.epochs)
        local = [room // len(engine.devices) for room in rooms]
        apply = cohort(
            training,
            engine.space,
            [group.static for group in groups],
            asked.pruner,
            trials=trials,
            sizes=[sorted({room, *(min(size, room) for size in most)}) for room in local],
            metric=asked.metric,
            mode=asked.mode,
            fold=engine.folds is not None,
            axis="trials" if several else None,
        )
        if several:
            specs: Any = Outcome(P("trials"), P("trials"), P())  # type: ignore[arg-type]
            shares = P(), P(), P("trials"), P("trials")
            apply = jax.shard_map(apply, mesh=mesh, in_specs=shares, out_specs=specs, check_vma=False)
        # Traced by the caller's thread, whose settings JAX keeps to that thread; compiled by the other.
        traced = hoisted(apply, *arguments)
        options = compiler_options(engine.devices[0].platform)

        @functools.cache
        def compiled() -> Callable[..., Outcome]:
            constants = jax.device_put(traced.constants, NamedSharding(mesh, P()))
            program = jax.jit(traced.apply, compiler_options=options)
            return functools.partial(program.lower(constants, *arguments).compile(), constants)

        programs[name] = compiled
        if len(programs) > _MOST:
            del programs[next(iter(programs))]
    return programs[name]


_PROGRAMS: WeakKeyDictionary[Engine, dict[Any, Callable[[], Callable[..., Outcome]]]] = WeakKeyDictionary()
"""An engine's cohorts by what makes them: a batch of the same make needs no compilation."""

_MOST = 16
