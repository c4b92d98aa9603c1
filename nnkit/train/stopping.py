"""Early stopping as a rule and two pure functions, for the host and for compiled runs alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nnkit.checks import is_static_number, unknown_name
from nnkit.optim.scalars import Scalar, as_scalar
from nnkit.train.averaging import AveragedState
from nnkit.types import PyTree, TrainState

__all__ = [
    "EarlyStopping",
    "Stopping",
    "begin",
    "check_monitor",
    "check_rule",
    "early_stopping",
    "restored",
    "start",
    "update",
]


class EarlyStopping(NamedTuple):
    """When a run stops; made and described by :func:`early_stopping`."""

    monitor: str
    patience: Scalar
    min_delta: Scalar
    mode: str
    start_from_epoch: Scalar
    baseline: Scalar | None
    restore_best: bool


class Stopping(NamedTuple):
    """What early stopping remembers from epoch to epoch, a pytree of arrays.

    Attributes:
      best: the best value of the metric so far, at first the worst there is.
      best_epoch: the epoch it came from, counted from 1 as in the history; 0 where there was none.
      wait: how many epochs in a row were no better, and did not beat the baseline.
      epoch: how many epochs the run has had.
      stopped: whether the run is at its end.
      params: the parameters of the best epoch, or () unless the rule says ``restore_best``.
      state: the layers' state of that epoch, or ().
      average: the average of :func:`nnkit.train.averaged` at that epoch and its weight, or ().
    """

    best: Float[Array, ""]
    best_epoch: Int[Array, ""]
    wait: Int[Array, ""]
    epoch: Int[Array, ""]
    stopped: Bool[Array, ""]
    params: PyTree
    state: PyTree
    average: PyTree


def early_stopping(
    monitor: str = "val_loss",
    *,
    patience: Scalar = 0,
    min_delta: Scalar = 0.0,
    mode: str = "min",
    start_from_epoch: Scalar = 0,
    baseline: Scalar | None = None,
    restore_best: bool = False,
) -> EarlyStopping:
    """The rule that a run ends after ``patience`` epochs in which a metric got no better (Keras 3's).

    A value is better when it is below ``best − min_delta``, with mode "max" above ``best + min_delta``;
    NaN is never better. Each watched epoch adds 1 to ``wait``, a better one that also beats the baseline
    sets it to 0, and one that is no better ends the run where ``wait >= patience``, except the first. The
    numbers may be traced: a sweep maps over them.

    Args:
      monitor: the metric's name in the history.
      patience: after how many epochs without improvement; 0 is as 1.
      min_delta: how much better is better, in the metric's unit.
      mode: whether small ("min") or large ("max") is good.
      start_from_epoch: how many epochs go by before the metric is watched.
      baseline: what the metric has to beat, by ``min_delta``, for the waiting to begin again.
      restore_best: whether the run returns the best epoch's parameters and layer state, and not the last
        one's. Where no epoch had a best value (NaN in all of them) the last stays.

    Raises:
      ValueError: for a number outside its interval or another mode.
      TypeError: for a value that is not a number, a monitor that is no name, a restore_best that is no bool.

    The best value is 1, two epochs are no better, and the run ends:

    >>> from nnkit.train import stopping
    >>> rule = train.early_stopping("val_loss", patience=2)
    >>> ts = train.trainer(
    ...     layers.dense(1), losses.mean_squared_error, optim.sgd(0.1)
    ... ).init(jax.random.key(0), jnp.ones((1, 2)))
    >>> s = stopping.start(rule, ts)
    >>> for value in (2.0, 1.0, 1.0, 1.5):
    ...     s = stopping.update(rule, s, ts, {"val_loss": value})
    ...     print(int(s.epoch), int(s.best_epoch), int(s.wait), bool(s.stopped))
    1 1 0 False
    2 2 0 False
    3 2 1 False
    4 2 2 True
    """
    if not isinstance(monitor, str):
        raise TypeError(f"monitor must be a metric's name, got {monitor!r}: write monitor='val_loss'")
    if mode not in ("min", "max"):
        raise unknown_name("mode", mode, ("min", "max"))
    if not isinstance(restore_best, bool):
        raise TypeError(f"restore_best must be True or False, got {restore_best!r}")
    return EarlyStopping(
        monitor,
        _whole(patience, "patience", "after so many epochs without improvement a run ends"),
        as_scalar(min_delta, "min_delta", "[0, inf)", "it is how much better is better, in either mode"),
        mode,
        _whole(start_from_epoch, "start_from_epoch", "so many epochs are not watched"),
        None if baseline is None else as_scalar(baseline, "baseline", why="it is a value of the metric"),
        restore_best,
    )


def _whole(value: Any, name: str, why: str) -> Any:
    value = as_scalar(value, name, "[0, inf)", why)
    if is_static_number(value) and value != int(value):
        raise ValueError(f"{name} must be a whole number, got {value}: {why}")
    return value


def check_monitor(rule: EarlyStopping, metrics: Iterable[str]) -> None:
    """Raises unless the rule's metric is among the names that an epoch's row will have.

    >>> check_monitor(train.early_stopping("f1"), ["loss", "accuracy"])
    Traceback (most recent call last):
    ValueError: early_stopping monitors 'f1', which the run does not compute: its metrics are accuracy, loss
    """
    names = sorted(metrics)
    if rule.monitor in names:
        return
    held_out = rule.monitor.startswith("val_") and not any(name.startswith("val_") for name in names)
    advice = "pass validation=...; its" if held_out else "its"
    raise ValueError(
        f"early_stopping monitors {rule.monitor!r}, which the run does not compute: {advice} metrics are "
        f"{', '.join(names) or 'none'}"
    )


def check_rule(name: str, rule: Any, metrics: Iterable[str]) -> None:
    """Raises unless ``rule`` is None, or a rule whose metric ``name``'s rows will have."""
    if rule is None:
        return
    if not isinstance(rule, EarlyStopping):
        raise TypeError(
            f"{name}(early_stopping=...) takes a rule and got {rule!r}: pass train.early_stopping('val_loss')"
        )
    check_monitor(rule, metrics)


def start(rule: EarlyStopping, ts: TrainState, epoch: Any = 0) -> Stopping:
    """What is remembered before the first epoch, in buffers of its own.

    Args:
      rule: from :func:`early_stopping`.
      ts: the state that the run starts from.
      epoch: how many epochs it has had.
    """
    worst = jnp.inf if rule.mode == "min" else -jnp.inf
    return Stopping(
        jnp.asarray(worst, jax.dtypes.canonicalize_dtype(float)),
        jnp.zeros([], jnp.int32),
        jnp.zeros([], jnp.int32),
        jnp.array(epoch, jnp.int32),
        jnp.zeros([], bool),
        *jax.tree.map(jnp.copy, _kept(rule, ts)),
    )


def begin(rule: EarlyStopping | None, ts: TrainState, epoch: Any = 0) -> TrainState:
    """``ts`` with what the rule remembers: what it carries already, or else :func:`start`'s; () without a rule.

    Raises:
      ValueError: where the state was left by a rule with another ``restore_best``.
    """
    if rule is None:
        return ts._replace(stopping=())
    if ts.stopping == ():
        return ts._replace(stopping=start(rule, ts, epoch))
    if (ts.stopping.params == ()) == rule.restore_best:
        raise ValueError(
            f"early_stopping(restore_best={rule.restore_best}) got the state of a run with "
            f"restore_best={not rule.restore_best}: pass the same, or begin anew with state._replace(stopping=())"
        )
    return ts


def update(
    rule: EarlyStopping, stopping: Stopping, ts: TrainState, metrics: Mapping[str, Array | float]
) -> Stopping:
    """What is remembered after one more epoch, in buffers of its own.

    Pure and compilable; the mode, the names and ``restore_best`` are static.

    Args:
      rule: from :func:`early_stopping`.
      stopping: what was remembered before.
      ts: the state at the epoch's end.
      metrics: the epoch's row, scalars by name.

    Raises:
      ValueError: where the monitored metric is missing.
    """
    check_monitor(rule, metrics)
    numbers = (rule.patience, rule.min_delta, rule.start_from_epoch)
    return _next(stopping, _kept(rule, ts), metrics[rule.monitor], numbers, rule.baseline, mode=rule.mode)


@partial(jax.jit, static_argnames="mode")  # on the host one dispatch, and not one for each operation
def _next(s: Stopping, here: PyTree, value: Any, numbers: Any, baseline: Any, *, mode: str) -> Stopping:
    # In floats, since a mapped patience may be one; counts are exact in float32 up to 2**24.
    patience, min_delta, first, value = (jnp.asarray(x).astype(s.best.dtype) for x in (*numbers, value))

    def beats(reference: Any) -> Any:
        return value < reference - min_delta if mode == "min" else value > reference + min_delta

    watched = s.epoch.astype(first.dtype) >= first
    better = watched & beats(s.best)
    renewed = better if baseline is None else better & beats(jnp.asarray(baseline).astype(s.best.dtype))
    wait = jnp.where(renewed, 0, s.wait + watched.astype(jnp.int32))
    out = watched & ~better & (wait.astype(patience.dtype) >= patience) & (s.epoch > 0)
    kept = jax.tree.map(lambda new, old: jnp.where(better, new, old), here, (s.params, s.state, s.average))
    return Stopping(
        jnp.where(better, value, s.best),
        jnp.where(better, s.epoch + 1, s.best_epoch),
        wait,
        s.epoch + 1,
        s.stopped | out,
        *kept,
    )


def _kept(rule: EarlyStopping, ts: TrainState) -> tuple[PyTree, PyTree, PyTree]:
    """What is remembered of an epoch in case it is the best."""
    if not rule.restore_best:
        return (), (), ()
    averages = isinstance(ts.opt_state, AveragedState)
    return ts.params, ts.state, (ts.opt_state.average, ts.opt_state.weight) if averages else ()


def restored(rule: EarlyStopping, stopping: Stopping, ts: TrainState) -> TrainState:
    """``ts`` with the best epoch's parameters and layer state, where the rule says ``restore_best``.

    The optimizer's state (but for the average of ``averaged``), the key and the step stay those of the end.
    """
    if not rule.restore_best:
        return ts
    any_best = stopping.best_epoch > 0
    params, state, average = jax.tree.map(
        lambda best, last: jnp.where(any_best, best, last),
        (stopping.params, stopping.state, stopping.average),
        _kept(rule, ts),
    )
    if average:
        ts = ts._replace(opt_state=ts.opt_state._replace(average=average[0], weight=average[1]))
    return ts._replace(params=params, state=state)
