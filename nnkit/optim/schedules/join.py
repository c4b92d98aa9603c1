"""One schedule after the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp

from nnkit.checks import is_static_number
from nnkit.optim.scalars import Scalar
from nnkit.optim.schedules.steps import as_boundaries, of_step
from nnkit.types import Schedule

__all__ = ["join_schedules"]


def join_schedules(schedules: Sequence[Schedule], boundaries: Sequence[Scalar]) -> Schedule:
    """Schedules one after the other, each counting its steps from 0 (optax's ``join_schedules``).

    ``schedules[i](t − boundaries[i − 1])`` for ``boundaries[i − 1] ≤ t < boundaries[i]``. A schedule is
    never asked for steps before its own first one.

    Args:
      schedules: functions of the step.
      boundaries: where the second begins, the third, and so on: increasing steps.

    Raises:
      TypeError: for a member that is not a function of the step.
      ValueError: for no schedules, boundaries that do not increase, or another number of them than one
        less than the schedules.

    >>> schedule = optim.join_schedules([optim.linear_schedule(0.0, 1.0, 2), lambda step: 0.5**step], [2])
    >>> [float(schedule(step)) for step in range(5)]
    [0.0, 0.5, 1.0, 0.5, 0.25]
    """
    if not isinstance(schedules, Iterable) or isinstance(schedules, str):
        raise TypeError(f"schedules must be a list of functions of the step, got {schedules!r}")
    schedules = list(schedules)
    for i, member in enumerate(schedules):
        if not callable(member):
            raise TypeError(
                f"schedules[{i}] must be a function of the step, got {member!r}: for a number write "
                "constant_schedule(number)"
            )
    if not schedules:
        raise ValueError("schedules must hold at least one function of the step, got none")
    steps = as_boundaries(boundaries, "boundaries", "[100, 200]")
    if len(steps) != len(schedules) - 1:
        raise ValueError(
            f"boundaries must be one fewer than the schedules, got {len(steps)} for {len(schedules)}: each "
            "is the step at which the next schedule begins"
        )

    @of_step
    def schedule(count: Any) -> Any:
        value = schedules[0](count)
        for boundary, member in zip(steps, schedules[1:], strict=True):
            since = count - boundary
            since = max(since, 0) if is_static_number(since) else jnp.maximum(since, 0)
            value = jnp.where(count < boundary, value, member(since))
        return value

    return schedule
