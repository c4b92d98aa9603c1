"""Losses of regression against optax, PyTorch and closed forms."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from nnkit import losses

RNG = np.random.default_rng(0)
P, T = RNG.normal(size=(6, 2, 3)) * 2, RNG.normal(size=(6, 2, 3))
P[0, 0, 0] = T[0, 0, 0]  # the kink of the absolute value
P[0, 0, 1] = T[0, 0, 1] + 1.0  # the joint of Huber's two parts
F = torch.nn.functional
half_sum = functools.partial(losses.half_squared_error, reduce="sum")
ALL = [losses.mean_squared_error, losses.half_squared_error, losses.mean_absolute_error, losses.huber]

ROWS = [
    (losses.mean_squared_error, optax.squared_error, F.mse_loss, "mean"),
    (losses.half_squared_error, optax.l2_loss, lambda p, t, **kw: F.mse_loss(p, t, **kw) / 2, "mean"),
    (half_sum, optax.l2_loss, lambda p, t, **kw: F.mse_loss(p, t, **kw) / 2, "sum"),
    (losses.mean_absolute_error, lambda p, t: jnp.abs(p - t), F.l1_loss, "mean"),
    (losses.huber, optax.huber_loss, F.huber_loss, "mean"),
    (
        functools.partial(losses.huber, delta=0.3),
        functools.partial(optax.huber_loss, delta=0.3),
        functools.partial(F.huber_loss, delta=0.3),
        "mean",
    ),
]
IDS = ["mse", "half", "half sum", "mae", "huber", "huber 0.3"]


@pytest.mark.parametrize(("ours", "optaxs", "torchs", "reduce"), ROWS, ids=IDS)
def test_values_and_gradients_are_those_of_the_peers(ours, optaxs, torchs, reduce):
    leaf = torch.tensor(P, requires_grad=True)
    theirs = getattr(torchs(leaf, torch.tensor(T), reduction="none"), reduce)((1, 2))
    theirs.sum().backward()
    with jax.enable_x64(True):
        p, t = jnp.asarray(P), jnp.asarray(T)
        values, slope = ours(p, t), jax.grad(lambda p: ours(p, t).sum())(p)
        np.testing.assert_allclose(values, getattr(optaxs(p, t), reduce)((1, 2)), rtol=1e-14)
        along_targets = jax.grad(lambda t: ours(p, t).sum())(t)
    assert values.shape == (6,)
    np.testing.assert_allclose(values, theirs.detach(), rtol=1e-14)
    np.testing.assert_allclose(slope, leaf.grad, rtol=1e-14, atol=1e-16)
    np.testing.assert_array_equal(along_targets, -slope)


@pytest.mark.parametrize("loss", [*ALL, half_sum])
def test_jit_vmap_half_precision_and_extremes(loss):
    p, t = jnp.asarray(P, jnp.float32), jnp.asarray(T, jnp.float32)
    np.testing.assert_allclose(jax.jit(loss)(p, t), loss(p, t), rtol=1e-6)
    one = jax.vmap(lambda p, t: loss(p[None], t[None])[0])
    np.testing.assert_allclose(one(p, t), loss(p, t), rtol=1e-6)
    half = (p.astype(jnp.bfloat16), t.astype(jnp.bfloat16))
    assert loss(*half).dtype == jnp.float32
    np.testing.assert_array_equal(loss(*half), loss(*(x.astype(jnp.float32) for x in half)))
    far = jax.grad(lambda p: loss(p, jnp.zeros(3)).sum())(jnp.array([1e30, -1e30, 0.0]))
    assert np.isfinite(far).all()
    assert far[2] == 0
    assert np.isnan(loss(jnp.array([math.nan]), jnp.zeros(1))[0])


def test_delta_may_be_traced_and_has_a_slope():
    p = jnp.array([3.0, 0.5])
    f = jax.jit(lambda delta: losses.huber(p, jnp.zeros(2), delta=delta))
    np.testing.assert_array_equal(f(1.0), [2.5, 0.125])
    np.testing.assert_array_equal(f(2.0), [4.0, 0.125])
    assert f._cache_size() == 1
    np.testing.assert_array_equal(jax.jacobian(f)(1.0), [2.0, 0.0])  # |e| - delta, and 0


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize(
    ("p", "t", "text"),
    [
        ((8, 1), (8,), r"of shape \(8, 1\) and .* \(8,\).* write predictions\[:, 0\] or targets\[:, None\]"),
        ((8,), (8, 1), r"of shape \(8,\) and .* \(8, 1\).* write predictions\[:, None\] or targets\[:, 0\]"),
        ((8, 4, 1), (8, 4), r"write predictions\[\.\.\., 0\] or targets\[\.\.\., None\]"),
        ((8, 2), (4, 2), "the batch sizes differ"),
        ((8, 2), (8, 3), "the shapes must be equal: reshape one of them"),
        ((), (), r"without a batch axis: write predictions\[None\]"),
        ((8, 0), (8, 0), "an example with no values"),
    ],
)
def test_shapes_that_do_not_fit(loss, p, t, text):
    with pytest.raises(ValueError, match=f"{loss.__name__} .*{text}"):
        jax.eval_shape(loss, jnp.zeros(p), jnp.zeros(t))


def test_an_empty_batch_has_no_values():
    assert losses.mean_squared_error(jnp.zeros((0, 3)), jnp.zeros((0, 3))).shape == (0,)


def test_other_errors():
    with pytest.raises(TypeError, match=r"targets must be floating, got int32: write targets.astype"):
        losses.mean_squared_error(jnp.zeros(4), jnp.zeros(4, int))
    for delta in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"huber got delta={delta}: it must be positive and finite"):
            losses.huber(jnp.zeros(4), jnp.zeros(4), delta=delta)


def test_the_absolute_value_has_slope_zero_at_zero_and_no_second_derivative():
    f = lambda p: losses.mean_absolute_error(p, jnp.zeros(4)).sum()
    x = jnp.array([0.0, -0.0, 2.0, -2.0])
    np.testing.assert_array_equal(jax.grad(f)(x), [0, 0, 1, -1])
    np.testing.assert_array_equal(jax.hessian(f)(x), np.zeros((4, 4)))


def check_huber(elements) -> None:
    e = jnp.array([-3.0, -0.5, 0.0, 1.0, 3.0])
    values, slopes = jax.vmap(jax.value_and_grad(elements))(e)
    np.testing.assert_allclose(values, [2.5, 0.125, 0, 0.5, 2.5])
    np.testing.assert_allclose(slopes, jnp.clip(e, -1, 1))


def test_the_check_passes_ours():
    check_huber(lambda e: losses.huber(e[None], jnp.zeros(1))[0])


@pytest.mark.parametrize(
    "mutant",
    [
        lambda e: jnp.where(jnp.abs(e) <= 1, 0.5 * e**2, jnp.abs(e)),
        lambda e: jnp.where(jnp.abs(e) <= 1, e**2, 2 * jnp.abs(e) - 1),
        lambda e: 0.5 * jnp.minimum(jnp.abs(e), 1) ** 2 + jnp.maximum(jnp.abs(e) - 1, 0) + 0 * jnp.sqrt(e**2),
        lambda e: 0.5 * e**2,
    ],
    ids=["a jump", "no half", "NaN slope at 0", "only the square"],
)
def test_mutants_are_caught(mutant):
    with pytest.raises(AssertionError):
        check_huber(mutant)
