"""Hyper-parameters in the state: to be read, and set without compiling again."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnkit.checks import is_static_number
from nnkit.optim.combine import tolerant
from nnkit.optim.leafwise import check_state
from nnkit.optim.note import attach, note_of, with_note
from nnkit.optim.scalars import check_learning_rate, increment
from nnkit.optim.transform import schedule_at
from nnkit.types import GradientTransformation, PyTree

__all__ = [
    "InjectStatefulHyperparamsState",
    "WrappedScheduleState",
    "inject_hyperparams",
    "set_hyperparams",
]


class InjectStatefulHyperparamsState(NamedTuple):
    """What :func:`inject_hyperparams` remembers.

    Attributes:
      count: how many updates there were, int32.
      hyperparams: the values by name; of a schedule the one that the last update used.
      hyperparams_states: the schedules' states by name.
      inner_state: the optimizer's own.
    """

    count: Any
    hyperparams: dict[str, Any]
    hyperparams_states: dict[str, Any]
    inner_state: PyTree


@with_note
class WrappedScheduleState(NamedTuple):
    """How many updates a schedule has seen: count, an int32 scalar."""

    count: Any


class _Wrapped:
    """A function of the step as a schedule with a state."""

    def __init__(self, schedule: Callable[[Any], Any]):
        self.schedule = schedule

    def init(self) -> WrappedScheduleState:
        return attach(WrappedScheduleState(count=jnp.zeros([], jnp.int32)), self.schedule)

    def update(self, state: WrappedScheduleState, **_: Any) -> WrappedScheduleState:
        return attach(state._replace(count=increment(state.count)), self.schedule)

    def __call__(self, state: WrappedScheduleState, **_: Any) -> Any:
        return self.schedule(state.count)


def inject_hyperparams(
    inner_factory: Callable[..., GradientTransformation],
    static_args: str | Iterable[str] = (),
    hyperparam_dtype: Any = None,
) -> Callable[..., GradientTransformation]:
    """An optimizer whose numeric hyper-parameters lie in its state (optax's ``inject_hyperparams``).

    ``inject_hyperparams(adam)(1e-3)`` is ``adam(1e-3)`` whose numbers may be set between steps, by
    :func:`set_hyperparams`, without compiling anything again, and differ from member to member of a
    mapped population. Every number becomes a scalar array, every function of the step (a schedule) is
    evaluated at each update: the first uses ``schedule(0)``.

    Args:
      inner_factory: a function that builds an optimizer.
      static_args: which arguments stay as they are: structural integers, and functions that are not
        schedules, a mask for instance.
      hyperparam_dtype: the dtype of the numbers; by default the widest of the parameters', but at least
        float32 (optax takes bfloat16 for bfloat16 parameters, in which a decay of 0.999 is 1).

    Returns:
      A function with the arguments of ``inner_factory``, each of which may be a schedule. The numbers
      are checked as the factory checks them, before the first step.

    Raises:
      ValueError: for static arguments that the factory does not have.
      TypeError: at an update with the state of another transformation.

    >>> optimizer = optim.inject_hyperparams(optim.sgd)(0.5)
    >>> params = {"w": jnp.array(1.0)}
    >>> opt_state = optimizer.init(params)
    >>> opt_state = optim.set_hyperparams(opt_state, learning_rate=0.25)
    >>> updates, opt_state = optimizer.update({"w": jnp.array(2.0)}, opt_state, params)
    >>> float(updates["w"]), float(optim.learning_rate(opt_state))
    (-0.5, 0.25)
    """
    static = {static_args} if isinstance(static_args, str) else set(static_args)
    signature = inspect.signature(inner_factory)
    if unknown := sorted(static - set(signature.parameters)):
        raise ValueError(
            f"static_args names {unknown[0]!r}, which is no argument of "
            f"{getattr(inner_factory, '__name__', 'the factory')}: it has {', '.join(signature.parameters)}"
        )

    @functools.wraps(inner_factory)
    def build(*args: Any, **kwargs: Any) -> GradientTransformation:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        schedules: dict[str, Any] = {}
        numbers: dict[str, Any] = {}
        others: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            if name in static:
                others[name] = value
            elif callable(value):
                stateful = hasattr(value, "init") and hasattr(value, "update")
                schedules[name] = value if stateful else _Wrapped(value)
            elif is_static_number(value) or _is_numeric(value):
                numbers[name] = value
            else:
                others[name] = value

        def inner(values: Mapping[str, Any]) -> GradientTransformation:
            call = inspect.BoundArguments(signature, bound.arguments | others | dict(values))
            return tolerant("inject_hyperparams", inner_factory(*call.args, **call.kwargs))

        start = {name: _first(name, schedule) for name, schedule in schedules.items()}
        inner(numbers | start)  # for its checks
        arrays = {name: jnp.asarray(value) for name, value in (numbers | start).items()}
        try:
            inner(arrays)
        except (TypeError, ValueError) as error:
            error.add_note(
                "inject_hyperparams makes arrays of all numbers: name in static_args those that must stay as they are"
            )
            raise

        def init(params: PyTree) -> InjectStatefulHyperparamsState:
            dtype = hyperparam_dtype or _dtype(params)
            states = {name: schedule.init() for name, schedule in schedules.items()}
            values = {name: _converted(value, dtype) for name, value in numbers.items()}
            values |= {name: _converted(f(states[name]), dtype) for name, f in schedules.items()}
            return InjectStatefulHyperparamsState(
                count=jnp.zeros([], jnp.int32),
                hyperparams=values,
                hyperparams_states=states,
                inner_state=inner(values).init(params),
            )

        def update(
            updates: PyTree, state: PyTree, params: PyTree | None = None, **extra_args: Any
        ) -> tuple[PyTree, PyTree]:
            state = check_state("inject_hyperparams", state, InjectStatefulHyperparamsState)
            if state.hyperparams.keys() != numbers.keys() | schedules.keys():
                raise TypeError(
                    f"inject_hyperparams got a state of {', '.join(sorted(state.hyperparams))}, this "
                    f"optimizer has {', '.join(sorted(numbers | schedules))}: pass its own"
                )
            dtype = hyperparam_dtype or _dtype(updates if params is None else params)
            states = state.hyperparams_states
            values = {name: _converted(state.hyperparams[name], dtype) for name in numbers}
            values |= {
                name: _converted(f(states[name], **extra_args), dtype) for name, f in schedules.items()
            }
            updates, inner_state = inner(values).update(updates, state.inner_state, params, **extra_args)
            return updates, InjectStatefulHyperparamsState(
                count=increment(state.count),
                hyperparams=values,
                hyperparams_states={n: f.update(states[n], **extra_args) for n, f in schedules.items()},
                inner_state=inner_state,
            )

        return GradientTransformation(init, update)

    return build


def _first(name: str, schedule: Any) -> Any:
    """The schedule's first value; a function of something else than the step is no schedule."""
    value = schedule(schedule.init())
    if isinstance(value, bool | np.bool_) or jnp.result_type(value) == jnp.bool_:
        raise TypeError(
            f"inject_hyperparams takes the function {name} for a schedule, and it returned {value!r}: pass "
            f"static_args={name!r} if it is none"
        )
    return value


def set_hyperparams(opt_state: PyTree, **values: Any) -> PyTree:
    """The state with other hyper-parameters, wherever :func:`inject_hyperparams` has put those.

    The shapes and dtypes stay, so nothing is compiled again; a mapped state takes one number for all of
    its members, or an array of one for each. Where several parts of an optimizer have a parameter of
    the name, all get the value.

    Raises:
      ValueError: for a name that the state has not, or that a schedule sets, for a learning rate that
        is negative, and for an array that does not fit.

    >>> optimizer = optim.inject_hyperparams(optim.adam)(1e-3)
    >>> opt_state = optimizer.init({"w": jnp.zeros(2)})
    >>> opt_state = optim.set_hyperparams(opt_state, learning_rate=1e-4, b1=0.95)
    >>> round(float(opt_state.hyperparams["b1"]), 6)
    0.95
    """
    found: set[str] = set()
    scheduled: set[str] = set()

    def visit(part: Any) -> Any:
        if not is_injected(part):
            return part
        states = getattr(part, "hyperparams_states", {})
        scheduled.update(states)
        new = dict(part.hyperparams)
        for name in values.keys() & part.hyperparams.keys() - states.keys():
            found.add(name)
            new[name] = _fitted(name, values[name], part.hyperparams[name])
        return part._replace(hyperparams=new, inner_state=_visit(visit, part.inner_state))

    result = _visit(visit, opt_state)
    for name in values:
        if name in found:
            continue
        if name in scheduled:
            raise ValueError(
                f"{name} is set by a schedule: build the optimizer with a number to set it by hand"
            )
        known = sorted({n for part in _injected(opt_state) for n in part.hyperparams} - scheduled)
        has = f"it has {', '.join(known)}" if known else "none lies in it"
        raise ValueError(
            f"the state has no hyper-parameter {name!r} that can be set, {has}: build the optimizer with "
            "inject_hyperparams, inject_hyperparams(adam)(1e-3) for instance"
        )
    return result


def injected_rate(part: Any) -> Any:
    """The learning rate that the next step uses of an injected state, or None where it has none."""
    state = getattr(part, "hyperparams_states", {}).get("learning_rate")
    if state is not None and note_of(state) is not None:
        return schedule_at(note_of(state), state.count)
    return part.hyperparams.get("learning_rate")


def is_injected(part: Any) -> bool:
    """Whether it is a state of :func:`inject_hyperparams`, nnkit's or optax's."""
    fields = getattr(part, "_fields", ())
    return "hyperparams" in fields and "inner_state" in fields


def _injected(opt_state: PyTree) -> list[Any]:
    found: list[Any] = []

    def visit(part: Any) -> Any:
        if is_injected(part):
            found.append(part)
            _visit(visit, part.inner_state)
        return part

    _visit(visit, opt_state)
    return found


def _visit(f: Callable[[Any], Any], tree: PyTree) -> PyTree:
    return jax.tree.map(f, tree, is_leaf=is_injected)


def _dtype(params: PyTree) -> Any:
    """The widest real dtype of the parameters, at least float32."""
    dtypes = [jnp.result_type(x) for x in jax.tree.leaves(params)]
    real = [jnp.finfo(dtype).dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.inexact)]
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(jnp.float32, *real)


