"""What a run is given to train on, arrays or a source of batches, made ready for the loop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nnkit.data import Source, check_batch_size
from nnkit.data.batch_source import check_source, checked_batches
from nnkit.train.evaluate import evaluate_arrays
from nnkit.train.evaluate_source import evaluate_source
from nnkit.train.feed import Feed, Resident
from nnkit.train.position import data_digest
from nnkit.train.preflight import arrays_of, check_suited, checked_data, number_of_examples, specs
from nnkit.train.streaming import Streaming
from nnkit.types import PyTree, Trainer, TrainState

__all__ = ["Supply", "Validation", "example", "supply", "validation"]

BATCH_SIZE = 64
"""Examples in a step, unless something else is said."""


class Supply(NamedTuple):
    """Training data whose form no longer matters.

    Attributes:
      steps: batches in an epoch.
      batch_size: examples in a full batch.
      tail: examples in an uneven last batch, 0 without.
      spec: a full batch, as a pytree of ``jax.ShapeDtypeStruct``.
      check: raises where the examples do not suit a trainer; of a source the first batch is looked at.
      digest: of the examples; of a source of its first batch.
      feed: makes the feed of so many steps a dispatch and epochs. A context manager.
    """

    steps: int
    batch_size: int
    tail: int
    spec: PyTree
    check: Callable[[Trainer, TrainState], None]
    digest: Callable[[TrainState], str]
    feed: Callable[[int, int], contextlib.AbstractContextManager[Feed]]


def supply(data: Any, batch_size: int | None, *, shuffle: bool, drop_last: bool) -> Supply:
    """The training data, after the checks that need no trainer."""
    if isinstance(data, Source):
        return _of_source(data, batch_size, shuffle=shuffle, drop_last=drop_last)
    arrays = arrays_of(data, "the training data")
    n, size = number_of_examples(arrays), BATCH_SIZE if batch_size is None else batch_size
    check_batch_size(size, n)

    def feed(steps_per_call: int, epochs: int) -> contextlib.AbstractContextManager[Feed]:
        on_device = jax.tree.map(jnp.asarray, arrays)
        return contextlib.nullcontext(
            Resident(on_device, size, shuffle=shuffle, drop_last=drop_last, steps_per_call=steps_per_call)
        )

    return Supply(
        steps=n // size if drop_last else -(-n // size),
        batch_size=size,
        tail=0 if drop_last else n % size,
        spec=specs(arrays, size),
        check=lambda trainer, ts: check_suited(trainer, ts, arrays, "the training data"),
        digest=lambda ts: data_digest(arrays),
        feed=feed,
    )


def _of_source(source: Source, batch_size: int | None, *, shuffle: bool, drop_last: bool) -> Supply:
    size, tail = check_source(source)
    if batch_size not in (None, size):
        raise ValueError(
            f"the source's batches have {size} examples and fit got batch_size={batch_size}: leave it out, the "
            "source decides"
        )
    if not shuffle or drop_last:
        raise ValueError(
            "shuffle and drop_last are for arrays: a source decides on its order itself, as in "
            "data.stream(..., shuffle=False, drop_last=True)"
        )

    def first(ts: TrainState) -> PyTree:
        return next(checked_batches(source, ts.key, 0))

    def feed(steps_per_call: int, epochs: int) -> contextlib.AbstractContextManager[Feed]:
        return Streaming(source, steps_per_call=steps_per_call, epochs=epochs)

    return Supply(
        steps=source.steps,
        batch_size=size,
        tail=tail,
        spec=specs(source.spec, size),
        check=lambda trainer, ts: check_suited(
            trainer, ts, first(ts), "the first batch of the training data"
        ),
        digest=lambda ts: data_digest(first(ts)),
        feed=feed,
    )


def example(of: Supply) -> PyTree:
    """What ``trainer.init`` is shown: one example of the first of a tuple, or else of all; zeros."""
    x = of.spec[0] if isinstance(of.spec, tuple) else of.spec
    return jax.tree.map(lambda leaf: jnp.zeros((1, *leaf.shape[1:]), leaf.dtype), x)


Validate = Callable[[TrainState], dict[str, float]]


class Validation(NamedTuple):
    """Validation data whose form no longer matters.

    Attributes:
      spec: a batch of them, as a pytree of ``jax.ShapeDtypeStruct``; None without validation.
      metrics: computes the metrics of a state on them; None without validation.
      digest: of the examples; of a source of its first batch; "" without validation.
    """

    spec: PyTree
    metrics: Validate | None
    digest: Callable[[], str]


def validation(data: Any, trainer: Trainer, ts: TrainState) -> Validation:
    """The validation data, or what stands for none, after all checks."""
    if data is None:
        return Validation(None, None, lambda: "")
    if isinstance(data, Source):
        size, _ = check_source(data)
        first = next(checked_batches(data, ts.key, 0))
        check_suited(trainer, ts, first, "the first batch of the validation data")
        return Validation(
            specs(data.spec, size), lambda ts: evaluate_source(trainer, ts, data), lambda: data_digest(first)
        )
    arrays = checked_data(trainer, ts, data, "the validation data")
    on_device = jax.tree.map(jnp.asarray, arrays)
    size = min(number_of_examples(arrays), 1000)
    return Validation(
        specs(arrays, size), lambda ts: evaluate_arrays(trainer, ts, on_device), lambda: data_digest(arrays)
    )
