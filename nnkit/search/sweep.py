"""``sweep``: a search from beginning to end, and ``retrain``: any of its trials again."""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from nnkit.checks import is_static_number, unknown_name
from nnkit.search.choose import check_selection
from nnkit.search.engine import Engine
from nnkit.search.loop import MOST, Loop
from nnkit.search.progress import Callback, line
from nnkit.search.samplers import make_sampler
from nnkit.search.space import Space, as_space
from nnkit.search.storage import require_optuna
from nnkit.search.study import Study, begin_study
from nnkit.types import PyTree

if TYPE_CHECKING:
    from nnkit.search.pruning import Pruner

__all__ = ["retrain", "sweep"]


def sweep(
    train_fn: Callable[..., Any],
    space: Mapping[str, Any] | Space,
    *,
    sampler: Any = "random",
    trials: int,
    seeds: int | Sequence[int] = 1,
    metric: str = "val_loss",
    mode: Literal["min", "max"] = "min",
    at: Literal["last", "best"] = "last",
    batch: int | None = None,
    members: Literal["exact", "mapped"] | None = None,
    workers: int | None = None,
    devices: Sequence[Any] | None = None,
    pruner: Pruner | None = None,
    folds: int | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    storage: Any = None,
    name: str | None = None,
    sampler_seed: int = 0,
    progress: bool | None = None,
    callbacks: Callback | Sequence[Callback] = (),
    max_time: float | None = None,
) -> Study:
    """Trains many settings of a pure training function, in batches of compiled programs, and records each.

    All trials are trained with the same seeds, so that they differ by their hyper-parameters alone. A
    configuration that the study has already is copied and not trained again. Called again with the same
    arguments it goes on where it was stopped, and any number of processes may work on one study at once.

    Args:
      train_fn: ``train_fn(key, hparams) -> history``, or ``(result, history)``: pure, and compiled. The
        history is a dict of arrays of (epochs,), as from ``train.run``, or of scalars. It may also take the
        names of the space, ``train_fn(key, *, lr, width)``, or be a :class:`Training`.
      space: what is searched, see :func:`as_space`.
      sampler: a name ("grid", "random", "quasi-random", "tpe", "gp", "cma-es", "coarse-to-fine"), a sampler
        of Optuna's, or a function from a seed to one: see :func:`make_sampler`.
      trials: how many the study has at the end, those of earlier calls and of other workers included.
      seeds: how many trainings a trial has, with the seeds 0, 1, ...; or the seeds. A training gets
        ``jax.random.key(seed)``; a trial's value is the mean.
      metric: the name in the history by which trials are judged.
      mode: whether it is to be small ("min") or large ("max").
      at: the value is the metric of the "last" epoch that was trained, or of the "best".
      batch: how many trials are asked for together. By default 8 for a sampler that looks at results, whose
        choices depend on it, and 27 with a pruner, which compares the trials of a batch; for others, where
        it changes nothing, as many as go well.
      members: "exact" or "mapped", see :class:`Engine`; by default exact on a CPU, mapped elsewhere.
      workers: threads, in exact mode; by default one for each core, or each accelerator.
      devices: what to train on.
      pruner: :func:`successive_halving` or :func:`median`; ``train_fn`` must then be a :class:`Training`. The
        trials of a batch are compared with each other, and recorded when all are done.
      folds: of a cross-validation: ``train_fn`` is called with ``fold=`` too, see :func:`fold_of`.
      run_dir: a folder for the study, which is then the SQLite file ``study.db`` in it.
      storage: where else it is, see :func:`open_storage`; without both it is in memory.
      name: of the study in its storage.
      sampler_seed: of the sampler's randomness.
      progress: whether to show a line on standard error; None for "on a terminal".
      callbacks: called as ``callback(event, view)``, see :class:`View`.
      max_time: seconds after which no further trial is begun, and what is left of a batch is given back when
        its next trial is finished; a later call goes on.

    Returns:
      The :class:`Study`: ``study.best``, ``study.trials``, ``study.export("trials.csv")``.

    Raises:
      ValueError, TypeError: before anything is trained, for arguments that cannot be meant, a training function
        that does not go with the space, or a study that was asked something else.
      ConnectionError, OSError: the storage cannot be reached.
      KeyboardInterrupt, SystemExit: Ctrl-C and SIGTERM; what is finished is kept, what was running is
        given back.

    >>> def train_fn(key, hparams):
    ...     noise = 0.01 * jax.random.normal(key)
    ...     return {"val_loss": (jnp.log10(hparams["lr"]) + 2) ** 2 + noise}
    >>> study = search.sweep(train_fn, {"lr": search.log_uniform(1e-4, 1.0)}, sampler="grid", trials=5, seeds=3)
    >>> study.best.hparams, study.best.values.shape
    ({'lr': 0.01}, (3,))
    """
    space = as_space(space)
    for what, number in (("trials", trials), ("batch", batch)):
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
            raise ValueError(f"sweep({what}=...) must be a whole number of at least 1, got {number!r}")
    if max_time is not None and not (is_static_number(max_time) and max_time > 0):
        raise ValueError(f"sweep(max_time=...) must be seconds above 0, got {max_time!r}")
    if mode not in ("min", "max"):
        raise unknown_name("mode", mode, ("min", "max"))
    check_selection(metric)
    called = _callbacks(callbacks)
    shown = line(progress)
    require_optuna()
    engine = Engine(
        train_fn, space, seeds=_seeds(seeds), folds=folds, members=members, workers=workers, devices=devices
    )
    train = engine.run if pruner is None else _pruned(engine, pruner, metric, mode)
    drawn = make_sampler(sampler, space, seed=sampler_seed, trials=trials, batch=batch)
    size, grows = _batch(batch, drawn, pruner, engine, alone=run_dir is None and storage is None)
    engine.check(metric)
    study = begin_study(
        space,
        metric=metric,
        mode=mode,
        at=at,
        seeds=engine.seeds,
        folds=folds,
        sampler=getattr(drawn, "name", None) or getattr(sampler, "__name__", type(sampler).__name__),
        run_dir=run_dir,
        storage=storage,
        name=name,
    )
    study.optuna.sampler = drawn
    loop = Loop(
        study,
        engine,
        train,
        target=trials,
        batch=min(size, trials),
        grows=grows,
        together=pruner is not None,
        max_time=max_time,
        callbacks=called if shown is None else (shown, *called),
    )
    loop.run()
    _engines[study] = engine
    return study


