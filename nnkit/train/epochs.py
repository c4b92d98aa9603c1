"""Many steps a dispatch: the compiled inner loop that ``fit`` drives."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from nnkit.train.feed import Chunk, Resident
from nnkit.train.finite import chunk_is_finite, scaled
from nnkit.types import PyTree, Trainer, TrainState

__all__ = [
    "STEPS_PER_CALL",
    "Means",
    "compiler_options",
    "copied",
    "dispatch",
    "platform_of",
    "run_epoch",
    "take",
    "train_steps",
]

STEPS_PER_CALL = 100
"""Steps in one dispatch. Longer is not faster (measured), and progress would be seen less often."""


def run_epoch(
    trainer: Trainer,
    ts: TrainState,
    arrays: PyTree,
    *,
    batch_size: int,
    shuffle: bool = True,
    drop_last: bool = False,
    steps_per_call: int = STEPS_PER_CALL,
    on_chunk: Callable[[int, float], None] | None = None,
) -> tuple[TrainState, dict[str, float]]:
    """Takes the steps that are left of the epoch in which ``ts`` stands: what :func:`fit` repeats.

    For loops of one's own. Nothing is checked here, and the buffers of ``ts`` are given up.

    Args:
      trainer: whose steps are taken.
      ts: the state.
      arrays: the data on the device, a pytree of arrays with one leading axis.
      batch_size: examples in a step, at most as many as there are.
      shuffle: whether the epoch has an order of its own, a function of (key, epoch).
      drop_last: whether to leave out a last batch that is not full.
      steps_per_call: steps in one dispatch.
      on_chunk: called as ``on_chunk(steps, mean_loss)`` after each dispatch.

    Returns:
      The state, and the means of the metrics over the examples that were trained on.

    >>> trainer = train.trainer(layers.dense(1), losses.mean_squared_error, optim.sgd(0.1))
    >>> ts = trainer.init(jax.random.key(0), jnp.zeros((1, 2)))
    >>> ts, means = train.run_epoch(trainer, ts, (jnp.ones((10, 2)), jnp.ones((10, 1))), batch_size=4)
    >>> int(ts.step), sorted(means)
    (3, ['loss'])
    """
    feed = Resident(arrays, batch_size, shuffle=shuffle, drop_last=drop_last, steps_per_call=steps_per_call)
    epoch, at = divmod(int(ts.step), feed.steps)
    means = Means()
    waiting: tuple[Chunk, dict[str, Array]] | None = None

    def settle() -> None:
        if waiting is not None:
            loss = means.add(*waiting)
            if on_chunk is not None:
                on_chunk(waiting[0].steps, loss)

    for chunk in feed.chunks(ts.key, epoch, at):
        ts, metrics, _ = dispatch(trainer, ts, chunk)
        settle()  # of the one before, so that the device is never idle
        waiting = chunk, metrics
    settle()
    return ts, means.values()


class Means:
    """Means of metrics over the examples of an epoch, as if they were added up one step after another.

    They do not depend on how steps were cut into chunks, to the last bit, nor on where a run was saved
    and taken up again: :attr:`sums` is all that there is to know. A step that was skipped (metric
    ``skipped``) has no part in the means, and ``skipped`` itself is a count.
    """

    def __init__(self, sums: Mapping[str, float] | None = None):
        self.sums: dict[str, float] = dict(sums or {})

    def add(self, chunk: Chunk, metrics: Mapping[str, Any]) -> float:
        """Takes in a chunk's metrics, arrays of (capacity,), and returns the mean of its losses."""
        found = {name: np.asarray(m)[: chunk.steps] for name, m in jax.device_get(metrics).items()}
        skipped = found.get("skipped")
        taken = np.ones(chunk.steps, bool) if skipped is None else np.asarray(skipped) == 0
        for name, values in found.items():
            if name == "skipped":
                self._add(name, values)
            else:
                self._add(name, chunk.batch_size * values[taken].astype(np.float64))
        self._add(_EXAMPLES, np.full(int(taken.sum()), chunk.batch_size))
        losses = found["loss"][taken].astype(np.float64)
        return float(losses.mean()) if len(losses) else float("nan")

    def _add(self, name: str, values: np.ndarray) -> None:
        # accumulate adds from left to right; sum would add in pairs, differently for each length.
        row = np.concatenate([[self.sums.get(name, 0.0)], values])
        self.sums[name] = float(np.add.accumulate(row, dtype=np.float64)[-1])

    def values(self) -> dict[str, float]:
        """The means so far."""
        examples = self.sums.get(_EXAMPLES, 0.0)
        names = [name for name in self.sums if name != _EXAMPLES]
        return {name: self._value(name, examples) for name in names}

    def _value(self, name: str, examples: float) -> float:
        if name == "skipped":
            return self.sums[name]
        return self.sums[name] / examples if examples else float("nan")


