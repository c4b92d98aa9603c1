"""Kullback-Leibler divergence and cosine against optax, PyTorch, SciPy's formula and closed forms."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from nnkit import losses

RNG = np.random.default_rng(0)
LOG_Q = np.log(RNG.dirichlet(np.ones(4), (3, 2)))
P = RNG.dirichlet(np.ones(4), (3, 2))
X, Y = RNG.normal(size=(3, 2, 4)), RNG.normal(size=(3, 2, 4))
INF = float("inf")


def test_kl_is_optaxs_and_pytorchs():
    leaf = torch.tensor(LOG_Q, requires_grad=True)
    theirs = torch.nn.functional.kl_div(leaf, torch.tensor(P), reduction="none").sum(-1)
    theirs.sum().backward()
    with jax.enable_x64(True):
        values = losses.kl_divergence(LOG_Q, P)
        slope = jax.grad(lambda q: losses.kl_divergence(q, P).sum())(jnp.asarray(LOG_Q))
        along = jax.grad(lambda p: losses.kl_divergence(LOG_Q, p).sum())(jnp.asarray(P))
        np.testing.assert_allclose(
            values, optax.kl_divergence(jnp.asarray(LOG_Q), jnp.asarray(P)), rtol=1e-13
        )
    assert values.shape == (3, 2)
    np.testing.assert_allclose(values, theirs.detach(), rtol=1e-13)
    np.testing.assert_array_equal(slope, leaf.grad)
    np.testing.assert_allclose(along, np.log(P) + 1 - LOG_Q, rtol=1e-13)


def test_kl_and_cross_entropy_differ_by_the_entropy():
    z, p = jnp.asarray(X), jnp.asarray(P)
    entropy = -jnp.sum(p * jnp.log(p), -1)
    kl = losses.kl_divergence(jax.nn.log_softmax(z), p)
    np.testing.assert_allclose(kl + entropy, losses.softmax_cross_entropy(z, p), rtol=1e-5)


def test_kl_with_zeros_has_no_nan():
    log_q = jnp.array([[0.0, -INF], [math.log(0.5), math.log(0.5)], [-INF, 0.0]])
    p = jnp.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    np.testing.assert_allclose(losses.kl_divergence(log_q, p), [0, math.log(2), INF], rtol=1e-6)
    slopes = jax.grad(lambda q, p: losses.kl_divergence(q, p).sum(), argnums=(0, 1))(log_q[:2], p[:2])
    np.testing.assert_array_equal(slopes[0], [[-1, 0], [-1, 0]])
    np.testing.assert_allclose(slopes[1], [[1, 0], [1 + math.log(2), math.log(2)]], rtol=1e-6)


def test_cosine_is_pytorchs_and_optaxs():
    leaf = torch.tensor(X, requires_grad=True)
    theirs = torch.nn.functional.cosine_similarity(leaf, torch.tensor(Y), dim=-1)
    theirs.sum().backward()
    with jax.enable_x64(True):
        x, y = jnp.asarray(X), jnp.asarray(Y)
        values = losses.cosine_similarity(x, y)
        slope = jax.grad(lambda x: losses.cosine_similarity(x, y).sum())(x)
        np.testing.assert_allclose(losses.cosine_distance(x, y), optax.cosine_distance(x, y), rtol=1e-13)
        second = jax.jacrev(jax.grad(lambda x: losses.cosine_distance(x, y[0, 0])))(x[0, 0])
        other = jax.jacrev(jax.grad(lambda x: optax.cosine_distance(x, y[0, 0])))(x[0, 0])
        np.testing.assert_allclose(second, other, atol=1e-14)
    assert values.shape == (3, 2)
    np.testing.assert_allclose(values, theirs.detach(), rtol=1e-13)
    np.testing.assert_allclose(slope, leaf.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("epsilon", [1e-8, 0.0])
@pytest.mark.parametrize("wrt", [0, 1])
def test_zero_vectors_have_similarity_and_gradient_zero(epsilon, wrt):
    x = (jnp.array([[0.0, 0.0], [0.0, 0.0]]), jnp.array([[1.0, 2.0], [0.0, 0.0]]))
    f = lambda x, y: losses.cosine_distance(x, y, epsilon=epsilon)
    np.testing.assert_array_equal(f(*x), [1, 1])
    slopes = jax.grad(lambda x, y: f(x, y).sum(), argnums=wrt)(*x)
    assert np.isfinite(slopes).all()
    np.testing.assert_array_equal(slopes, np.zeros((2, 2)))


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e30])
def test_vectors_of_any_length_are_compared(scale):
    x, y = jnp.asarray(X[0], jnp.float32), jnp.asarray(Y[0], jnp.float32)
    f = lambda x: losses.cosine_similarity(x, y, epsilon=0.0)
    np.testing.assert_allclose(f(scale * x), f(x), rtol=1e-5)
    slope = jax.grad(lambda x: f(x).sum())
    np.testing.assert_allclose(slope(scale * x) * scale, slope(x), rtol=1e-4, atol=1e-6)


def test_epsilon_is_the_least_norm_and_may_be_traced():
    x, y = jnp.array([[3e-3, 4e-3]]), jnp.array([[1.0, 0.0]])
    f = jax.jit(lambda epsilon: losses.cosine_similarity(x, y, epsilon=epsilon))
    np.testing.assert_allclose(f(0.0), [0.6], rtol=1e-6)
    np.testing.assert_allclose(f(0.5), [6e-3], rtol=1e-6)
    theirs = torch.nn.functional.cosine_similarity(torch.tensor(X), torch.tensor(Y), dim=-1, eps=1.5)
    with jax.enable_x64(True):
        np.testing.assert_allclose(losses.cosine_similarity(X, Y, epsilon=1.5), theirs, rtol=1e-13)
    small = jax.grad(lambda x: losses.cosine_similarity(x, y, epsilon=0.5).sum())(x)
    np.testing.assert_allclose(small, [[2.0, 0.0]], rtol=1e-6)  # y / epsilon


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("loss", [losses.kl_divergence, losses.cosine_distance])
def test_half_precision_jit_and_vmap(loss, dtype):
    a, b = jnp.asarray(LOG_Q, dtype), jnp.asarray(P, dtype)
    wide = loss(a.astype(jnp.float32), b.astype(jnp.float32))
    assert loss(a, b).dtype == jnp.float32
    np.testing.assert_array_equal(loss(a, b), wide)
    np.testing.assert_allclose(jax.jit(jax.vmap(jax.vmap(loss)))(a, b), wide, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", [losses.kl_divergence, losses.cosine_similarity, losses.cosine_distance])
def test_errors_say_what_arrived_and_what_to_write(loss):
    with pytest.raises(ValueError, match=r"got predictions of shape \(4, 3\) and targets of shape \(4,\)"):
        loss(jnp.zeros((4, 3)), jnp.zeros(4))
    with pytest.raises(TypeError, match=r"targets must be floating, got int32"):
        loss(jnp.zeros((4, 3)), jnp.zeros((4, 3), int))
    with pytest.raises(ValueError, match=r"got scalars: it needs shape \(\.\.\., "):
        loss(jnp.array(0.0), jnp.array(0.0))


def test_epsilon_out_of_range():
    with pytest.raises(ValueError, match=r"got epsilon=-1\.0: it must be at least 0 and finite"):
        losses.cosine_distance(jnp.ones(3), jnp.ones(3), epsilon=-1.0)


def check_cosine(loss) -> None:
    x, y = jnp.array([[3.0, 4.0], [0.0, 0.0], [3e25, 4e25]]), jnp.array([[4.0, 3.0], [1.0, 0.0], [4.0, 3.0]])
    values, slopes = jax.vmap(jax.value_and_grad(loss))(x, y)
    np.testing.assert_allclose(values, [0.04, 1, 0.04], rtol=1e-5)
    assert np.isfinite(slopes).all()


def test_the_check_passes_ours():
    check_cosine(losses.cosine_distance)


@pytest.mark.parametrize(
    "mutant",
    [
        optax.cosine_distance,
        lambda x, y: optax.cosine_distance(x, y, epsilon=1e-8),
        lambda x, y: losses.cosine_similarity(x, y),
        lambda x, y: 1 - x @ y,
    ],
    ids=["NaN at zero", "overflow", "similarity", "not normalised"],
)
def test_mutants_are_caught(mutant):
    with pytest.raises(AssertionError):
        check_cosine(mutant)
