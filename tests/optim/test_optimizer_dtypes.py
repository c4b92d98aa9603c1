"""bfloat16, float16, complex numbers, accumulators of another dtype, missing gradients."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nnkit import optim
from tests.optim.oracle import beside, check_against_optax, parameters, rough_gradients, ulps
from tests.optim.rows import LOW, ROWS


@pytest.mark.parametrize("name", LOW)
def test_bfloat16_within_2_ulp_a_step(name: str) -> None:
    check_against_optax(ROWS[name](optim), ROWS[name](optax), jnp.bfloat16)


@pytest.mark.parametrize("name", ["adam", "rmsprop_centered", "adagrad"])
def test_float16_where_optax_gives_a_number_and_never_nan(name: str) -> None:
    """In float16 the usual eps of 1e-8 is 0, and optax divides by 0.

    4 ulp: the guard against that keeps XLA from multiplying Adam's two denominators first.
    """
    ours, theirs = ROWS[name](optim), ROWS[name](optax)
    params, grads = parameters(jnp.float16), rough_gradients(jnp.float16, 50)
    updates, their_updates, states, _ = beside(ours, theirs, params, grads)
    unknown = [~np.isfinite(u) for u in jax.tree.leaves(their_updates)]
    assert any(u.any() for u in unknown) == (name != "adagrad")
    assert ulps(updates, their_updates, unknown) <= 4
    for update, square in zip(jax.tree.leaves(updates), jax.tree.leaves(states[0][-1]), strict=True):
        # A square that overflowed is inf, and inf - inf is NaN for anyone.
        assert np.isfinite(update[np.isfinite(square)]).all()


@pytest.mark.parametrize("eps", [0.0, 1e-7, 1e-5])
@pytest.mark.parametrize(
    "make",
    [
        optim.adam,
        lambda rate, eps: optim.rmsprop(rate, eps=eps, bias_correction=True),
        lambda rate, eps: optim.rmsprop(rate, eps=eps, bias_correction=True, eps_in_sqrt=False),
        lambda rate, eps: optim.adagrad(rate, 0.0, eps, eps_in_sqrt=False),
        lambda rate, eps: optim.nadam(rate, eps=eps, momentum_decay=4e-3),
        optim.adamax,
        optim.amsgrad,
        lambda rate, eps: optim.radam(rate, b2=0.9, eps=eps, bias_correction_eps=True),
        lambda rate, eps: optim.adadelta(rate, eps=eps),
        optim.lamb,
    ],
)
def test_float16_without_a_gradient(make: Any, eps: float) -> None:
    """No NaN from what eps becomes: 0.1·1e-7, which XLA multiplies out, is 0, and 1/1e-5 is inf."""
    params = {"a": jnp.zeros(3, jnp.float16), "b": jnp.zeros(5, jnp.float16)}
    tx = make(0.1, eps=eps)
    state = tx.init(params)
    for _ in range(3):
        updates, state = jax.jit(tx.update)(params, state, params)
        assert [leaf.any() for leaf in jax.tree.leaves(updates)] == [False, False]


@pytest.mark.parametrize(
    "name",
    [
        *("adam_arguments", "rmsprop", "adagrad", "sgd_nesterov", "adamw"),
        *("nadam", "adamax", "amsgrad", "radam", "lion", "lamb"),
    ],
)
def test_complex_parameters_as_optax_treats_them(name: str) -> None:
    rng = np.random.default_rng(0)

    def draw() -> Any:
        z = rng.normal(size=(2, 3, 5)) + 1j * rng.normal(size=(2, 3, 5))
        return {"a": jnp.asarray(z[0], jnp.complex64), "b": jnp.asarray(z[1], jnp.complex64)}

    params, grads = draw(), [draw() for _ in range(10)]
    updates, their_updates, states, their_states = beside(ROWS[name](optim), ROWS[name](optax), params, grads)
    for x, y in zip(
        jax.tree.leaves((updates, states)), jax.tree.leaves((their_updates, their_states)), strict=True
    ):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)  # sums of products may cancel


@pytest.mark.parametrize("accumulator", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("make", ["sgd", "adam"])
def test_accumulators_of_another_dtype(make: str, dtype: Any, accumulator: Any) -> None:
    """Kept in the dtype asked for, computed in the wider one, the update in the parameters'.

    optax leaves the update in the wider dtype; rounded to the parameters' it is within 2 of their
    ulp. The second moment of bfloat16 parameters optax computes in bfloat16, nnkit in float32.
    """

    def build(m: Any) -> Any:
        if make == "sgd":
            return m.sgd(0.1, 0.9, True, accumulator_dtype=accumulator)
        return m.adam(1e-2, mu_dtype=accumulator)

    params, grads = parameters(dtype), rough_gradients(dtype, 30)
    updates, their_updates, states, their_states = beside(build(optim), build(optax), params, grads)
    kept = states[0].trace if make == "sgd" else states[0].mu
    assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {jnp.dtype(accumulator)}
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    their_updates = jax.tree.map(lambda u: u.astype(dtype), their_updates)
    assert ulps(updates, their_updates) <= 2
    assert ulps(states, their_states) <= 1


@pytest.mark.parametrize("name", ["adam_arguments", "rmsprop_unbiased", "sgd_nesterov"])
def test_not_jitted_too(name: str) -> None:
    """4 ulp: the denominators are multiplied first, and there is no fused multiply-add."""
    ours, theirs = ROWS[name](optim), ROWS[name](optax)
    params, grads = parameters(jnp.float32), rough_gradients(jnp.float32, 4)
    state = theirs.init(params)
    structure = jax.tree.structure(ours.init(params))
    for grad in grads:
        updates, new = ours.update(grad, jax.tree.unflatten(structure, jax.tree.leaves(state)), params)
        with jax.numpy_dtype_promotion("standard"):
            their_updates, state = theirs.update(grad, state, params)
        assert ulps(updates, their_updates) <= 4
        assert ulps(new, state) == 0


def test_apply_updates() -> None:
    params, updates = parameters(jnp.float32), parameters(jnp.float32, 2)
    assert ulps(optim.apply_updates(params, updates), optax.apply_updates(params, updates)) == 0
    assert optim.apply_updates(None, jnp.ones(3)) is optax.apply_updates(None, jnp.ones(3)) is None
    low = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    with jax.numpy_dtype_promotion("standard"):
        theirs = optax.apply_updates(low, updates)
    assert ulps(optim.apply_updates(low, updates), theirs) == 0
    assert optim.apply_updates({"w": 1.0}, {"w": 0.5}) == {"w": 1.5}


def test_a_parameter_without_a_gradient_stays_and_keeps_its_state() -> None:
    params = {"used": jnp.ones(3), "frozen": {"kernel": jnp.ones(2)}}
    grads = {"used": jnp.ones(3), "frozen": None}
    tx = optim.adamw(0.1)
    state = tx.init(params)
    updates, state = tx.update(grads, state, params)
    new = optim.apply_updates(params, updates)
    assert updates["frozen"] is None
    assert new["frozen"]["kernel"].tolist() == [1, 1]
    assert new["used"].tolist() != [1, 1, 1]
    assert state[0].nu["frozen"]["kernel"].tolist() == [0, 0]
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))
