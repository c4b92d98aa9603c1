"""``Training``: a run that goes on epoch by epoch, so that a search can stop it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from nnkit.search.member import advance, begin, history_of
from nnkit.train.begin import first_state
from nnkit.train.job import Plan, plan_of, prepare
from nnkit.train.preflight import arrays_of, number_of_examples, whole
from nnkit.train.run import train_epoch
from nnkit.train.stopping import EarlyStopping, restored
from nnkit.train.stopping import begin as begin_stopping
from nnkit.types import Array, PyTree, Trainer, TrainState

__all__ = ["Training", "never", "training"]


def never(carry: Any) -> Array:
    """No training ends by itself: the default of :class:`Training`."""
    del carry
    return jnp.bool_(False)


def _carry(carry: Any, hparams: Any) -> Any:
    del hparams
    return carry


class Training(NamedTuple):
    """A training run as pure functions of one epoch each, which is also a training function as a whole.

    Made by :func:`training` from a trainer and data, or from functions of one's own. A search that prunes
    takes nothing else, since it must be able to leave a run and to go on with it.

    Attributes:
      start: ``start(key, hparams) -> carry``: what goes from epoch to epoch, a pytree of arrays. In a search
        with folds it is called with ``fold=`` too, an int32 that may be traced.
      epoch: ``epoch(carry, hparams, number) -> (carry, row)``: epoch ``number``, from 0, which is traced, and
        its row of the history, scalars by name. The carry keeps its structure, shapes and dtypes.
      epochs: how many there are at most.
      ended: ``ended(carry) -> bool``: whether the run has come to its end before, as by early stopping.
      result: ``result(carry, hparams)``: what the run returns beside its history.

    As a training function it gives ``(result, history)``, the history as arrays of (epochs,): ``epoch`` from 1
    on and what the rows have. After the end floats are NaN, and whole numbers stay as they were.

    >>> halving = search.Training(
    ...     start=lambda key, hparams: jax.random.uniform(key),
    ...     epoch=lambda x, hparams, number: (x * hparams["rate"], {"loss": x * hparams["rate"]}),
    ...     epochs=3,
    ... )
    >>> x, history = halving(jax.random.key(0), {"rate": 0.5})
    >>> history["epoch"].tolist(), bool(history["loss"][-1] == x)
    ([1, 2, 3], True)
    """

    start: Callable[..., Any]
    epoch: Callable[[Any, Any, Any], tuple[Any, dict[str, Array]]]
    epochs: int
    ended: Callable[[Any], Array] = never
    result: Callable[[Any, Any], Any] = _carry

    def run(self, key: Array, hparams: Any, **folded: Any) -> tuple[Any, dict[str, Array]]:
        """The whole run: ``(result, history)``; ``fold=`` is handed to ``start``."""
        member = advance(self, begin(self, key, hparams, **folded), hparams, self.epochs)
        return self.result(member.carry, hparams), history_of(member)

    __call__ = run


def training(
    make: Callable[[Any], Trainer],
    data: Any,
    epochs: int,
    *,
    batch_size: int | Callable[[Any], int] = 64,
    validation: Any = None,
    shuffle: bool = True,
    drop_last: bool = False,
    early_stopping: EarlyStopping | Callable[[Any], EarlyStopping] | None = None,
) -> Training:
    """``train.run`` epoch by epoch, for a search: the same order, keys, metrics and early stopping.

    Args:
      make: makes the trainer from the hyper-parameters: ``make(hparams)``. Those that are not static are traced.
      data: as for ``train.run``; in a search with folds a function of the fold, ``data(fold)``, that gives
        ``(training data, validation data)``, see :func:`fold_of`.
      epochs: how many there are at most.
      batch_size: examples in a step, or a function of the hyper-parameters; the one it reads must be static.
      validation: data on which the metrics are computed after each epoch, as ``val_...``.
      shuffle: whether each epoch has an order of its own.
      drop_last: whether to leave out a last batch that is not full.
      early_stopping: from ``train.early_stopping``, or a function of the hyper-parameters that makes one.

    Returns:
      A :class:`Training` whose result is the ``TrainState`` at the end. Called with plain numbers, outside of
      any transformation, it gives ``train.run``'s bits; within a program, where the numbers are traced, the same
      to rounding. It has no derivative in reverse: use ``train.run`` for that.

    Raises:
      ValueError, TypeError: as ``train.run``; for a trainer, batch size or rule that ``make`` and the other
        functions cannot have meant, folds without data that depend on them, or the other way round.

    >>> x = np.linspace(-1, 1, 100, dtype="f")[:, None]
    >>> def make(hparams):
    ...     return train.trainer(layers.dense(1), losses.mean_squared_error, optim.sgd(hparams["lr"]))
    >>> run = search.training(make, (x, 2 * x), epochs=3, batch_size=10)
    >>> ts, history = run(jax.random.key(0), {"lr": 0.1})
    >>> sorted(history), int(ts.step)
    (['epoch', 'loss', 'step'], 30)
    """
    epochs = whole(epochs, "search.training(epochs=...)")
    if not callable(make):
        raise TypeError(
            f"search.training needs a function that makes the trainer and got {type(make).__name__}: pass "
            "lambda hparams: train.trainer(model, loss, optim.adam(hparams['lr']))"
        )
    parts: Callable[..., Any]
    if callable(data) and not hasattr(data, "arrays"):
        if validation is not None:
            raise TypeError(
                "search.training got validation= and data that are a function of the fold: have that return "
                "(training data, validation data)"
            )
        by_fold, parts = True, data
    else:
        fixed = _arrays(data, "the training data"), _arrays(validation, "the validation data")
        by_fold, parts = False, lambda **fold: fixed

    def parts_of(hparams: Any, fold: dict[str, Any]) -> tuple[Trainer, PyTree, PyTree, int, Any]:
        trainer = make(hparams)
        if not isinstance(trainer, Trainer):
            raise TypeError(
                f"search.training's make(hparams) returned {type(trainer).__name__}: it must return a trainer, "
                "train.trainer(...)"
            )
        rule = early_stopping
        if callable(rule):
            rule = rule(hparams)
        return trainer, *parts(**fold), _batch_size(batch_size, hparams), rule

    def start(key: Array, hparams: Any, **fold: Any) -> tuple[TrainState, dict[str, Any]]:
        _check_fold(fold, by_fold)
        trainer, arrays, held_out, size, rule = parts_of(hparams, fold)
        options = {"shuffle": shuffle, "drop_last": drop_last, "early_stopping": rule, "remat": False}
        options |= {"batch_size": size, "validation": held_out}
        job = prepare("search.training", trainer, key, arrays, epochs, **options)
        ts = first_state(trainer, key, job.example) if job.alone else job.ts
        return begin_stopping(rule, ts), fold

    def epoch(carry: Any, hparams: Any, number: Any) -> tuple[Any, dict[str, Array]]:
        ts, fold = carry
        trainer, arrays, held_out, size, rule = parts_of(hparams, fold)
        plan = _plan(arrays, epochs, size, shuffle, drop_last)
        ts, row = train_epoch(trainer, arrays, held_out, rule, plan, ts, number)
        return (ts, fold), {"step": ts.step, **row}

    def ended(carry: Any) -> Array:
        return carry[0].stopping.stopped

    def result(carry: Any, hparams: Any) -> TrainState:
        ts, _ = carry
        rule = early_stopping(hparams) if callable(early_stopping) else early_stopping
        return ts if rule is None else restored(rule, ts.stopping, ts)

    return Training(start, epoch, epochs, never if early_stopping is None else ended, result)


def _arrays(data: Any, what: str) -> PyTree:
    """The arrays on the device, once for all programs."""
    return None if data is None else jax.tree.map(jnp.asarray, arrays_of(data, what))


def _check_fold(fold: dict[str, Any], by_fold: bool) -> None:
    if fold and not by_fold:
        raise TypeError(
            "search.training got data that are the same for all folds: pass a function, "
            "search.training(make, lambda fold: search.fold_of(data, fold, 5, key=key), ...)"
        )
    if by_fold and not fold:
        raise TypeError(
            "search.training got data that are a function of the fold, and no fold: pass sweep(..., folds=5)"
        )


def _batch_size(batch_size: Any, hparams: Any) -> int:
    size: Any = batch_size(hparams) if callable(batch_size) else batch_size
    if isinstance(size, Tracer):
        raise TypeError(
            "search.training(batch_size=...) gave a traced value, and the size of a batch is part of the program: "
            "make it static in the space, search.choice([32, 64]) or search.integer(16, 256, log=True)"
        )
    return size


def _plan(arrays: PyTree, epochs: int, size: int, shuffle: bool, drop_last: bool) -> Plan:
    """The plan of a run of its own, whose rounding an epoch has wherever it is."""
    return plan_of(epochs, size, number_of_examples(arrays), shuffle, drop_last)
