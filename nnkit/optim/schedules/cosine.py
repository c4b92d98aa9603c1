"""Half a cosine from a value down to another: once, after a warm-up, and with restarts."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from nnkit.checks import is_static_number, unknown_name
from nnkit.optim.scalars import Scalar, as_scalar
from nnkit.optim.schedules.decay import warmup_constant_schedule
from nnkit.optim.schedules.join import join_schedules
from nnkit.optim.schedules.steps import as_steps, cosine_share, mix, of_step
from nnkit.types import Schedule

__all__ = ["cosine_decay_schedule", "sgdr_schedule", "warmup_cosine_decay_schedule"]


def cosine_decay_schedule(
    init_value: Scalar, decay_steps: Scalar, alpha: Scalar = 0.0, exponent: Scalar = 1.0
) -> Schedule:
    """Half a cosine down to a part of the first value (optax's ``cosine_decay_schedule``).

    ``init_value · (α + (1 − α) · c^exponent)`` with ``c = (1 + cos(π·min(t/decay_steps, 1)))/2``.

    Args:
      init_value: the value at step 0.
      decay_steps: how many steps the decay takes, at least 1.
      alpha: α, the part of init_value that is left at the end.
      exponent: 1 is the plain cosine; with more the value falls earlier.

    Raises:
      ValueError: for decay_steps that is not positive, a negative exponent, or a number that is not
        finite.

    Loshchilov and Hutter, 2017, https://arxiv.org/abs/1608.03983.

    >>> schedule = optim.cosine_decay_schedule(1.0, decay_steps=4, alpha=0.2)
    >>> [round(float(schedule(step)), 3) for step in range(6)]
    [1.0, 0.883, 0.6, 0.317, 0.2, 0.2]
    """
    init_value, alpha = as_scalar(init_value, "init_value"), as_scalar(alpha, "alpha")
    return _cosine(init_value, lambda: alpha * init_value, decay_steps, exponent)


def warmup_cosine_decay_schedule(
    init_value: Scalar,
    peak_value: Scalar,
    warmup_steps: Scalar,
    decay_steps: Scalar,
    end_value: Scalar = 0.0,
    exponent: Scalar = 1.0,
) -> Schedule:
    """A linear warm-up, then half a cosine down (optax's ``warmup_cosine_decay_schedule``).

    ``init_value + (peak_value − init_value)·t/warmup_steps`` up to warmup_steps; then
    ``end_value + (peak_value − end_value)·c^exponent``, c as in :func:`cosine_decay_schedule` over the
    remaining decay_steps − warmup_steps. As in optax, a peak_value of 0 stays 0.

    Args:
      init_value: the value at step 0.
      peak_value: the value at warmup_steps.
      warmup_steps: how many steps the warm-up takes.
      decay_steps: how many steps warm-up and decay take together.
      end_value: the value from decay_steps on.
      exponent: 1 is the plain cosine; with more the value falls earlier.

    Raises:
      ValueError: for a negative warmup_steps or exponent, for decay_steps not above warmup_steps, or a
        number that is not finite.

    >>> schedule = optim.warmup_cosine_decay_schedule(0.0, 1.0, warmup_steps=2, decay_steps=6)
    >>> [round(float(schedule(step)), 3) for step in range(8)]
    [0.0, 0.5, 1.0, 0.854, 0.5, 0.146, 0.0, 0.0]
    """
    peak_value, end_value = as_scalar(peak_value, "peak_value"), as_scalar(end_value, "end_value")
    warmup = warmup_constant_schedule(init_value, peak_value, warmup_steps)
    warmup_steps, decay_steps = as_steps(warmup_steps, "warmup_steps"), as_steps(decay_steps, "decay_steps")
    with jax.numpy_dtype_promotion("standard"):  # a traced number of another dtype
        remaining = decay_steps - warmup_steps
    if is_static_number(remaining) and remaining <= 0:
        raise ValueError(
            f"decay_steps must be above warmup_steps, got {decay_steps} and {warmup_steps}: it counts the "
            "steps of the warm-up, too"
        )
    end = lambda: jnp.where(jnp.asarray(peak_value) == 0, 0.0, end_value)
    return join_schedules([warmup, _cosine(peak_value, end, remaining, exponent)], [warmup_steps])


def sgdr_schedule(cosine_kwargs: Iterable[Mapping[str, Any]]) -> Schedule:
    """Warm restarts: one :func:`warmup_cosine_decay_schedule` after the other (optax's ``sgdr_schedule``).

    Args:
      cosine_kwargs: the arguments of each, as dicts. Its decay_steps is when the next begins.

    Raises:
      TypeError: for something else than dicts with the arguments' names.
      ValueError: for no cycles, or arguments that a cycle does not take.

    Loshchilov and Hutter, 2017, https://arxiv.org/abs/1608.03983.

    >>> cycles = [dict(init_value=0.0, peak_value=1.0, warmup_steps=0, decay_steps=n) for n in (2, 4)]
    >>> schedule = optim.sgdr_schedule(cycles)
    >>> [round(float(schedule(step)), 3) for step in range(7)]
    [1.0, 0.5, 1.0, 0.854, 0.5, 0.146, 0.0]
    """
    if isinstance(cosine_kwargs, Mapping) or not isinstance(cosine_kwargs, Iterable):
        got = (
            f"one {type(cosine_kwargs).__name__}"
            if isinstance(cosine_kwargs, Mapping)
            else repr(cosine_kwargs)
        )
        raise TypeError(f"cosine_kwargs must be a list of dicts, one a cycle, got {got}")
    cycles = list(cosine_kwargs)
    if not cycles:
        raise ValueError("cosine_kwargs must hold at least one cycle's arguments, got none")
    parameters = inspect.signature(warmup_cosine_decay_schedule).parameters
    members, boundaries = [], [0]
    for i, cycle in enumerate(cycles):
        if not isinstance(cycle, Mapping):
            raise TypeError(f"cosine_kwargs[{i}] must be a dict of a cycle's arguments, got {cycle!r}")
        for name in cycle:
            if name not in parameters:
                raise unknown_name(f"argument in cosine_kwargs[{i}]", name, parameters)
        missing = [name for name, p in parameters.items() if p.default is p.empty and name not in cycle]
        if missing:
            raise TypeError(f"cosine_kwargs[{i}] lacks {', '.join(missing)}: every cycle needs its own")
        members.append(warmup_cosine_decay_schedule(**cycle))
        with jax.numpy_dtype_promotion("standard"):
            boundaries.append(boundaries[-1] + cycle["decay_steps"])
    return join_schedules(members, boundaries[1:-1])


def _cosine(start: Scalar, end: Any, decay_steps: Any, exponent: Any) -> Schedule:
    """Half a cosine from ``start`` to ``end()``."""
    steps = as_steps(decay_steps, "decay_steps", "(0, inf)")
    exponent = as_scalar(exponent, "exponent", "[0, inf)", "1 is the plain cosine")

    @of_step
    def schedule(count: Any) -> Any:
        left = cosine_share(steps - jnp.maximum(count, 0), steps)
        return mix(end(), start, left**exponent)

    return schedule
