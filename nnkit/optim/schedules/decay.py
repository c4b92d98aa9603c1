"""Schedules of one formula: constant, polynomial, exponential, inverse square root, and with a warm-up."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from nnkit.checks import is_static_number
from nnkit.optim.scalars import Scalar, as_scalar
from nnkit.optim.schedules.join import join_schedules
from nnkit.optim.schedules.steps import as_steps, mix, of_step, share
from nnkit.types import Schedule

__all__ = [
    "constant_schedule",
    "exponential_decay",
    "inverse_square_root_schedule",
    "linear_schedule",
    "polynomial_schedule",
    "warmup_constant_schedule",
    "warmup_exponential_decay_schedule",
]

_BEGIN = "it is how many steps init_value is held first"


def constant_schedule(value: Scalar) -> Schedule:
    """The same value at every step (optax's ``constant_schedule``).

    Raises:
      ValueError: for a value that is not finite.

    >>> optim.constant_schedule(0.1)(1000)
    0.1
    """
    value = as_scalar(value, "value")
    return lambda count: value


def polynomial_schedule(
    init_value: Scalar,
    end_value: Scalar,
    power: Scalar,
    transition_steps: Scalar,
    transition_begin: Scalar = 0,
) -> Schedule:
    """From one value to another along a power of what is left (optax's ``polynomial_schedule``).

    ``end_value + (init_value − end_value) · (1 − (t − transition_begin)/transition_steps)^power``, held
    at init_value before and at end_value after. It is end_value at the end with every power; optax
    0.2.8, when compiled, gives NaN from there on with powers that are not whole.

    Args:
      init_value: the value at the start.
      end_value: the value at the end.
      power: 1 is a line; with more the value falls fast first, with less last.
      transition_steps: how many steps there are from one to the other. As in optax, with 0 or fewer
        the value stays init_value.
      transition_begin: how many steps init_value is held first.

    Raises:
      ValueError: for a negative power or transition_begin, or a number that is not finite.

    >>> schedule = optim.polynomial_schedule(1.0, 0.0, power=2, transition_steps=4, transition_begin=1)
    >>> [float(schedule(step)) for step in range(7)]
    [1.0, 1.0, 0.5625, 0.25, 0.0625, 0.0, 0.0]
    """
    init_value, end_value = as_scalar(init_value, "init_value"), as_scalar(end_value, "end_value")
    power = as_scalar(power, "power", "[0, inf)", "1 is a line")
    steps = as_steps(transition_steps, "transition_steps", "(-inf, inf)")
    begin = as_steps(transition_begin, "transition_begin", why=_BEGIN)
    if is_static_number(steps) and steps <= 0:
        return lambda count: init_value

    @of_step
    def schedule(count: Any) -> Any:
        # What is left in whole steps, never negative: compiled, optax's 1 - t/T may be -6e-8.
        left = share(steps - jnp.maximum(count - _not_negative(begin), 0), steps)
        value = mix(end_value, init_value, left**power)
        return value if is_static_number(steps) else jnp.where(steps > 0, value, init_value)

    return schedule


def linear_schedule(
    init_value: Scalar, end_value: Scalar, transition_steps: Scalar, transition_begin: Scalar = 0
) -> Schedule:
    """From one value to another along a line (optax's ``linear_schedule``).

    ``init_value + (end_value − init_value) · (t − transition_begin)/transition_steps``, held at
    init_value before and at end_value after.

    Args:
      init_value: the value at the start.
      end_value: the value at the end.
      transition_steps: how many steps there are from one to the other. As in optax, with 0 or fewer
        the value stays init_value.
      transition_begin: how many steps init_value is held first.

    Raises:
      ValueError: for a negative transition_begin, or a number that is not finite.

    >>> schedule = optim.linear_schedule(1.0, 0.5, transition_steps=2)
    >>> [float(schedule(step)) for step in range(4)]
    [1.0, 0.75, 0.5, 0.5]
    """
    return polynomial_schedule(init_value, end_value, 1, transition_steps, transition_begin)


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
      transition_begin: how many steps the value is held first.
      staircase: whether the exponent is rounded down, so that the value falls in steps.
      end_value: where the decay stops, a lower bound for a factor below 1, else an upper one.

    Raises:
      ValueError: for a negative decay_rate or transition_begin, or a number that is not finite.

    >>> schedule = optim.exponential_decay(1.0, transition_steps=2, decay_rate=0.25)
    >>> [float(schedule(step)) for step in range(4)]
    [1.0, 0.5, 0.25, 0.125]
    >>> schedule = optim.exponential_decay(1.0, 2, 0.25, transition_begin=1, staircase=True, end_value=0.2)
    >>> [round(float(schedule(step)), 6) for step in range(6)]
    [1.0, 1.0, 1.0, 0.25, 0.25, 0.2]
    """
    init_value = as_scalar(init_value, "init_value")
    steps = as_steps(transition_steps, "transition_steps", "(-inf, inf)")
    factor = as_scalar(decay_rate, "decay_rate", "[0, inf)")
    begin = as_steps(transition_begin, "transition_begin", why=_BEGIN)
    end_value = None if end_value is None else as_scalar(end_value, "end_value")
    if any(is_static_number(x) and x <= 0 for x in (steps, factor)):
        return lambda count: init_value

    @of_step
    def schedule(count: Any) -> Any:
        since = count - _not_negative(begin)
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


def inverse_square_root_schedule(init_value: Scalar, peak_value: Scalar, warmup_steps: Scalar) -> Schedule:
    """A linear warm-up, then a decay like 1/√t: the Transformer's (fairseq's ``inverse_sqrt``).

    ``init_value + (peak_value − init_value)·t/warmup_steps`` up to warmup_steps, from there on
    ``peak_value·√(warmup_steps/t)``. The paper's ``d^-0.5 · min(s^-0.5, s·warmup_steps^-1.5)`` has
    init_value 0 and peak_value ``(d·warmup_steps)^-0.5``; it counts s from 1, which is
    ``lambda step: schedule(step + 1)``.

    Args:
      init_value: the value at step 0.
      peak_value: the largest value, at warmup_steps.
      warmup_steps: how many steps the warm-up takes, at least 1.

    Raises:
      ValueError: for warmup_steps that is not positive, or a number that is not finite.

    Vaswani et al., 2017, https://arxiv.org/abs/1706.03762.

    >>> schedule = optim.inverse_square_root_schedule(0.0, 1.0, warmup_steps=4)
    >>> [float(schedule(step)) for step in (0, 1, 4, 16, 64)]
    [0.0, 0.25, 1.0, 0.5, 0.25]
    """
    init_value, peak_value = as_scalar(init_value, "init_value"), as_scalar(peak_value, "peak_value")
    warmup = as_steps(warmup_steps, "warmup_steps", "(0, inf)", "the decay begins at √(warmup_steps/t)")

    @of_step
    def schedule(count: Any) -> Any:
        # Bounded below, so that neither a value nor a derivative is infinite at step 0.
        decayed = peak_value * jnp.sqrt(warmup / (jnp.maximum(count, warmup) * 1.0))
        return jnp.where(count < warmup, mix(init_value, peak_value, share(count, warmup)), decayed)

    return schedule


def warmup_constant_schedule(init_value: Scalar, peak_value: Scalar, warmup_steps: Scalar) -> Schedule:
    """A linear warm-up to a value that stays (optax's ``warmup_constant_schedule``).

    ``init_value + (peak_value − init_value)·min(t/warmup_steps, 1)``. Without a warm-up, with 0 steps,
    it is peak_value; in optax it is init_value for ever.

    Args:
      init_value: the value at step 0.
      peak_value: the value from warmup_steps on.
      warmup_steps: how many steps the warm-up takes.

    Raises:
      ValueError: for a negative warmup_steps, or a number that is not finite.

    >>> schedule = optim.warmup_constant_schedule(0.0, 1.0, warmup_steps=4)
    >>> [float(schedule(step)) for step in (0, 1, 4, 5)]
    [0.0, 0.25, 1.0, 1.0]
    """
    init_value, peak_value = as_scalar(init_value, "init_value"), as_scalar(peak_value, "peak_value")
    warmup = as_steps(warmup_steps, "warmup_steps")
    return of_step(lambda count: mix(init_value, peak_value, share(jnp.maximum(count, 0), warmup)))


def warmup_exponential_decay_schedule(
    init_value: Scalar,
    peak_value: Scalar,
    warmup_steps: Scalar,
    transition_steps: Scalar,
    decay_rate: Scalar,
    transition_begin: Scalar = 0,
    staircase: bool = False,
    end_value: Scalar | None = None,
) -> Schedule:
    """A linear warm-up, then :func:`exponential_decay` (optax's ``warmup_exponential_decay_schedule``).

    Args:
      init_value: the value at step 0.
      peak_value: the value at warmup_steps.
      warmup_steps: how many steps the warm-up takes.
      transition_steps, decay_rate, staircase, end_value: as for :func:`exponential_decay`.
      transition_begin: how many steps peak_value is held first.

    Raises:
      ValueError: for a negative count or decay_rate, or a number that is not finite.

    >>> schedule = optim.warmup_exponential_decay_schedule(0.0, 1.0, 2, transition_steps=1, decay_rate=0.5)
    >>> [float(schedule(step)) for step in range(5)]
    [0.0, 0.5, 1.0, 0.5, 0.25]
    """
    warmup = warmup_constant_schedule(init_value, peak_value, warmup_steps)
    decay = exponential_decay(
        peak_value, transition_steps, decay_rate, transition_begin, staircase, end_value
    )
    return join_schedules([warmup, decay], [warmup_steps])


def _not_negative(steps: Scalar) -> Any:
    """What a plain number was checked for, of a traced one."""
    return steps if is_static_number(steps) else jnp.maximum(steps, 0)