def retrain(
    study: Study,
    train_fn: Callable[..., Any],
    number: int | None = None,
    seed: int | None = None,
    *,
    fold: int | None = None,
) -> tuple[PyTree, dict[str, np.ndarray]]:
    """Trains a trial of the study again: ``(result, history)``, for its parameters, its test or a look.

    By the program that trained it, so that on the same machine the history is the recorded one bit for bit;
    where members were mapped, to rounding.

    Args:
      study: from :func:`sweep` or :func:`open_study`.
      train_fn: what was swept.
      number: the trial's; by default the best one's.
      seed: by default the first of the study; another one is welcome.
      fold: which, where the study has folds.

    Returns:
      What ``train_fn`` returned beside the history, None where that is all; and the history of one member.

    Raises:
      ValueError: there is no such trial. And as :func:`sweep`.

    >>> def train_fn(key, hparams):
    ...     return hparams["lr"] * jnp.ones(2), {"val_loss": hparams["lr"] ** 2}
    >>> study = search.sweep(train_fn, {"lr": search.uniform(-1, 1)}, trials=3)
    >>> params, history = search.retrain(study, train_fn)
    >>> bool(history["val_loss"] == study.best.history["val_loss"][0]), params.shape
    (True, (2,))
    """
    if number is None:
        trial = study.best
    else:
        found = {trial.number: trial for trial in study.trials}
        if number not in found:
            raise ValueError(
                f"the study {study.name!r} has no trial {number!r}: it has {len(found)}, from 0 on"
            )
        trial = found[number]
    seed = study.seeds[0] if seed is None else seed
    engine = _engines.get(study)
    if engine is None or engine.train_fn is not train_fn:
        engine = Engine(train_fn, study.space, seeds=study.seeds, folds=study.folds, members="exact")
        _engines[study] = engine
    return engine.retrain(trial.params, seed, fold)


_engines: weakref.WeakKeyDictionary[Study, Engine] = weakref.WeakKeyDictionary()
"""Of each study the one whose programs are compiled, so that retraining need not do it again."""


def _pruned(engine: Engine, pruner: Pruner, metric: str, mode: Literal["min", "max"]) -> Callable[..., Any]:
    from nnkit.search.pruned import run_pruned
    from nnkit.search.pruning import Pruner
    from nnkit.search.training import Training

    if not isinstance(pruner, Pruner):
        raise TypeError(
            f"sweep(pruner=...) must be search.successive_halving() or search.median(), got {pruner!r}"
        )
    if not isinstance(engine.train_fn, Training):
        raise TypeError(
            "with a pruner a training must be one that can be left between two epochs: pass "
            "search.training(make, data, epochs) as train_fn, or leave out pruner="
        )
    return functools.partial(run_pruned, engine, engine.train_fn, pruner=pruner, metric=metric, mode=mode)


def _batch(batch: int | None, sampler: Any, pruner: Any, engine: Engine, *, alone: bool) -> tuple[int, bool]:
    """How many trials are asked for together, and whether that may change with their speed."""
    if batch is not None:
        return batch, False
    if pruner is not None:
        return _COHORT, False
    if getattr(sampler, "name", None) not in _BLIND:
        return getattr(sampler, "batch", _ADAPTIVE), False
    if engine.members == "mapped":
        return max(1, MOST // (len(engine.seeds) * (engine.folds or 1))), False
    # Others who work on the study, or join later, should find something to do.
    return (MOST, False) if alone else (4 * engine.workers, True)


_BLIND = ("grid", "random", "quasi-random")
"""Samplers that do not look at results, so that nothing depends on the batch."""

_ADAPTIVE = 8
"""The batch for those that do: the same on every machine."""

_COHORT = 27
"""The batch with a pruner: successive halving leaves 9, 3 and 1 of it."""


def _seeds(seeds: Any) -> Any:
    """The seeds, where a number says how many; a list is the engine's to check."""
    if isinstance(seeds, bool) or not isinstance(seeds, int | np.integer):
        return seeds
    if seeds < 1:
        raise ValueError(
            f"sweep(seeds=...) must be at least 1, got {seeds}: it is how many trainings a trial has"
        )
    return range(int(seeds))


def _callbacks(callbacks: Any) -> tuple[Callback, ...]:
    found = (callbacks,) if callable(callbacks) else tuple(callbacks)
    for callback in found:
        if not callable(callback):
            raise TypeError(f"sweep(callbacks=...) must be functions of (event, view), got {callback!r}")
    return found
