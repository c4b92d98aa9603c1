"""Schedules that rise and fall: one cycle over the whole training, or many triangular ones."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from nnkit.checks import is_static_number, unknown_name
from nnkit.optim.scalars import Scalar, as_scalar
from nnkit.optim.schedules.piecewise import interpolated
from nnkit.optim.schedules.steps import as_steps, in_int32, mix, of_step, share
from nnkit.types import Schedule

__all__ = ["cosine_onecycle_schedule", "cyclic_triangular_schedule", "linear_onecycle_schedule"]

_MODES = ("triangular", "triangular2", "exp_range")


def linear_onecycle_schedule(
    transition_steps: Scalar,
    peak_value: Scalar,
    pct_start: Scalar = 0.3,
    pct_final: Scalar = 0.85,
    div_factor: Scalar = 25.0,
    final_div_factor: Scalar = 1e4,
) -> Schedule:
    """Up, down and out in three lines (optax's ``linear_onecycle_schedule``).

    From ``peak_value/div_factor`` to peak_value at ``⌊pct_start·transition_steps⌋``, back at
    ``⌊pct_final·transition_steps⌋``, and to ``peak_value/(div_factor·final_div_factor)`` at
    transition_steps. In a run so short that two of these steps coincide, the phase between is left out;
    optax leaves out the factor, too.

    Args:
      transition_steps: how many steps the cycle takes, at least 1.
      peak_value: the largest value.
      pct_start: the part of the steps in which the value rises, in [0, 1].
      pct_final: the part of the steps after which the last phase begins, in [pct_start, 1].
      div_factor: the largest value over the first.
      final_div_factor: the first value over the last.

    Raises:
      ValueError: for transition_steps that is not positive, a part outside its interval, a factor that
        is not positive, or a number that is not finite.

    Smith and Topin, 2017, https://arxiv.org/abs/1708.07120.

    >>> schedule = optim.linear_onecycle_schedule(10, 1.0, 0.4, 0.8, div_factor=5.0, final_div_factor=4.0)
    >>> [round(float(schedule(step)), 3) for step in range(0, 12, 2)]
    [0.2, 0.6, 1.0, 0.6, 0.2, 0.05]
    """
    parts = {"pct_start": pct_start, "pct_final": pct_final}
    if all(map(is_static_number, parts.values())) and pct_final < pct_start:
        raise ValueError(
            f"pct_final must be at least pct_start, got {pct_final} and {pct_start}: it is the part of the "
            "steps after which the last phase begins"
        )
    return _onecycle("linear", transition_steps, peak_value, parts, div_factor, final_div_factor)


def cosine_onecycle_schedule(
    transition_steps: Scalar,
    peak_value: Scalar,
    pct_start: Scalar = 0.3,
    div_factor: Scalar = 25.0,
    final_div_factor: Scalar = 1e4,
) -> Schedule:
    """Up and down in two half cosines (optax's ``cosine_onecycle_schedule``).

    From ``peak_value/div_factor`` to peak_value at ``⌊pct_start·transition_steps⌋``, and to
    ``peak_value/(div_factor·final_div_factor)`` at transition_steps. It is PyTorch's ``OneCycleLR``
    but for the steps: PyTorch's has its largest value at ``pct_start·total_steps − 1`` and its last at
    ``total_steps − 1``.

    Args:
      transition_steps: how many steps the cycle takes, at least 1.
      peak_value: the largest value.
      pct_start: the part of the steps in which the value rises, in [0, 1].
      div_factor: the largest value over the first.
      final_div_factor: the first value over the last.

    Raises:
      ValueError: for transition_steps that is not positive, a part outside [0, 1], a factor that is not
        positive, or a number that is not finite.

    Smith and Topin, 2017, https://arxiv.org/abs/1708.07120.

    >>> schedule = optim.cosine_onecycle_schedule(8, 1.0, 0.5, div_factor=5.0, final_div_factor=2.0)
    >>> [round(float(schedule(step)), 3) for step in range(0, 12, 2)]
    [0.2, 0.6, 1.0, 0.55, 0.1, 0.1]
    """
    parts = {"pct_start": pct_start}
    return _onecycle("cosine", transition_steps, peak_value, parts, div_factor, final_div_factor)


def cyclic_triangular_schedule(
    init_value: Scalar,
    peak_value: Scalar,
    step_size_up: Scalar,
    step_size_down: Scalar | None = None,
    mode: str = "triangular",
    gamma: Scalar = 1.0,
) -> Schedule:
    """Up and down along lines, again and again (PyTorch's ``CyclicLR``).

    ``init_value + (peak_value − init_value) · height · scale`` where the height goes from 0 to 1 in
    step_size_up steps and back in step_size_down, and the scale is 1 (triangular), 1/2 to the number
    of cycles done (triangular2), or gamma to the number of steps done (exp_range).

    Args:
      init_value: the value at which every cycle begins and ends.
      peak_value: the largest value, that of the first cycle.
      step_size_up: how many steps the rise takes; Smith recommends 2 to 10 epochs.
      step_size_down: how many steps the fall takes; as many as the rise by default.
      mode: "triangular", "triangular2" or "exp_range".
      gamma: the factor a step of exp_range.

    Raises:
      ValueError: for another mode, a number of steps that is not positive, a negative gamma, or a
        number that is not finite.

    Smith, 2017, https://arxiv.org/abs/1506.01186.

    >>> schedule = optim.cyclic_triangular_schedule(0.0, 1.0, 2, mode="triangular2")
    >>> [float(schedule(step)) for step in range(9)]
    [0.0, 0.5, 1.0, 0.5, 0.0, 0.25, 0.5, 0.25, 0.0]
    """
    if mode not in _MODES:
        raise unknown_name("mode", mode, _MODES)
    init_value, peak_value = as_scalar(init_value, "init_value"), as_scalar(peak_value, "peak_value")
    up = as_steps(step_size_up, "step_size_up", "(0, inf)")
    down = up if step_size_down is None else as_steps(step_size_down, "step_size_down", "(0, inf)")
    gamma = as_scalar(gamma, "gamma", "[0, inf)", "it is the factor a step of exp_range")

    @of_step
    def schedule(count: Any) -> Any:
        count = jnp.maximum(count, 0)
        cycle = count // (up + down)
        place = count - cycle * (up + down)
        height = jnp.where(place <= up, share(place, up), share(up + down - place, down))
        if mode == "triangular2":
            height = jnp.ldexp(height, -jnp.asarray(cycle).astype(jnp.int32))
        elif mode == "exp_range":
            height = height * _power(gamma, count)
        return mix(init_value, peak_value, height)

    return schedule


def _power(gamma: Any, count: Any) -> Any:
    if not is_static_number(gamma) or gamma == 0:
        return gamma ** (count * 1.0)
    # Its logarithm in float64: in float32 0.99994 is so far off that its 100,000th power is 0.2% wrong.
    return jnp.exp(count * math.log(gamma))


def _onecycle(
    kind: str, transition_steps: Any, peak_value: Any, parts: dict[str, Any], div: Any, final_div: Any
) -> Schedule:
    """From peak_value/div to peak_value, with a second part back, and to peak_value/(div·final_div)."""
    peak_value = as_scalar(peak_value, "peak_value")
    steps = as_steps(transition_steps, "transition_steps", "(0, inf)")
    div = as_scalar(div, "div_factor", "(0, inf)")
    final_div = as_scalar(final_div, "final_div_factor", "(0, inf)")
    parts = {name: as_scalar(x, name, "[0, 1]", "it is a part of the steps") for name, x in parts.items()}
    with jax.numpy_dtype_promotion("standard"):  # traced numbers of other dtypes
        marks = [*(_floor(part * steps) for part in parts.values()), steps]
        scales = [div, 1 / div, 1 / final_div] if len(marks) == 3 else [div, 1 / (div * final_div)]
        return interpolated(kind, peak_value / div, [*zip(marks, scales, strict=True)])


def _floor(step: Any) -> Any:
    return in_int32(math.floor(step)) if is_static_number(step) else jnp.floor(step)