_EXAMPLES = " examples"  # a space keeps it apart from a metric's name


def take(arrays: PyTree, rows: Int[Array, " batch"]) -> PyTree:
    """The given rows of every array; the indices are known to be within bounds."""
    return jax.tree.map(lambda a: a.at[rows].get(mode="promise_in_bounds"), arrays)


def _train_steps(
    trainer: Trainer,
    ts: TrainState,
    arrays: PyTree,
    order: Int[Array, " n"] | None,
    offset: Int[Array, ""],
    count: Int[Array, ""],
    *,
    batch_size: int,
    capacity: int,
) -> tuple[TrainState, dict[str, Array]]:
    """``count`` steps on consecutive batches of ``order`` from ``offset`` on, as one program.

    Each step gathers its batch from the data that stays on the device: that costs half of
    shuffling the whole data set in advance. The number of steps is an argument of the program
    and not a constant of it, so that a last, shorter chunk needs no second compilation.

    Args:
      trainer: whose ``step`` is taken.
      ts: the state; its buffers are donated, that is, given up.
      arrays: the data, a pytree of arrays with one leading axis.
      order: indices of examples; None for the examples as they lie.
      offset: where in ``order``, or in the arrays, the first batch starts.
      count: how many steps, at most ``capacity``.
      batch_size: examples in a batch.
      capacity: how many steps the returned arrays have room for.

    Returns:
      The state, and each step's metrics, arrays of shape (capacity,) of which the first
      ``count`` entries are filled.
    """

    def batch_at(i: Any) -> Any:
        start = offset + i * batch_size
        if order is None:
            return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, batch_size), arrays)
        return take(arrays, jax.lax.dynamic_slice_in_dim(order, start, batch_size))

    shapes = jax.eval_shape(lambda ts: trainer.step(ts, batch_at(0))[1], ts)
    room = jax.tree.map(lambda m: jnp.zeros((capacity, *m.shape), m.dtype), shapes)

    def body(i: Any, carry: Any) -> Any:
        ts, history = carry
        ts, metrics = trainer.step(ts, batch_at(i))
        return ts, jax.tree.map(lambda h, m: h.at[i].set(m), history, metrics)

    return jax.lax.fori_loop(0, count, body, (ts, room))


_STATIC = ("trainer", "batch_size", "capacity")
train_steps = jax.jit(_train_steps, static_argnames=_STATIC, donate_argnames=("ts",))


def _chunk(
    trainer: Trainer,
    ts: TrainState,
    arrays: PyTree,
    order: Any,
    offset: Any,
    count: Any,
    rate_scale: Any,
    *,
    batch_size: int,
    capacity: int,
) -> tuple[TrainState, dict[str, Array], Bool[Array, ""]]:
    if rate_scale is not None:
        trainer = scaled(trainer, rate_scale)
    ts, metrics = _train_steps(
        trainer, ts, arrays, order, offset, count, batch_size=batch_size, capacity=capacity
    )
    return ts, metrics, chunk_is_finite(ts, metrics)


def dispatch(
    trainer: Trainer, ts: TrainState, chunk: Chunk, *, rate_scale: float | None = None
) -> tuple[TrainState, dict[str, Array], Bool[Array, ""]]:
    """Starts a chunk's steps; what it returns is not yet computed when it returns.

    Returns:
      The state, the metrics as :func:`train_steps` gives them, and whether they and the parameters at the
      end are finite, see :func:`nnkit.train.finite.chunk_is_finite`.
    """
    return _compiled(platform_of(ts.key))(
        trainer,
        ts,
        chunk.arrays,
        chunk.order,
        jnp.int32(chunk.offset),
        jnp.int32(chunk.steps),
        None if rate_scale is None else jnp.float32(rate_scale),
        batch_size=chunk.batch_size,
        capacity=chunk.capacity,
    )


@functools.cache
def _compiled(platform: str) -> Callable[..., Any]:
    return jax.jit(
        _chunk,
        static_argnames=_STATIC,
        donate_argnames=("ts",),
        compiler_options=compiler_options(platform),
    )


def compiler_options(platform: str) -> dict[str, Any] | None:
    """What suits a platform, for a program that is not within another one or a transformation.

    On a CPU XLA keeps to vectors of 256 bits unless asked; AVX-512's are twice as long (an epoch of
    ``benchmarks.epoch`` takes 0.93 of the time), and a CPU without them is not affected.
    """
    return {"xla_cpu_prefer_vector_width": 512} if platform == "cpu" else None


copied: Callable[[TrainState], TrainState] = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
"""The state in buffers of its own, which the next dispatch does not take, in one program."""


def platform_of(arrays: PyTree) -> str:
    """The platform that holds the arrays, which are not traced."""
    return next(iter(jax.tree.leaves(arrays)[0].devices())).platform
