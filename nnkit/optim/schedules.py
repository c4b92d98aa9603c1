"""Schedules: functions from the step, which starts at 0, to a number."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from nnkit.checks import is_static_number
from nnkit.optim.scalars import Scalar, as_scalar
from nnkit.types import Schedule

__all__ = ["constant_schedule", "exponential_decay"]


def constant_schedule(value: Scalar) -> Schedule:
    """The same value at every step (optax's ``constant_schedule``).

    Raises:
      ValueError: for a value that is not finite.

    >>> optim.constant_schedule(0.1)(1000)
    0.1
    """
    value = as_scalar(value, "value")
    return lambda count: value


def exponential_decay(
    init_value: Scalar,
    transition_steps: Scalar,
    decay_rate: Scalar,
    transition_begin: Scalar = 0,
    staircase: bool = False,
    end_value: Scalar | None = None,
) -> Schedule:
    """A constant factor every so many steps (optax's ``exponential_decay``).

    ``init_value · decay_rate^(max(t − transition_begin, 0) / transition_steps)``, bounded by
    end_value. A factor of 0.9 an epoch is ``exponential_decay(1e-4, steps_per_epoch, 0.9)``. At a
    multiple of transition_steps the factor has already been applied, as in optax and PyTorch.

    Args:
      init_value: the value at the start.
      transition_steps: in how many steps the factor is applied once. As in optax, with 0 or fewer
        the value stays init_value.
      decay_rate: the factor. As in optax, with 0 the value stays init_value.
      transition_begin: how many steps the value is held first; a negative number counts as 0.
      staircase: whether the exponent is rounded down, so that the value falls in steps.
      end_value: where the decay stops, a lower bound for a factor below 1, else an upper one.

    Raises:
      ValueError: for a negative decay_rate, or a number that is not finite.

    >>> schedule = optim.exponential_decay(1.0, transition_steps=2, decay_rate=0.25)
    >>> [float(schedule(step)) for step in range(4)]
    [1.0, 0.5, 0.25, 0.125]
    >>> schedule = optim.exponential_decay(1.0, 2, 0.25, transition_begin=1, staircase=True, end_value=0.2)
    >>> [round(float(schedule(step)), 6) for step in range(6)]
    [1.0, 1.0, 1.0, 0.25, 0.25, 0.2]
    """
    init_value, steps = as_scalar(init_value, "init_value"), as_scalar(transition_steps, "transition_steps")
    factor = as_scalar(decay_rate, "decay_rate", "[0, inf)")
    begin = as_scalar(transition_begin, "transition_begin")
    end_value = None if end_value is None else as_scalar(end_value, "end_value")
    if any(is_static_number(x) and x <= 0 for x in (steps, factor)):
        return lambda count: init_value
    begin = max(begin, 0) if is_static_number(begin) else jnp.maximum(begin, 0)

    def schedule(count: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):  # whole steps over fractions, as in optax
            since = count - begin
            past = jnp.maximum(since, 0)
            # Rounded down as whole numbers: compiled, 47/47 is 47·(1/47) = 0.99999994, a step too late. Then
            # divided by 1, for the float dtype that the other quotient has, as in optax.
            exponent = (past // steps) / 1 if staircase else past / steps
            value = jnp.where(since <= 0, init_value, init_value * factor**exponent)
            if end_value is not None:
                lower, upper = jnp.maximum(value, end_value), jnp.minimum(value, end_value)
                value = jnp.where(factor < 1, lower, upper)
            if not (is_static_number(steps) and is_static_number(factor)):
                # What plain numbers were asked above.
                value = jnp.where((steps > 0) & (factor > 0), value, init_value)
            return value

    return schedule
