"""Averages of updates and of parameters: optax's numbers, closed forms, wrong ones, bad input."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnkit import optim
from tests.optim.oracle import (
    beside,
    check_against_optax,
    fields_of,
    optax_jit,
    parameters,
    rough_gradients,
    scanned,
    smooth_gradients,
    trajectory,
    ulps,
)

ROWS: dict[str, Any] = {
    "ema": lambda m: m.ema(0.9),
    "ema_biased": lambda m: m.ema(0.99, debias=False),
    "ema_accumulator": lambda m: m.ema(0.9, True, jnp.float32),
    "ema_without_memory": lambda m: m.ema(0.0),
}


def raises(kind: type[Exception], text: str) -> Any:
    return pytest.raises(kind, match=f"^{re.escape(text)}$")


@pytest.mark.parametrize("name", ROWS)
def test_float32_within_2_ulp_a_step(name: str) -> None:
    check_against_optax(ROWS[name](optim), ROWS[name](optax), jnp.float32)
    params = parameters(jnp.float32)
    assert fields_of(ROWS[name](optim).init(params)) == fields_of(ROWS[name](optax).init(params))


@pytest.mark.parametrize("name", ["ema", "ema_biased"])
def test_bfloat16_within_2_ulp_a_step(name: str) -> None:
    check_against_optax(ROWS[name](optim), ROWS[name](optax), jnp.bfloat16)


def test_an_accumulator_of_another_dtype() -> None:
    """The update is in its own dtype; optax leaves it in the accumulator's."""
    params, grads = parameters(jnp.bfloat16), rough_gradients(jnp.bfloat16, 30)
    updates, theirs, states, their_states = beside(
        ROWS["ema_accumulator"](optim), ROWS["ema_accumulator"](optax), params, grads
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(states.ema)} == {jnp.dtype(jnp.float32)}
    assert ulps(updates, jax.tree.map(lambda u: u.astype(jnp.bfloat16), theirs)) <= 1
    assert ulps(states, their_states) <= 2


@pytest.mark.parametrize("name", ["ema", "ema_biased"])
def test_float64_trajectories_are_optax(name: str) -> None:
    with jax.enable_x64(True):
        params, grads = parameters(jnp.float64), smooth_gradients(jnp.float64)
        ours = trajectory(ROWS[name](optim), optim.apply_updates, params, grads)
        theirs = trajectory(ROWS[name](optax), optax.apply_updates, params, grads, optax_jit)
        for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12)


def test_a_constant_is_its_own_average() -> None:
    """That is what the correction is for; and its derivative by the decay exists."""
    tx = optim.ema(0.9)
    state = tx.init({"w": jnp.zeros(2)})
    for _ in range(5):
        updates, state = tx.update({"w": jnp.array([1.0, -3.0])}, state)
        np.testing.assert_allclose(updates["w"], [1.0, -3.0], rtol=1e-6)

    def run(decay: Any) -> Any:
        return scanned(optim.ema(decay), parameters(jnp.float32), smooth_gradients(jnp.float32, 5))[0]

    grid = jnp.array([0.5, 0.9])
    mapped = jax.jit(jax.vmap(run))(grid)
    for i in range(2):
        for x, y in zip(jax.tree.leaves(mapped), jax.tree.leaves(jax.jit(run)(grid[i])), strict=True):
            np.testing.assert_allclose(x[i], y, rtol=2e-6, atol=2e-6)


def _count_moved(by: int) -> Any:
    tx = optim.ema(0.9)

    def update(u: Any, s: Any, p: Any = None, **_: Any) -> Any:
        u, s = tx.update(u, s._replace(count=s.count + by), p)
        return u, s._replace(count=s.count - by)

    return optim.GradientTransformation(tx.init, update)


MUTANTS: dict[str, Any] = {
    "the count one ahead": _count_moved(1),
    "the count one behind": _count_moved(-1),
    "biased": optim.ema(0.9, debias=False),
    "a sum": optim.GradientTransformation(
        optim.ema(0.9).init,
        lambda u, s, p=None, **_: optim.ema(0.9).update(jax.tree.map(lambda x: 10 * x, u), s),
    ),
    "the weights exchanged": optim.ema(0.1),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str) -> None:
    with pytest.raises(AssertionError):
        check_against_optax(MUTANTS[name], optax.ema(0.9), jnp.float32, steps=10)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("step_size", [0.0, 0.3, 1.0])
def test_incremental_updates_are_optax(dtype: Any, step_size: float) -> None:
    new, old = parameters(dtype, 1), parameters(dtype, 2)
    ours = jax.jit(optim.incremental_update)(new, old, step_size)
    theirs = optax_jit(optax.incremental_update)(new, old, step_size)
    assert ulps(ours, jax.tree.map(lambda x: x.astype(dtype), theirs)) <= 1


