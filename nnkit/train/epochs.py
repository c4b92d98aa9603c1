"""Many steps a dispatch: the compiled inner loop that ``fit`` drives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from nnkit.data import shuffled_indices
from nnkit.train.preflight import number_of_examples
from nnkit.types import PyTree, Trainer, TrainState

__all__ = ["STEPS_PER_CALL", "run_epoch", "take", "train_steps"]

STEPS_PER_CALL = 100
"""Steps in one dispatch. Longer is not faster (measured), and progress would be seen less often."""

_shuffle = jax.jit(shuffled_indices, static_argnums=2)


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
    n = number_of_examples(arrays)
    full, tail = divmod(n, batch_size)
    tail = 0 if drop_last else tail
    steps, capacity = full + (tail > 0), min(steps_per_call, full)
    epoch, at = divmod(int(ts.step), steps)
    order = _shuffle(ts.key, jnp.int32(epoch), n) if shuffle else jnp.arange(n, dtype=jnp.int32)
    program = _fastest(next(iter(ts.key.devices())).platform)
    seen: list[_Chunk] = []
    while at < steps:
        is_full = at < full
        count = min(capacity, full - at) if is_full else 1
        size = batch_size if is_full else tail
        ts, metrics = program(
            trainer,
            ts,
            arrays,
            order,
            jnp.int32(at * batch_size),
            jnp.int32(count),
            batch_size=size,
            capacity=capacity if is_full else 1,
        )
        seen.append(_Chunk(size, count, metrics))
        at += count
        if on_chunk is not None and len(seen) > 1:
            on_chunk(seen[-2].steps, seen[-2].loss())  # the one before, so that the device is never idle
    if on_chunk is not None:
        on_chunk(seen[-1].steps, seen[-1].loss())
    return ts, _means(seen)


class _Chunk(NamedTuple):
    """What a dispatch returned: metrics of shape (capacity,), the first ``steps`` of them filled."""

    batch_size: int
    steps: int
    metrics: dict[str, Array]

    def loss(self) -> float:
        return float(np.mean(np.asarray(self.metrics["loss"])[: self.steps]))


def _means(seen: list[_Chunk]) -> dict[str, float]:
    """Means over examples: each step's metrics weigh as many as its batch had."""
    fetched = jax.device_get([chunk.metrics for chunk in seen])
    examples = sum(chunk.batch_size * chunk.steps for chunk in seen)

    def mean(name: str) -> float:
        total = 0.0
        for chunk, metrics in zip(seen, fetched, strict=True):
            total += chunk.batch_size * float(np.sum(metrics[name][: chunk.steps], dtype=np.float64))
        return total / examples

    return {name: mean(name) for name in fetched[0]}


def take(arrays: PyTree, rows: Int[Array, " batch"]) -> PyTree:
    """The given rows of every array; the indices are known to be within bounds."""
    return jax.tree.map(lambda a: a.at[rows].get(mode="promise_in_bounds"), arrays)


def _train_steps(
    trainer: Trainer,
    ts: TrainState,
    arrays: PyTree,
    order: Int[Array, " n"],
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
      order: indices of examples.
      offset: where in ``order`` the first batch starts.
      count: how many steps, at most ``capacity``.
      batch_size: examples in a batch.
      capacity: how many steps the returned arrays have room for.

    Returns:
      The state, and each step's metrics, arrays of shape (capacity,) of which the first
      ``count`` entries are filled.
    """

    def batch_at(i: Any) -> Any:
        rows = jax.lax.dynamic_slice_in_dim(order, offset + i * batch_size, batch_size)
        return take(arrays, rows)

    shapes = jax.eval_shape(lambda ts: trainer.step(ts, batch_at(0))[1], ts)
    room = jax.tree.map(lambda m: jnp.zeros((capacity, *m.shape), m.dtype), shapes)

    def body(i: Any, carry: Any) -> Any:
        ts, history = carry
        ts, metrics = trainer.step(ts, batch_at(i))
        return ts, jax.tree.map(lambda h, m: h.at[i].set(m), history, metrics)

    return jax.lax.fori_loop(0, count, body, (ts, room))


_jit = functools.partial(
    jax.jit, static_argnames=("trainer", "batch_size", "capacity"), donate_argnames=("ts",)
)
train_steps = _jit(_train_steps)


@functools.cache
def _fastest(platform: str) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """:func:`train_steps` with the compiler options that suit a platform.

    On a CPU XLA keeps to vectors of 256 bits unless asked; AVX-512's are twice as long (an epoch of
    ``benchmarks.epoch`` takes 0.93 of the time), and a CPU without them is not affected. Options bind
    only a program of its own, so ``train_steps``, which may be called within another, has none.
    """
    wide = {"xla_cpu_prefer_vector_width": 512}
    return _jit(_train_steps, compiler_options=wide) if platform == "cpu" else train_steps
