"""Schedules inside of transformations: traced steps, traced numbers, derivatives, long runs."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnkit import optim

STEPS = jnp.arange(60)

# Each with all its numbers at two settings; what is bound stays static.
ROWS: dict[str, tuple[Any, dict[str, float], dict[str, float]]] = {
    "constant": (optim.constant_schedule, {"value": 0.1}, {"value": 0.3}),
    "linear": (
        optim.linear_schedule,
        {"init_value": 0.1, "end_value": 0.0, "transition_steps": 20, "transition_begin": 0},
        {"init_value": 0.3, "end_value": 0.5, "transition_steps": 31, "transition_begin": 7},
    ),
    "polynomial": (
        optim.polynomial_schedule,
        {"init_value": 0.1, "end_value": 0.0, "power": 0.5, "transition_steps": 20},
        {"init_value": 0.3, "end_value": 0.5, "power": 2.0, "transition_steps": 31},
    ),
    "exponential": (
        functools.partial(optim.exponential_decay, staircase=True),
        {
            "init_value": 0.1,
            "transition_steps": 20,
            "decay_rate": 0.5,
            "transition_begin": 0,
            "end_value": 0.01,
        },
        {
            "init_value": 0.3,
            "transition_steps": 31,
            "decay_rate": 1.5,
            "transition_begin": 7,
            "end_value": 0.4,
        },
    ),
    "inverse_square_root": (
        optim.inverse_square_root_schedule,
        {"init_value": 0.0, "peak_value": 0.1, "warmup_steps": 1},
        {"init_value": 0.1, "peak_value": 0.3, "warmup_steps": 10},
    ),
    "warmup_constant": (
        optim.warmup_constant_schedule,
        {"init_value": 0.0, "peak_value": 0.1, "warmup_steps": 0},
        {"init_value": 0.1, "peak_value": 0.3, "warmup_steps": 10},
    ),
    "warmup_exponential": (
        optim.warmup_exponential_decay_schedule,
        {"init_value": 0.0, "peak_value": 0.1, "warmup_steps": 3, "transition_steps": 5, "decay_rate": 0.9},
        {"init_value": 0.1, "peak_value": 0.3, "warmup_steps": 10, "transition_steps": 7, "decay_rate": 0.5},
    ),
    "cosine": (
        optim.cosine_decay_schedule,
        {"init_value": 0.1, "decay_steps": 30, "alpha": 0.0, "exponent": 1.0},
        {"init_value": 0.3, "decay_steps": 47, "alpha": 0.1, "exponent": 0.5},
    ),
    "warmup_cosine": (
        optim.warmup_cosine_decay_schedule,
        {"init_value": 0.0, "peak_value": 0.0, "warmup_steps": 0, "decay_steps": 20, "end_value": 0.2},
        {"init_value": 0.1, "peak_value": 0.3, "warmup_steps": 10, "decay_steps": 47, "end_value": 0.2},
    ),
    "sgdr": (
        lambda **cycle: optim.sgdr_schedule([cycle, cycle | {"peak_value": 0.2}]),
        {"init_value": 0.0, "peak_value": 0.1, "warmup_steps": 0, "decay_steps": 20},
        {"init_value": 0.1, "peak_value": 0.3, "warmup_steps": 10, "decay_steps": 23},
    ),
    "linear_onecycle": (
        optim.linear_onecycle_schedule,
        {"transition_steps": 20, "peak_value": 0.1, "pct_start": 0.25, "pct_final": 0.75},
        {"transition_steps": 40, "peak_value": 0.3, "pct_start": 0.5, "pct_final": 0.5},
    ),
    "cosine_onecycle": (
        optim.cosine_onecycle_schedule,
        {
            "transition_steps": 20,
            "peak_value": 0.1,
            "pct_start": 0.0,
            "div_factor": 5.0,
            "final_div_factor": 10.0,
        },
        {
            "transition_steps": 40,
            "peak_value": 0.3,
            "pct_start": 0.5,
            "div_factor": 7.0,
            "final_div_factor": 2.0,
        },
    ),
    "triangular2": (
        functools.partial(optim.cyclic_triangular_schedule, mode="triangular2"),
        {"init_value": 0.0, "peak_value": 0.1, "step_size_up": 5, "step_size_down": 7},
        {"init_value": 0.1, "peak_value": 0.3, "step_size_up": 11, "step_size_down": 1},
    ),
    "exp_range": (
        functools.partial(optim.cyclic_triangular_schedule, mode="exp_range"),
        {"init_value": 0.0, "peak_value": 0.1, "step_size_up": 5, "gamma": 0.9},
        {"init_value": 0.1, "peak_value": 0.3, "step_size_up": 11, "gamma": 1.0},
    ),
    "step_decay": (
        optim.step_decay,
        {"init_value": 0.1, "step_size": 2, "gamma": 0.5, "steps_per_epoch": 7},
        {"init_value": 0.3, "step_size": 3, "gamma": 0.1, "steps_per_epoch": 5},
    ),
    "multi_step_decay": (
        lambda first, second, **numbers: optim.multi_step_decay(milestones=[first, second], **numbers),
        {"init_value": 0.1, "first": 1, "second": 3, "gamma": 0.5, "steps_per_epoch": 7},
        {"init_value": 0.3, "first": 2, "second": 4, "gamma": 0.1, "steps_per_epoch": 5},
    ),
    "piecewise_constant": (
        lambda init_value, a, b: optim.piecewise_constant_schedule(init_value, {20: a, 5: b}),
        {"init_value": 0.1, "a": 0.5, "b": 0.0},
        {"init_value": 0.3, "a": 2.0, "b": 0.1},
    ),
    "piecewise_interpolate": (
        lambda init_value, a, b: optim.piecewise_interpolate_schedule("cosine", init_value, {20: a, 5: b}),
        {"init_value": 0.1, "a": 0.5, "b": 0.0},
        {"init_value": 0.3, "a": 2.0, "b": 0.1},
    ),
    "join": (
        lambda value, boundary: optim.join_schedules(
            [optim.constant_schedule(value), lambda step: value * 0.5**step], [boundary]
        ),
        {"value": 0.1, "boundary": 0},
        {"value": 0.3, "boundary": 7},
    ),
}


def _mapped(schedule: Any) -> Any:
    return jax.vmap(lambda step: jnp.asarray(schedule(step)))(STEPS)


@pytest.mark.parametrize("name", ROWS)
def test_a_grid_is_a_vmap(name: str) -> None:
    """All numbers traced at once, as float32: the same values, from one compilation."""
    make, low, high = ROWS[name]
    grid = {key: jnp.array([low[key], high[key]], jnp.float32) for key in low}
    traces = []

    @jax.jit
    @jax.vmap
    def run(numbers: Any) -> Any:
        traces.append(1)
        return _mapped(make(**numbers))

    got = run(grid)
    run({key: x[::-1] for key, x in grid.items()})
    assert len(traces) == 1
    for row, numbers in zip(got, (low, high), strict=True):
        # A float32 number is up to 6e-8 from the plain one, and its 60th power 60 times as far.
        np.testing.assert_allclose(row, _mapped(make(**numbers)), rtol=4e-6, atol=1e-8)


@pytest.mark.parametrize("name", ROWS)
def test_whole_numbers_may_be_traced_as_whole_numbers(name: str) -> None:
    make, low, high = ROWS[name]
    for numbers in (low, high):
        arrays = {k: jnp.int32(v) if isinstance(v, int) else jnp.float32(v) for k, v in numbers.items()}
        got = jax.jit(lambda arrays: _mapped(make(**arrays)))(arrays)
        np.testing.assert_allclose(got, _mapped(make(**numbers)), rtol=4e-6, atol=1e-8)


@pytest.mark.parametrize("name", ROWS)
def test_derivatives_are_finite(name: str) -> None:
    """In all the numbers that are not counts, at steps before, at and after every boundary."""
    make, low, high = ROWS[name]
    for numbers in (low, high):
        values = {k: v for k, v in numbers.items() if not isinstance(v, int)}
        counts = {k: v for k, v in numbers.items() if isinstance(v, int)}
        slopes = jax.jit(jax.jacobian(lambda values, counts=counts: _mapped(make(**values, **counts))))(
            values
        )
        for key, slope in slopes.items():
            assert np.isfinite(slope).all(), key
        if (
            "init_value" in slopes
            and counts.get("warmup_steps") != 0
            and name not in ("warmup_exponential", "sgdr")
        ):
            assert float(slopes["init_value"][0]) == pytest.approx(1.0)


@pytest.mark.parametrize("name", ROWS)
def test_steps_of_every_kind(name: str) -> None:
    """In a scan, as plain, numpy and narrow integers, as an array; before the start as at the start."""
    make, _, numbers = ROWS[name]
    schedule = make(**numbers)
    expected = np.asarray(_mapped(schedule))
    carried = jax.lax.scan(lambda n, _: (n + 1, jnp.asarray(schedule(n))), jnp.int32(0), None, 60)[1]
    np.testing.assert_allclose(carried, expected, rtol=1e-6)
    np.testing.assert_allclose(np.broadcast_to(schedule(np.arange(60)), 60), expected, rtol=1e-6)
    for step in (0, 13, 41):
        for kind in (int, float, np.int64, np.int32, np.uint8, np.int8, jnp.int32, jnp.uint8, jnp.int16):
            assert float(schedule(kind(step))) == pytest.approx(float(expected[step]), rel=1e-6), kind
    assert float(schedule(jnp.int32(-5))) == float(schedule(-5)) == float(schedule(0))
    assert np.shape(schedule(3)) == ()


@pytest.mark.parametrize("name", ROWS)
def test_float64(name: str) -> None:
    """Where x64 is on: float64, and what float32 rounds to; exponential_decay is float32, as optax's is."""
    make, _, numbers = ROWS[name]
    narrow = np.asarray(_mapped(make(**numbers)))
    with jax.enable_x64(True):
        wide = jax.jit(lambda steps: jax.vmap(lambda n: jnp.asarray(make(**numbers)(n)))(steps))(
            jnp.arange(60, dtype=jnp.int32)
        )
    assert wide.dtype == (np.float32 if "exponential" in name else np.float64)
    np.testing.assert_allclose(narrow, wide, rtol=4e-6, atol=1e-8)


