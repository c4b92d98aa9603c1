"""``run``: a whole training run as one pure function of a key, data and hyper-parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import get_opaque_trace_state

from nnkit.checks import check_key
from nnkit.data import Source, check_batch_size, shuffled_indices
from nnkit.optim import report
from nnkit.train.epochs import take
from nnkit.train.evaluate import _evaluate
from nnkit.train.means import epoch_means
from nnkit.train.preflight import (
    arrays_of,
    check_monitored,
    check_steps,
    check_suited,
    checked_batch_size,
    number_of_examples,
    specs,
    whole,
)
from nnkit.train.stopping import EarlyStopping, begin, check_monitor, restored, update
from nnkit.types import Array, PyTree, Trainer, TrainState

__all__ = ["Job", "Plan", "compiler_options", "platform_of", "prepare", "run", "train_epochs"]


def run(
    trainer: Trainer,
    key: Array | None,
    data: Any,
    epochs: int,
    *,
    batch_size: int = 64,
    validation: Any = None,
    shuffle: bool = True,
    drop_last: bool = False,
    early_stopping: EarlyStopping | None = None,
    state: TrainState | None = None,
    remat: bool = False,
) -> tuple[TrainState, dict[str, Array]]:
    """A whole training run as one pure function, equal to :func:`fit` and made of arrays alone.

    It can be jitted, mapped over keys and hyper-parameters (make the trainer within the mapped function),
    and differentiated, forward and in reverse, with respect to whatever the trainer, the data or ``state``
    were computed from. Early stopping and plateaus are part of the program: an epoch after the stop is not
    computed, or under ``jax.vmap`` computed and thrown away.

    Called outside of any transformation it compiles itself, as ``fit`` compiles its steps, and gives
    ``fit``'s parameters bit for bit; within another program the arithmetic is the same, and XLA may
    round it differently.

    Args:
      trainer: from :func:`trainer`.
      key: the run's only source of randomness; None where ``state`` is given.
      data: a dataset or a pytree of arrays with one leading axis, as for ``fit``.
      epochs: how many passes the run has had at its end, those before ``state`` included.
      batch_size: examples in a step.
      validation: data on which the metrics are computed after each epoch, as ``val_...``.
      shuffle: whether each epoch has an order of its own.
      drop_last: whether to leave out a last batch that is not full.
      early_stopping: from :func:`early_stopping`; its numbers may be traced.
      state: where to go on from, or what to start with. A step that is traced must be that of an epoch's
        beginning; with another, nothing is trained and the whole history is NaN.
      remat: whether a derivative in reverse computes each epoch again from its beginning instead of
        keeping what every step of the run has left: memory of one epoch for a third more time.

    Returns:
      The final state, and the history by name, arrays of (epochs,): ``epoch`` from 1 on, ``step``, the
      training metrics and the validation metrics. The metrics of epochs that were not trained, before
      ``state`` or after the stop, are NaN.

    Raises:
      ValueError, TypeError: for data, labels, batch size, key or state that cannot be meant. Values that
        are traced are not looked at.

    One program for four learning rates:

    >>> x = jnp.linspace(-1, 1, 100)[:, None]
    >>> def final_loss(rate):
    ...     trainer = train.trainer(layers.dense(1), losses.mean_squared_error, optim.sgd(rate))
    ...     ts, history = train.run(trainer, jax.random.key(0), (x, 2 * x + 1), epochs=3, batch_size=10)
    ...     return history["loss"][-1]
    >>> rates = jnp.array([1e-3, 1e-2, 1e-1, 2.0])
    >>> int(jnp.argmin(jax.jit(jax.vmap(final_loss))(rates)))
    2

    and the derivative of what a rate leads to:

    >>> bool(jax.grad(final_loss)(1e-2) < 0)
    True
    """
    options = {
        "batch_size": batch_size,
        "validation": validation,
        "shuffle": shuffle,
        "drop_last": drop_last,
        "early_stopping": early_stopping,
        "remat": remat,
    }
    job = prepare("run", trainer, key, data, epochs, state=state, **options)
    ts = _init(trainer, key, job.example) if job.alone and state is None else job.ts
    program = _compiled(platform_of(job.arrays)) if job.alone else train_epochs
    return program(trainer, ts, job.arrays, job.held_out, job.numbers, rule=job.rule, plan=job.plan)


# A program of its own, as in fit, so that initial values have fit's bits.
@functools.partial(jax.jit, static_argnums=0)
def _init(trainer: Trainer, key: Array, x: PyTree) -> TrainState:
    return trainer.init(key, x)


@functools.cache
def _compiled(platform: str) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    return jax.jit(
        train_epochs, static_argnames=("trainer", "rule", "plan"), compiler_options=compiler_options(platform)
    )


def compiler_options(platform: str) -> dict[str, Any] | None:
    """Those of fit's steps; they bind only a program that is not within another or a transformation."""
    return {"xla_cpu_prefer_vector_width": 512} if platform == "cpu" else None


