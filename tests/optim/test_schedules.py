"""Schedules beside optax's, plain and traced."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nnkit import optim
from tests.optim.oracle import optax_jit, ulps

STEPS = jnp.arange(40)
ARGUMENTS = [
    {
        "init_value": 0.3,
        "transition_steps": steps,
        "decay_rate": rate,
        "transition_begin": begin,
        "staircase": stairs,
        "end_value": end,
    }
    for steps, rate, begin, stairs, end in itertools.product(
        (7, 1, 0), (0.9, 1.25, 0.0), (0, 5, 3), (False, True), (None, 0.2, 0.9)
    )
]


def _mapped(schedule: Any) -> Any:
    return jax.vmap(lambda step: jnp.asarray(schedule(step)))


@pytest.mark.parametrize("arguments", ARGUMENTS[::5])
def test_exponential_decay_is_optax(arguments: Any) -> None:
    ours = jax.jit(_mapped(optim.exponential_decay(**arguments)))(STEPS)
    theirs = optax_jit(_mapped(optax.exponential_decay(**arguments)))(STEPS)
    assert ulps(ours, theirs) <= 1
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        wide = jax.jit(_mapped(optim.exponential_decay(**arguments)))(STEPS)
        theirs = jax.jit(_mapped(optax.exponential_decay(**arguments)))(STEPS)
    assert wide.dtype == theirs.dtype
    np.testing.assert_allclose(wide, theirs, rtol=1e-15 if wide.dtype == np.float64 else 1e-7)


@pytest.mark.parametrize("arguments", ARGUMENTS[::3])
def test_exponential_decay_is_its_formula(arguments: Any) -> None:
    """In float64 by numpy; 3e-6 relative is what the float32 power of up to 39 factors of 1.25 loses."""
    a = arguments
    since = np.maximum(np.asarray(STEPS) - max(a["transition_begin"], 0), 0)
    if a["transition_steps"] == 0 or a["decay_rate"] == 0:
        expected = np.full(len(since), a["init_value"])
    else:
        exponent = since / a["transition_steps"]
        exponent = np.floor(exponent) if a["staircase"] else exponent
        expected = a["init_value"] * a["decay_rate"] ** exponent
        if a["end_value"] is not None:
            bound = np.maximum if a["decay_rate"] < 1 else np.minimum
            expected = bound(expected, a["end_value"])
    np.testing.assert_allclose(_mapped(optim.exponential_decay(**a))(STEPS), expected, rtol=3e-6)


@pytest.mark.parametrize("arguments", [a for a in ARGUMENTS if a["end_value"] is not None][::5])
def test_traced_arguments_mean_the_same(arguments: Any) -> None:
    numbers = {k: jnp.float32(v) for k, v in arguments.items() if k != "staircase"}
    stairs = arguments["staircase"]

    @jax.jit
    def traced(numbers: Any) -> Any:
        return _mapped(optim.exponential_decay(**numbers, staircase=stairs))(STEPS)

    expected = _mapped(optim.exponential_decay(**arguments))(STEPS)
    np.testing.assert_allclose(traced(numbers), expected, rtol=1e-6)


@pytest.mark.parametrize("steps", [41, 47, 83, 97])
def test_a_compiled_staircase_falls_at_the_epoch_and_not_a_step_later(steps: int) -> None:
    """Compiled, optax's 47/47 is 47·(1/47), which float32 rounds to 0.99999994, and down to 0."""
    counts = jnp.array([steps - 1, steps, steps + 1])
    ours = jax.jit(_mapped(optim.exponential_decay(1.0, steps, 0.5, staircase=True)))(counts)
    assert ours.tolist() == [1.0, 0.5, 0.5]


def test_staircases_of_every_length() -> None:
    steps = jnp.arange(1, 3000)

    @jax.jit
    @jax.vmap
    def values(steps: Any) -> Any:
        schedule = optim.exponential_decay(1.0, steps, 0.5, staircase=True)
        return jnp.stack([schedule(steps - 1), schedule(steps), schedule(3 * steps - 1), schedule(3 * steps)])

    for column, expected in zip(values(steps).T, (1.0, 0.5, 0.25, 0.125), strict=True):
        np.testing.assert_array_equal(column, expected)
    fractions = optim.exponential_decay(1.0, 2.5, 0.5, staircase=True)
    assert [float(fractions(jnp.int32(step))) for step in range(6)] == [1, 1, 1, 0.5, 0.5, 0.25]


def test_a_grid_of_decays_is_a_vmap() -> None:
    rates = jnp.array([0.5, 0.9, 1.0])
    grid = jax.vmap(lambda rate: optim.exponential_decay(0.1, 10, rate)(jnp.int32(25)))(rates)
    one_by_one = [optim.exponential_decay(0.1, 10, float(rate))(jnp.int32(25)) for rate in rates]
    np.testing.assert_allclose(grid, one_by_one, rtol=1e-6)


def test_derivatives_before_the_decay_begins_are_finite() -> None:
    """0.01^(-1000/10) is inf, and would make the derivative NaN in the branch not taken."""

    def value(rate: Any) -> Any:
        return optim.exponential_decay(0.1, 10, rate, transition_begin=1000)(jnp.int32(0))

    assert float(jax.grad(value)(0.01)) == 0.0


def test_steps_beyond_float32_are_told_apart() -> None:
    begin = 2**25
    schedule = optim.exponential_decay(1.0, 1, 0.5, transition_begin=begin)
    assert [float(schedule(jnp.int32(begin + i))) for i in range(4)] == [1.0, 0.5, 0.25, 0.125]


def test_python_steps_and_fractions_of_a_step() -> None:
    assert float(optim.exponential_decay(1.0, 2, 0.25)(1)) == 0.5
    assert float(optim.exponential_decay(1.0, 0.5, 0.25)(jnp.int32(1))) == 0.0625


def test_constant_schedule() -> None:
    assert optim.constant_schedule(0.1)(7) == optax.constant_schedule(0.1)(7) == 0.1
    rates = jnp.array([0.1, 0.2])
    assert jax.vmap(lambda r: optim.constant_schedule(r)(0))(rates).tolist() == rates.tolist()


def test_the_first_update_has_step_0() -> None:
    seen = []

    def schedule(step: Any) -> Any:
        seen.append(int(step))
        return 1.0

    tx = optim.sgd(schedule)
    state = tx.init({"w": jnp.ones(2)})
    for _ in range(3):
        _, state = tx.update({"w": jnp.ones(2)}, state)
    assert seen == [0, 1, 2]


@pytest.mark.parametrize(
    "mutant",
    [
        lambda step: optim.exponential_decay(0.3, 7, 0.9, 5)(step + 1),
        lambda step: optim.exponential_decay(0.3, 7, 0.9, 0)(step),
        lambda step: optim.exponential_decay(0.3, 7, 0.9, 5, staircase=True)(step),
        lambda step: optim.exponential_decay(0.3, 7, 0.9, 5, end_value=0.2)(step),
        lambda step: 0.3 * 0.9 ** ((step - 5) / 7),
        lambda step: 0.3 * jnp.exp(-jnp.maximum(step - 5, 0) / 7),
    ],
)
def test_wrong_schedules_are_told_apart(mutant: Any) -> None:
    right = optax_jit(_mapped(optax.exponential_decay(0.3, 7, 0.9, 5)))(STEPS)
    with jax.numpy_dtype_promotion("standard"):
        wrong = jax.jit(_mapped(mutant))(STEPS)
    assert ulps(wrong, right) > 1
