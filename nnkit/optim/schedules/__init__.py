"""Schedules: functions from the step, which starts at 0, to a number.

All of them take a Python or numpy number, or an array that may be traced, and have reached at a
boundary what stands after it, as in optax and PyTorch. Before step 0 they have the value of step 0.
Their numbers may be traced, too: a grid over initial values, lengths or decay rates is a ``jax.vmap``.
"""

from nnkit.optim.schedules.cosine import cosine_decay_schedule, sgdr_schedule, warmup_cosine_decay_schedule
from nnkit.optim.schedules.cycles import (
    cosine_onecycle_schedule,
    cyclic_triangular_schedule,
    linear_onecycle_schedule,
)
from nnkit.optim.schedules.decay import (
    constant_schedule,
    exponential_decay,
    inverse_square_root_schedule,
    linear_schedule,
    polynomial_schedule,
    warmup_constant_schedule,
    warmup_exponential_decay_schedule,
)
from nnkit.optim.schedules.join import join_schedules
from nnkit.optim.schedules.piecewise import (
    multi_step_decay,
    piecewise_constant_schedule,
    piecewise_interpolate_schedule,
    step_decay,
)

__all__ = [
    "constant_schedule",
    "cosine_decay_schedule",
    "cosine_onecycle_schedule",
    "cyclic_triangular_schedule",
    "exponential_decay",
    "inverse_square_root_schedule",
    "join_schedules",
    "linear_onecycle_schedule",
    "linear_schedule",
    "multi_step_decay",
    "piecewise_constant_schedule",
    "piecewise_interpolate_schedule",
    "polynomial_schedule",
    "sgdr_schedule",
    "step_decay",
    "warmup_constant_schedule",
    "warmup_cosine_decay_schedule",
    "warmup_exponential_decay_schedule",
]
