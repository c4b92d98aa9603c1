"""A whole data set at a time: metrics that are exact."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from nnkit.data import Source
from nnkit.data.batch_source import checked_batches
from nnkit.train.evaluate_source import evaluate_source, metrics_of
from nnkit.train.preflight import check_suited, checked_batch_size, checked_data, number_of_examples, specs
from nnkit.types import Array, PyTree, Trainer, TrainState

__all__ = ["evaluate", "evaluate_arrays", "evaluate_batches"]


def evaluate(trainer: Trainer, ts: TrainState, data: Any, *, batch_size: int = 1000) -> dict[str, float]:
    """The trainer's metrics over all of ``data``, exact also where the last batch is smaller.

    Means of batches are weighted by their sizes, so a metric that is a mean over examples is its
    mean over the data set. Metrics of another kind (F1, calibration) are computed from
    :func:`nnkit.train.predict`.

    Args:
      trainer: whose ``evaluate`` is used.
      ts: the state; it is not changed.
      data: a dataset or a pytree of arrays with one leading axis, batched as in training; or a
        ``data.Source``, read as it is needed.
      batch_size: examples at a time; a source has its own.

    >>> trainer = train.trainer(layers.dense(1), losses.mean_squared_error, optim.sgd(0.1))
    >>> ts = trainer.init(jax.random.key(0), jnp.zeros((1, 2)))
    >>> metrics = train.evaluate(trainer, ts, (np.ones((7, 2), "f"), np.ones((7, 1), "f")), batch_size=3)
    >>> sorted(metrics)
    ['loss']
    """
    if isinstance(data, Source):
        check_suited(trainer, ts, next(checked_batches(data, ts.key, 0)), "the first batch of the data")
        return evaluate_source(trainer, ts, data)
    arrays = checked_data(trainer, ts, data, "the data")
    return evaluate_arrays(trainer, ts, jax.tree.map(jnp.asarray, arrays), batch_size=batch_size)


def evaluate_arrays(
    trainer: Trainer, ts: TrainState, arrays: PyTree, *, batch_size: int = 1000
) -> dict[str, float]:
    """:func:`evaluate` for arrays on the device that were checked before."""
    batch_size = checked_batch_size(batch_size, number_of_examples(arrays))
    return jax.tree.map(float, jax.device_get(evaluate_batches(trainer, ts, arrays, batch_size=batch_size)))


@partial(jax.jit, static_argnames=("trainer", "batch_size"))
def evaluate_batches(
    trainer: Trainer, ts: TrainState, arrays: PyTree, *, batch_size: int
) -> dict[str, Array]:
    n = number_of_examples(arrays)
    full, tail = divmod(n, batch_size)

    on = partial(metrics_of, trainer, ts)

    def total(i: Any, sums: dict[str, Array]) -> dict[str, Array]:
        return jax.tree.map(
            lambda s, m: s + m * batch_size, sums, on(i, rows_of(arrays, i * batch_size, batch_size))
        )

    shapes = jax.eval_shape(on, 0, specs(arrays, batch_size))
    sums = jax.lax.fori_loop(0, full, total, jax.tree.map(lambda m: jnp.zeros(m.shape, m.dtype), shapes))
    if tail:
        rest = on(full, jax.tree.map(lambda a: a[full * batch_size :], arrays))
        sums = jax.tree.map(lambda s, m: s + m * tail, sums, rest)
    return jax.tree.map(lambda s: s / n, sums)


def rows_of(arrays: PyTree, start: Any, count: int) -> PyTree:
    """``count`` rows of every array from ``start`` on."""
    return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, count), arrays)
