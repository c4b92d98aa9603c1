"""A whole data set at a time: metrics that are exact, and predictions."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from nnkit.types import Array, Layer, Params, PyTree, State, Trainer, TrainState

__all__ = ["evaluate", "predict"]


def evaluate(trainer: Trainer, ts: TrainState, data: Any, *, batch_size: int = 1000) -> dict[str, float]:
    """The trainer's metrics over all of ``data``, exact also where the last batch is smaller.

    Means of batches are weighted by their sizes, so a metric that is a mean over examples is its
    mean over the data set. Metrics of another kind (F1, calibration) are computed from
    :func:`predict`.

    Args:
      trainer: whose ``evaluate`` is used.
      ts: the state; it is not changed.
      data: a dataset or a pytree of arrays with one leading axis, batched as in training.
      batch_size: examples at a time.

    >>> trainer = train.trainer(layers.dense(1), losses.mean_squared_error, optim.sgd(0.1))
    >>> ts = trainer.init(jax.random.key(0), jnp.zeros((1, 2)))
    >>> metrics = train.evaluate(trainer, ts, (np.ones((7, 2), "f"), np.ones((7, 1), "f")), batch_size=3)
    >>> sorted(metrics)
    ['loss']
    """
    arrays = jax.tree.map(jnp.asarray, getattr(data, "arrays", data))
    n = number_of_examples(arrays)
    return jax.tree.map(float, jax.device_get(_evaluate(trainer, ts, arrays, batch_size=min(batch_size, n))))


def number_of_examples(arrays: PyTree) -> int:
    """The length of the arrays' common leading axis."""
    lengths = {a.shape[0] if getattr(a, "ndim", 0) else 0 for a in jax.tree.leaves(arrays)}
    if len(lengths) != 1 or lengths == {0}:
        raise ValueError(
            f"data must be arrays with one common, non-empty leading axis, got lengths {sorted(lengths)}"
        )
    return lengths.pop()


@partial(jax.jit, static_argnames=("trainer", "batch_size"))
def _evaluate(trainer: Trainer, ts: TrainState, arrays: PyTree, *, batch_size: int) -> dict[str, Array]:
    n = number_of_examples(arrays)
    full, tail = divmod(n, batch_size)

    def total(i: Any, sums: dict[str, Array]) -> dict[str, Array]:
        batch = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, i * batch_size, batch_size), arrays)
        return jax.tree.map(lambda s, m: s + m * batch_size, sums, trainer.evaluate(ts, batch))

    first = jax.tree.map(lambda a: jax.ShapeDtypeStruct((batch_size, *a.shape[1:]), a.dtype), arrays)
    zeros = jax.tree.map(lambda m: jnp.zeros(m.shape, m.dtype), jax.eval_shape(trainer.evaluate, ts, first))
    sums = jax.lax.fori_loop(0, full, total, zeros)
    if tail:
        rest = trainer.evaluate(ts, jax.tree.map(lambda a: a[full * batch_size :], arrays))
        sums = jax.tree.map(lambda s, m: s + m * tail, sums, rest)
    return jax.tree.map(lambda s: s / n, sums)


def predict(model: Layer, params: Params, state: State, x: Any, *, batch_size: int = 1000) -> Any:
    """``model.apply(..., train=False)`` on any number of inputs, ``batch_size`` at a time.

    >>> model = layers.dense(3)
    >>> params, state = model.init(jax.random.key(0), jnp.zeros((1, 2)))
    >>> train.predict(model, params, state, np.ones((7, 2), "f"), batch_size=3).shape
    (7, 3)
    """
    x = jax.tree.map(jnp.asarray, x)
    return _predict(model, params, state, x, batch_size=min(batch_size, number_of_examples(x)))


@partial(jax.jit, static_argnames=("model", "batch_size"))
def _predict(model: Layer, params: Params, state: State, x: Any, *, batch_size: int) -> Any:
    n = number_of_examples(x)
    full, tail = divmod(n, batch_size)

    def run(x: Any) -> Any:
        return model.apply(params, state, x, train=False)[0]

    batches = jax.tree.map(lambda a: a[: full * batch_size].reshape(full, batch_size, *a.shape[1:]), x)
    y = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), jax.lax.map(run, batches))
    if not tail:
        return y
    rest = run(jax.tree.map(lambda a: a[full * batch_size :], x))
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), y, rest)