def test_an_average_in_a_wider_dtype_stays_there() -> None:
    new, old = (
        {"w": jnp.array([1.0], jnp.bfloat16), "frozen": None},
        {"w": jnp.zeros(1), "frozen": jnp.ones(2)},
    )
    average = optim.incremental_update(new, old, 2.0**-10)
    assert average["w"].dtype == jnp.float32
    assert average["w"].tolist() == [2.0**-10]
    assert average["frozen"].tolist() == [1, 1]
    assert optim.incremental_update(None, jnp.ones(2), 0.5).tolist() == [1, 1]


numbers = st.floats(-1000, 1000, width=32)


@given(numbers, numbers, st.floats(0, 1, width=32))
def test_a_step_towards_new_values_stays_between(new: float, old: float, step_size: float) -> None:
    x = float(optim.incremental_update(jnp.float32(new), jnp.float32(old), jnp.float32(step_size)))
    slack = 1e-6 * max(abs(new), abs(old)) + 2.0**-126  # XLA makes 0 of what is smaller
    assert min(new, old) - slack <= x <= max(new, old) + slack
    np.testing.assert_allclose(x, step_size * new + (1 - step_size) * old, rtol=1e-6, atol=slack)


def test_periodic_updates_are_optax() -> None:
    """Also of whole numbers, mapped over periods, and with a traced step."""
    new = {**parameters(jnp.float32, 1), "count": jnp.array(3)}
    old = {**parameters(jnp.float32, 2), "count": jnp.array(1)}
    ours, theirs = jax.jit(optim.periodic_update), jax.jit(optax.periodic_update)
    for step in range(7):
        for period in (1, 3):
            assert ulps(ours(new, old, step, period), theirs(new, old, step, period)) == 0
    mapped = jax.vmap(lambda period: optim.periodic_update(new, old, 6, period)["count"])(jnp.arange(1, 6))
    assert mapped.tolist() == [3, 3, 3, 1, 1]


@pytest.mark.parametrize(
    "mutant",
    [
        lambda new, old, step, period: optim.periodic_update(new, old, step + 1, period),
        lambda new, old, step, period: optim.periodic_update(old, new, step, period),
        lambda new, old, step, period: new,
    ],
)
def test_wrong_periods_are_caught(mutant: Any) -> None:
    new, old = {"w": jnp.ones(1)}, {"w": jnp.zeros(1)}
    distance = max(ulps(mutant(new, old, i, 3), optax.periodic_update(new, old, i, 3)) for i in range(4))
    with pytest.raises(AssertionError):
        assert distance == 0


def test_bad_input() -> None:
    for value in (-0.1, 1.0, float("nan")):
        with raises(ValueError, f"decay must be in [0, 1), got {value}: it is the decay of an average"):
            optim.ema(value)
    with raises(TypeError, "accumulator_dtype must be a floating-point dtype, got int32"):
        optim.ema(0.9, accumulator_dtype=jnp.int32)
    tx, params = optim.ema(0.9), {"w": jnp.ones(3)}
    with raises(
        TypeError,
        "ema got the state of another transformation: TraceState in place of EmaState(count, ema); "
        "pass what this optimizer's own init or update returned",
    ):
        tx.update(params, optim.trace(0.9).init(params))
    form = "gradients, optimizer state and parameters must be trees of one form"
    with raises(ValueError, f"ema: updates has shape (1,) at w, ema has shape (3,); {form}"):
        tx.update({"w": jnp.ones(1)}, tx.init(params))
    for value in (-0.1, 1.1, float("nan")):
        with raises(ValueError, f"step_size must be in [0, 1], got {value}: it is the part of the way to go"):
            optim.incremental_update(params, params, value)
    with raises(ValueError, f"incremental_update: new_tensors has w, which old_tensors has not; {form}"):
        optim.incremental_update(params, {}, 0.5)


def test_bad_periods() -> None:
    params = {"w": jnp.ones(3)}
    with raises(ValueError, "update_period must be at least 1, got 0"):
        optim.periodic_update(params, params, 0, 0)
    with raises(TypeError, "update_period must be a whole number, got 2.5"):
        optim.periodic_update(params, params, 0, 2.5)  # pyright: ignore[reportArgumentType]
    with raises(
        ValueError,
        "periodic_update: new_tensors and old_tensors must be trees of one form, got PyTreeDef({'w': *}) "
        "and PyTreeDef({'v': *})",
    ):
        optim.periodic_update(params, {"v": jnp.ones(3)}, 0, 1)
    with raises(ValueError, "periodic_update: new_tensors has float32[3] at w, old_tensors has bfloat16[3]"):
        optim.periodic_update(params, {"w": jnp.ones(3, jnp.bfloat16)}, 0, 1)
