"""Many steps a dispatch: the compiled inner loop that ``fit`` drives."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from nnkit.types import PyTree, Trainer, TrainState

__all__ = ["take", "train_steps"]


def take(arrays: PyTree, rows: Int[Array, " batch"]) -> PyTree:
    """The given rows of every array; the indices are known to be within bounds."""
    return jax.tree.map(lambda a: a.at[rows].get(mode="promise_in_bounds"), arrays)


@partial(jax.jit, static_argnames=("trainer", "batch_size", "capacity"), donate_argnames=("ts",))
def train_steps(
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
