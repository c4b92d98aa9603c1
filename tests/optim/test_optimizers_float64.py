"""Every optimizer and optax's, each going its own way in float64 for 200 steps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nnkit import optim
from tests.optim.oracle import parameters, rough_gradients, trajectory
from tests.optim.rows import IGNORE, ROWS


@pytest.mark.parametrize("name", sorted(ROWS.keys() - IGNORE.keys()))
def test_float64_after_200_steps(name: str) -> None:
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        params, grads = parameters(jnp.float64), rough_gradients(jnp.float64)
        ours = trajectory(ROWS[name](optim), optim.apply_updates, params, grads)
        theirs = trajectory(ROWS[name](optax), optax.apply_updates, params, grads)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=0)