def platform_of(arrays: PyTree) -> str:
    """The platform that holds the arrays, which are not traced."""
    return next(iter(jax.tree.leaves(arrays)[0].devices())).platform


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
    full, tail = divmod(n, batch_size)
    tail = 0 if drop_last else tail
    plan = Plan(epochs, int(batch_size), full, tail, bool(shuffle), bool(remat), done, alone)
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
    if early_stopping is not None:
        if not isinstance(early_stopping, EarlyStopping):
            raise TypeError(
                f"{name}(early_stopping=...) takes a rule and got {early_stopping!r}: pass "
                "train.early_stopping('val_loss')"
            )
        check_monitor(early_stopping, names)
    rule, numbers = _split(early_stopping)
    arrays, held_out = jax.tree.map(jnp.asarray, (arrays, held_out))
    return Job(ts, x, arrays, held_out, rule, numbers, plan)


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
    if state is not None:
        if key is not None:
            raise TypeError(
                f"{name} got both a key and state=: the state carries its own key, pass None for the key"
            )
        if not isinstance(state, TrainState):
            raise TypeError(
                f"{name}(state=...) takes a TrainState and got {type(state).__name__}: pass what fit or run returned"
            )
        return state
    if key is None:
        raise TypeError(f"{name} needs a key: pass {name}(trainer, jax.random.key(0), data, epochs)")
    check_key(key, name)
    return jax.eval_shape(trainer.init, key, x) if alone else trainer.init(key, x)


def _split(rule: EarlyStopping | None) -> tuple[EarlyStopping | None, Any]:
    """The rule without its numbers, which is static, and its numbers, which may be traced."""
    if rule is None:
        return None, None
    numbers = (rule.patience, rule.min_delta, rule.start_from_epoch, rule.baseline)
    return _joined(rule, (None,) * 4), numbers


def _joined(rule: EarlyStopping, numbers: Any) -> EarlyStopping:
    patience, min_delta, start_from_epoch, baseline = numbers
    return rule._replace(
        patience=patience, min_delta=min_delta, start_from_epoch=start_from_epoch, baseline=baseline
    )