def test_very_long_schedules() -> None:
    """Whole numbers beyond int32 are counted as floats."""
    far = 10**10
    for schedule in (
        optim.linear_schedule(1.0, 0.0, 2 * far),
        optim.join_schedules([optim.constant_schedule(1.0), optim.constant_schedule(0.5)], [far]),
        optim.piecewise_constant_schedule(1.0, {far: 0.5}),
        optim.piecewise_interpolate_schedule("linear", 1.0, {2 * far: 0.0}),
        optim.step_decay(1.0, 10**5, 0.5, steps_per_epoch=10**5),
        optim.multi_step_decay(1.0, [10**5], 0.5, steps_per_epoch=10**5),
        optim.cosine_decay_schedule(1.0, 2 * far),
        optim.warmup_constant_schedule(0.0, 0.5, far),
        optim.linear_onecycle_schedule(4 * far, 2 / 3, 0.5, 1.0, 2.0),
    ):
        assert float(schedule(far)) == pytest.approx(0.5, rel=1e-6)
        assert np.isfinite(float(jax.jit(schedule)(jnp.int32(2**31 - 1))))


def test_a_schedule_in_an_optimizer() -> None:
    tx = optim.sgd(optim.warmup_cosine_decay_schedule(0.0, 1.0, 2, 4))
    state, seen = tx.init({"w": jnp.ones(())}), []
    for _ in range(6):
        updates, state = jax.jit(tx.update)({"w": -jnp.ones(())}, state)
        seen.append(round(float(updates["w"]), 6))
    assert seen == [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]
