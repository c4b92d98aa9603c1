"""RAdam's rectification against exact arithmetic, where optax's is not."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nnkit import optim
from nnkit.optim.radam import rectification

STEPS = 300


def exact(b2: float, threshold: float = 5.0) -> tuple[np.ndarray, np.ndarray]:
    """Whether ρ has reached the threshold at the steps 1, 2, ..., and r, from fractions."""
    powers = [Fraction(b2) ** t for t in range(1, STEPS + 1)]
    longest = 2 / (1 - Fraction(b2)) - 1
    known, r = [], []
    for length in (longest - 2 * t * p / (1 - p) for t, p in enumerate(powers, start=1)):
        known.append(length >= threshold)
        square = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
        r.append(float(square) ** 0.5 if known[-1] else 1.0)
    return np.array(known), np.array(r)


def ours(b2: Any, threshold: float = 5.0) -> tuple[np.ndarray, np.ndarray]:
    known, r = jax.jit(jax.vmap(lambda t: rectification(b2, t, threshold)))(jnp.arange(1, STEPS + 1))
    return np.asarray(known), np.asarray(r)


@pytest.mark.parametrize("b2", [0.7, 0.9, 0.99, 0.999, 0.9995, 0.9999])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_rectification_has_the_precision_of_its_dtype(b2: float, dtype: Any) -> None:
    """8 ulp: with b2 = 0.7, ρ - 4 is between 1 and 1.7, and an ulp of ρ five of it."""
    expected_known, expected = exact(b2)
    with jax.enable_x64(dtype == np.float64):
        known, r = ours(b2)
    assert r.dtype == dtype
    np.testing.assert_array_equal(known, expected_known)
    np.testing.assert_allclose(
        r, expected, rtol=8 * np.finfo(dtype).eps if b2 == 0.7 else 4 * np.finfo(dtype).eps
    )


@pytest.mark.parametrize("b2", [0.0, 0.5, 0.6])
def test_without_a_rectification(b2: float) -> None:
    known, r = ours(b2)
    assert not known.any()
    assert (r == 1).all()


def test_a_traced_decay_too() -> None:
    """What 0.999 is in float32, not what it is in float64."""
    b2 = float(np.float32(0.999))
    known, r = jax.jit(lambda b2: rectification(b2, jnp.int32(6), 5.0))(jnp.float32(0.999))
    assert bool(known)
    np.testing.assert_allclose(float(r), exact(b2)[1][5], rtol=4e-7)


@pytest.mark.parametrize(("b2", "t", "wrong"), [(0.999, 6, 5e-3), (0.9995, 5, 1.0), (0.9999, 2, 1.0)])
def test_where_optax_is_off(b2: float, t: int, wrong: float) -> None:
    """By half a percent, or by rectifying what is not to be: its ρ is made of float32 powers."""
    params = {"w": jnp.ones(3)}

    def step(m: Any) -> float:
        tx = m.scale_by_radam(b1=0.0, b2=b2, eps=0.0)
        state = tx.init(params)
        for _ in range(t):
            with jax.numpy_dtype_promotion("standard"):
                updates, state = jax.jit(tx.update)({"w": jnp.full(3, 4.0)}, state)
        return float(updates["w"][0])

    known, r = (x[t - 1] for x in exact(b2))
    expected = r if known else 4.0
    # 1 - b2ᵗ of float32 numbers, in v̂ (and in optax in r too), is up to 1e-4 off.
    assert abs(step(optim) / expected - 1) < 2e-4
    assert abs(step(optax) / expected - 1) > 0.9 * wrong


def test_derivatives_are_finite_at_every_step() -> None:
    def value(b2: Any) -> Any:
        tx = optim.radam(0.1, b2=b2)
        params = {"w": jnp.float32(1.0)}
        state = tx.init(params)
        total = jnp.float32(0)
        for _ in range(8):
            updates, state = tx.update({"w": jnp.float32(3.0)}, state, params)
            total += updates["w"]
        return total

    derivative = jax.jit(jax.grad(value))
    for b2 in (0.3, 0.6, 0.9, 0.999):
        assert np.isfinite(float(derivative(jnp.float32(b2))))
