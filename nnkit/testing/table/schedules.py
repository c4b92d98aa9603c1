"""Schedules beside optax's formula in float64 and PyTorch's schedulers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnkit import optim
from nnkit.testing.equivalent import Distance
from nnkit.testing.table.row import Bound, Row
from nnkit.testing.ulp import ulp_distance

__all__ = ["OPTAX", "STEPS", "TORCH", "compiled", "in_torch", "rows", "truth"]

STEPS = np.concatenate([np.arange(130), [149, 150, 151, 999, 1000, 10**6, 2**31 - 1]]).astype(np.int32)


def _grid(**choices: Any) -> list[dict[str, Any]]:
    return [dict(zip(choices, row, strict=True)) for row in itertools.product(*choices.values())]


WARMUP = {"init_value": [0.01], "peak_value": [0.3, 0.0], "warmup_steps": [10, 41]}
OPTAX: dict[str, list[dict[str, Any]]] = {
    "constant_schedule": [{"value": 0.3}],
    "linear_schedule": _grid(
        init_value=[0.3, 0.0], end_value=[0.1], transition_steps=[47, 1, 0, -1], transition_begin=[0, 5]
    ),
    "polynomial_schedule": _grid(
        init_value=[0.3],
        end_value=[0.0, 0.7],
        power=[0, 0.5, 1.7, 3],
        transition_steps=[41, 97],
        transition_begin=[7],
    ),
    "exponential_decay": _grid(
        init_value=[0.3],
        transition_steps=[47],
        decay_rate=[0.5, 1.1],
        transition_begin=[0, 7],
        staircase=[False, True],
        end_value=[None, 0.25],
    ),
    "piecewise_constant_schedule": [
        {"init_value": 0.3},
        {"init_value": 0.3, "boundaries_and_scales": {}},
        {"init_value": 0.3, "boundaries_and_scales": {0: 0.5}},
        {"init_value": -0.3, "boundaries_and_scales": {100: 0.1, 7: 3.0, 50: 0.0}},
        {"init_value": 1, "boundaries_and_scales": {np.int64(10): np.float32(0.5), 20: 2}},
    ],
    "piecewise_interpolate_schedule": _grid(
        interpolate_type=["linear", "cosine"],
        init_value=[0.3],
        boundaries_and_scales=[None, {}, {41: 0.1}, {0: 2.0, 5: 3.0}, {97: 0.5, 41: 3.0, 120: 0.0}],
    ),
    "cosine_decay_schedule": _grid(
        init_value=[0.3, -1], decay_steps=[47, 120.5], alpha=[0.0, 1.2], exponent=[1.0, 1.5]
    ),
    "linear_onecycle_schedule": [
        {"transition_steps": 100, "peak_value": 0.3},
        {"transition_steps": 47, "peak_value": 3, "pct_start": 0.4, "pct_final": 0.6},
        {"transition_steps": 7, "peak_value": 0.3, "div_factor": 3.0, "final_div_factor": 0.5},
    ],
    "cosine_onecycle_schedule": [
        {"transition_steps": 100, "peak_value": 0.3},
        {"transition_steps": 47, "peak_value": 3, "pct_start": 0.0},
        {"transition_steps": 7, "peak_value": 0.3, "div_factor": 3.0, "final_div_factor": 0.5},
    ],
    "warmup_constant_schedule": _grid(**WARMUP),
    "warmup_cosine_decay_schedule": _grid(
        **WARMUP | {"warmup_steps": [0, 10, 41]}, decay_steps=[42, 97], end_value=[0.02], exponent=[2.0]
    ),
    "warmup_exponential_decay_schedule": _grid(
        **WARMUP, transition_steps=[11], decay_rate=[0.5], transition_begin=[7], staircase=[False, True]
    ),
    "sgdr_schedule": [
        {"cosine_kwargs": [{"init_value": 0.1, "peak_value": 0.3, "warmup_steps": 3, "decay_steps": 20}]},
        {
            "cosine_kwargs": [
                {"init_value": 0.1, "peak_value": p, "warmup_steps": 3, "decay_steps": d, "end_value": 0.02}
                for p, d in ((0.3, 20), (0.2, 41), (0.1, 47))
            ]
        },
    ],
}

# Ours and PyTorch's scheduler of an optimizer with the rate 0.3.
TORCH: dict[str, tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]] = {
    "step_decay": (optim.step_decay(0.3, 5, 0.5), lambda S, opt: S.StepLR(opt, 5, 0.5)),
    "multi_step_decay": (
        optim.multi_step_decay(0.3, [30, 50], 0.1),
        lambda S, opt: S.MultiStepLR(opt, [30, 50], 0.1),
    ),
    "exponential_decay": (optim.exponential_decay(0.3, 1, 0.9), lambda S, opt: S.ExponentialLR(opt, 0.9)),
    "cosine_decay_schedule": (
        optim.cosine_decay_schedule(0.3, 69),
        lambda S, opt: S.CosineAnnealingLR(opt, 69),
    ),
    "cyclic_triangular_schedule": (
        optim.cyclic_triangular_schedule(0.1, 0.7, 5, 3, mode="triangular2"),
        lambda S, opt: S.CyclicLR(
            opt, 0.1, 0.7, step_size_up=5, step_size_down=3, mode="triangular2", cycle_momentum=False
        ),
    ),
}


def compiled(schedule: Any, steps: Any = STEPS) -> np.ndarray:
    """The values at all steps, compiled."""
    run = jax.jit(jax.vmap(lambda step: jnp.asarray(schedule(step))))
    with jax.numpy_dtype_promotion("standard"):
        return np.asarray(run(jnp.asarray(steps)))


def truth(name: str, arguments: Any) -> np.ndarray:
    """optax's in float64 and not compiled: there its division by a constant is a division."""
    import optax

    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        schedule = jax.vmap(lambda step: jnp.asarray(getattr(optax, name)(**arguments)(step)))
        return np.asarray(schedule(STEPS.astype(np.int64)))


