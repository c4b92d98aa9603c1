"""Schedules of pieces: constant between boundaries, or drawn from one boundary to the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nnkit.checks import is_static_number, unknown_name
from nnkit.optim.scalars import Scalar, as_scalar
from nnkit.optim.schedules.steps import as_boundaries, as_steps, cosine_share, in_int32, mix, of_step, share
from nnkit.types import Schedule

__all__ = [
    "interpolated",
    "multi_step_decay",
    "piecewise_constant_schedule",
    "piecewise_interpolate_schedule",
    "step_decay",
]

_SHARES: dict[str, Callable[..., Any]] = {"linear": share, "cosine": cosine_share}


def piecewise_constant_schedule(
    init_value: Scalar, boundaries_and_scales: Mapping[int, Scalar] | None = None
) -> Schedule:
    """A factor at each boundary, constant between (optax's ``piecewise_constant_schedule``).

    ``init_value · Π {scale : (boundary, scale), boundary ≤ t}``.

    Args:
      init_value: the value before the first boundary.
      boundaries_and_scales: ``{step: factor}``; without any the value stays init_value.

    Raises:
      TypeError: for something else than a dict of numbers.
      ValueError: for a negative step or factor, or a number that is not finite.

    >>> schedule = optim.piecewise_constant_schedule(1.0, {2: 0.5, 4: 0.1})
    >>> [round(float(schedule(step)), 3) for step in range(6)]
    [1.0, 1.0, 0.5, 0.5, 0.05, 0.05]
    """
    init_value = as_scalar(init_value, "init_value")
    pairs = _pairs(boundaries_and_scales)
    return _stepped(init_value, pairs) if pairs else lambda count: init_value


def piecewise_interpolate_schedule(
    interpolate_type: str, init_value: Scalar, boundaries_and_scales: Mapping[int, Scalar] | None = None
) -> Schedule:
    """Drawn through given values, by lines or half cosines (optax's ``piecewise_interpolate_schedule``).

    At a boundary it is init_value times that boundary's factor and all factors before; it stays at the
    last of these values. Before step 0 it is init_value; optax's is 0 there.

    Args:
      interpolate_type: "linear" or "cosine".
      init_value: the value at step 0.
      boundaries_and_scales: ``{step: factor}``; without any the value stays init_value.

    Raises:
      TypeError: for something else than a dict of numbers.
      ValueError: for another interpolate_type, a negative step or factor, or a number that is not finite.

    >>> schedule = optim.piecewise_interpolate_schedule("linear", 1.0, {2: 0.5, 4: 0.0})
    >>> [float(schedule(step)) for step in range(6)]
    [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """
    if not isinstance(interpolate_type, str) or interpolate_type not in _SHARES:
        raise unknown_name("interpolate_type", interpolate_type, _SHARES)
    init_value = as_scalar(init_value, "init_value")
    pairs = _pairs(boundaries_and_scales)
    return interpolated(interpolate_type, init_value, pairs) if pairs else lambda count: init_value


def interpolated(kind: str, init_value: Any, pairs: Sequence[tuple[Any, Any]]) -> Schedule:
    """The same for pairs in order, whose steps may be traced and may coincide."""

    @of_step
    def schedule(count: Any) -> Any:
        begin, value = 0, init_value
        result: Any = value
        for boundary, scale in pairs:
            before, value = value, value * scale
            weight = _SHARES[kind](count - begin, boundary - begin)
            result = jnp.where(count >= begin, mix(before, value, weight), result)
            begin = boundary
        return result

    return schedule


def step_decay(
    init_value: Scalar, step_size: Scalar, gamma: Scalar = 0.1, steps_per_epoch: Scalar = 1
) -> Schedule:
    """A factor every so many epochs (PyTorch's ``StepLR``).

    ``init_value · gamma^⌊t / (step_size·steps_per_epoch)⌋``.

    Args:
      init_value: the value of the first epochs.
      step_size: how many epochs there are from one fall to the next.
      gamma: the factor.
      steps_per_epoch: how many steps an epoch has; 1 for a schedule that is called with epochs.

    Raises:
      ValueError: for a step_size or steps_per_epoch that is not positive, a negative gamma, or a number
        that is not finite.

    >>> schedule = optim.step_decay(1.0, step_size=2, gamma=0.5, steps_per_epoch=10)
    >>> [float(schedule(step)) for step in (0, 19, 20, 39, 40)]
    [1.0, 1.0, 0.5, 0.5, 0.25]
    """
    init_value, gamma = as_scalar(init_value, "init_value"), as_scalar(gamma, "gamma", "[0, inf)")
    epochs = as_steps(step_size, "step_size", "(0, inf)", "it counts epochs")
    period = _steps(epochs, steps_per_epoch)
    return of_step(lambda count: init_value * gamma ** (jnp.maximum(count, 0) // period * 1.0))


def multi_step_decay(
    init_value: Scalar, milestones: Sequence[Scalar], gamma: Scalar = 0.1, steps_per_epoch: Scalar = 1
) -> Schedule:
    """A factor at each of some epochs (PyTorch's ``MultiStepLR``).

    ``init_value · gamma^(number of milestones ≤ t/steps_per_epoch)``.

    Args:
      init_value: the value before the first milestone.
      milestones: increasing epochs.
      gamma: the factor.
      steps_per_epoch: how many steps an epoch has; 1 for a schedule that is called with epochs.

    Raises:
      ValueError: for no milestones, milestones that do not increase, a steps_per_epoch that is not
        positive, a negative gamma, or a number that is not finite.

    >>> schedule = optim.multi_step_decay(1.0, [30, 80], gamma=0.5, steps_per_epoch=10)
    >>> [float(schedule(step)) for step in (0, 299, 300, 799, 800)]
    [1.0, 1.0, 0.5, 0.5, 0.25]
    """
    init_value, gamma = as_scalar(init_value, "init_value"), as_scalar(gamma, "gamma", "[0, inf)")
    epochs = as_boundaries(milestones, "milestones", "[30, 80]")
    if not epochs:
        raise ValueError("milestones must hold at least one epoch, got none: write milestones=[30, 80]")
    return _stepped(init_value, [(_steps(epoch, steps_per_epoch), gamma) for epoch in epochs])


def _stepped(init_value: Any, pairs: Sequence[tuple[Any, Any]]) -> Schedule:
    @of_step
    def schedule(count: Any) -> Any:
        value = init_value
        for boundary, scale in pairs:
            value = value * jnp.where(count >= boundary, scale, 1.0)
        return value

    return schedule


def _steps(epochs: Any, steps_per_epoch: Any) -> Any:
    steps_per_epoch = as_steps(steps_per_epoch, "steps_per_epoch", "(0, inf)")
    with jax.numpy_dtype_promotion("standard"):  # a traced number of another dtype
        return in_int32(epochs * steps_per_epoch)


def _pairs(boundaries_and_scales: Any) -> list[tuple[Any, Any]]:
    """The boundaries in order, each with its factor."""
    if boundaries_and_scales is None:
        return []
    if not isinstance(boundaries_and_scales, Mapping):
        raise TypeError(
            f"boundaries_and_scales must be a dict, got {boundaries_and_scales!r}: write {{step: factor}}"
        )
    for step in boundaries_and_scales:
        if not is_static_number(step):
            raise TypeError(
                f"boundaries_and_scales must have steps for keys, got {step!r}: write {{100: 0.1}}"
            )
    return [
        (
            as_steps(step, "a step in boundaries_and_scales"),
            as_scalar(scale, f"boundaries_and_scales[{step}]", "[0, inf)", "it is a factor"),
        )
        for step, scale in sorted(boundaries_and_scales.items())
    ]
