"""Metrics over a source of batches, for data that do not fit into memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from nnkit.data.batch_source import Source
from nnkit.train.streaming import Streaming
from nnkit.types import Array, PyTree, Trainer, TrainState

__all__ = ["evaluate_source", "metrics_of"]

_STEPS_PER_CALL = 100


def evaluate_source(trainer: Trainer, ts: TrainState, source: Source) -> dict[str, float]:
    """The trainer's metrics over one epoch of a source, exact also where the last batch is smaller.

    The batches are those of epoch 0 and the state's key, which matters only where the source leaves
    out a part of the data.

    >>> trainer = train.trainer(layers.dense(1), losses.mean_squared_error, optim.sgd(0.1))
    >>> ts = trainer.init(jax.random.key(0), jnp.zeros((1, 2)))
    >>> source = data.stream((np.ones((7, 2), "f"), np.ones((7, 1), "f")), 3, shuffle=False)
    >>> sorted(train.evaluate(trainer, ts, source))
    ['loss']
    """
    sums, first = None, 0
    with Streaming(source, steps_per_call=_STEPS_PER_CALL) as feed:
        for chunk in feed.chunks(ts.key, 0, 0):
            before, range_ = sums, (jnp.int32(first), jnp.int32(chunk.steps))
            sums = _add(trainer, ts, before, chunk.arrays, *range_, batch_size=chunk.batch_size)
            first += chunk.steps
            jax.block_until_ready(before)  # so that at most two chunks are in use
    means = jax.tree.map(lambda s: s / source.examples, sums)
    return jax.tree.map(float, jax.device_get(means))


def metrics_of(trainer: Trainer, ts: TrainState, number: Any, batch: PyTree) -> dict[str, Array]:
    """The metrics of a batch, in dtypes that can be added up: float32 for bools, integers and half precision."""
    # Each batch draws numbers of its own, where evaluation draws any.
    found = trainer.evaluate(ts._replace(key=jax.random.fold_in(ts.key, number)), batch)
    return jax.tree.map(lambda m: m.astype(m.dtype if m.dtype == jnp.float64 else jnp.float32), found)


@partial(jax.jit, static_argnames=("trainer", "batch_size"))
def _add(
    trainer: Trainer, ts: TrainState, sums: Any, arrays: PyTree, first: Any, steps: Any, *, batch_size: int
) -> dict[str, Array]:
    """``sums`` and the metrics of ``steps`` batches, which lie one behind another, times their size."""

    def total(i: Any, sums: dict[str, Array]) -> dict[str, Array]:
        batch = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, i * batch_size, batch_size), arrays)
        found = metrics_of(trainer, ts, first + i, batch)
        return jax.tree.map(lambda s, m: s + m * batch_size, sums, found)

    if sums is None:
        batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct((batch_size, *a.shape[1:]), a.dtype), arrays)
        shapes = jax.eval_shape(partial(metrics_of, trainer, ts, 0), batch)
        sums = jax.tree.map(lambda m: jnp.zeros(m.shape, m.dtype), shapes)
    return jax.lax.fori_loop(0, steps, total, sums)
