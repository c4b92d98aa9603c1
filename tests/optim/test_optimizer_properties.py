"""What every optimizer promises of buffers, structures and dtypes, and of no gradient."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnkit import optim
from tests.optim.oracle import parameters, smooth_gradients, trajectory
from tests.optim.traced import ROWS

PLAIN = {name: row.make(**row.high) for name, row in ROWS.items()}
PARAMS, GRADS = parameters(jnp.float32), smooth_gradients(jnp.float32, 12)


def close(a: Any, b: Any, tolerance: float) -> None:
    """By the largest number of the tree: sums cancel."""
    a, b = ([np.asarray(x) for x in jax.tree.leaves(t)] for t in (a, b))
    scale = max(np.abs(y).max(initial=0) for y in b)
    for x, y in zip(a, b, strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("name", ROWS)
def test_donated_buffers(name: str) -> None:
    """A buffer that cannot be donated warns, and warnings are errors here."""
    tx = PLAIN[name]

    def step(params: Any, state: Any, grad: Any) -> Any:
        updates, state = tx.update(grad, state, params)
        return optim.apply_updates(params, updates), state

    donating = jax.jit(step, donate_argnums=(0, 1))
    params = jax.tree.map(jnp.copy, PARAMS)
    state = tx.init(params)
    for grad in GRADS:
        old = params
        params, state = donating(params, state, grad)
        assert old["dense_0"]["kernel"].is_deleted()
    close((params, state), trajectory(tx, optim.apply_updates, PARAMS, GRADS), 0)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_structures_dtypes_and_traced_float32_numbers(name: str, dtype: Any) -> None:
    """The update is of the parameters' form and dtypes, the state of its own, with traced numbers too."""
    row, params = ROWS[name], parameters(dtype)

    def step(params: Any, numbers: Any) -> Any:
        tx = row.make(**numbers)
        state = tx.init(params)
        return state, *tx.update(params, state, params)

    numbers = {k: jnp.float32(v) for k, v in row.high.items()}
    for before, updates, after in (
        jax.eval_shape(step, params, numbers),
        jax.eval_shape(lambda p: step(p, row.high), params),
    ):
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        assert jax.tree.structure(after) == jax.tree.structure(before)
        for a, b in zip(jax.tree.leaves((updates, after)), jax.tree.leaves((params, before)), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert not any(leaf.weak_type for leaf in jax.tree.leaves(after))


@pytest.mark.parametrize("name", ROWS)
def test_float64_under_x64(name: str) -> None:
    with jax.enable_x64(True):
        params = parameters(jnp.float64)
        tx = PLAIN[name]
        updates, state = tx.update(params, tx.init(params), params)
        for leaf in jax.tree.leaves((updates, state)):
            assert leaf.dtype in (jnp.float64, jnp.int32)


@pytest.mark.parametrize("name", sorted(ROWS.keys() - {"adamw"}))
def test_no_gradient_no_step(name: str) -> None:
    """Also where eps is 0, where optax gives NaN."""
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    for numbers in (ROWS[name].low, ROWS[name].high):
        tx = ROWS[name].make(**numbers)
        params, _ = trajectory(tx, optim.apply_updates, PARAMS, [zeros] * 3)
        close(params, PARAMS, 0)
