"""Gradient accumulation: the large batch's step, optax's numbers, skipping, wrong ones, bad input."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.transforms
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnkit import optim
from tests.optim.oracle import (
    beside,
    fields_of,
    optax_jit,
    parameters,
    rough_gradients,
    smooth_gradients,
    ulps,
)

NAN = float("nan")


def raises(kind: type[Exception], text: str) -> Any:
    return pytest.raises(kind, match=f"^{re.escape(text)}$")


def _growing(step: Any) -> Any:
    return jnp.where(step < 2, 1, 3)


def _skip(m: Any, name: str, *args: Any) -> Any:
    home = optim if m is optim else optax.transforms
    return functools.partial(getattr(home, name), **({"max_squared_norm": args[0]} if args else {}))


ROWS: dict[str, Any] = {
    "sum": lambda m: m.MultiSteps(m.sgd(0.1, 0.9), 3, use_grad_mean=False),
    "mean": lambda m: m.MultiSteps(m.sgd(0.1, 0.9), 3),
    "one": lambda m: m.MultiSteps(m.ema(0.9), 1),
    "schedule": lambda m: m.MultiSteps(m.sgd(0.1, 0.9), _growing),
    "not_finite": lambda m: m.MultiSteps(m.ema(0.9), 2, should_skip_update_fn=_skip(m, "skip_not_finite")),
    "large": lambda m: m.MultiSteps(m.sgd(0.1), 2, False, _skip(m, "skip_large_updates", 1e8)),
    "bfloat16": lambda m: m.MultiSteps(m.sgd(0.1), 3, accumulator_dtype=jnp.bfloat16),
}


def gradients(dtype: Any, steps: int) -> list[Any]:
    """Positive, so that no mean cancels, some with a NaN or too large."""
    grads = [jax.tree.map(jnp.abs, g) for g in smooth_gradients(dtype, steps)]
    for step, rough in enumerate(rough_gradients(dtype, steps)):
        if step % 5 == 1:
            grads[step] = jax.tree.map(jnp.abs, rough)
    return grads


def check(ours: Any, theirs: Any, dtype: Any = jnp.float32, steps: int = 100, bad: bool = False) -> None:
    params, grads = parameters(dtype), gradients(dtype, steps)
    if bad:
        for step in range(0, steps, 3):
            grads[step]["more"][0] = jnp.asarray([NAN, jnp.inf][step % 2], dtype)
    mine, other = ours.init(params), theirs.init(params)
    assert ulps(mine, other) == 0
    assert fields_of(mine) == fields_of(other)
    updates, expected, states, their_states = beside(
        ours.gradient_transformation(), theirs.gradient_transformation(), params, grads
    )
    assert ulps(updates, expected) <= 2
    # By parts: of counts and flags one is far.
    for part in ("mini_step", "gradient_step"):
        assert ulps(getattr(states, part), getattr(their_states, part)) == 0
    for part in ("inner_opt_state", "acc_grads"):
        assert ulps(getattr(states, part), getattr(their_states, part)) <= 2
    assert ulps(states.skip_state, their_states.skip_state) <= 1
    if states.skip_state:
        flags = states.skip_state["should_skip"]
        assert (flags == their_states.skip_state["should_skip"]).all()
        assert 0 < flags.sum() < steps


@pytest.mark.parametrize("name", ROWS)
def test_float32_within_2_ulp_a_step(name: str) -> None:
    check(ROWS[name](optim), ROWS[name](optax), bad=name == "not_finite")


@pytest.mark.parametrize("name", ["sum", "mean", "not_finite"])
def test_bfloat16_within_2_ulp_a_step(name: str) -> None:
    check(ROWS[name](optim), ROWS[name](optax), jnp.bfloat16, 40, name == "not_finite")


def test_a_mean_that_cancels_is_as_exact_as_optax() -> None:
    """Half an ulp of the larger of what is added, no more; which of the two is nearer, chance decides."""
    rng = np.random.default_rng(0)
    grads = rng.normal(size=(30, 200)).astype(np.float32)
    for m, jit in ((optim, jax.jit), (optax, optax_jit)):
        tx = m.MultiSteps(m.scale(1.0), 2)
        state, update, worst = tx.init(jnp.zeros(200)), jit(tx.update), 0.0
        for step, grad in enumerate(grads):
            updates, state = update(jnp.asarray(grad), state)
            if step % 2:
                pair = grads[step - 1 : step + 1].astype(np.float64)
                worst = max(worst, (np.abs(updates - pair.mean(0)) / np.abs(pair).max(0)).max())
        assert worst <= 1.01 * 2.0**-24 + 2.0**-25


def _loss(params: Any, batch: Any) -> Any:
    x, y = batch
    h = jnp.tanh(x @ params["dense_0"]["kernel"] + params["dense_0"]["bias"])
    return jnp.mean((h @ params["head"] - y) ** 2)


def _batches(dtype: Any, n: int, size: int) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    return (
        {"dense_0": {"kernel": draw(4, 5), "bias": draw(5)}, "head": draw(5)},
        draw(n, size, 4),
        draw(n, size),
    )


K, STEPS = 4, 3


@functools.cache
def _compiled() -> Any:
    """The gradient, and the run on the large batches."""
    params, x, y = _batches(jnp.float64, STEPS * K, 8)
    grad, large = jax.jit(jax.grad(_loss)), optim.adamw(0.1)
    update, state = jax.jit(large.update), large.init(params)
    for step in range(STEPS):
        rows = slice(step * K, (step + 1) * K)
        grads = grad(params, (x[rows].reshape(-1, 4), y[rows].reshape(-1)))
        updates, state = update(grads, state, params)
        params = optim.apply_updates(params, updates)
    return grad, (params, state)


def check_large_batch(make: Any) -> None:
    """In float64: steps of 4 small batches and of the 4 together, to 1e-12."""
    with jax.enable_x64(True):
        params, x, y = _batches(jnp.float64, STEPS * K, 8)
        grad, expected = _compiled()
        tx = make(optim.adamw(0.1))
        update, state = jax.jit(tx.update), tx.init(params)
        for step in range(STEPS * K):
            updates, state = update(grad(params, (x[step], y[step])), state, params)
            moved = any(u.any() for u in jax.tree.leaves(updates))
            assert moved == bool(tx.has_updated(state)) == (step % K == K - 1)
            params = optim.apply_updates(params, updates)
        got = params, state.inner_opt_state
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            assert a.dtype in (jnp.float64, jnp.int32)
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


def test_the_step_of_the_large_batch() -> None:
    check_large_batch(lambda tx: optim.MultiSteps(tx, 4))


class _Wrong(optim.MultiSteps):
    """MultiSteps with the state or the gradient changed on its way."""

    def __init__(self, tx: Any, k: int, before: Any = None, after: Any = None, **arguments: Any):
        super().__init__(tx, k, **arguments)
        self.before, self.after = before or (lambda u, s: (u, s)), after or (lambda u, s: (u, s))

    def update(self, updates: Any, state: Any, params: Any = None, **_: Any) -> Any:
        return self.after(*super().update(*self.before(updates, state), params))


def _sums(change: Any) -> Any:
    return lambda u, s: (u, s._replace(acc_grads=jax.tree.map(change, s.acc_grads)))


MUTANTS: dict[str, Any] = {
    "a sum for the mean": lambda tx: optim.MultiSteps(tx, K, use_grad_mean=False),
    "one more": lambda tx: optim.MultiSteps(tx, K + 1),
    "one less": lambda tx: optim.MultiSteps(tx, K - 1),
    "only the last": lambda tx: _Wrong(tx, K, before=_sums(jnp.zeros_like)),
    "the sum is not cleared": lambda tx: _Wrong(tx, K, after=_sums(lambda a: a + 1e-3)),
    "float32 sums": lambda tx: _Wrong(tx, K, after=_sums(lambda a: a.astype(jnp.float32).astype(a.dtype))),
    "the plain optimizer": lambda tx: _Wrong(tx, 1),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str) -> None:
    with pytest.raises(AssertionError):
        check_large_batch(MUTANTS[name])


@pytest.mark.parametrize("by", [1, -1])
def test_a_schedule_a_step_off_is_caught(by: int) -> None:
    mutant = optim.MultiSteps(optim.sgd(0.1, 0.9), lambda step: _growing(step + by))
    with pytest.raises(AssertionError):
        check(mutant, ROWS["schedule"](optax), steps=12)


@settings(max_examples=15)
@given(st.lists(st.sampled_from([1.0, 2.0, -4.0, NAN]), min_size=1, max_size=14), st.integers(1, 4))
def test_a_loop_says_the_same(grads: list[float], k: int) -> None:
    """Counts, and when and with what the optimizer steps, skipping what is not finite."""
    tx = optim.MultiSteps(optim.scale(-1.0), k, False, optim.skip_not_finite)
    state, update = tx.init(jnp.zeros(())), UPDATES.setdefault(k, jax.jit(tx.update))
    held: list[float] = []
    steps = 0
    for grad in grads:
        updates, state = update(jnp.float32(grad), state)
        held += [] if np.isnan(grad) else [grad]
        expected = 0.0
        if len(held) == k and not np.isnan(grad):
            expected, held, steps = -sum(held), [], steps + 1
        assert float(updates) == expected
        assert (int(state.mini_step), int(state.gradient_step)) == (len(held), steps)
        assert float(state.acc_grads) == sum(held)
        assert bool(state.skip_state["should_skip"]) == np.isnan(grad)


UPDATES: dict[int, Any] = {}


def test_bad_gradients_end_with_their_step() -> None:
    """Without skipping. In optax one inf makes NaN of the calls in between and of all that follow."""
    grads = [jnp.array([v]) for v in (jnp.inf, 1.0, 1.0, 1.0)]
    ours, theirs = optim.MultiSteps(optim.scale(1.0), 2), optax.MultiSteps(optax.scale(1.0), 2)
    state, their_state = ours.init(grads[0]), theirs.init(grads[0])
    got, expected = [], []
    for grad in grads:
        updates, state = ours.update(grad, state)
        got.append(float(updates[0]))
        with jax.numpy_dtype_promotion("standard"):
            updates, their_state = theirs.update(grad, their_state)
        expected.append(float(updates[0]))
    assert got[0] == 0
    assert not np.isfinite(got[1])
    assert got[2:] == [0, 1]
    assert np.isnan(expected[0])
    assert np.isnan(expected[3])


def test_the_optimizer_runs_only_when_it_steps() -> None:
    """What it would make of half-gathered gradients is not computed."""
    calls: list[Any] = []

    def update(u: Any, s: Any, p: Any = None, *, value: Any) -> Any:
        jax.debug.callback(lambda v: calls.append(float(v)), value)
        return u, s

    tx = optim.MultiSteps(optim.GradientTransformation(lambda p: (), update), 3)  # pyright: ignore
    state, step = tx.init(jnp.zeros(1)), jax.jit(lambda u, s, v: tx.update(u, s, value=v, other=1))
    for i in range(6):
        _, state = step(jnp.ones(1), state, float(i))
    jax.effects_barrier()
    assert calls == [2.0, 5.0]


def test_complex_numbers_and_wide_ones_keep_what_they_have() -> None:
    """optax gathers in float32: without the imaginary part, and without the digits of float64."""
    z = jnp.array([1.0 + 2.0j])
    tx = optim.MultiSteps(optim.scale(1.0), 2)
    _, state = tx.update(z, tx.init(z))
    assert (state.acc_grads.dtype, tx.update(3 * z, state)[0].tolist()) == (jnp.complex64, [2 + 4j])
    with jax.enable_x64(True):
        x = jnp.array([1.0 + 1e-12])
        _, state = tx.update(x, tx.init(x))
        assert tx.update(x, state)[0].tolist() == [1 + 1e-12]
    half = jnp.ones(1, jnp.bfloat16)
    assert tx.init(half).acc_grads.dtype == jnp.float32
    low = optim.MultiSteps(optim.scale(1.0), 2, accumulator_dtype=jnp.bfloat16)
    assert low.init(jnp.ones(1)).acc_grads.dtype == jnp.bfloat16


def test_traced_numbers_and_periods_map() -> None:
    grads = smooth_gradients(jnp.float32, 6)
    stacked = jax.tree.map(lambda *g: jnp.stack(g), *grads)

    def run(k: Any, rate: Any) -> Any:
        tx = optim.MultiSteps(optim.sgd(rate, 0.9), k)

        def step(state: Any, g: Any) -> Any:
            return tx.update(g, state)[::-1]

        return jax.lax.scan(step, tx.init(grads[0]), stacked)

    ks, rates = jnp.array([1, 2, 3]), jnp.array([0.1, 0.2, 0.3])
    states, updates = jax.jit(jax.vmap(run))(ks, rates)
    assert states.gradient_step.tolist() == [6, 3, 2]
    _, one = jax.jit(lambda: run(2, 0.2))()
    for x, y in zip(jax.tree.leaves(updates), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(x[1], y, rtol=2e-6, atol=1e-7)


def test_parameters_without_a_gradient_and_many_small_ones() -> None:
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    tx = optim.MultiSteps(optim.adam(0.1), 2)
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update({"a": jnp.ones(2), "b": None}, state, params)
    assert updates["b"] is None
    assert updates["a"].all()
    many = {f"p{i}": jnp.full((2,), 1.0 + i) for i in range(100)}
    state = tx.init(many)
    for _ in range(2):
        updates, state = jax.jit(tx.update)(many, state, many)
    np.testing.assert_allclose(updates["p7"], -0.1, rtol=1e-5)


def test_buffers_are_donated() -> None:
    tx, params = optim.MultiSteps(optim.adam(0.1), 2), {"w": jnp.ones(100)}
    step = jax.jit(lambda g, s: tx.update(g, s), donate_argnums=(0, 1))
    old = tx.init(params)
    step(jax.tree.map(jnp.copy, params), old)
    assert old.acc_grads["w"].is_deleted()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64])
def test_large_updates_by_their_norm(dtype: Any) -> None:
    """In half precision and for complex numbers too, where optax overflows and squares."""
    grads = {"a": jnp.array([300.0, 400.0], dtype), "b": jnp.zeros((), dtype)}
    if dtype == jnp.complex64:
        grads = {"a": jnp.array([300.0 + 400.0j])}
    for bound, expected in ((249999.0, True), (250000.0, True), (250001.0, False), (jnp.inf, False)):
        skip, told = optim.skip_large_updates(grads, jnp.array(0), None, bound)
        assert bool(skip) == bool(told["should_skip"]) == expected
        assert float(told["norm_squared"]) == 250000
    skip, told = optim.skip_large_updates({"a": jnp.array([NAN])}, jnp.array(0), None, 1.0)
    assert bool(skip)
    assert not bool(optim.skip_large_updates({}, jnp.array(0), None, 1.0)[0])
    assert not bool(optim.skip_not_finite({}, jnp.array(0), None)[0])


def test_bad_input() -> None:
    with raises(
        TypeError,
        "MultiSteps: opt must have init and update, got int: pass a transformation, sgd(0.1) for instance",
    ):
        optim.MultiSteps(2, optim.sgd(0.1))  # pyright: ignore[reportArgumentType]
    for k in (0, -1):
        with raises(ValueError, f"every_k_schedule must be at least 1, got {k}"):
            optim.MultiSteps(optim.sgd(0.1), k)
    for k in (2.0, True, None):
        with raises(TypeError, f"every_k_schedule must be a whole number, got {k!r}"):
            optim.MultiSteps(optim.sgd(0.1), k)  # pyright: ignore[reportArgumentType]
    with raises(TypeError, "accumulator_dtype must be a floating-point dtype, got int32"):
        optim.MultiSteps(optim.sgd(0.1), 2, accumulator_dtype=jnp.int32)
    tx, params = optim.MultiSteps(optim.sgd(0.1), 2), {"w": jnp.ones(2)}
    with pytest.raises(
        TypeError, match="MultiSteps got the state of another transformation: tuple in place of"
    ):
        tx.update(params, optim.sgd(0.1).init(params))
    form = "gradients, optimizer state and parameters must be trees of one form"
    with raises(ValueError, f"MultiSteps: updates has shape (1,) at w, acc_grads has shape (2,); {form}"):
        tx.update({"w": jnp.ones(1)}, tx.init(params))
    with pytest.raises(TypeError, match="MultiSteps: params has dtype int32 at w: only floating-point"):
        tx.init({"w": jnp.ones(2, jnp.int32)})
    with raises(ValueError, "max_squared_norm must be in [0, inf], got -1.0"):
        optim.skip_large_updates(params, jnp.array(0), None, -1.0)
    for skip, got in ((jnp.array(1), "int32 of shape ()"), (jnp.array([True]), "bool of shape (1,)")):
        tx = optim.MultiSteps(optim.sgd(0.1), 2, should_skip_update_fn=lambda u, s, p, skip=skip: (skip, ()))
        with raises(TypeError, f"should_skip_update_fn must return a bool scalar first, got {got}"):
            tx.update(params, tx.init(params))
