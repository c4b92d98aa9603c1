"""What ends a run whose numbers are no longer finite: the step is found by replay, and explained."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from nnkit.train.epochs import copied, dispatch, take
from nnkit.train.explain import explain
from nnkit.train.feed import Chunk, Feed
from nnkit.train.finite import scaled
from nnkit.train.report import Report
from nnkit.types import Trainer, TrainState

__all__ = ["BadStep", "NotFiniteError", "find_step", "not_finite"]


class NotFiniteError(FloatingPointError):
    """A loss or a parameter of a run became inf or NaN.

    Attributes:
      step: the number of the step by which, the first of the run being 0.
      epoch: in which epoch, the first being 1; None where that is not known.
      report: what :func:`explain` found; None where the step could not be found or explained.
    """

    def __init__(self, step: int, epoch: int | None, report: Report | None, problem: str = ""):
        self.step, self.epoch, self.report, self.problem = step, epoch, report, problem
        super().__init__(_message(step, epoch, report, problem))

    def __reduce__(self) -> tuple[Any, ...]:
        return NotFiniteError, (self.step, self.epoch, self.report, self.problem)


def _message(step: int, epoch: int | None, report: Report | None, problem: str) -> str:
    within = "" if epoch is None else f" of epoch {epoch}"
    lines = [f"inf or NaN at step {step}{within}" + (f"; {problem}" if problem else "")]
    if report is not None:
        lines += [str(report), f"  to try: {_advice(report)}"]
    else:
        lines.append(f"  to try: {_SMALLER}")
    return "\n".join(lines)


_SMALLER = (
    "a smaller learning rate or a warm-up; optim.chain(optim.clip_by_global_norm(1.0), optimizer); "
    'fit(..., guard="skip") or fit(..., guard="roll_back")'
)
_AT_ZERO = frozenset({"div", "log", "pow", "rsqrt", "sqrt", "integer_pow", "log1p", "atanh"})
_ADVICE = {
    "batch": "a look at these rows of the data; np.isfinite(x) finds all that are like them",
    "params": "a start from parameters that are finite: an earlier checkpoint",
    "state": "a start from layer state that is finite: an earlier checkpoint",
    "opt_state": "a start from an optimizer state that is finite: an earlier checkpoint",
    "constant": "a finite number for the constant, jnp.finfo(x.dtype).min for a mask",
    "update": "a look at the learning rate and its schedule at this step, and at the optimizer's eps; clipping",
    "finite": "the same step compiled: uncompiled it is finite, so a number is close to the largest; "
    + _SMALLER,
}


def _advice(report: Report) -> str:
    if report.problem and report.kind == "batch":
        return "a look at these rows of the data, and at all that are like them"
    if report.kind in _ADVICE:
        return _ADVICE[report.kind]
    if any(s.dtype == "float16" for s in (*report.inputs.values(), *report.params.values())):
        return "bfloat16 in place of float16, or float32 for this layer (layers.with_dtype); " + _SMALLER
    if report.kind == "gradient" and report.operation in _AT_ZERO:
        return (
            "an argument away from where the derivative is infinite, as in jnp.sqrt(x + 1e-6); jnp.where must "
            "choose before the operation, jnp.sqrt(jnp.where(x > 0, x, 1)), and not only behind it"
        )
    if report.operation in _AT_ZERO:
        return "an argument away from 0, as in jnp.log(x + 1e-6) and x / (std + 1e-6); a look at these rows"
    return _SMALLER


class BadStep(NamedTuple):
    """A step that :func:`find_step` found.

    Attributes:
      ts: the state before it.
      batch: its batch.
      examples: the numbers of the batch's examples in the data; None where the data do not tell.
    """

    ts: TrainState
    batch: Any
    examples: np.ndarray | None


def find_step(
    trainer: Trainer, ts: TrainState, chunks: Iterable[Chunk], *, rate_scale: float | None = None
) -> BadStep | None:
    """Trains again from ``ts``, and returns the first step by which something is not finite any more.

    Steps are taken by the program of the run itself: a chunk at a time, and one at a time in the first
    chunk whose end is not finite. A run's randomness is a function of key and step, so on one
    machine this is the same run to the last bit. What counts is :func:`chunk_is_finite`.

    Args:
      trainer: the run's.
      ts: a state of the run that is finite; it stays usable.
      chunks: the run's batches from there on.
      rate_scale: as the run had it.

    Returns:
      The step; None where all is finite to the end of the chunks.

    >>> trainer = train.trainer(layers.dense(1), losses.mean_squared_error, optim.sgd(0.1))
    >>> ts = trainer.init(jax.random.key(0), jnp.zeros((1, 2)))
    >>> x = jnp.ones((12, 2)).at[7, 0].set(jnp.nan)
    >>> from nnkit.train.feed import Chunk
    >>> chunk = Chunk((x, jnp.ones((12, 1))), None, 0, steps=3, batch_size=4, capacity=3)
    >>> int(train.find_step(trainer, ts, [chunk]).ts.step)
    1
    """
    ts = ts._replace(stopping=())
    for chunk in chunks:
        new, _, finite = dispatch(trainer, copied(ts), chunk, rate_scale=rate_scale)
        if not bool(finite):
            found = _step_by_step(trainer, ts, chunk, rate_scale)
            if found is not None:
                return found
        ts = new
    return None


def _step_by_step(trainer: Trainer, ts: TrainState, chunk: Chunk, rate_scale: float | None) -> BadStep | None:
    for i in range(chunk.steps):
        start = chunk.offset + i * chunk.batch_size
        one = chunk._replace(offset=start, steps=1)
        new, _, finite = dispatch(trainer, copied(ts), one, rate_scale=rate_scale)
        if not bool(finite):
            rows = jnp.arange(start, start + chunk.batch_size, dtype=jnp.int32)
            if chunk.order is not None:
                rows = take(chunk.order, rows)
            batch = take(chunk.arrays, rows)
            return BadStep(ts, batch, None if chunk.order is None else np.asarray(rows))
        ts = new
    return None


def not_finite(
    trainer: Trainer,
    ts: TrainState,
    feed: Feed,
    rate_scale: float | None = None,
    *,
    until: int | None = None,
) -> NotFiniteError:
    """The error for a run that was finite at ``ts`` and was not some steps later, to be raised.

    Args:
      trainer: the run's.
      ts: the last state that is known to be finite.
      feed: the run's batches.
      rate_scale: what its updates are multiplied by, see :func:`scaled`.
      until: the run's step at which it was seen; None for the end of the second epoch from ``ts``.

    Returns:
      The error, with the step found (:func:`find_step`) and explained (:func:`explain`), or with the
      reason why it was not.

    >>> trainer = train.trainer(layers.dense(1), losses.mean_squared_error, optim.sgd(1e30))
    >>> ts = trainer.init(jax.random.key(0), jnp.zeros((1, 2)))
    >>> arrays = jnp.ones((12, 2)), jnp.ones((12, 1))
    >>> from nnkit.train.feed import Resident
    >>> feed = Resident(arrays, 4, shuffle=True, drop_last=False, steps_per_call=100)
    >>> error = not_finite(trainer, ts, feed)
    >>> error.step, error.epoch, error.report.operation
    (1, 1, 'square')
    """
    start = int(ts.step)
    until = (start // feed.steps + 2) * feed.steps if until is None else until
    with contextlib.closing(_chunks(feed, ts, until)) as chunks:
        found = find_step(trainer, ts, chunks, rate_scale=rate_scale)
    if found is None:
        return NotFiniteError(
            until, _epoch(until - 1, feed), None, f"trained again from step {start}, the run stays finite"
        )
    step = int(found.ts.step)
    used = trainer if rate_scale is None else scaled(trainer, rate_scale)
    try:
        report, problem = explain(used, found.ts, found.batch, rows=found.examples), ""
    except Exception as error:  # the run's own error must not be lost for want of memory, or an odd operation
        report, problem = None, f"the step could not be taken uncompiled: {type(error).__name__}: {error}"
    return NotFiniteError(step, _epoch(step, feed), report, problem)


def _chunks(feed: Feed, ts: TrainState, until: int) -> Generator[Chunk, None, None]:
    """The run's batches from ``ts`` to step ``until``."""
    step = int(ts.step)
    while step < until:
        epoch, at = divmod(step, feed.steps)
        for chunk in feed.chunks(ts.key, epoch, at):
            steps = min(chunk.steps, until - step)
            if steps == 0:
                return
            yield chunk._replace(steps=steps)
            step += steps


def _epoch(step: int, feed: Feed) -> int:
    return step // feed.steps + 1
