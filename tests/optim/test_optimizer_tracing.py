"""Compiled, scanned and mapped over all hyper-parameters, an optimizer gives the same numbers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnkit import optim
from tests.optim.oracle import parameters, scanned, smooth_gradients, stack, trajectory
from tests.optim.traced import ROWS

PLAIN = {name: row.make(**row.high) for name, row in ROWS.items()}
PARAMS, GRADS = parameters(jnp.float32), smooth_gradients(jnp.float32, 12)


def run(tx: Any) -> Any:
    return scanned(tx, PARAMS, GRADS)


def close(a: Any, b: Any, tolerance: float) -> None:
    """By the largest number of the tree: sums cancel."""
    a, b = ([np.asarray(x) for x in jax.tree.leaves(t)] for t in (a, b))
    scale = max(np.abs(y).max(initial=0) for y in b)
    for x, y in zip(a, b, strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("name", ROWS)
def test_jit_scan_and_eager_agree(name: str) -> None:
    """1e-6: a fused multiply-add rounds once where two kernels round twice."""
    jitted = trajectory(PLAIN[name], optim.apply_updates, PARAMS, GRADS)
    close(jax.jit(lambda: run(PLAIN[name]))(), jitted, 1e-6)
    eager = trajectory(PLAIN[name], optim.apply_updates, PARAMS, GRADS[:2], jit=lambda f: f)
    close(eager, trajectory(PLAIN[name], optim.apply_updates, PARAMS, GRADS[:2]), 1e-6)


@pytest.mark.parametrize("name", ROWS)
def test_a_mapped_grid_equals_the_loop_and_compiles_once(name: str) -> None:
    """All hyper-parameters at once. To the same numbers untraced only 1e-4: 1 - b2 of the float32
    0.999 is 1.3e-5 off 0.001."""
    row = ROWS[name]
    grid = {k: jnp.array([row.low[k], row.high[k], (row.low[k] + row.high[k]) / 2]) for k in row.low}
    members = [{k: v[i] for k, v in grid.items()} for i in range(3)]
    traces = []

    @jax.jit
    def one(numbers: Any) -> Any:
        traces.append(1)
        return run(row.make(**numbers))

    loop = [one(numbers) for numbers in members]
    assert len(traces) == 1
    close(jax.jit(jax.vmap(lambda numbers: run(row.make(**numbers))))(grid), stack(loop), 2e-6)
    close(jax.jit(lambda: run(PLAIN[name]))(), loop[1], 1e-4)
