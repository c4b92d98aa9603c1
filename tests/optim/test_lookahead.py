"""Lookahead: optax's numbers, the paper's two loops, wrong ones, bad input."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nnkit import optim
from tests.optim.oracle import fields_of, optax_jit, parameters, smooth_gradients, ulps

INNER: dict[str, Any] = {
    "sgd": lambda m: m.sgd(0.1, 0.9),
    "adam": lambda m: m.adam(0.1),
    "adamw": lambda m: m.adamw(0.1, weight_decay=0.1),
}


def raises(kind: type[Exception], text: str) -> Any:
    return pytest.raises(kind, match=f"^{re.escape(text)}$")


def check(ours: Any, theirs: Any, dtype: Any = jnp.float32, steps: int = 60, max_ulps: int = 2) -> None:
    """Each step from optax's state and parameters."""
    params = optax.LookaheadParams.init_synced(parameters(dtype))
    state = theirs.init(params)
    mine = ours.init(optim.LookaheadParams(*params))
    assert fields_of(mine) == fields_of(state)
    structure, update, their_update = jax.tree.structure(mine), jax.jit(ours.update), optax_jit(theirs.update)
    for grad in smooth_gradients(dtype, steps):
        mine = jax.tree.unflatten(structure, jax.tree.leaves(state))
        updates, new = update(grad, mine, optim.LookaheadParams(*params))
        expected, state = their_update(grad, state, params)
        assert isinstance(updates, optim.LookaheadParams)
        for part in ("fast", "slow"):
            for u, e, p in zip(
                *(jax.tree.leaves(getattr(t, part)) for t in (updates, expected, params)), strict=True
            ):
                assert u.dtype == e.dtype
                # Differences of parameters cancel: an ulp is one of theirs.
                gap = np.maximum(np.abs(np.asarray(e, np.float64)), np.abs(np.asarray(p, np.float64)))
                eps = float(jnp.finfo(dtype).eps)
                assert (
                    np.abs(np.asarray(u, np.float64) - np.asarray(e, np.float64)) <= max_ulps * eps * gap
                ).all()
        assert int(new.steps_since_sync) == int(state.steps_since_sync)
        assert ulps(new.fast_state, state.fast_state) <= 2
        params = optax.apply_updates(params, expected)


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("reset", [False, True])
def test_float32_within_2_ulp_a_step(inner: str, reset: bool) -> None:
    make = INNER[inner]
    check(optim.lookahead(make(optim), 5, 0.3, reset), optax.lookahead(make(optax), 5, 0.3, reset))


