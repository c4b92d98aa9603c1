"""What a run is asked for, checked on the host and taken apart into what is static and what is traced."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend.core import get_opaque_trace_state

from nnkit.data import Source, check_batch_size
from nnkit.train.begin import check_beginning
from nnkit.train.preflight import (
    arrays_of,
    check_monitored,
    check_steps,
    check_suited,
    number_of_examples,
    specs,
    whole,
)
from nnkit.train.stopping import EarlyStopping, check_rule
from nnkit.types import Array, PyTree, Trainer, TrainState

__all__ = ["Job", "Plan", "joined", "plan_of", "prepare"]


class Plan(NamedTuple):
    """What is static in a run.

    ``alone`` says that it is a program of its own, which nothing maps or differentiates.
    """

    epochs: int
    batch_size: int
    full: int
    tail: int
    shuffle: bool
    remat: bool
    done: int | None  # steps before the run; None where they are traced
    alone: bool

    @property
    def steps(self) -> int:
        return self.full + (self.tail > 0)


class Job(NamedTuple):
    """A run that was checked: what :func:`train_epochs` takes."""

    ts: TrainState  # a spec of it where the run begins anew and is alone
    example: PyTree
    arrays: PyTree
    held_out: PyTree
    rule: EarlyStopping | None
    numbers: Any
    plan: Plan

    @property
    def alone(self) -> bool:
        return self.plan.alone


_OUTERMOST = get_opaque_trace_state()


def prepare(
    name: str,
    trainer: Trainer,
    key: Array | None,
    data: Any,
    epochs: int,
    *,
    batch_size: int,
    validation: Any,
    shuffle: bool,
    drop_last: bool,
    early_stopping: EarlyStopping | None,
    remat: bool,
    state: TrainState | None = None,
) -> Job:
    """All that can be checked before a run, with ``name`` for the messages."""
    epochs = whole(epochs, f"{name}(epochs=...)")
    arrays = _arrays(name, data, "the training data")
    n = number_of_examples(arrays)
    check_batch_size(batch_size, n)
    held_out = None if validation is None else _arrays(name, validation, "the validation data")
    x = specs(arrays[0] if isinstance(arrays, tuple) else arrays, 1)
    x = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), x)
    alone = get_opaque_trace_state() == _OUTERMOST
    ts = _first(name, trainer, x, key, state, alone)
    done = 0 if state is None else None if isinstance(state.step, Tracer) else int(state.step)
    plan = plan_of(epochs, batch_size, n, shuffle, drop_last, remat=bool(remat), done=done, alone=alone)
    if done is not None and done >= epochs * plan.steps:
        raise ValueError(
            f"{name}(epochs={epochs}) has nothing to do: the state has taken {done} steps, which are "
            f"{done / plan.steps:g} epochs; epochs counts those too"
        )
    for part, what in ((arrays, "the training data"), (held_out, "the validation data")):
        if part is not None and not _is_traced(part):
            check_suited(trainer, ts, part, what)
    names = check_steps(trainer, ts, arrays, plan.batch_size, plan.tail)
    names = check_monitored(trainer, ts, names, held_out)
    check_rule(name, early_stopping, names)
    rule, numbers = _split(early_stopping)
    arrays, held_out = jax.tree.map(jnp.asarray, (arrays, held_out))
    return Job(ts, x, arrays, held_out, rule, numbers, plan)


def plan_of(
    epochs: int,
    batch_size: int,
    n: int,
    shuffle: bool,
    drop_last: bool,
    *,
    remat: bool = False,
    done: int | None = 0,
    alone: bool = True,
) -> Plan:
    """The plan of a run on ``n`` examples."""
    full, tail = divmod(n, batch_size)
    tail = 0 if drop_last else tail
    return Plan(epochs, int(batch_size), full, tail, bool(shuffle), remat, done, alone)


def _is_traced(arrays: PyTree) -> bool:
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(arrays))


def _arrays(name: str, data: Any, what: str) -> PyTree:
    if isinstance(data, Source):
        raise TypeError(
            f"{name} takes {what} as arrays and got a source of batches: a program without a host loop cannot "
            "wait for one, pass it to train.fit"
        )
    arrays = getattr(data, "arrays", data)
    if not _is_traced(arrays):
        return arrays_of(data, what)
    return tuple(arrays) if isinstance(arrays, list) else arrays


def _first(
    name: str, trainer: Trainer, x: PyTree, key: Array | None, state: TrainState | None, alone: bool
) -> TrainState:
    check_beginning(key, state, name=name, write=f"{name}(trainer, jax.random.key(0), data, epochs)")
    if state is not None:
        return state
    assert key is not None
    return jax.eval_shape(trainer.init, key, x) if alone else trainer.init(key, x)


def _split(rule: EarlyStopping | None) -> tuple[EarlyStopping | None, Any]:
    """The rule without its numbers, which is static, and its numbers, which may be traced."""
    if rule is None:
        return None, None
    numbers = (rule.patience, rule.min_delta, rule.start_from_epoch, rule.baseline)
    return joined(rule, (None,) * 4), numbers


def joined(rule: EarlyStopping, numbers: Any) -> EarlyStopping:
    """A job's rule with its numbers."""
    patience, min_delta, start_from_epoch, baseline = numbers
    return rule._replace(
        patience=patience, min_delta=min_delta, start_from_epoch=start_from_epoch, baseline=baseline
    )
