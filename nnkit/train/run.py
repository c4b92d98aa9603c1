"""``run``: a whole training run as one pure function of a key, data and hyper-parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnkit.data import shuffled_indices
from nnkit.optim import report
from nnkit.train.begin import first_state
from nnkit.train.epochs import compiler_options, platform_of, take
from nnkit.train.evaluate import evaluate_batches
from nnkit.train.job import Plan, joined, prepare
from nnkit.train.means import epoch_means
from nnkit.train.preflight import checked_batch_size, number_of_examples
from nnkit.train.stopping import EarlyStopping, begin, restored, update
from nnkit.types import Array, PyTree, Trainer, TrainState

__all__ = ["run", "train_epoch", "train_epochs"]


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
    ts = first_state(trainer, key, job.example) if job.alone and state is None else job.ts
    program = _compiled(platform_of(job.arrays)) if job.alone else train_epochs
    return program(trainer, ts, job.arrays, job.held_out, job.numbers, rule=job.rule, plan=job.plan)


@functools.cache
def _compiled(platform: str) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    return jax.jit(
        train_epochs, static_argnames=("trainer", "rule", "plan"), compiler_options=compiler_options(platform)
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
    rule = None if rule is None else joined(rule, numbers)
    ts = begin(rule, ts, ts.step // plan.steps)
    epoch = functools.partial(train_epoch, trainer, arrays, held_out, rule, plan)
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


def train_epoch(
    trainer: Trainer,
    arrays: PyTree,
    held_out: PyTree,
    rule: EarlyStopping | None,
    plan: Plan,
    ts: TrainState,
    number: Any,
    first: int = 0,
) -> tuple[TrainState, dict[str, Array]]:
    """The steps of epoch ``number`` from batch ``first`` on, and what comes at an epoch's end.

    Nothing asks whether the epoch is due: a search that goes from epoch to epoch knows. ``number``, from 0,
    may be traced.
    """
    n = number_of_examples(arrays)
    order = shuffled_indices(ts.key, number, n) if plan.shuffle else jnp.arange(n, dtype=jnp.int32)
    stopping = ts.stopping
    ts, metrics = _steps(trainer, ts._replace(stopping=()), arrays, order, first, plan)
    sizes = np.asarray([plan.batch_size] * (plan.full - first) + [plan.tail] * (plan.tail > 0))
    row = epoch_means(metrics, sizes)
    if held_out is not None:
        size = checked_batch_size(1000, number_of_examples(held_out))
        found = evaluate_batches(trainer, ts, held_out, batch_size=size)
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
