"""Masks, edges and invariances of single optimizers."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings

from nnkit import optim, tree
from tests.optim.oracle import parameters, trajectory

PARAMS = parameters(jnp.float32)


def test_weight_decay_alone_and_only_where_the_mask_says() -> None:
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    tx = optim.adamw(0.1, weight_decay=0.5, mask=tree.decayed)
    params, _ = trajectory(tx, optim.apply_updates, PARAMS, [zeros])
    before, after = tree.flatten(PARAMS), tree.flatten(params)
    for path in before:
        factor = 1.0 if path.endswith("bias") else 0.95
        np.testing.assert_allclose(after[path], factor * before[path], rtol=1e-6)
    everything, _ = trajectory(optim.adamw(0.1, weight_decay=0.5), optim.apply_updates, PARAMS, [zeros])
    for path, leaf in tree.flatten(everything).items():
        np.testing.assert_allclose(leaf, 0.95 * before[path], rtol=1e-6)


@pytest.mark.parametrize("mask", ["prefix", "tree", "function"])
def test_forms_of_the_mask(mask: str) -> None:
    params = {"a": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}, "b": jnp.ones(2)}
    form: Any = {
        "prefix": {"a": True, "b": False},
        "tree": {"a": {"kernel": True, "bias": np.bool_(True)}, "b": False},
        "function": lambda p: {"a": True, "b": False},
    }[mask]
    tx = optim.add_decayed_weights(0.5, form)
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["a"]["kernel"].tolist() == updates["a"]["bias"].tolist() == [1.5, 1.5]
    assert updates["b"].tolist() == [1.0, 1.0]


def test_a_steady_gradient_does_not_make_the_centered_variance_negative() -> None:
    """v - m² of a constant gradient is rounding noise; its root is NaN in optax and PyTorch."""
    rng = np.random.default_rng(0)
    params = {"w": jnp.zeros(1000)}
    grads = [{"w": jnp.asarray(rng.normal(size=1000) * 100, jnp.float32)}] * 300
    for inside in (True, False):
        tx = optim.rmsprop(1e-3, 0.9, centered=True, eps_in_sqrt=inside)
        moved, _ = trajectory(tx, optim.apply_updates, params, grads)
        assert np.isfinite(np.asarray(moved["w"])).all()


def test_the_count_stops_at_the_largest_integer() -> None:
    tx = optim.adam(0.1)
    state = tx.init({"w": jnp.ones(2)})
    state = (state[0]._replace(count=jnp.int32(2**31 - 1)), state[1])
    _, state = tx.update({"w": jnp.ones(2)}, state)
    assert int(state[0].count) == 2**31 - 1


def test_numpy_and_python_leaves() -> None:
    params = {"a": 1.0, "b": np.ones(2, np.float32)}
    tx = optim.adam(np.float64(0.1), b1=np.float32(0.5))
    updates, _ = tx.update({"a": 2.0, "b": np.ones(2, np.float32)}, tx.init(params), params)
    new = optim.apply_updates(params, updates)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(new)} == {"float32"}
    np.testing.assert_allclose(new["b"], 0.9, rtol=1e-5)


floats = st.floats(-1e3, 1e3, width=32).filter(lambda x: x == 0 or abs(x) > 1e-3)


@settings(max_examples=25)
@given(st.lists(floats, min_size=3, max_size=3), st.integers(-20, 20))
@example([1.0, -2.0, 0.0], 20)
def test_adam_without_eps_does_not_see_the_gradients_scale(values: list[float], power: int) -> None:
    """Exactly for powers of 2: every rounding is the same. From 2⁻²⁰ on nothing underflows."""
    optimizer = optim.adam(0.1, eps=0.0)
    params = {"w": jnp.zeros(3)}
    grads = [{"w": jnp.asarray(values, jnp.float32) * (i + 1)} for i in range(3)]
    scaled = [{"w": g["w"] * 2.0**power} for g in grads]
    a, _ = trajectory(optimizer, optim.apply_updates, params, grads, jit=lambda f: f)
    b, _ = trajectory(optimizer, optim.apply_updates, params, scaled, jit=lambda f: f)
    np.testing.assert_array_equal(a["w"], b["w"])


@settings(max_examples=25)
@given(st.lists(floats, min_size=4, max_size=4))
def test_the_first_step_of_adam_is_the_sign(values: list[float]) -> None:
    """To 1e-5: 1 - b2 in float32."""
    optimizer = optim.adam(0.1, eps=0.0)
    grads = {"w": jnp.asarray(values, jnp.float32)}
    updates, _ = optimizer.update(grads, optimizer.init(grads))
    np.testing.assert_allclose(updates["w"], -0.1 * np.sign(values), rtol=1e-5)
