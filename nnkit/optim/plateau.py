"""Smaller steps once a metric has stopped getting better, as a transformation in compiled code."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nnkit.checks import is_static_number, unknown_name
from nnkit.optim.leafwise import check_params, check_state, leafwise
from nnkit.optim.note import attach, note_of, with_note
from nnkit.optim.scalars import Scalar, as_scalar, increment
from nnkit.types import GradientTransformation, PyTree

__all__ = ["ReduceLROnPlateauState", "monitors", "reduce_on_plateau", "report"]


class ReduceLROnPlateauState(NamedTuple):
    """What is known of a metric, and the factor that follows from it.

    Attributes:
      scale: by what the updates are multiplied.
      best_value: the best value so far, at first the worst there is.
      plateau_count: how many values in a row were no better.
      cooldown_count: for how many values nothing is counted yet.
      count: how many values the average holds.
      avg_value: the average of the values since the last decision.
    """

    scale: Any
    best_value: Any
    plateau_count: Any
    cooldown_count: Any
    count: Any
    avg_value: Any


class _Rule(NamedTuple):
    """How a plateau is told. In the note of a monitored state the numbers are arrays, so leaves."""

    factor: Any
    limit: Any
    rtol: Any
    atol: Any
    cooldown: Any
    accumulation_size: Any
    min_scale: Any
    mode: str
    relative_to: str
    monitor: str | None


# Compared, since report reads it: jitted once, it must not take another optimizer's metric.
_MonitoredState = with_note(ReduceLROnPlateauState, compare=True)

_CALL = "call update(grads, opt_state, params, value=loss)"


def reduce_on_plateau(
    factor: Scalar = 0.1,
    patience: Scalar = 10,
    rtol: Scalar = 1e-4,
    atol: Scalar = 0.0,
    cooldown: Scalar = 0,
    accumulation_size: Scalar = 1,
    min_scale: Scalar = 0.0,
    *,
    mode: str = "min",
    relative_to: str = "magnitude",
    counting: str = "optax",
    monitor: str | None = None,
) -> GradientTransformation:
    """Multiplies the updates by a scale that falls when a metric stops improving (optax.contrib's).

    A value is better when it is below ``best − (rtol·|best| + atol)``, or with mode "max" above
    ``best + (rtol·|best| + atol)``. After ``patience`` values in a row that are not, the scale is
    multiplied by ``factor``. Put it last: ``chain(adam(1e-3), reduce_on_plateau())``. NaN is never
    better. As in optax but for these: optax's relative threshold turns round for negative metrics, its
    patience of 0 cuts when the metric improves, and its scale and best value have the precision of
    bfloat16 parameters (here float32 at least).

    The metric comes with every update, ``update(grads, opt_state, params, value=loss)``, or is reported
    when there is one: with ``monitor="validation_loss"`` an update needs no value, and :func:`report`
    gives it the validation loss of an epoch. Such a state carries the rule beside its fields.

    Args:
      factor: by what the scale is multiplied, in (0, 1).
      patience: after how many values without improvement; 0 is as 1 unless counting says "pytorch".
      rtol: how much better is better, relative to the best value, in [0, 1].
      atol: the same in the metric's unit. ``rtol=0, atol=x`` is PyTorch's threshold_mode "abs".
      cooldown: how many values after a cut are not counted.
      accumulation_size: of how many values the average is taken, each time, for one decision.
      min_scale: the smallest scale; PyTorch's min_lr is ``min_scale·learning_rate``.
      mode: whether small ("min") or large ("max") is good.
      relative_to: what rtol is of: the "magnitude" of the best value, or as in PyTorch and optax its
        signed "value", ``best·(1 − rtol) − atol`` and ``best·(1 + rtol) + atol``.
      counting: on a flat metric a patience of 3 cuts at the fourth value with "optax" (Keras too), at
        the fifth with "pytorch": only the value after ``patience`` bad ones cuts.
      monitor: the metric's name in :func:`report`; None for a value with every update.

    Raises:
      ValueError: for a number outside its interval, another mode, relative_to or counting; at an update
        for a missing value, or one that is not a scalar.
      TypeError: for a value that is not a number.

    By hand: 1 is the best value, two 1s are a plateau, and 2 more.

    >>> tx = optim.reduce_on_plateau(factor=0.5, patience=2)
    >>> state = tx.init({"w": jnp.array(0.0)})
    >>> for loss in (1.0, 1.0, 1.0, 1.0, 1.0, 0.5):
    ...     updates, state = tx.update({"w": jnp.array(8.0)}, state, value=loss)
    ...     print(loss, float(updates["w"]))
    1.0 8.0
    1.0 8.0
    1.0 4.0
    1.0 4.0
    1.0 2.0
    0.5 2.0
    """
    for name, choice, known in (
        ("mode", mode, ("min", "max")),
        ("relative_to", relative_to, ("magnitude", "value")),
        ("counting", counting, ("optax", "pytorch")),
    ):
        if choice not in known:
            raise unknown_name(name, choice, known)
    if not (monitor is None or isinstance(monitor, str)):
        raise TypeError(f"monitor must be a metric's name, got {monitor!r}: write monitor='validation_loss'")
    rule = _Rule(
        factor=as_scalar(factor, "factor", "(0, 1)", "the scale is multiplied by it"),
        limit=_whole(patience, "patience", 0),
        rtol=as_scalar(rtol, "rtol", "[0, 1]", "it is a part of the best value"),
        atol=as_scalar(atol, "atol", "[0, inf)"),
        cooldown=_whole(cooldown, "cooldown", 0),
        accumulation_size=_whole(accumulation_size, "accumulation_size", 1),
        min_scale=as_scalar(min_scale, "min_scale", "[0, 1]", "the scale begins at 1"),
        mode=mode,
        relative_to=relative_to,
        monitor=monitor,
    )
    if counting == "pytorch":
        rule = rule._replace(limit=rule.limit + 1)

    def init(params: PyTree) -> ReduceLROnPlateauState:
        check_params("reduce_on_plateau", params)
        real = [jnp.finfo(x.dtype).dtype for x in map(jnp.asarray, jax.tree.leaves(params))]
        with jax.numpy_dtype_promotion("standard"):
            dtype = jnp.result_type(jnp.float32, *real)
        # Each count a buffer of its own, so that the state can be donated.
        zero = partial(jnp.zeros, [], jnp.int32)
        kind = ReduceLROnPlateauState if monitor is None else _MonitoredState
        worst = jnp.inf if mode == "min" else -jnp.inf
        state = kind(
            jnp.ones([], dtype), jnp.asarray(worst, dtype), zero(), zero(), zero(), jnp.zeros([], dtype)
        )
        return attach(state, _arrays(rule, dtype))

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, *, value: Any = None, **_: Any
    ) -> tuple[PyTree, PyTree]:
        state = check_state("reduce_on_plateau", state, ReduceLROnPlateauState)
        if isinstance(state, _MonitoredState) != (monitor is not None):
            has = "a monitor" if monitor is None else "no monitor"
            raise TypeError(
                f"reduce_on_plateau got the state of one with {has}: pass what its own init or update returned"
            )
        if monitor is not None:
            kept = note_of(state)
            if kept is not None and kept[-3:] != rule[-3:]:
                raise TypeError(
                    f"reduce_on_plateau(mode={mode!r}, relative_to={relative_to!r}, monitor={monitor!r}) got the "
                    f"state of one with {kept.mode!r}, {kept.relative_to!r}, {kept.monitor!r}: pass its own, a "
                    "plateau begins anew with init"
                )
            state = attach(state, _arrays(rule, state.scale.dtype))
        elif value is None:
            raise ValueError(f"reduce_on_plateau needs the metric's value: {_CALL}, or name a monitor")
        else:
            state = _step(state, _scalar(value, "value", "reduce it to one number, the mean say"), rule)
        scale = state.scale
        scaled = leafwise("reduce_on_plateau", lambda u: ((scale * u).astype(u.dtype),), {"updates": updates})
        return scaled[0], state

    return GradientTransformation(init, update)


def monitors(opt_state: PyTree) -> list[str]:
    """The metrics that plateaus in the state are told of by :func:`report`."""
    parts = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, _MonitoredState))
    rules = [note_of(part) for part in parts if isinstance(part, _MonitoredState)]
    return [rule.monitor for rule in rules if rule is not None]


def report(opt_state: PyTree, metrics: Mapping[str, Array | float]) -> PyTree:
    """Gives new metrics to every :func:`reduce_on_plateau` with a monitor, anywhere in the state.

    Pure and compilable; a stack of states and metrics is mapped with ``jax.vmap(report)``. A state
    without a monitored plateau comes back as it is.

    Args:
      opt_state: an optimizer's state.
      metrics: scalars by name; those that no monitor names are left alone.

    Raises:
      ValueError: for a monitored metric that is missing, or not a scalar.
      TypeError: for metrics that are no mapping, or a metric that is not a number.

    >>> plateau = optim.reduce_on_plateau(factor=0.5, patience=1, monitor="validation_loss")
    >>> optimizer = optim.chain(optim.sgd(1.0), plateau)
    >>> params = {"w": jnp.array(0.0)}
    >>> opt_state = optimizer.init(params)
    >>> for epoch in range(3):
    ...     updates, opt_state = optimizer.update({"w": jnp.array(-8.0)}, opt_state, params)
    ...     opt_state = optim.report(opt_state, {"validation_loss": 1.0})
    ...     print(float(updates["w"]))
    8.0
    8.0
    4.0
    """

    def visit(part: Any) -> Any:
        rule = note_of(part) if isinstance(part, _MonitoredState) else None
        if rule is None:
            return part
        if not isinstance(metrics, Mapping):
            raise TypeError(f"metrics must be a mapping from names to scalars, got {type(metrics).__name__}")
        if rule.monitor not in metrics:
            raise ValueError(
                f"reduce_on_plateau monitors {rule.monitor!r}, which report did not get: the metrics are "
                f"{', '.join(map(str, metrics)) or 'none'}"
            )
        what = f"the metric {rule.monitor!r}"
        value = _scalar(metrics[rule.monitor], what, "one state takes one number, map with jax.vmap(report)")
        return _step(part, value, rule)

    return jax.tree.map(visit, opt_state, is_leaf=lambda part: isinstance(part, _MonitoredState))


def _step(state: Any, value: Any, rule: _Rule) -> Any:
    """The state after one more value of the metric."""
    with jax.numpy_dtype_promotion("standard"):
        count = increment(state.count)
        average = (state.count * state.avg_value + value.astype(state.avg_value.dtype)) / count
        complete = count >= rule.accumulation_size
        best = state.best_value
        sign = 1 if rule.mode == "min" else -1
        closer, farther = 1 - sign * rule.rtol, 1 + sign * rule.rtol
        kept = closer if rule.relative_to == "value" else jnp.where(best < 0, farther, closer)
        # Nothing is relative to an infinity: with the first value, every number is better.
        bound = jnp.where(jnp.isinf(best), best, best * kept - sign * rule.atol)
        better = average < bound if rule.mode == "min" else average > bound
        bad = jnp.where(better, 0, increment(state.plateau_count))
        cooling = state.cooldown_count > 0
        cut = ~better & ~cooling & (bad >= rule.limit)
        scale = jnp.where(cut, jnp.maximum(state.scale * rule.factor, rule.min_scale), state.scale)
        decided = {
            "scale": scale,
            "best_value": jnp.where(better, average, best),
            "plateau_count": jnp.where(cut | cooling, 0, bad),
            "cooldown_count": jnp.where(cut, rule.cooldown, jnp.maximum(state.cooldown_count - 1, 0)),
            "count": 0,
            "avg_value": 0.0,
        }
        open_ = {"count": count, "avg_value": average}
    new = {}
    for name, after in decided.items():
        old = getattr(state, name)
        new[name] = jnp.where(complete, after, open_.get(name, old)).astype(old.dtype)
    return state._replace(**new)


def _arrays(rule: _Rule, dtype: Any) -> _Rule:
    """The rule with its numbers as arrays; a state in a loop keeps their dtypes."""
    floats = {name: jnp.array(getattr(rule, name), dtype) for name in ("factor", "rtol", "atol", "min_scale")}
    counts = {
        name: jnp.array(getattr(rule, name), jnp.int32) for name in ("limit", "cooldown", "accumulation_size")
    }
    return rule._replace(**floats, **counts)


def _whole(value: Any, name: str, low: int) -> Any:
    value = as_scalar(value, name, f"[{low}, 2147483647)", "it counts values of the metric")
    if is_static_number(value) and value != int(value):
        raise ValueError(f"{name} must be a whole number, got {value}: it counts values of the metric")
    return value


def _scalar(value: Any, what: str, advice: str) -> Float[Array, ""]:
    if isinstance(value, bool) or not (is_static_number(value) or hasattr(value, "dtype")):
        raise TypeError(f"reduce_on_plateau: {what} must be a number, got {value!r}")
    if jnp.shape(value) != ():
        raise ValueError(
            f"reduce_on_plateau: {what} must be a scalar, got shape {jnp.shape(value)}: {advice}"
        )
    return jnp.asarray(value)
