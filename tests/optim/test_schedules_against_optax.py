"""Every schedule that optax has, beside optax's: compiled and not, in float32 and float64."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nnkit import optim
from tests.optim.oracle import optax_jit

STEPS = np.concatenate([np.arange(130), [149, 150, 151, 999, 1000, 10**6, 2**31 - 1]]).astype(np.int32)


def _grid(**choices: Any) -> list[dict[str, Any]]:
    return [dict(zip(choices, row, strict=True)) for row in itertools.product(*choices.values())]


WARMUP = {"init_value": [0.01], "peak_value": [0.3, 0.0], "warmup_steps": [10, 41]}
CASES: dict[str, list[dict[str, Any]]] = {
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
ROWS = [(name, arguments) for name, rows in CASES.items() for arguments in rows]


def compiled(schedule: Any, steps: Any = STEPS) -> np.ndarray:
    return np.asarray(optax_jit(jax.vmap(lambda step: jnp.asarray(schedule(step))))(jnp.asarray(steps)))


def truth(name: str, arguments: Any) -> np.ndarray:
    """optax's in float64 and not compiled: there its division by a constant is a division."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        schedule = jax.vmap(lambda step: jnp.asarray(getattr(optax, name)(**arguments)(step)))
        return np.asarray(schedule(STEPS.astype(np.int64)))


def check(schedule: Any, name: str, arguments: Any) -> None:
    """Tolerances in units of the largest value: what a sum of terms of that size may be rounded by.

    2.5 units were seen at most in either precision. The power of exponential_decay adds what 20/47·log 1.1
    and the power itself are rounded by; with int32 steps it is float32 always, as optax's is.
    """
    expected = truth(name, arguments)
    told = np.isfinite(expected) & (np.abs(expected) < 1e6)
    size = np.abs(expected[told]).max()

    def near(values: Any, at: Any = slice(None)) -> None:
        unit = np.finfo(values.dtype).eps if values.dtype == np.float64 else np.float64(2.0**-23)
        off = np.abs(values.astype(np.float64)[told[at]] - expected[at][told[at]]).max()
        assert off <= (6 if "exponential" in name else 4) * unit * size, off / unit / size

    near(compiled(schedule))
    near(np.broadcast_to(np.asarray(schedule(STEPS)), STEPS.shape))
    one_by_one = [schedule(7), schedule(np.int64(53)), schedule(np.uint8(97)), schedule(jnp.int32(120))]
    near(np.array([float(value) for value in one_by_one], np.float32), [7, 53, 97, 120])
    with jax.enable_x64(True):
        wide = compiled(schedule)
        assert wide.dtype == np.float64 or "exponential" in name or isinstance(schedule(0), int | float)
        near(wide)


@pytest.mark.parametrize(("name", "arguments"), ROWS, ids=[f"{n}-{i}" for i, (n, _) in enumerate(ROWS)])
def test_values(name: str, arguments: Any) -> None:
    check(getattr(optim, name)(**arguments), name, arguments)


@pytest.mark.parametrize("name", CASES)
def test_signatures_are_optax(name: str) -> None:
    ours, theirs = (inspect.signature(getattr(module, name)).parameters for module in (optim, optax))
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]