def _is_integer(value: Any) -> bool:
    return hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.integer)


def _is_numeric(value: Any) -> bool:
    """Whether it is an array of numbers; a PRNG key is none."""
    return isinstance(value, jax.Array | np.ndarray) and jnp.issubdtype(value.dtype, jnp.number)


def _converted(value: Any, dtype: Any) -> Any:
    """A scalar array; floats of no firm dtype get ``dtype``, integers and arrays with one keep theirs."""
    if isinstance(value, jax.Array) and not value.weak_type:
        return value
    is_float = jnp.issubdtype(jnp.result_type(value), jnp.floating)
    return jnp.asarray(value, dtype=dtype if is_float else None)


def _fitted(name: str, value: Any, old: Any) -> Any:
    if name == "learning_rate" and is_static_number(value):
        check_learning_rate(value)
    if is_static_number(value) and not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value}")
    dtype = jnp.asarray(old).dtype
    whole = is_static_number(value) and value == int(value)
    if jnp.issubdtype(dtype, jnp.integer) and not whole and not _is_integer(value):
        raise ValueError(
            f"{name} lies in the state as an integer and got {value!r}: build the optimizer with a float"
        )
    try:
        # A copy: the same array in two places of a state could not be donated.
        return jnp.array(jnp.broadcast_to(jnp.asarray(value, dtype=dtype), jnp.shape(old)))
    except (ValueError, TypeError):
        got = f"an array of shape {value.shape}" if hasattr(value, "shape") else repr(value)
        raise ValueError(
            f"{name} has shape {jnp.shape(old)} in the state and got {got}: pass a number or that shape"
        ) from None
