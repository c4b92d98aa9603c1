"""``fit``: a whole training run from one call."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from nnkit.checks import check_key
from nnkit.data import check_batch_size
from nnkit.optim import report
from nnkit.train.epochs import STEPS_PER_CALL, run_epoch
from nnkit.train.evaluate import evaluate_arrays
from nnkit.train.preflight import (
    arrays_of,
    check_monitored,
    check_steps,
    check_suited,
    checked_data,
    number_of_examples,
    whole,
)
from nnkit.train.progress import progress_bar
from nnkit.types import Array, PyTree, Trainer, TrainState

__all__ = ["fit"]


def fit(
    trainer: Trainer,
    data: Any,
    *,
    epochs: int,
    key: Array | None = None,
    state: TrainState | None = None,
    batch_size: int = 64,
    validation: Any = None,
    shuffle: bool = True,
    drop_last: bool = False,
    steps_per_call: int = STEPS_PER_CALL,
    progress: bool | None = None,
    on_epoch: Callable[[TrainState, dict[str, Any]], None] | None = None,
) -> tuple[TrainState, list[dict[str, Any]]]:
    """Trains for ``epochs`` passes over ``data`` and returns the final state and the history.

    The data go to the device once; the steps run compiled, ``steps_per_call`` in a dispatch, on
    buffers that are reused. The order of examples is a function of (key, epoch) alone and the
    randomness of a step one of (key, step) alone, so the result is the same for any
    ``steps_per_call`` and the same as calling ``trainer.step`` on each batch in turn. A last
    batch with fewer examples is a step like any other.

    Args:
      trainer: from :func:`trainer`.
      data: a dataset, or a pytree of arrays with one leading axis: (x, y) for supervised runs. The
        first of a tuple, or else all of it, is what ``trainer.init`` is shown one example of.
      epochs: how many passes the run has had at its end, those before ``state`` included.
      key: the run's only source of randomness; needed unless ``state`` is given.
      state: where to go on from; it is copied, so it stays usable. Its step says how many batches
        of how many epochs are done, which presumes the same data and batch size: for a new run from
        old parameters pass ``state._replace(step=jnp.int32(0))``.
      batch_size: examples in a step.
      validation: data on which the metrics are computed after each epoch, as ``val_...``. An optimizer
        with ``optim.reduce_on_plateau(monitor="val_loss")`` is told each epoch's metrics.
      shuffle: whether each epoch has an order of its own.
      drop_last: whether to leave out a last batch that is not full.
      steps_per_call: steps in one dispatch.
      progress: True, False, or None for a bar on a terminal only.
      on_epoch: called after each epoch as ``on_epoch(state, row)``. The state's buffers are used
        again by the next epoch: copy what is to be kept.

    Returns:
      The final state, and one row for each epoch: ``epoch``, ``step``, the training metrics
      (means over the epoch's examples while they were trained on), the validation metrics, and
      ``seconds``.

    Raises:
      ValueError, TypeError: for data, labels, batch size, key or state that cannot be meant,
        before anything is computed.

    >>> x = np.linspace(-1, 1, 100, dtype="f")[:, None]
    >>> trainer = train.trainer(layers.dense(1), losses.mean_squared_error, optim.sgd(0.1))
    >>> ts, history = train.fit(trainer, (x, 2 * x + 1), epochs=20, key=jax.random.key(0), batch_size=10)
    >>> round(float(ts.params["kernel"][0, 0]), 2), history[-1]["step"]
    (2.0, 200)
    """
    epochs, steps_per_call = (
        whole(epochs, "fit(epochs=...)"),
        whole(steps_per_call, "fit(steps_per_call=...)"),
    )
    arrays = arrays_of(data, "the training data")
    n = number_of_examples(arrays)
    check_batch_size(batch_size, n)
    ts = _start(trainer, arrays, key, state)
    check_suited(trainer, ts, arrays, "the training data")
    held_out = None if validation is None else checked_data(trainer, ts, validation, "the validation data")

    full, tail = divmod(n, batch_size)
    tail = 0 if drop_last else tail
    steps = full + (tail > 0)
    done = int(ts.step)
    if done >= epochs * steps:
        raise ValueError(
            f"fit(epochs={epochs}) has nothing to do: the state has taken {done} steps, which are "
            f"{done / steps:g} epochs; epochs counts those too"
        )
    check_monitored(trainer, ts, check_steps(trainer, ts, arrays, batch_size, tail), held_out)
    arrays, held_out = jax.tree.map(jnp.asarray, (arrays, held_out))
    history: list[dict[str, Any]] = []
    with progress_bar(progress, epochs=epochs, steps=steps, done=done, batch_size=batch_size) as bar:
        for epoch in range(done // steps, epochs):
            started = time.perf_counter()
            ts, means = run_epoch(
                trainer,
                ts,
                arrays,
                batch_size=batch_size,
                shuffle=shuffle,
                drop_last=drop_last,
                steps_per_call=steps_per_call,
                on_chunk=bar.advance if bar.watches_steps else None,
            )
            if held_out is not None:
                found = evaluate_arrays(trainer, ts, held_out)
                means |= {f"val_{name}": value for name, value in found.items()}
            ts = ts._replace(opt_state=report(ts.opt_state, means))
            row = {"epoch": epoch + 1, "step": int(ts.step), **means}
            row["seconds"] = time.perf_counter() - started
            history.append(row)
            bar.epoch(row)
            if on_epoch is not None:
                on_epoch(ts, row)
    return ts, history


def _start(trainer: Trainer, arrays: PyTree, key: Array | None, state: TrainState | None) -> TrainState:
    if state is not None:
        if key is not None:
            raise TypeError("fit got both key= and state=: the state carries its own key, pass one of them")
        if not isinstance(state, TrainState):
            raise TypeError(
                f"fit(state=...) takes a TrainState and got {type(state).__name__}: pass what fit returned"
            )
        return jax.tree.map(jnp.copy, state)
    if key is None:
        raise TypeError("fit needs a key: pass fit(..., key=jax.random.key(0))")
    check_key(key, "fit")
    x = arrays[0] if isinstance(arrays, tuple) else arrays
    return _init(trainer, key, jax.tree.map(lambda a: jnp.asarray(a[:1]), x))


@partial(jax.jit, static_argnums=0)
def _init(trainer: Trainer, key: Array, x: PyTree) -> TrainState:
    # Initialisation op by op would compile some thirty small programs; jitted, it is one.
    return trainer.init(key, x)