@pytest.mark.parametrize("period", [1, 2])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_arguments_are_optax(period: int, alpha: float) -> None:
    check(
        optim.lookahead(optim.sgd(0.1), period, alpha),
        optax.lookahead(optax.sgd(0.1), period, alpha),
        steps=6,
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
def test_other_dtypes(dtype: Any) -> None:
    with jax.enable_x64(dtype == jnp.float64):
        check(
            optim.lookahead(optim.sgd(0.1, 0.9), 3, 0.5),
            optax.lookahead(optax.sgd(0.1, 0.9), 3, 0.5),
            dtype,
            12,
        )


def _two_loops(grad: Any, start: np.ndarray, rounds: int, k: int, alpha: float, rate: float) -> Any:
    """Zhang et al.'s algorithm 1 in float64."""
    slow = start
    for _ in range(rounds):
        fast = slow
        for _ in range(k):
            fast = fast - rate * grad(fast)
        slow = slow + alpha * (fast - slow)
    return slow


def run(tx: Any, rounds: int, k: int) -> Any:
    """On f(w) = w·A·w/2, gradients at the fast parameters."""
    params = optim.LookaheadParams.init_synced(jnp.asarray(START, jnp.float32))
    state = tx.init(params)
    step = jax.jit(tx.update)
    for _ in range(rounds * k):
        updates, state = step(jnp.asarray(A, jnp.float32) @ params.fast, state, params)
        params = optim.apply_updates(params, updates)
    return params


A, START = np.array([[2.0, 0.3], [0.3, 0.5]]), np.array([1.0, -2.0])


def check_two_loops(tx: Any) -> None:
    expected = _two_loops(lambda w: A @ w, START, 4, 3, 0.4, 0.2)
    params = run(tx, 4, 3)
    np.testing.assert_allclose(params.slow, expected, rtol=1e-5)
    np.testing.assert_allclose(params.fast, params.slow, rtol=1e-6)


def test_the_papers_two_loops() -> None:
    check_two_loops(optim.lookahead(optim.sgd(0.2), 3, 0.4))


def _moved(tx: Any, by: int) -> Any:
    """``tx`` whose slow step comes some steps later or earlier."""

    def update(u: Any, s: Any, p: Any = None, **_: Any) -> Any:
        u, new = tx.update(u, s._replace(steps_since_sync=(s.steps_since_sync - by) % 3), p)
        return u, new._replace(steps_since_sync=(new.steps_since_sync + by) % 3)

    return optim.GradientTransformation(tx.init, update)


def _changed(change: Any) -> Any:
    tx = optim.lookahead(optim.sgd(0.2), 3, 0.4)

    def update(u: Any, s: Any, p: Any = None, **_: Any) -> Any:
        return change(u, p, *tx.update(u, s, p))

    return optim.GradientTransformation(tx.init, update)


MUTANTS: dict[str, Any] = {
    "the slow step one late": _moved(optim.lookahead(optim.sgd(0.2), 3, 0.4), 1),
    "the slow step one early": _moved(optim.lookahead(optim.sgd(0.2), 3, 0.4), -1),
    "the parts of the way exchanged": optim.lookahead(optim.sgd(0.2), 3, 0.6),
    "another period": optim.lookahead(optim.sgd(0.2), 4, 0.4),
    "the fast ones stay where they are": _changed(
        lambda g, p, u, s: (u._replace(fast=jax.tree.map(lambda x: -0.2 * x, g)), s)
    ),
    "the last fast step forgotten": _changed(
        lambda g, p, u, s: (
            u._replace(slow=jnp.where(s.steps_since_sync == 0, 0.4 * (p.fast - p.slow), 0)),
            s,
        )
    ),
    "the slow ones always follow": _changed(
        lambda g, p, u, s: (u._replace(slow=0.4 * (p.fast + u.fast - p.slow)), s)
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str) -> None:
    with pytest.raises(AssertionError):
        check_two_loops(MUTANTS[name])


@pytest.mark.parametrize("mutant", [False, True])
def test_a_reset_is_seen(mutant: bool) -> None:
    """With momentum a fresh start differs, and only at a synchronisation."""
    tx = optim.lookahead(optim.sgd(0.1, 0.9), 2, 0.5, reset_state=not mutant)
    params = optim.LookaheadParams.init_synced({"w": jnp.ones(2)})
    state, grads = tx.init(params), {"w": jnp.array([1.0, float("inf")])}
    _, state = tx.update(grads, state, params)
    assert state.fast_state[0].trace["w"].tolist() == [1.0, float("inf")]
    _, state = tx.update(grads, state, params)
    fresh = state.fast_state[0].trace["w"].tolist() == [0.0, 0.0]  # optax: 0·inf, NaN
    assert fresh != mutant


def test_an_inf_between_synchronisations_is_the_fast_ones_alone() -> None:
    params = optim.LookaheadParams.init_synced(jnp.zeros(1))
    tx, theirs = optim.lookahead(optim.sgd(1.0), 3, 0.5), optax.lookahead(optax.sgd(1.0), 3, 0.5)
    updates, _ = tx.update(jnp.array([jnp.inf]), tx.init(params), params)
    assert (updates.fast.tolist(), updates.slow.tolist()) == ([-float("inf")], [0.0])
    synced = optax.LookaheadParams.init_synced(jnp.zeros(1))
    expected, _ = optax_jit(theirs.update)(jnp.array([jnp.inf]), theirs.init(synced), synced)
    assert jnp.isnan(expected.slow).all()


def test_parameters_without_a_gradient_stay() -> None:
    params = optim.LookaheadParams.init_synced({"a": jnp.ones(1), "b": jnp.ones(1)})
    tx = optim.lookahead(optim.sgd(1.0), 1, 0.5)
    updates, _ = tx.update({"a": jnp.ones(1), "b": None}, tx.init(params), params)
    new = optim.apply_updates(params, updates)
    assert new.slow["a"].tolist() == new.fast["a"].tolist() == [0.5]
    assert new.slow["b"].tolist() == new.fast["b"].tolist() == [1.0]


def test_further_arguments_and_fast_parameters_alone() -> None:
    seen: list[Any] = []

    def update(u: Any, s: Any, p: Any = None, **extra: Any) -> Any:
        seen.append((p, extra))
        return u, s

    tx = optim.lookahead(optim.GradientTransformation(lambda p: p, update), 2, 0.5)
    params = optim.LookaheadParams(fast=jnp.ones(1), slow=jnp.zeros(1))
    assert ulps(tx.init(params), tx.init(jnp.ones(1))) == 0
    tx.update(jnp.ones(1), tx.init(params), params, value=3.0)
    assert seen[0][0] is params.fast
    assert seen[0][1] == {"value": 3.0}


def test_a_grid_of_periods_and_steps_maps() -> None:
    periods, alphas = jnp.array([1, 3, 4]), jnp.array([0.3, 0.4, 1.0])
    run_one = lambda k, a: run(optim.lookahead(optim.sgd(0.2), k, a), 2, 3)
    mapped = jax.vmap(run_one)(periods, alphas)
    for i in range(3):
        one = run_one(int(periods[i]), float(alphas[i]))
        np.testing.assert_allclose(mapped.slow[i], one.slow, rtol=1e-5)
        np.testing.assert_allclose(mapped.fast[i], one.fast, rtol=1e-5)


def test_buffers_are_donated() -> None:
    params = optim.LookaheadParams(fast={"w": jnp.ones(100)}, slow={"w": jnp.ones(100)})
    tx = optim.lookahead(optim.adam(0.1), 2, 0.5)

    def step(g: Any, s: Any, p: Any) -> Any:
        u, s = tx.update(g, s, p)
        return s, optim.apply_updates(p, u)

    jax.jit(step, donate_argnums=(1, 2))({"w": jnp.ones(100)}, tx.init(params), params)
    assert params.fast["w"].is_deleted()


def test_bad_input() -> None:
    with raises(
        TypeError,
        "lookahead: fast_optimizer must have init and update, got float: pass a transformation, sgd(0.1) for instance",
    ):
        optim.lookahead(0.1, 5, 0.5)  # pyright: ignore[reportArgumentType]
    with raises(ValueError, "sync_period must be at least 1, got 0"):
        optim.lookahead(optim.sgd(0.1), 0, 0.5)
    with raises(TypeError, "sync_period must be a whole number, got 2.5"):
        optim.lookahead(optim.sgd(0.1), 2.5, 0.5)
    for value in (-0.1, 1.5, float("nan")):
        with raises(
            ValueError, f"slow_step_size must be in [0, 1], got {value}: it is the part of the way to go"
        ):
            optim.lookahead(optim.sgd(0.1), 5, value)
    tx, params = optim.lookahead(optim.sgd(0.1), 5, 0.5), {"w": jnp.ones(2)}
    advice = "call update(grads, opt_state, params) with params = LookaheadParams.init_synced(...)"
    with raises(ValueError, f"lookahead needs the parameters: {advice}"):
        tx.update(params, tx.init(params))
    with raises(TypeError, f"lookahead needs fast and slow parameters, got dict: {advice}"):
        tx.update(params, tx.init(params), params)
    pair = optim.LookaheadParams.init_synced(params)
    with pytest.raises(
        TypeError, match="lookahead got the state of another transformation: tuple in place of"
    ):
        tx.update(params, optim.sgd(0.1).init(params), pair)
    form = "gradients, optimizer state and parameters must be trees of one form"
    with raises(ValueError, f"lookahead: params.slow has v, which updates has not; {form}"):
        tx.update(params, tx.init(pair), pair._replace(slow={"w": jnp.ones(2), "v": jnp.ones(2)}))
