"""The parts that optimizers are chained from: scaling, by a number or a schedule, and weight decay."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from nnkit.checks import is_static_number
from nnkit.optim.leafwise import check_params, check_state, leafwise
from nnkit.optim.note import attach, with_note
from nnkit.optim.scalars import Scalar, as_scalar, check_learning_rate, increment
from nnkit.types import GradientTransformation, PyTree, ScalarOrSchedule, Schedule

__all__ = [
    "EmptyState",
    "Rate",
    "ScaleByScheduleState",
    "WeightDecaySchedule",
    "add_decayed_weights",
    "identity",
    "is_function",
    "scale",
    "scale_by_learning_rate",
    "scale_by_schedule",
    "schedule_at",
]


@with_note
class EmptyState(NamedTuple):
    """The state of a transformation that remembers nothing."""


@with_note
class ScaleByScheduleState(NamedTuple):
    """How many updates a schedule has seen: count, an int32 scalar."""

    count: Any


class WeightDecaySchedule(NamedTuple):
    """How many updates a schedule of the weight decay has seen: count, an int32 scalar."""

    count: Any


@dataclasses.dataclass(frozen=True)
class Rate:
    """The note of a state whose transformation multiplies by a learning rate.

    Attributes:
      of: the rate from the state; None from it where the rate was traced and so is not known.
      constant: whether it is a number, and no schedule.
    """

    of: Callable[[Any], Any]
    constant: bool


def identity() -> GradientTransformation:
    """Leaves the updates as they are (optax's ``identity``).

    >>> tx = optim.identity()
    >>> tx.update({"w": 2.0}, tx.init({"w": 1.0}))
    ({'w': 2.0}, EmptyState())
    """

    def init(params: PyTree) -> EmptyState:
        return EmptyState()

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **_: Any
    ) -> tuple[PyTree, PyTree]:
        return updates, state

    return GradientTransformation(init, update)


def scale(step_size: Scalar) -> GradientTransformation:
    """Multiplies the updates by a number, u ← c·u (optax's ``scale``).

    Raises:
      ValueError: for a number that is not finite, or an array that is not a scalar.

    >>> tx = optim.scale(-0.5)
    >>> updates, _ = tx.update({"w": jnp.array([2.0, 4.0])}, tx.init({"w": jnp.zeros(2)}))
    >>> updates["w"].tolist()
    [-1.0, -2.0]
    """
    factor = as_scalar(step_size, "step_size")

    def init(params: PyTree) -> EmptyState:
        check_params("scale", params)
        return EmptyState()

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **_: Any
    ) -> tuple[PyTree, PyTree]:
        return leafwise("scale", lambda u: ((factor * u).astype(u.dtype),), {"updates": updates})[0], state

    return GradientTransformation(init, update)


def scale_by_schedule(step_size_fn: Schedule) -> GradientTransformation:
    """Multiplies the updates by a function of the step, u ← c(t)·u (optax's ``scale_by_schedule``).

    The first update has t = 0.

    Raises:
      TypeError: for a schedule that is not callable.
      ValueError: at the first update, for a schedule whose value is not one number.

    >>> tx = optim.scale_by_schedule(lambda step: 1 / (1 + step))
    >>> state = tx.init({"w": jnp.array(0.0)})
    >>> for _ in range(3):
    ...     updates, state = tx.update({"w": jnp.array(6.0)}, state)
    ...     print(float(updates["w"]))
    6.0
    3.0
    2.0
    """
    if not callable(step_size_fn):
        raise TypeError(
            f"step_size_fn must be a function of the step, got {step_size_fn!r}: scale takes numbers"
        )

    def init(params: PyTree) -> ScaleByScheduleState:
        check_params("scale_by_schedule", params)
        return ScaleByScheduleState(count=jnp.zeros([], jnp.int32))

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **_: Any
    ) -> tuple[PyTree, PyTree]:
        state = check_state("scale_by_schedule", state, ScaleByScheduleState)
        factor = _value(step_size_fn, state.count)
        scaled = leafwise("scale_by_schedule", lambda u: (factor.astype(u.dtype) * u,), {"updates": updates})
        return scaled[0], state._replace(count=increment(state.count))

    return GradientTransformation(init, update)


def scale_by_learning_rate(
    learning_rate: ScalarOrSchedule | None = None, *, flip_sign: bool = True
) -> GradientTransformation:
    """Turns ascent into a step, u ← −η·u (optax's ``scale_by_learning_rate``).

    Args:
      learning_rate: η, a number or a schedule; None leaves the updates as they are.
      flip_sign: whether to multiply by −η (the default) or by η.

    Raises:
      ValueError: for a rate that is negative or not a number.

    >>> tx = optim.scale_by_learning_rate(0.5)
    >>> updates, _ = tx.update({"w": jnp.array(3.0)}, tx.init({"w": jnp.array(0.0)}))
    >>> float(updates["w"])
    -1.5
    """
    if learning_rate is None:
        return identity()
    sign = -1 if flip_sign else 1
    if callable(learning_rate):
        inner = scale_by_schedule(lambda step: sign * _value(learning_rate, step))
        rate = Rate(lambda state: _rate_at(learning_rate, state.count), constant=False)
    else:
        value = check_learning_rate(learning_rate)
        inner = scale(sign * value)
        known = None if isinstance(value, Tracer) else value
        rate = Rate(lambda _: known, constant=True)

    def init(params: PyTree) -> PyTree:
        return attach(inner.init(params), rate)

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **_: Any
    ) -> tuple[PyTree, PyTree]:
        updates, state = inner.update(updates, state, params)
        return updates, attach(state, rate)

    return GradientTransformation(init, update)


def add_decayed_weights(
    weight_decay: ScalarOrSchedule = 0.0,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
) -> GradientTransformation:
    """Adds the parameters times a number, u ← u + λθ (optax's ``add_decayed_weights``).

    Before an optimizer it is the gradient of the penalty λ/2·‖θ‖² (PyTorch's ``weight_decay`` of SGD,
    Adam, RMSprop and Adagrad): ``chain(add_decayed_weights(1e-4), sgd(0.1))``. After the gradient's
    rescaling and before the learning rate it is AdamW's decoupled decay.

    Args:
      weight_decay: λ, a number or a schedule.
      mask: which parameters decay: a tree of bools shaped like the parameters or a prefix of them, or a
        function from the parameters to one. None decays all, as in optax; ``nnkit.tree.decayed`` is the
        mask that leaves biases, scales and slopes alone.

    Raises:
      ValueError: at an update without parameters, or for a mask of another form.
      TypeError: for a mask that holds something else than bools.

    >>> tx = optim.add_decayed_weights(0.1, mask=tree.decayed)
    >>> params = {"kernel": jnp.array(2.0), "bias": jnp.array(2.0)}
    >>> grads = {"kernel": jnp.array(1.0), "bias": jnp.array(1.0)}
    >>> updates, _ = tx.update(grads, tx.init(params), params)
    >>> float(updates["kernel"]), float(updates["bias"])
    (1.2000000476837158, 1.0)
    """
    scheduled = callable(weight_decay)
    decay = weight_decay if scheduled else as_scalar(weight_decay, "weight_decay")

    def init(params: PyTree) -> EmptyState | WeightDecaySchedule:
        check_params("add_decayed_weights", params)
        return WeightDecaySchedule(count=jnp.zeros([], jnp.int32)) if scheduled else EmptyState()

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **_: Any
    ) -> tuple[PyTree, PyTree]:
        if params is None:
            raise ValueError(
                "add_decayed_weights needs the parameters: call update(grads, opt_state, params) with params"
            )
        if scheduled:
            state = check_state("add_decayed_weights", state, WeightDecaySchedule)
            factor: Any = _value(weight_decay, state.count)
            state = state._replace(count=increment(state.count))
        else:
            factor = decay
        if is_static_number(factor) and factor == 0:
            return updates, state

        def leaf(u: Array, p: Any) -> tuple[Array]:
            if p is None:
                return (u,)
            return ((u + factor * p).astype(jnp.promote_types(u.dtype, p.dtype)),)

        selected = {"params": _selected(params, mask)}
        return leafwise("add_decayed_weights", leaf, {"updates": updates}, selected)[0], state

    return GradientTransformation(init, update)


def _value(schedule: Any, count: Array) -> Array:
    """The schedule's value as a scalar array, or an error that shows what it returned."""
    value = schedule(count)
    if isinstance(value, bool) or not (is_static_number(value) or hasattr(value, "dtype")):
        raise TypeError(f"a schedule must return a number, this one returned {value!r}")
    if jnp.shape(value) != ():
        raise ValueError(f"a schedule must return one number, this one returned shape {jnp.shape(value)}")
    return jnp.asarray(value)


def schedule_at(schedule: Any, count: Array) -> Array:
    """The schedule's value at a count, or at every count of a mapped state."""
    if jnp.ndim(count) == 0:
        return _value(schedule, count)
    return jax.vmap(lambda c: schedule_at(schedule, c))(count)


def _rate_at(schedule: Any, count: Array) -> Array | None:
    """The rate, or None where the schedule was made of traced numbers that are no more."""
    try:
        return schedule_at(schedule, count)
    except jax.errors.UnexpectedTracerError:
        return None


def is_function(tree: Any) -> bool:
    """Whether a mask or labels are a function of the parameters: not if it is a module, a callable tree, of them."""
    leaves = jax.tree.leaves(tree)
    return callable(tree) and bool(leaves) and all(callable(leaf) for leaf in leaves)


def _selected(params: PyTree, mask: PyTree | Callable[[PyTree], PyTree] | None) -> PyTree:
    """``params`` with None where ``mask`` says False."""
    if mask is None:
        return params
    flags = mask(params) if is_function(mask) else mask

    def select(keep: Any, part: PyTree) -> PyTree:
        if not isinstance(keep, bool | np.bool_):
            raise TypeError(
                f"add_decayed_weights: a mask must hold True and False, got {type(keep).__name__}"
            )
        return part if keep else jax.tree.map(lambda _: None, part)

    try:
        return jax.tree.map(select, flags, params)
    except ValueError as error:
        raise ValueError(
            "add_decayed_weights: the mask must be a tree of bools like the parameters or a prefix of them, "
            f"got {jax.tree.structure(flags)} for {jax.tree.structure(params)}"
        ) from error
