"""Derivatives through whole runs: an optimizer is a function of its hyper-parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnkit import optim
from tests.optim.oracle import parameters, scanned, smooth_gradients
from tests.optim.traced import ROWS

PARAMS, GRADS = parameters(jnp.float32), smooth_gradients(jnp.float32, 12)


@pytest.mark.parametrize("name", sorted(ROWS.keys() - {"sgd", "rmsprop_centered"}))
def test_derivatives_with_respect_to_every_hyper_parameter(name: str) -> None:
    """Through 12 steps in float64, against central differences."""
    row = ROWS[name]
    with jax.enable_x64(True):
        params, *grads = jax.tree.map(lambda x: x.astype(jnp.float64), [PARAMS, *GRADS])

        def value(numbers: Any) -> Any:
            after, _ = scanned(row.make(**numbers), params, grads)
            return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(after))

        value = jax.jit(value)
        numbers = {k: jnp.float64(v) for k, v in row.high.items()}
        derivatives = jax.jit(jax.grad(value))(numbers)
        for k, v in numbers.items():
            h = 1e-6 * v
            up, down = value({**numbers, k: v + h}), value({**numbers, k: v - h})
            np.testing.assert_allclose(derivatives[k], (up - down) / (2 * h), rtol=2e-5, atol=1e-6, err_msg=k)


def test_derivatives_in_float32_pass_through_the_division_by_two_products() -> None:
    """The factors of 1/(1 - b2ᵗ) have the derivative of 1/(1 - b2ᵗ)."""

    def value(b2: Any, eps_root: float, grad: float) -> Any:
        params = {"w": jnp.float32(1.0)}
        tx = optim.scale_by_adam(b2=b2, eps=0.0, eps_root=eps_root)
        updates, _ = tx.update({"w": jnp.float32(grad)}, tx.init(params))
        return updates["w"]

    # u = g / √((1 - b2)·g² / (1 - b2)) does not depend on b2 at the first step.
    assert abs(float(jax.grad(value)(0.9, 0.0, 3.0))) < 1e-5
    # With a bound below that does not vanish, no gradient is no NaN.
    assert np.isfinite(float(jax.grad(value)(0.9, 1e-8, 0.0)))
