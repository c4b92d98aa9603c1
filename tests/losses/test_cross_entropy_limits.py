"""Cross-entropy where it is hard: higher derivatives, extreme logits, impossible classes, wrong code."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nnkit import losses

CROSS_ENTROPY = losses.softmax_cross_entropy
N, C = 4, 3
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(N, C)) * 3
LABELS = np.array([2, 0, 1, 1])
PROBABILITIES = RNG.dirichlet(np.ones(C), N)
PROBABILITIES[0] = np.eye(C)[1]
WEIGHTS = np.array([0.5, 2.0, 0.0])
INF = float("inf")


def check_derivatives(f: Callable[..., Any], x: np.ndarray) -> None:
    """Gradient, second and third derivative of a scalar f, in both modes, against central differences."""
    with jax.enable_x64(True):
        x = jnp.asarray(x, jnp.float64)
        second = jax.jacfwd(jax.jacrev(f))
        first = jax.jit(jax.vmap(lambda x: (f(x), jax.jacrev(f)(x), second(x))))
        third = jax.jit(lambda x: (jax.jacfwd(f)(x), jax.jacrev(jax.jacfwd(f))(x), jax.jacrev(second)(x)))
        h = 1e-5
        up, down = first(x + h * jnp.eye(x.size)), first(x - h * jnp.eye(x.size))
        differences = [np.moveaxis((u - d) / (2 * h), 0, -1) for u, d in zip(up, down, strict=True)]
        for got, expected in zip(third(x), differences, strict=True):
            # Truncation h² = 1e-10 and rounding 1e-16 / h = 1e-11, of derivatives up to 10.
            np.testing.assert_allclose(got, expected, rtol=1e-8, atol=1e-8)
        np.testing.assert_allclose(jax.jit(jax.jacrev(f))(x), differences[0], rtol=1e-8, atol=1e-8)


def test_three_derivatives_along_logits_of_labels():
    check_derivatives(
        lambda z: CROSS_ENTROPY(z.reshape(2, C), LABELS[:2]) @ jnp.array([1.0, 2.0]), LOGITS[:2].ravel()
    )


def test_three_derivatives_along_logits_targets_and_weights():
    def f(x):
        z, q, w = x.reshape(3, C)
        return CROSS_ENTROPY(z, q, class_weights=w)

    # A target and a weight of exactly 0 have a slope, too.
    check_derivatives(f, np.stack([LOGITS[0], PROBABILITIES[0], WEIGHTS]).ravel())


@pytest.mark.parametrize("amount", [0.0, 0.2])
def test_three_derivatives_along_logits_and_smoothing(amount):
    f = lambda x: CROSS_ENTROPY(x[:C], jnp.array(1), label_smoothing=x[C])
    check_derivatives(f, np.append(LOGITS[0], amount))


def test_hypergradient_through_steps_of_descent():
    def trained(options):
        smoothing, weights = options[0], options[1:]
        z = jnp.asarray(LOGITS)
        for _ in range(2):
            f = lambda z: CROSS_ENTROPY(z, LABELS, label_smoothing=smoothing, class_weights=weights).mean()
            z = z - 0.5 * jax.grad(f)(z)
        return CROSS_ENTROPY(z, LABELS).mean()

    with jax.enable_x64(True):
        x, h = jnp.array([0.1, 0.5, 2.0, 1.0]), 1e-5
        f = jax.jit(jax.vmap(trained))
        expected = (f(x + h * jnp.eye(4)) - f(x - h * jnp.eye(4))) / (2 * h)
        np.testing.assert_allclose(jax.jit(jax.grad(trained))(x), expected, rtol=1e-8, atol=1e-9)


EXTREMES = [
    ([1e4, -1e4, 0.0], 0, 0.0, [0, 0, 0]),
    ([1e4, -1e4, 0.0], 1, 2e4, [1, -1, 0]),
    ([1e30, -1e30, 0.0], 1, 2e30, [1, -1, 0]),
    ([1e30, 1e30, -1e30], 0, math.log(2), [-0.5, 0.5, 0]),
    ([3e38, -3e38, 0.0], 1, INF, [1, -1, 0]),
    ([0.0, -INF, 0.0], 0, math.log(2), [-0.5, 0, 0.5]),
    ([0.0, -INF, -INF], 0, 0.0, [0, 0, 0]),
    ([0.0, -INF, 0.0], 1, INF, [0.5, -1, 0.5]),
]


@pytest.mark.parametrize("soft", [False, True])
def test_extreme_logits(soft):
    rows, labels, values, gradients = (jnp.array(column) for column in zip(*EXTREMES, strict=True))
    targets = jnp.eye(3)[labels] if soft else labels
    got, slope = jax.vmap(jax.value_and_grad(CROSS_ENTROPY))(rows, targets)
    np.testing.assert_allclose(got, values, rtol=1e-6)
    np.testing.assert_allclose(slope, gradients, atol=1e-7)
    assert np.isfinite(jax.jit(jax.vmap(jax.hessian(CROSS_ENTROPY)))(rows, targets)).all()


def value_and_grad(f: Callable[[Any], Any], z: Any) -> tuple[Any, Any]:
    """f(z), and the gradient of its sum."""
    total = lambda z: (jnp.sum(f(z)), f(z))
    slope, values = jax.jit(jax.grad(total, has_aux=True))(jnp.asarray(z))
    return values, slope


@pytest.mark.parametrize("weighted", [False, True])
def test_masked_classes_are_as_if_they_were_not_there(weighted):
    wide = np.concatenate([LOGITS, np.full((N, 2), -np.inf)], 1)
    weights = np.ones(C + 2) if weighted else None
    value, slope = value_and_grad(lambda z: CROSS_ENTROPY(z, LABELS, class_weights=weights), wide)
    expected = value_and_grad(lambda z: CROSS_ENTROPY(z, LABELS), LOGITS)
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    np.testing.assert_allclose(slope[:, :C], expected[1], rtol=1e-6, atol=1e-7)
    assert not slope[:, C:].any()
    soft = jnp.eye(C + 2)[LABELS]
    along = jax.grad(lambda w: CROSS_ENTROPY(wide, soft, class_weights=w).sum())(jnp.ones(C + 2))
    assert np.isfinite(along).all()


@pytest.mark.parametrize("loss", [CROSS_ENTROPY, losses.negative_log_likelihood])
def test_an_impossible_class_of_weight_zero_costs_nothing(loss):
    z, w = jnp.array([0.0, -INF, 0.0]), jnp.array([1.0, 0.0, 0.0])
    f = jax.value_and_grad(lambda z, y: loss(z, y, class_weights=w))
    for label in (1, 2):
        value, slope = f(z, jnp.array(label))
        assert value == 0
        np.testing.assert_array_equal(slope, [0, 0, 0])
    along = jax.grad(lambda w: loss(z, jnp.array(2), class_weights=w))(w)
    np.testing.assert_allclose(along, [0, 0, loss(z, jnp.array(2))])


def test_no_class_possible_and_nan_are_loud():
    for row in ([-INF, -INF], [INF, 0.0], [math.nan, 0.0]):
        assert np.isnan(CROSS_ENTROPY(jnp.array(row), jnp.array(0)))


def test_smoothing_over_an_impossible_class_costs_inf_and_keeps_a_finite_gradient():
    value, slope = jax.value_and_grad(
        lambda z: CROSS_ENTROPY(z, jnp.array(0), label_smoothing=0.3),
    )(jnp.array([0.0, -INF, 0.0]))
    assert value == np.inf
    np.testing.assert_allclose(slope, [0.5 - 0.8, -0.1, 0.5 - 0.1], rtol=1e-6)


@jax.jit
def _with_slope(z, y, smoothing):
    f = lambda z: CROSS_ENTROPY(z, y, label_smoothing=smoothing)
    return f(z), jax.grad(lambda z: f(z).sum())(z)


@given(st.integers(0, 2**31), st.floats(0, 1), st.floats(-1e4, 1e4))
def test_shift_invariance_and_sign(seed, smoothing, shift):
    rng = np.random.default_rng(seed)
    z, y = rng.normal(size=(N, C)), rng.integers(0, C, N)
    with jax.enable_x64(True):
        loss, slope = _with_slope(z, y, smoothing)
        assert (loss >= 0).all()
        np.testing.assert_allclose(_with_slope(z + shift, y, smoothing)[0], loss, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(slope.sum(-1), 0, atol=1e-14)


def check_hard(loss: Callable[..., Any]) -> None:
    """What any cross-entropy of labels must do; the mutants below must not."""
    z, y = jnp.asarray(LOGITS, jnp.float32), jnp.asarray(LABELS)
    leaf = torch.tensor(LOGITS, requires_grad=True)
    theirs = torch.nn.functional.cross_entropy(
        leaf, torch.tensor(LABELS), reduction="none", label_smoothing=0.2
    )
    theirs.sum().backward()
    values, slope = value_and_grad(lambda z: loss(z, y, 0.2), z)
    np.testing.assert_allclose(values, theirs.detach(), rtol=1e-5)
    np.testing.assert_allclose(slope, leaf.grad, rtol=1e-5, atol=1e-6)
    hessian = jax.jit(jax.hessian(lambda z: loss(z, y[:1], 0.2)[0]))(z[:1])[0, :, 0]
    p = jax.nn.softmax(z[0])
    np.testing.assert_allclose(hessian, jnp.diag(p) - jnp.outer(p, p), atol=1e-6)
    far = loss(jnp.array([[1e4, 0.0, 0.0]]), jnp.array([1]), 0.0)
    np.testing.assert_allclose(far, [1e4])
    one = jax.value_and_grad(lambda z: loss(z, jnp.array([0]), 0.0)[0])
    value, masked = one(jnp.array([[0.0, -INF, 0.0]]))
    np.testing.assert_allclose(value, math.log(2), rtol=1e-6)
    np.testing.assert_allclose(masked, [[-0.5, 0, 0.5]])


def test_the_check_passes_ours():
    check_hard(lambda z, y, a: CROSS_ENTROPY(z, y, label_smoothing=a))


def _smoothed(y, classes, a, over=None):
    return (1 - a) * jax.nn.one_hot(y, classes) + a / (over or classes)


@jax.custom_jvp
def _frozen(z, q):
    return -jnp.sum(jnp.where(q == 0, 0, q * jax.nn.log_softmax(z)), -1)


@_frozen.defjvp
def _frozen_jvp(primals, tangents):
    z, q = primals
    slope = jax.lax.stop_gradient(jax.nn.softmax(z)) - q
    return _frozen(z, q), jnp.sum(slope * tangents[0], -1)


MUTANTS = {
    "log of softmax": lambda z, y, a: -jnp.sum(_smoothed(y, z.shape[-1], a) * jnp.log(jax.nn.softmax(z)), -1),
    "0 times inf": lambda z, y, a: -jnp.sum(_smoothed(y, z.shape[-1], a) * jax.nn.log_softmax(z), -1),
    "smoothing over the other classes": lambda z, y, a: _frozen(
        z, _smoothed(y, z.shape[-1], a, z.shape[-1] - 1)
    ),
    "a second derivative that is 0": lambda z, y, a: _frozen(z, _smoothed(y, z.shape[-1], a)),
    "no smoothing": lambda z, y, a: CROSS_ENTROPY(z, y),
    "the neighbour's label": lambda z, y, a: CROSS_ENTROPY(z, (y + 1) % z.shape[-1], label_smoothing=a),
    "a mean": lambda z, y, a: jnp.full(len(z), CROSS_ENTROPY(z, y, label_smoothing=a).mean()),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS.keys())
def test_mutants_are_caught(mutant):
    with pytest.raises(AssertionError):
        check_hard(mutant)