def in_torch(scheduler: Callable[[Any], Any], steps: int = 70, lr: float = 0.3) -> np.ndarray:
    """The rates that a PyTorch scheduler sets, step by step."""
    import torch

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=lr)
    schedule, rates = scheduler(optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return np.array(rates)


def rows() -> Iterator[Row]:
    """float32 values; the bounds are roundings of the largest value, six for a power."""
    for name in OPTAX:
        bound = Bound(relative=(6 if "exponential" in name else 4) * 2.0**-23)
        yield Row("schedules", name, "optax", "float32", bound, partial(_optax, name))
    for name in TORCH:
        yield Row("schedules", name, "torch", "float32", Bound(relative=2e-6), partial(_torch, name))


def _optax(name: str) -> Distance:
    found = [_distance(compiled(getattr(optim, name)(**a)), truth(name, a)) for a in OPTAX[name]]
    return Distance(max(d.ulps for d in found), *max((d[1:] for d in found), key=lambda d: d[0]))


def _torch(name: str) -> Distance:
    import torch

    ours, theirs = TORCH[name]
    expected = in_torch(partial(theirs, torch.optim.lr_scheduler))
    return _distance(compiled(ours, np.arange(len(expected), dtype=np.int32)), expected)


def _distance(values: np.ndarray, expected: np.ndarray) -> Distance:
    """Where the formula gives a number of a rate's size; elsewhere optax overflows or has NaN."""
    told = np.isfinite(expected) & (np.abs(expected) < 1e6)
    off = np.where(told, np.abs(values.astype(np.float64) - np.where(told, expected, 0)), 0)
    near = ulp_distance(values.astype(np.float32), expected.astype(np.float32))
    relative = off / max(float(np.abs(expected[told]).max(initial=0)), 1e-300)
    return Distance(int(near[told].max(initial=0)), float(relative.max()), int(np.argmax(relative)), "value")
