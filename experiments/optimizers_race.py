"""Trainings at many learning rates and seeds, a compiled program for each optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from nnkit import data, losses, metrics, train
from nnkit.types import GradientTransformation, Layer, PyTree, TrainState

__all__ = ["Summary", "Sweep", "learning_rates", "summary", "sweep"]


class Sweep(NamedTuple):
    """One optimizer's trainings; not one is left out, whatever became of it.

    The arrays are of shape (rates, seeds, epochs + 1); their first epoch is the start.

    Attributes:
      rates: the learning rates.
      seeds: the seeds.
      train_loss: mean loss over the whole training part; NaN or infinite where the training diverged.
      validation_accuracy: on the validation part.
      test_accuracy: on the test part.
    """

    rates: Float[np.ndarray, " rates"]
    seeds: Sequence[int]
    train_loss: Float[np.ndarray, "rates seeds epochs"]
    validation_accuracy: Float[np.ndarray, "rates seeds epochs"]
    test_accuracy: Float[np.ndarray, "rates seeds epochs"]

    @property
    def diverged(self) -> np.ndarray:
        """Whether a training ended in numbers that are not finite, (rates, seeds)."""
        return ~np.isfinite(self.train_loss[:, :, -1])

    @property
    def chosen(self) -> int:
        """The place in ``rates`` of the one to race with: best mean validation accuracy after the last
        epoch, of equal ones the lowest training loss. A rate at which one seed diverged is not chosen,
        unless there is no other."""
        accuracy = self.validation_accuracy[:, :, -1].mean(axis=1)
        loss = self.train_loss[:, :, -1].mean(axis=1)
        order = np.lexsort((np.nan_to_num(loss, nan=np.inf), -accuracy, self.diverged.any(axis=1)))
        return int(order[0])


class Summary(NamedTuple):
    """The chosen rate's results after the last epoch, over the seeds; the spread is the sample's."""

    learning_rate: float
    train_loss: float
    train_loss_std: float
    validation_accuracy: float
    test_accuracy: float
    test_accuracy_std: float


def learning_rates(lowest: float, highest: float, per_decade: int) -> Float[np.ndarray, " rates"]:
    """Rates from ``lowest`` to ``highest``, equally far apart in logarithm.

    >>> [float(f"{rate:.3g}") for rate in learning_rates(0.01, 1, 2)]
    [0.01, 0.0316, 0.1, 0.316, 1.0]
    """
    if not 0 < lowest < highest < float("inf"):
        raise ValueError(
            f"rates must be two positive numbers, the lowest first, got {lowest:g} and {highest:g}"
        )
    if per_decade < 1:
        raise ValueError(f"rates_per_decade must be at least 1, got {per_decade}")
    decades = np.log10(highest / lowest)
    return np.logspace(np.log10(lowest), np.log10(highest), max(2, round(decades * per_decade) + 1))


def sweep(
    make: Callable[[Any], GradientTransformation],
    model: Layer,
    splits: data.Splits,
    rates: Float[np.ndarray, " rates"],
    seeds: Sequence[int],
    *,
    epochs: int,
    batch_size: int,
) -> Sweep:
    """Trains ``model`` with ``make(rate)`` from every seed at every rate: one program, one dispatch.

    The rate is an argument of the program, so all rates share one compilation. A seed decides the
    initial parameters and the order of the examples; the last, uneven batch of an epoch is left out.
    """
    parts = jax.tree.map(jnp.asarray, tuple(part.arrays for part in splits if part is not None))
    pairs = jnp.asarray(np.repeat(rates, len(seeds)), jnp.float32), jnp.tile(jnp.array(seeds), len(rates))
    found = jax.device_get(_trainings(make, model, epochs, batch_size, parts, pairs))
    shape = len(rates), len(seeds), epochs + 1
    return Sweep(rates, seeds, *(np.asarray(a, float).reshape(shape) for a in found))


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _trainings(
    make: Any, model: Layer, epochs: int, batch_size: int, parts: PyTree, pairs: tuple[Array, Array]
) -> tuple[Array, Array, Array]:
    (x, y), validation, test = parts
    n = len(x)
    steps = n // batch_size

    def training(pair: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        rate, seed = pair
        run = train.trainer(
            model, losses.softmax_cross_entropy, make(rate), metrics={"accuracy": metrics.accuracy}
        )

        def measured(ts: TrainState) -> tuple[Array, Array, Array]:
            on_validation, on_test = run.evaluate(ts, validation), run.evaluate(ts, test)
            return run.evaluate(ts, (x, y))["loss"], on_validation["accuracy"], on_test["accuracy"]

        def step(ts: TrainState, rows: Array) -> tuple[TrainState, None]:
            return run.step(ts, (x[rows], y[rows]))[0], None

        def epoch(ts: TrainState, number: Array) -> tuple[TrainState, Any]:
            order = data.shuffled_indices(ts.key, number, n)[: steps * batch_size]
            ts, _ = jax.lax.scan(step, ts, order.reshape(steps, batch_size))
            return ts, measured(ts)

        ts = run.init(jax.random.key(seed), x[:1])
        first = measured(ts)
        _, rest = jax.lax.scan(epoch, ts, jnp.arange(epochs))
        return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, rest)

    # One after the other: on a CPU products of many small matrices at once are slower than that.
    return jax.lax.map(training, pairs)


def summary(found: Sweep) -> Summary:
    """The row of a table: the chosen rate, and mean and spread over the seeds there."""
    loss, validation, test = (a[found.chosen, :, -1] for a in found[2:])
    ddof = int(len(found.seeds) > 1)
    with np.errstate(invalid="ignore"):  # the spread of an infinite loss is NaN
        return Summary(
            float(found.rates[found.chosen]),
            float(loss.mean()),
            float(loss.std(ddof=ddof)),
            float(validation.mean()),
            float(test.mean()),
            float(test.std(ddof=ddof)),
        )
