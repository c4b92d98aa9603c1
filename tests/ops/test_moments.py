"""Means, variances and normalisation as functions: masks, mapped axes, half precision, derivatives."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnkit import ops

RNG = np.random.default_rng(0)


def _naive(x, axes, where=None):
    """In float64 by NumPy."""
    x = np.asarray(x, np.float64)
    where = np.ones(x.shape, bool) if where is None else np.broadcast_to(where, x.shape)
    return np.mean(x, axes, where=where), np.var(x, axes, where=where)


def _mask(*shape):
    mask = RNG.random(shape) < 0.6
    mask[..., 0] = True  # no empty slice, whose mean NumPy has none of
    return mask


@pytest.mark.parametrize("axes", [None, 1, (0, 2), (-1,)])
@pytest.mark.parametrize("masked", [False, True])
def test_equal_numpy(axes, masked):
    x = RNG.normal(3, 2, (4, 5, 6)).astype(np.float32)
    where = _mask(4, 5, 6) if masked else None
    mean, var, n = ops.moments(jnp.asarray(x), axes, where=None if where is None else jnp.asarray(where))
    want_mean, want_var = _naive(x, axes, where)
    assert mean.shape == want_mean.shape
    np.testing.assert_allclose(mean, want_mean, rtol=1e-6)
    np.testing.assert_allclose(var, want_var, rtol=1e-6)
    np.testing.assert_array_equal(n, np.sum(np.ones(x.shape) if where is None else where, axes))


def test_mean_1e4_and_deviation_1():
    """The error of the mean is some 1e-3 at 1e4 in float32, so that of the variance (its square) is some 1e-6."""
    x = jnp.asarray(RNG.normal(1e4, 1, (4096,)), jnp.float32)
    _, want = _naive(x, 0)
    np.testing.assert_allclose(ops.moments(x).var, want, rtol=1e-5)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(jnp.mean(x * x) - jnp.mean(x) ** 2, want, rtol=0.1)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    x = jnp.asarray(RNG.normal(5, 1, (30000,)), dtype)  # the sum of squares is no float16
    mean, var, _ = ops.moments(x)
    assert mean.dtype == var.dtype == jnp.float32
    want_mean, want_var = _naive(x.astype(jnp.float32), 0)
    np.testing.assert_allclose([mean, var], [want_mean, want_var], rtol=1e-5)


def test_no_entry_gives_zeros_and_gradients_without_nan():
    x, where = jnp.asarray([[1.0, 2.0], [3.0, 4.0]]), jnp.asarray([[True, True], [False, False]])

    def total(x):
        mean, var, _ = ops.moments(x, 1, where=where)
        return jnp.sum(mean + var)

    mean, var, n = ops.moments(x, 1, where=where)
    assert (mean.tolist(), var.tolist(), n.tolist()) == ([1.5, 0.0], [0.25, 0.0], [2, 0])
    np.testing.assert_allclose(jax.grad(total)(x), [[0.0, 1.0], [0.0, 0.0]])


def test_complex_input_has_a_real_variance():
    x = jnp.asarray(RNG.normal(size=8) + 1j * RNG.normal(size=8), jnp.complex64)
    np.testing.assert_allclose(ops.moments(x).var, np.var(np.asarray(x)), rtol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_over_a_mapped_axis_they_are_those_of_the_whole(masked):
    x = jnp.asarray(RNG.normal(3, 2, (4, 5, 6)), jnp.float32)
    where = jnp.asarray(_mask(4, 5, 6)) if masked else None

    def member(x, where=None):
        return tuple(ops.moments(x, 0, where=where, axis_name="members"))

    mapped = jax.vmap(member, axis_name="members", out_axes=(0, 0, 0 if masked else None))
    mean, var, n = mapped(*((x, where) if masked else (x,)))
    want = ops.moments(x, (0, 1), where=where)
    for got, whole in ((mean, want.mean), (var, want.var)):
        np.testing.assert_allclose(got, np.broadcast_to(whole, got.shape), rtol=1e-6)
    np.testing.assert_array_equal(n[0] if masked else n, want.n)


# ---- normalize: its own derivative rule ---------------------------------------------------------

SHAPE = (3, 4, 2)
CASES = {
    "batch norm": {"axes": (0, 1), "affine": (1, 1, 2)},
    "batch norm, masked": {"axes": (0, 1), "affine": (1, 1, 2), "mask": (3, 4, 1)},
    "layer norm": {"axes": (2,), "affine": (1, 1, 2)},
    "layer norm, masked": {"axes": (1, 2), "affine": (1, 4, 2), "mask": (3, 4, 2)},
    "instance norm": {"axes": (1,), "affine": (1, 1, 2)},
    "RMS norm": {"axes": (2,), "affine": (1, 1, 2), "centred": False},
    "RMS norm, no scale, masked": {"axes": (2,), "affine": (1, 1, 1), "centred": False, "mask": (3, 4, 2)},
}


def _formula(x, scale, bias, epsilon, *, axes, where=None, centred=True):
    """The definition, which JAX differentiates."""
    ones = jnp.ones_like(x) if where is None else jnp.broadcast_to(where, x.shape).astype(x.dtype)
    n = jnp.sum(ones, axes, keepdims=True)
    mean = jnp.sum(x * ones, axes, keepdims=True) / n if centred else 0
    var = jnp.sum(jnp.square(x - mean) * ones, axes, keepdims=True) / n
    return (x - mean) / jnp.sqrt(var + epsilon) * scale + bias, mean + 0 * var, var


def _case(name):
    case = dict(CASES[name])
    shape, mask = case.pop("affine"), case.pop("mask", None)
    rng = np.random.default_rng(1)
    args = (rng.normal(2, 3, SHAPE), rng.normal(1, 1, shape), rng.normal(1, 1, shape), 0.3)
    where = None if mask is None else jnp.asarray(np.arange(np.prod(mask)).reshape(mask) % 3 != 1)
    return tuple(jnp.asarray(a) for a in args), {**case, "where": where}


def _ours(x, scale, bias, epsilon, *, axes, **options):
    return ops.normalize(x, scale, bias, axes, epsilon=epsilon, **options)


def _check_derivatives(f, name):
    """First and second, in every order of forward and reverse, in float64, by every argument, of y, m and v.

    Along one random direction each, which a wrong entry would have to be orthogonal to.
    """
    with jax.enable_x64(True):
        args, options = _case(name)
        rng = np.random.default_rng(2)
        weights = [
            jnp.asarray(rng.normal(size=a.shape))
            for a in jax.eval_shape(lambda *a: _formula(*a, **options), *args)
        ]
        way = tuple(jnp.asarray(rng.normal(size=a.shape)) for a in args)

        def derivatives(f):
            def scalar(*a):
                return sum(jnp.sum(w * jnp.sin(y)) for w, y in zip(weights, f(*a, **options), strict=True))

            def slope(*a):
                return jax.jvp(scalar, a, way)[1]

            def along(*a):
                return sum(jnp.sum(g * d) for g, d in zip(gradient(*a), way, strict=True))

            gradient = jax.grad(scalar, range(4))
            return (
                jax.jvp(lambda *a: f(*a, **options), args, way),
                jax.jvp(gradient, args, way),
                jax.jvp(slope, args, way),
                jax.grad(slope, range(4))(*args),
                jax.grad(along, range(4))(*args),
            )

        got, want = (jax.tree.leaves(jax.jit(lambda f=f: derivatives(f))()) for f in (f, _formula))
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_derivatives_are_those_of_the_formula(name):
    _check_derivatives(_ours, name)


def _without_the_means_derivative(x, scale, bias, epsilon, *, axes, where=None, centred=True):
    del centred
    _, mean, var = _formula(x, scale, bias, epsilon, axes=axes, where=where)
    mean = jax.lax.stop_gradient(mean)
    return (x - mean) / jnp.sqrt(var + epsilon) * scale + bias, mean, var


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        (_without_the_means_derivative, "batch norm"),
        (lambda *a, where, **o: _ours(*a, **o), "batch norm, masked"),
        (lambda *a, centred=True, **o: _ours(*a, **o), "RMS norm"),
        (lambda x, s, b, e, **o: _ours(x, s, b, jax.lax.stop_gradient(e), **o), "layer norm"),
    ],
)
def test_a_wrong_rule_is_caught(wrong, name):
    with pytest.raises(AssertionError):
        _check_derivatives(wrong, name)


def test_derivatives_over_a_mapped_axis_are_those_of_the_whole():
    with jax.enable_x64(True):
        args, options = _case("batch norm, masked")
        x, scale, bias, epsilon = args
        where, weights = options["where"], jnp.asarray(np.random.default_rng(3).normal(size=SHAPE))

        def whole(x, scale, bias):
            return jnp.sum(weights * jnp.sin(_formula(x, scale, bias, epsilon, axes=(0, 1), where=where)[0]))

        def mapped(x, scale, bias):
            def member(x, where):
                y, *_ = ops.normalize(
                    x, scale[0], bias[0], (0,), epsilon=epsilon, where=where, axis_name="members"
                )
                return y

            return jnp.sum(weights * jnp.sin(jax.vmap(member, axis_name="members")(x, where)))

        def second(f):
            return lambda *a: jax.grad(lambda *a: jnp.sum(jnp.cos(jax.grad(f)(*a))), (0, 1, 2))(*a)

        for of in (lambda f: jax.grad(f, (0, 1, 2)), second):
            got, want = (jax.tree.leaves(jax.jit(of(f))(x, scale, bias)) for f in (mapped, whole))
            for a, b in zip(got, want, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("epsilon", [0.0, 1e-5])
def test_where_no_entry_counts_the_input_passes_and_no_gradient_is_nan(epsilon):
    x, where = jnp.asarray([[1.0, 2.0], [0.0, 0.0]]), jnp.asarray([[True, True], [False, False]])

    def run(x, epsilon):
        return ops.normalize(x, jnp.full((1, 2), 3.0), jnp.ones((1, 2)), (1,), epsilon=epsilon, where=where)[
            0
        ]

    @jax.jit
    def all_of_it(x, epsilon):
        def total(x, epsilon):
            return jnp.sin(run(x, epsilon)).sum()

        first = jax.grad(total, (0, 1))(x, epsilon)
        second = jax.grad(lambda x: jnp.cos(jax.grad(total)(x, epsilon)).sum())(x)
        return run(x, epsilon), first, second

    y, first, second = all_of_it(x, jnp.float32(epsilon))
    np.testing.assert_allclose(y[1], [1.0, 1.0])
    assert all(np.isfinite(g).all() for g in (*first, second))
    np.testing.assert_allclose(first[0][1], 3 * np.cos([1.0, 1.0]), rtol=1e-6)