def train_epochs(
    trainer: Trainer,
    ts: TrainState,
    arrays: PyTree,
    held_out: PyTree,
    numbers: Any,
    *,
    rule: EarlyStopping | None,
    plan: Plan,
) -> tuple[TrainState, dict[str, Array]]:
    """The epochs of a job: the state at the end, and the history."""
    rule = None if rule is None else _joined(rule, numbers)
    ts = begin(rule, ts, ts.step // plan.steps)
    epoch = functools.partial(_epoch, trainer, arrays, held_out, rule, plan)
    if plan.remat and not plan.alone:
        epoch = jax.checkpoint(epoch, prevent_cse=False, static_argnums=2)

    def body(ts: TrainState, number: Any, first: int = 0) -> tuple[TrainState, dict[str, Array]]:
        if plan.done is not None and rule is None:
            ts, row = epoch(ts, number, first)
        else:
            # The step of a state that has stopped does not move on, so the epochs after it are not due.
            due = jnp.bool_(True) if plan.done is not None else ts.step == number * plan.steps
            due = due if rule is None else due & ~ts.stopping.stopped
            ts, row = _if_due(due, lambda ts: epoch(ts, number, first), ts, plan)
        return ts, {"step": jnp.minimum(ts.step, (number + 1) * plan.steps), **row}

    before, first = divmod(plan.done or 0, plan.steps)
    parts = []
    if first:
        ts, row = body(ts, jnp.int32(before), first)
        parts = [jax.tree.map(lambda a: a[None], row)]
    if before + bool(first) < plan.epochs:
        ts, rows = jax.lax.scan(body, ts, jnp.arange(before + bool(first), plan.epochs, dtype=jnp.int32))
        parts.append(rows)
    history = jax.tree.map(lambda *a: jnp.concatenate(a), _earlier(parts[0], before, plan.steps), *parts)
    if rule is not None:
        ts = restored(rule, ts.stopping, ts)
    return ts, {"epoch": jnp.arange(1, plan.epochs + 1, dtype=jnp.int32), **history}


def _epoch(
    trainer: Trainer,
    arrays: PyTree,
    held_out: PyTree,
    rule: EarlyStopping | None,
    plan: Plan,
    ts: TrainState,
    number: Any,
    first: int,
) -> tuple[TrainState, dict[str, Array]]:
    """The steps of epoch ``number`` from batch ``first`` on, and what comes at an epoch's end."""
    n = number_of_examples(arrays)
    order = shuffled_indices(ts.key, number, n) if plan.shuffle else jnp.arange(n, dtype=jnp.int32)
    stopping = ts.stopping
    ts, metrics = _steps(trainer, ts._replace(stopping=()), arrays, order, first, plan)
    sizes = np.asarray([plan.batch_size] * (plan.full - first) + [plan.tail] * (plan.tail > 0))
    row = epoch_means(metrics, sizes)
    if held_out is not None:
        size = checked_batch_size(1000, number_of_examples(held_out))
        found = _evaluate(trainer, ts, held_out, batch_size=size)
        row |= {f"val_{name}": value for name, value in found.items()}
    ts = ts._replace(opt_state=report(ts.opt_state, row))
    return ts if rule is None else ts._replace(stopping=update(rule, stopping, ts, row)), row


def _steps(
    trainer: Trainer, ts: TrainState, arrays: PyTree, order: Array, first: int, plan: Plan
) -> tuple[TrainState, dict[str, Array]]:
    """An epoch's steps, and the metrics of each, (steps,)."""

    def step(start: Any, size: int, ts: TrainState) -> tuple[TrainState, dict[str, Array]]:
        return trainer.step(ts, take(arrays, jax.lax.dynamic_slice_in_dim(order, start, size)))

    def body(ts: TrainState, i: Any) -> tuple[TrainState, dict[str, Array]]:
        return step(i * plan.batch_size, plan.batch_size, ts)

    def single(start: int, size: int) -> tuple[TrainState, dict[str, Array]]:
        one = functools.partial(step, start, size)
        if not plan.alone:
            return one(ts)
        # Outside of a loop it would be fused with what is around it, and be rounded differently than in fit.
        return _if_due(jax.lax.optimization_barrier(jnp.bool_(True)), one, ts, plan)

    parts = []
    if plan.full - first > 1:
        ts, metrics = jax.lax.scan(body, ts, jnp.arange(first, plan.full, dtype=jnp.int32))
        parts.append(metrics)
    elif plan.full > first:  # XLA would unroll a loop of one step
        ts, metrics = single(first * plan.batch_size, plan.batch_size)
        parts.append(jax.tree.map(lambda m: m[None], metrics))
    if plan.tail:
        ts, metrics = single(plan.full * plan.batch_size, plan.tail)
        parts.append(jax.tree.map(lambda m: m[None], metrics))
    return ts, jax.tree.map(lambda *m: jnp.concatenate(m), *parts)


def _if_due(
    due: Array, f: Callable[[TrainState], tuple[TrainState, dict[str, Array]]], ts: TrainState, plan: Plan
) -> tuple[TrainState, dict[str, Array]]:
    """``f(ts)``, or ``ts`` as it is and NaN for metrics where it is not due, which then costs nothing.

    Alone it is a loop of one round or none, which rounds as fit's loop does where a branch of a condition
    does not (convolutions on a CPU); but a loop whose length is not known has no derivative in reverse.
    """
    like = jax.eval_shape(f, ts)

    def not_due(ts: TrainState) -> tuple[TrainState, dict[str, Array]]:
        return _typed(ts, like[0]), jax.tree.map(_none, like[1])

    if plan.alone:
        return jax.lax.fori_loop(0, due.astype(jnp.int32), lambda _, carry: f(carry[0]), not_due(ts))
    return jax.lax.cond(due, f, not_due, ts)


def _typed(ts: TrainState, like: TrainState) -> TrainState:
    """``ts`` with the dtypes that an epoch leaves; a number that was made from Python's may have a weak one."""
    return jax.tree.map(
        lambda x, s: x if jnp.issubdtype(s.dtype, jax.dtypes.extended) else jnp.asarray(x, s.dtype), ts, like
    )


def _none(metric: Any) -> Array:
    """What stands for a metric that was not computed."""
    return jnp.full(metric.shape, jnp.nan if jnp.issubdtype(metric.dtype, jnp.inexact) else 0, metric.dtype)


def _earlier(rows: dict[str, Array], epochs: int, steps: int) -> dict[str, Array]:
    """The rows of the epochs before the run."""
    history = {name: jnp.full(epochs, jnp.nan, a.dtype) for name, a in rows.items() if name != "step"}
    return {**history, "step": steps * jnp.arange(1, epochs + 1, dtype=jnp.int32)}
