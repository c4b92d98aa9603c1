"""``fit``: a whole training run from one call."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnkit.checks import unknown_name
from nnkit.train import stopping as early
from nnkit.train.begin import check_beginning, first_state
from nnkit.train.epochs import STEPS_PER_CALL
from nnkit.train.events import Callback, check_callbacks
from nnkit.train.interrupt import Wish, interruptible
from nnkit.train.journal import Journal, open_folder
from nnkit.train.loop import Loop, Plan
from nnkit.train.position import Position, program_digest
from nnkit.train.preflight import check_monitored, check_steps, whole
from nnkit.train.progress import progress_bar
from nnkit.train.skipping import skip_nonfinite
from nnkit.train.supply import example, supply
from nnkit.train.supply import validation as validation_of
from nnkit.types import Array, Trainer, TrainState

__all__ = ["fit"]

GUARDS = ("explain", "skip", "roll_back")


def fit(
    trainer: Trainer,
    data: Any,
    *,
    epochs: int | None = None,
    key: Array | None = None,
    state: TrainState | None = None,
    batch_size: int | None = None,
    validation: Any = None,
    shuffle: bool = True,
    drop_last: bool = False,
    max_steps: int | None = None,
    max_time: float | None = None,
    early_stopping: early.EarlyStopping | None = None,
    guard: str | None = "explain",
    callbacks: Iterable[Callback] | Callback = (),
    run_dir: str | os.PathLike[str] | None = None,
    resume: bool | str = False,
    config: Any = None,
    checkpoint_every: int | None = None,
    keep_last: int = 2,
    keep_best: int = 0,
    steps_per_call: int = STEPS_PER_CALL,
    progress: bool | None = None,
) -> tuple[TrainState, list[dict[str, Any]]]:
    """Trains for ``epochs`` passes over ``data`` and returns the final state and the history.

    The data go to the device once; the steps run compiled, ``steps_per_call`` in a dispatch, on
    buffers that are reused. The order of examples is a function of (key, epoch) alone and the
    randomness of a step one of (key, step) alone, so the result is the same for any
    ``steps_per_call``, the same where a run was stopped and resumed at any step, and the same as
    calling ``trainer.step`` on each batch in turn. A last batch with fewer examples is a step like any
    other.

    Args:
      trainer: from :func:`trainer`.
      data: a dataset, or a pytree of arrays with one leading axis: (x, y) for supervised runs. Or a
        source of batches for what does not fit into memory, ``data.stream(...)``. The first of a tuple, or
        else all of it, is what ``trainer.init`` is shown an example of, in shape.
      epochs: how many passes the run has had at its end, those before ``state`` included; may be left
        out where ``max_steps`` is given.
      key: the run's only source of randomness; needed unless ``state`` is given.
      state: where to go on from; it is copied, so it stays usable. Its step says how many batches
        of how many epochs are done, which presumes the same data and batch size: for a new run from
        old parameters pass ``state._replace(step=jnp.int32(0))``.
      batch_size: examples in a step, 64 by default; a source has its own.
      validation: data on which the metrics are computed after each epoch, as ``val_...``. An optimizer
        with ``optim.reduce_on_plateau(monitor="val_loss")`` is told each epoch's metrics.
      shuffle: whether each epoch has an order of its own.
      drop_last: whether to leave out a last batch that is not full.
      max_steps: how many steps the run has taken at its end at most.
      max_time: for how many seconds this call may go on; it ends with the dispatch that is running then.
      early_stopping: a rule from :func:`early_stopping`.
      guard: what happens when a loss or a parameter becomes inf or NaN. "explain": the run ends with a
        :class:`NotFiniteError` that names the step, the layer and the examples. "skip": a step whose
        loss or gradients are not finite changes nothing, and the row's ``skipped`` counts them.
        "roll_back": the run goes on from the beginning of the epoch, or where it was resumed in it, with
        half the rate, five times at most.
        None: nobody looks.
      callbacks: functions of (event, view), see :class:`View`; what they return at an "epoch" is added to
        its row.
      run_dir: a folder for config.json, metrics.csv, metrics.jsonl and checkpoints. SIGTERM and Ctrl-C
        then save before they end the run.
      resume: True goes on with the run in ``run_dir``, or begins it where there is none. A changed
        training step and other validation data are refused, unless it says "anyway".
      config: what config.json has as the settings; by default the arguments of this call.
      checkpoint_every: steps from one checkpoint to the next, each made at the end of a dispatch; by
        default at ends of epochs, at most one in ten seconds. The end of a run is always saved.
      keep_last: how many checkpoints are kept.
      keep_best: how many more, those with the best value of what ``early_stopping`` monitors, or else of
        the validation loss.
      steps_per_call: steps in one dispatch, at most.
      progress: True, False, or None for a bar on a terminal only.

    Returns:
      The final state, and one row for each epoch: ``epoch``, ``step``, the training metrics
      (means over the epoch's examples while they were trained on), the validation metrics, and
      ``seconds``. An epoch that the run's end cut short has a row too, which no rule takes into account.

    Raises:
      ValueError, TypeError: for data, labels, batch size, key or state that cannot be meant,
        before anything is computed.
      NotFiniteError: see ``guard``.
      OSError: the run folder cannot be written in; the last good checkpoint stays.

    >>> x = np.linspace(-1, 1, 100, dtype="f")[:, None]
    >>> trainer = train.trainer(layers.dense(1), losses.mean_squared_error, optim.sgd(0.1))
    >>> ts, history = train.fit(trainer, (x, 2 * x + 1), epochs=20, key=jax.random.key(0), batch_size=10)
    >>> round(float(ts.params["kernel"][0, 0]), 2), history[-1]["step"]
    (2.0, 200)
    """
    deadline = math.inf if max_time is None else time.monotonic() + _seconds(max_time)
    steps_per_call = whole(steps_per_call, "fit(steps_per_call=...)")
    epochs, max_steps, checkpoint_every = (
        None if value is None else whole(value, f"fit({name}=...)")
        for name, value in (
            ("epochs", epochs),
            ("max_steps", max_steps),
            ("checkpoint_every", checkpoint_every),
        )
    )
    if epochs is None and max_steps is None:
        raise TypeError("fit needs to know when to end: pass epochs=... or max_steps=...")
    callbacks = check_callbacks(callbacks)
    if not (isinstance(resume, bool) or (isinstance(resume, str) and resume == "anyway")):
        raise ValueError(f"resume must be True, False or 'anyway', got {resume!r}")
    keep_last = whole(keep_last, "fit(keep_last=...)")
    keep_best = whole(keep_best, "fit(keep_best=...)") if keep_best != 0 else 0
    if run_dir is None:
        for name, value in (
            ("resume", resume),
            ("checkpoint_every", checkpoint_every),
            ("keep_best", keep_best),
        ):
            if value:
                raise ValueError(f"fit({name}={value!r}) needs run_dir=..., the folder of the run")
    trainer = _guarded(trainer, guard)
    given = supply(data, batch_size, shuffle=shuffle, drop_last=drop_last)
    check_beginning(key, state, name="fit", write="fit(..., key=jax.random.key(0))")
    ts = jax.tree.map(jnp.copy, state) if key is None else first_state(trainer, key, example(given))
    given.check(trainer, ts)
    held_out = validation_of(validation, trainer, ts)
    of_step = check_steps(trainer, ts, given.spec, given.batch_size, given.tail)
    names = check_monitored(trainer, ts, of_step, held_out.spec)
    early.check_rule("fit", early_stopping, names)
    if early_stopping is not None:
        _check_not_stopped(state)
    ts = early.begin(early_stopping, ts, int(ts.step) // given.steps)
    score = _score(early_stopping, names, keep_best)
    if epochs is None:
        assert max_steps is not None
        epochs = -(-max_steps // given.steps)
    if config is None:
        config = {
            "epochs": epochs,
            "max_steps": max_steps,
            "batch_size": given.batch_size,
            "shuffle": shuffle,
        }
        config |= {"drop_last": drop_last, "early_stopping": early_stopping, "guard": guard}

    journal, resumed = None, None
    if run_dir is not None:
        fingerprint = {
            "data": given.digest(ts),
            "validation": held_out.digest(),
            "batch_size": given.batch_size,
            "shuffle": shuffle,
            "drop_last": drop_last,
            "key": np.asarray(jax.random.key_data(ts.key)).tobytes().hex(),
            "early_stopping": None if early_stopping is None else repr(early_stopping),
            "skips": guard == "skip",
            "program": program_digest(jax.make_jaxpr(trainer.step)(ts, given.spec)),
            "jax": jax.__version__,
        }
        folder = open_folder(run_dir, config, resume)
        keep = {"keep_last": keep_last, "keep_best": keep_best, "mode": score[1] if score else "min"}
        journal = Journal(folder, fingerprint, config, **keep)
        resumed = journal.restore(ts, anyway=resume == "anyway") if resume else None
    position = resumed or Position(ts, {}, [])
    _check_goal(position, epochs, max_steps, given.steps, resumed is not None)

    bar = progress_bar(
        progress, epochs=epochs, steps=given.steps, done=int(position.ts.step), batch_size=given.batch_size
    )
    # Without a folder to save in a signal does what it does everywhere.
    signals = contextlib.nullcontext(Wish()) if journal is None else interruptible()
    with (
        signals as wish,
        journal or contextlib.nullcontext(),
        given.feed(steps_per_call, epochs) as feed,
        bar,
    ):
        if journal is not None:
            journal.open(position.rows)
        plan = Plan(
            trainer=trainer,
            feed=feed,
            epochs=epochs,
            max_steps=max_steps,
            deadline=deadline,
            validate=held_out.metrics,
            rule=early_stopping,
            guard=guard,
            callbacks=callbacks,
            journal=journal,
            checkpoint_every=checkpoint_every,
            score=score if keep_best else None,
            keep_best=keep_best,
            config=config,
        )
        return Loop(plan, position, bar, wish).run()


def _seconds(max_time: Any) -> float:
    is_number = isinstance(max_time, int | float | np.number) and not isinstance(max_time, bool)
    if not is_number or not max_time > 0:
        raise ValueError(f"fit(max_time=...) must be a positive number of seconds, got {max_time!r}")
    return float(max_time)


def _guarded(trainer: Trainer, guard: str | None) -> Trainer:
    """The trainer whose step does what the guard asks of it."""
    if guard is not None and guard not in GUARDS:
        raise unknown_name("guard", guard, GUARDS)
    return _skipping(trainer) if guard == "skip" else trainer


@lru_cache(maxsize=32)  # one trainer for each, since programs are compiled for the trainer they are given
def _skipping(trainer: Trainer) -> Trainer:
    trainer = skip_nonfinite(trainer)
    assert trainer.skipping is not None
    return trainer._replace(step=trainer.skipping)


def _check_not_stopped(state: TrainState | None) -> None:
    if state is not None and state.stopping != () and bool(state.stopping.stopped):
        raise ValueError(
            "fit has nothing to do: early stopping ended the run that the state comes from; for another rule pass "
            "state._replace(stopping=())"
        )


def _score(
    rule: early.EarlyStopping | None, names: Mapping[str, Any], keep_best: int
) -> tuple[str, str] | None:
    """The metric that tells the best checkpoint, and its mode."""
    if rule is not None:
        return rule.monitor, rule.mode
    if "val_loss" in names:
        return "val_loss", "min"
    if keep_best:
        raise ValueError(
            f"fit(keep_best={keep_best}) needs validation=... or early_stopping=... to know which checkpoints "
            "are best"
        )
    return None


def _check_goal(position: Position, epochs: int, max_steps: int | None, steps: int, resumed: bool) -> None:
    """Raises where the run is further than it is asked to get."""
    done = int(position.ts.step)
    goal = epochs * steps if max_steps is None else min(max_steps, epochs * steps)
    if done < goal or (resumed and done == goal):
        return
    asked = f"epochs={epochs}" if goal == epochs * steps else f"max_steps={max_steps}"
    what = "saved run" if resumed else "state"
    raise ValueError(
        f"fit({asked}) has nothing to do: the {what} has taken {done} steps, which are "
        f"{done / steps:g} epochs; epochs counts those too"
    )
