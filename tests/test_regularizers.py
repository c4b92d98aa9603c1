"""Penalties against closed forms, Keras's formula and PyTorch's weight decay."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from nnkit import regularizers, tree

RNG = np.random.default_rng(0)
PARAMS = {
    "batch_norm_0": {"scale": RNG.normal(size=4), "bias": RNG.normal(size=4)},
    "conv_0": {"kernel": RNG.normal(size=(3, 3, 2, 4)), "bias": RNG.normal(size=4)},
    "dense_0": {"kernel": RNG.normal(size=(4, 3)), "bias": RNG.normal(size=3)},
    "prelu_0": {"slope": RNG.normal(size=())},
}
KERNELS = [PARAMS["conv_0"]["kernel"], PARAMS["dense_0"]["kernel"]]


@pytest.fixture
def params():
    with jax.enable_x64(True):
        yield jax.tree.map(jnp.asarray, PARAMS)


def test_values_are_kerass_formulas_on_kernels_only(params):
    np.testing.assert_allclose(
        regularizers.l1(0.3)(params), 0.3 * sum(abs(k).sum() for k in KERNELS), rtol=1e-14
    )
    np.testing.assert_allclose(
        regularizers.l2(0.3)(params), 0.3 * sum((k**2).sum() for k in KERNELS), rtol=1e-14
    )
    frobenius = np.linalg.norm(KERNELS[1])
    np.testing.assert_allclose(regularizers.l2(2.0, "dense_0/kernel")(params), 2 * frobenius**2, rtol=1e-14)


def check_gradients(l1, l2, params) -> None:
    for slope, kernel_slope in [
        (jax.grad(l1(0.3))(params), lambda w: 0.3 * jnp.sign(w)),
        (jax.grad(l2(0.3))(params), lambda w: 0.6 * w),
    ]:
        for path, g in tree.flatten(slope).items():
            expected = (
                kernel_slope(tree.flatten(params)[path]) if path.endswith("kernel") else jnp.zeros_like(g)
            )
            np.testing.assert_allclose(g, expected, rtol=1e-14)


def test_gradients(params):
    check_gradients(regularizers.l1, regularizers.l2, params)


def _on_all(of):
    return lambda strength: lambda p: strength * sum(jnp.sum(of(w)) for w in jax.tree.leaves(p))


def _by_ndim(of):
    return lambda strength: lambda p: strength * sum(jnp.sum(of(w)) for w in jax.tree.leaves(p) if w.ndim > 1)


@pytest.mark.parametrize(
    ("l1", "l2"),
    [
        (_on_all(jnp.abs), regularizers.l2),
        (regularizers.l1, _on_all(jnp.square)),
        (regularizers.l1, lambda s: regularizers.l2(s / 2)),
        (lambda s: regularizers.l2(s), regularizers.l2),
        (regularizers.l1, lambda s: lambda p: jnp.sqrt(regularizers.l2(s)(p))),
    ],
    ids=["l1 on biases", "l2 on biases", "half", "a square for l1", "a root"],
)
def test_mutants_are_caught(params, l1, l2):
    with pytest.raises(AssertionError):
        check_gradients(l1, l2, params)


def test_l1_has_slope_zero_at_zero():
    zeros = {"kernel": jnp.array([0.0, -0.0, 1.0, -2.0])}
    np.testing.assert_array_equal(jax.grad(regularizers.l1(0.5))(zeros)["kernel"], [0, 0, 0.5, -0.5])
    np.testing.assert_array_equal(jax.grad(regularizers.l2(0.5))(zeros)["kernel"], [0, 0, 1, -2])
    np.testing.assert_array_equal(jax.jvp(regularizers.l1(0.5), (zeros,), ({"kernel": jnp.ones(4)},))[1], 0)


def test_half_the_weight_decay_is_pytorchs_under_sgd(params):
    decay, rate = 0.1, 0.5
    w = torch.tensor(KERNELS[1], requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=rate, weight_decay=decay)
    w.grad = torch.zeros_like(w)
    optimizer.step()
    slope = jax.grad(regularizers.l2(decay / 2))(params)["dense_0"]["kernel"]
    np.testing.assert_allclose(KERNELS[1] - rate * slope, w.detach(), rtol=1e-14)


def check_population(l2) -> None:
    population = jax.tree.map(lambda x: jnp.stack([jnp.asarray(x, jnp.float32)] * 3), PARAMS)
    one = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), PARAMS)
    np.testing.assert_allclose(jax.vmap(l2)(population), [regularizers.l2(0.1)(one)] * 3, rtol=1e-6)
    np.testing.assert_allclose(l2(population), 3 * regularizers.l2(0.1)(one), rtol=1e-6)


def test_a_stacked_population_is_penalised_as_its_members_are():
    check_population(regularizers.l2(0.1))
    with pytest.raises(AssertionError):
        check_population(_by_ndim(jnp.square)(0.1))


@pytest.mark.parametrize(
    ("mask", "paths"),
    [
        (None, ["conv_0/kernel", "dense_0/kernel"]),
        (r".*/kernel", ["conv_0/kernel", "dense_0/kernel"]),
        (r"dense_0/.*", ["dense_0/bias", "dense_0/kernel"]),
        (lambda p: tree.mask(p, r"batch_norm_0/scale"), ["batch_norm_0/scale"]),
        (tree.mask(PARAMS, r"prelu_0/slope"), ["prelu_0/slope"]),
        (
            jax.tree.map(np.bool_, tree.mask(PARAMS, r".*bias")),
            ["batch_norm_0/bias", "conv_0/bias", "dense_0/bias"],
        ),
    ],
    ids=["default", "expression", "subtree", "function", "tree", "tree_of_numpy"],
)
def test_masks_of_every_kind(params, mask, paths):
    leaves = tree.flatten(PARAMS)
    for f, of in ((regularizers.l1, np.abs), (regularizers.l2, np.square)):
        got = jax.jit(f(2.0, mask))(params)
        np.testing.assert_allclose(got, 2 * sum(of(leaves[p]).sum() for p in paths), rtol=1e-14)


def test_strength_may_be_traced_and_has_a_slope(params):
    f = jax.jit(lambda strength: regularizers.l2(strength)(params))
    np.testing.assert_allclose(f(2.0), 2 * f(1.0), rtol=1e-14)
    assert f._cache_size() == 1
    np.testing.assert_allclose(jax.grad(f)(1.0), f(1.0), rtol=1e-14)
    grid = jax.vmap(f)(jnp.array([0.0, 1.0], jnp.float32))
    np.testing.assert_allclose(grid, [0, f(1.0)], rtol=1e-14)


def test_combine_is_the_sum(params):
    l1, l2 = regularizers.l1(0.1), regularizers.l2(0.2)
    np.testing.assert_allclose(regularizers.combine(l1, l2)(params), l1(params) + l2(params), rtol=1e-14)
    assert regularizers.combine(l1)(params) == l1(params)
    with pytest.raises(ValueError, match="combine got no penalties: pass at least one"):
        regularizers.combine()


def test_dtypes(params):
    assert regularizers.l2(0.1)(params).dtype == jnp.float64
    for dtype in (jnp.float16, jnp.bfloat16, jnp.float32):
        ones = {"kernel": jnp.ones(3000, dtype)}
        assert regularizers.l2(1.0)(ones).dtype == jnp.float32
        assert regularizers.l1(1.0)(ones) == regularizers.l2(1.0)(ones) == 3000
        assert jax.grad(regularizers.l1(1.0))(ones)["kernel"].dtype == dtype
    mixed = {"a": {"kernel": jnp.ones(3, jnp.float64)}, "b": {"kernel": jnp.ones(3, jnp.bfloat16)}}
    assert regularizers.l1(1.0)(mixed) == 6
    assert regularizers.l1(1.0)(mixed).dtype == jnp.float64


@pytest.mark.parametrize("strength", [-1.0, math.nan, math.inf, np.float32(-1)])
@pytest.mark.parametrize("f", [regularizers.l1, regularizers.l2])
def test_strengths_out_of_range(f, strength):
    with pytest.raises(ValueError, match=f"{f.__name__} got strength=.*: it must be at least 0 and finite"):
        f(strength)


@pytest.mark.parametrize(
    ("mask", "error", "text"),
    [
        (r"kernel", ValueError, r"l2: the mask selects none of batch_norm_0/bias, .*mask=\"\.\*/kernel\""),
        (lambda p: jax.tree.map(lambda _: False, p), ValueError, "selects none of"),
        (
            {"dense_0": {"kernel": True}},
            ValueError,
            "shaped like the parameters; only one of them has batch_norm_0",
        ),
        (
            lambda p: jax.tree.map(lambda x: x > 0, p),
            TypeError,
            "mask at batch_norm_0/bias must be True or False",
        ),
        (jax.tree.map(lambda _: 1, PARAMS), TypeError, "must be True or False, got int"),
    ],
)
def test_masks_that_do_not_fit(params, mask, error, text):
    penalty = regularizers.l2(0.1, mask)
    with pytest.raises(error, match=text):
        jax.eval_shape(penalty, params)


def test_parameters_that_cannot_be_penalised():
    with pytest.raises(ValueError, match="selects none of no parameters"):
        regularizers.l1(0.1)({})
    with pytest.raises(ValueError, match="selects none of bias"):
        regularizers.l1(0.1)({"bias": jnp.ones(3)})
    with pytest.raises(TypeError, match="l1: parameter table is int32, a penalty needs floating numbers"):
        regularizers.l1(0.1)({"table": jnp.ones(3, int)})
