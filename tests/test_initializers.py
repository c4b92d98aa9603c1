"""Initializers against jax.nn.initializers bit for bit, closed-form moments, PyTorch and Flax."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy import stats

from nnkit import initializers as I

J = jax.nn.initializers
# Drawing from an "rbg" key compiles several times faster than from the default "threefry2x32" one, and
# every shape is compiled anew. What an initializer does with the numbers is the same.
KEY = jax.random.key(7, impl="rbg")
DEFAULT_KEY = jax.random.key(7)

# One row an initializer: nnkit's, and what it equals bit for bit.
PLAIN = {
    "zeros": (I.zeros, J.zeros),
    "ones": (I.ones, J.ones),
    "constant(0.3)": (I.constant(0.3), J.constant(0.3)),
    "uniform": (I.uniform(), J.uniform()),
    "uniform(0.3)": (I.uniform(0.3), J.uniform(0.3)),
    "normal": (I.normal(), J.normal()),
    "normal(0.3)": (I.normal(0.3), J.normal(0.3)),
    "truncated_normal": (I.truncated_normal(), J.truncated_normal()),
    "truncated_normal(0.3, -1, 3)": (
        I.truncated_normal(0.3, lower=-1.0, upper=3.0),
        J.truncated_normal(0.3, lower=-1.0, upper=3.0),
    ),
}
SCALED = {name: (getattr(I, name), getattr(J, name)) for name in (
    "he_normal", "he_uniform", "xavier_normal", "xavier_uniform", "lecun_normal", "lecun_uniform",
)}  # fmt: skip
for mode in ("fan_in", "fan_out", "fan_avg", "fan_geo_avg"):
    for distribution in ("truncated_normal", "normal", "uniform"):
        SCALED[f"variance_scaling({mode}, {distribution})"] = (
            lambda *axes, a=(1.7, mode, distribution): I.variance_scaling(*a, *axes),
            lambda *axes, a=(1.7, mode, distribution): J.variance_scaling(*a, *axes),
        )
# Shape and axes: dense, outputs first, convolution, independent kernels, attention to and from heads.
SHAPES = [
    ((24, 10), ()),
    ((24, 10), (1, 0)),
    ((3, 3, 4, 6), ()),
    ((3, 3, 4, 6), (-2, -1, 0)),
    ((12, 2, 5), (0, (1, 2))),
    ((12, 2, 5), ((0, 1), 2)),
]


@pytest.mark.parametrize("name", PLAIN)
def test_jax_gives_the_same_bits(name):
    ours, theirs = PLAIN[name]
    for shape in ((24, 10), (5,)):
        np.testing.assert_array_equal(ours(KEY, shape), theirs(KEY, shape, jnp.float32))


@pytest.mark.parametrize("name", SCALED)
def test_jax_gives_the_same_bits_for_all_axes(name):
    ours, theirs = SCALED[name]
    for shape, axes in SHAPES:
        x = ours(*axes)(KEY, shape)
        assert x.dtype == jnp.float32
        np.testing.assert_array_equal(x, theirs(*axes)(KEY, shape, jnp.float32))


def test_jax_gives_the_same_bits_under_the_default_kind_of_key():
    for ours, theirs in [*PLAIN.values(), *((f(), g()) for f, g in SCALED.values())]:
        np.testing.assert_array_equal(ours(DEFAULT_KEY, (24, 10)), theirs(DEFAULT_KEY, (24, 10), jnp.float32))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float64])
def test_jax_gives_the_same_bits_in_every_dtype(dtype):
    with jax.enable_x64(dtype == jnp.float64):
        for name, (ours, theirs) in [*PLAIN.items(), *((k, (f(), g())) for k, (f, g) in SCALED.items())]:
            x = ours(KEY, (24, 10), dtype)
            assert x.dtype == dtype
            np.testing.assert_array_equal(x, theirs(KEY, (24, 10), dtype), err_msg=name)


@pytest.mark.parametrize(("shape", "column_axis"), [((6, 6), -1), ((9, 4), -1), ((4, 9), 0), ((3, 2, 5), 1)])
def test_jax_gives_the_same_orthogonal_matrices(shape, column_axis):
    ours, theirs = (of.orthogonal(1.5, column_axis)(KEY, shape, jnp.float32) for of in (I, J))
    np.testing.assert_array_equal(ours, theirs)


def test_the_dtype_is_float32_unless_asked_for_even_with_x64():
    with jax.enable_x64(True):
        for f in (I.zeros, I.ones, I.constant(1.0), I.normal(), I.he_normal(), I.orthogonal()):
            assert jax.eval_shape(lambda key, f=f: f(key, (4, 4)), KEY).dtype == jnp.float32


def test_aliases():
    assert (I.kaiming_normal, I.kaiming_uniform) == (I.he_normal, I.he_uniform)
    assert (I.glorot_normal, I.glorot_uniform) == (I.xavier_normal, I.xavier_uniform)


# Moments of large draws. The estimate of E[xᵏ] from n draws has the standard error
# √((E[x²ᵏ] - E[xᵏ]²)/n); with a fixed key five of them pass or fail for good.


def normal_moment(k: int) -> float:
    return 0.0 if k % 2 else math.prod(range(k - 1, 0, -2))


def uniform_moment(k: int) -> float:
    """Of U(-√3, √3), which has variance 1."""
    return 0.0 if k % 2 else 3 ** (k / 2) / (k + 1)


def truncated_moment(k: int, a: float = 2.0) -> Any:
    """Of a standard normal within ±a, by m(k) = (k - 1)·m(k - 2) - 2·aᵏ⁻¹·φ(a)/P(|x| < a)."""
    if k % 2 or k == 0:
        return 1.0 - k % 2
    return (k - 1) * truncated_moment(k - 2, a) - 2 * a ** (k - 1) * stats.norm.pdf(a) / math.erf(a / 2**0.5)


def corrected_moment(k: int) -> float:
    """Of that normal divided by its standard deviation."""
    return truncated_moment(k) / truncated_moment(2) ** (k / 2)


MOMENTS = {"normal": normal_moment, "truncated_normal": corrected_moment, "uniform": uniform_moment}
BOUND = {"normal": math.inf, "truncated_normal": 2 / truncated_moment(2) ** 0.5, "uniform": 3**0.5}


def check_moments(x: Any, stddev: float, distribution: str, mean: float = 0.0) -> None:
    """``x`` has the moments 1 to 4, and the bounds, of ``distribution`` with this mean and deviation."""
    x = (np.asarray(x, np.float64).ravel() - mean) / stddev
    moment, bound = MOMENTS[distribution], BOUND[distribution]
    for k in (1, 2, 3, 4):
        error = math.sqrt((moment(2 * k) - moment(k) ** 2) / x.size)
        assert abs((x**k).mean() - moment(k)) < 5 * error, f"moment {k}"
    assert abs(x).max() <= bound * (1 + 1e-6)
    if math.isfinite(bound):
        # Of n draws the largest is within 20/n of the mass to the bound, but for one time in e²⁰; the
        # density there is at least 0.1, so the distance is at most 200/n.
        assert abs(x).max() > bound - 200 / x.size


# For every initializer: a kernel of unequal fans (in 400, out 250), the variance, the distribution.
KERNEL = (400, 250)
VARIANCES = {
    "he_normal": (I.he_normal(), 2 / 400, "truncated_normal"),
    "he_normal, PyTorch's": (I.he_normal(truncated=False), 2 / 400, "normal"),
    "he_uniform": (I.he_uniform(), 2 / 400, "uniform"),
    "xavier_normal": (I.xavier_normal(), 2 / 650, "truncated_normal"),
    "xavier_normal, PyTorch's": (I.xavier_normal(truncated=False), 2 / 650, "normal"),
    "xavier_normal, the lecture's": (I.xavier_normal(mode="fan_sum", truncated=False), 1 / 650, "normal"),
    "xavier_uniform": (I.xavier_uniform(), 2 / 650, "uniform"),
    "xavier_uniform, fan_sum": (I.xavier_uniform(mode="fan_sum"), 1 / 650, "uniform"),
    "lecun_normal": (I.lecun_normal(), 1 / 400, "truncated_normal"),
    "lecun_normal, not truncated": (I.lecun_normal(truncated=False), 1 / 400, "normal"),
    "lecun_uniform": (I.lecun_uniform(), 1 / 400, "uniform"),
    "fan_out": (I.variance_scaling(3.0, "fan_out", "truncated_normal"), 3 / 250, "truncated_normal"),
    "fan_avg": (I.variance_scaling(3.0, "fan_avg", "normal"), 3 / 325, "normal"),
    "fan_geo_avg": (I.variance_scaling(3.0, "fan_geo_avg", "uniform"), 3 / math.sqrt(1e5), "uniform"),
    "normal": (I.normal(0.2), 0.04, "normal"),
    "truncated_normal": (
        I.truncated_normal(0.2),
        0.04 * truncated_moment(2),
        "truncated_normal",
    ),
    "uniform, symmetric": (I.uniform(0.3, symmetric=True), 0.03, "uniform"),
}


@pytest.mark.parametrize("name", VARIANCES)
def test_moments(name):
    init, variance, distribution = VARIANCES[name]
    check_moments(init(KEY, KERNEL), math.sqrt(variance), distribution)


def test_moments_of_the_one_sided_uniform():
    check_moments(I.uniform(0.3)(KEY, KERNEL), 0.15 / math.sqrt(3), "uniform", mean=0.15)


def test_the_numbers_of_the_docstrings():
    assert math.sqrt(truncated_moment(2)) == pytest.approx(0.87962566103423978, abs=1e-15)
    assert truncated_moment(4) == pytest.approx(stats.truncnorm(-2, 2).moment(4), rel=1e-12)


# Fans.

FANS = [
    # shape, arguments, fans
    ((784, 256), {}, (784, 256)),
    ((3, 3, 16, 64), {}, (144, 576)),
    ((5, 8, 12), {}, (40, 60)),
    ((3, 3, 4, 64), {"groups": 4}, (36, 144)),
    ((3, 3, 1, 32), {"groups": 32}, (9, 9)),
    ((512, 8, 64), {"in_axis": 0, "out_axis": (1, 2)}, (512, 512)),
    ((512, 8, 32), {"in_axis": 0, "out_axis": (1, -1)}, (512, 256)),
    ((8, 32, 512), {"in_axis": (0, 1), "out_axis": 2}, (256, 512)),
    ((1000, 64), {"in_axis": 1, "out_axis": 0}, (64, 1000)),
    ((6, 20, 30), {"batch_axis": 0}, (20, 30)),
]


@pytest.mark.parametrize(("shape", "arguments", "expected"), FANS)
def test_fans(shape, arguments, expected):
    assert I.fans(shape, **arguments) == expected


def reached(groups: int, out: int) -> tuple[int, int]:
    """Counted in a real convolution of 3x3: non-zero entries of its Jacobian, by output and by input."""
    kernel = jnp.ones((3, 3, 8 // groups, out))

    def convolve(x):
        return jax.lax.conv_general_dilated(
            x[None], kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )[0]  # fmt: skip

    jacobian = np.asarray(jax.jacobian(convolve)(jnp.zeros((5, 5, 8)))).reshape(25, out, 25, 8)
    middle = 12
    return int((jacobian[middle, 0] != 0).sum()), int((jacobian[:, :, middle, 0] != 0).sum())


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_fans_of_a_convolution_are_what_it_connects(groups):
    assert I.fans((3, 3, 8 // groups, 16), groups=groups) == reached(groups, 16)


@pytest.mark.parametrize("groups", [1, 4])
def test_pytorch_s_fans(groups):
    for layer in (torch.nn.Linear(6, 9), torch.nn.Conv2d(8, 12, (3, 5), groups=groups)):
        kernel = layer.weight.detach().numpy()
        ours = np.moveaxis(kernel, (1, 0), (-2, -1)).shape  # (out, in, *window) to (*window, in, out)
        theirs = torch.nn.init._calculate_fan_in_and_fan_out(layer.weight)
        g = groups if kernel.ndim == 4 else 1
        assert I.fans(ours) == theirs
        # The difference that the docstring states.
        assert I.fans(ours, groups=g) == (theirs[0], theirs[1] // g)
    assert I.fans((100, 8), in_axis=1, out_axis=0) == torch.nn.init._calculate_fan_in_and_fan_out(
        torch.empty(100, 8)
    )


def test_groups_reach_the_variance():
    shape = (3, 3, 8, 256)  # 32 channels in 4 groups: fan_in 72, fan_out 576
    for mode, fan in (("fan_in", 72), ("fan_out", 576), ("fan_avg", 324), ("fan_sum", 648)):
        x = I.variance_scaling(2.0, mode, "normal", groups=4)(KEY, shape)
        check_moments(x, math.sqrt(2 / fan), "normal")
    check_moments(I.xavier_normal(groups=4)(KEY, shape), math.sqrt(1 / 324), "truncated_normal")
    check_moments(I.xavier_uniform(groups=4)(KEY, shape), math.sqrt(1 / 324), "uniform")
    for f in (I.he_normal, I.he_uniform, I.lecun_normal, I.lecun_uniform):
        np.testing.assert_array_equal(f(groups=4)(KEY, shape), f()(KEY, shape))


def test_attention_kernels_equal_their_dense_form():
    shape, axes = (12, 2, 5), {"in_axis": 0, "out_axis": (1, 2)}
    np.testing.assert_array_equal(
        I.lecun_normal(**axes)(KEY, shape), I.lecun_normal()(KEY, (12, 10)).reshape(shape)
    )


# The other libraries, by distribution.

TORCH = {
    "kaiming_normal_": (torch.nn.init.kaiming_normal_, I.he_normal(truncated=False)),
    "kaiming_uniform_": (torch.nn.init.kaiming_uniform_, I.he_uniform()),
    "kaiming_normal_(fan_out)": (
        lambda w, **k: torch.nn.init.kaiming_normal_(w, mode="fan_out", **k),
        I.variance_scaling(2.0, "fan_out", "normal"),
    ),
    "xavier_normal_": (torch.nn.init.xavier_normal_, I.xavier_normal(truncated=False)),
    "xavier_uniform_": (torch.nn.init.xavier_uniform_, I.xavier_uniform()),
    "Linear": (
        lambda w, **k: torch.nn.init.kaiming_uniform_(w, a=math.sqrt(5), **k),
        I.variance_scaling(1 / 3, "fan_in", "uniform"),
    ),
    "trunc_normal_": (
        lambda w, **k: torch.nn.init.trunc_normal_(w, std=0.5, a=-1, b=1, **k),
        I.truncated_normal(0.5),
    ),
}


@pytest.mark.parametrize("name", TORCH)
def test_pytorch_draws_from_the_same_distribution(name):
    theirs, init = TORCH[name]
    ours = np.asarray(init(KEY, (3, 3, 40, 250))).ravel()
    weight = torch.empty(250, 40, 3, 3)
    theirs(weight, generator=torch.Generator().manual_seed(0))
    # Two samples of n have a Kolmogorov distance below 1.95·√(2/n) but for one time in a thousand.
    test: Any = stats.ks_2samp(ours, weight.numpy().ravel())
    assert test.statistic < 1.95 * math.sqrt(2 / ours.size)
    # Both deviations have the relative error √((κ - 1)/(4n)), with a kurtosis κ of at most 3.
    assert ours.std() == pytest.approx(float(weight.std()), rel=5 / math.sqrt(ours.size))


def test_pytorch_s_linear_is_a_uniform_of_the_square_root_of_its_inputs():
    torch.manual_seed(0)
    bound = 1 / math.sqrt(400)
    for x in (
        torch.nn.Linear(400, 250).weight.detach().numpy(),
        I.variance_scaling(1 / 3, "fan_in", "uniform")(KEY, KERNEL),
    ):
        check_moments(x, bound / math.sqrt(3), "uniform")


def test_flax_s_embedding():
    theirs = nn.Embed(50, 8).embedding_init(KEY, (50, 8), jnp.float32)
    ours = I.lecun_normal(in_axis=1, out_axis=0, truncated=False)(KEY, (50, 8))
    np.testing.assert_array_equal(ours, theirs)


# Orthogonality.


@pytest.mark.parametrize(("shape", "axis"), [((8, 8), -1), ((3, 3, 4, 16), -1), ((4, 30), -1), ((5, 12), 0)])
def test_orthogonal(shape, axis):
    w = np.moveaxis(np.asarray(I.orthogonal(2.0, axis)(KEY, shape), np.float64), axis, -1)
    w = w.reshape(-1, w.shape[-1])
    gram = w.T @ w if w.shape[0] >= w.shape[1] else w @ w.T
    # 4·(rows) products of float32.
    np.testing.assert_allclose(gram, 4 * np.eye(len(gram)), atol=4 * max(w.shape) * 2.0**-24)


def test_orthogonal_matrices_are_uniformly_distributed():
    q = jax.jit(jax.vmap(lambda key: I.orthogonal()(key, (3, 3))))(jax.random.split(KEY, 4000))
    # Each entry is a coordinate of a uniform unit vector in 3 dimensions: U(-1, 1). Entries of one
    # matrix depend on each other, so take one.
    check = lambda x: stats.kstest(np.asarray(x), stats.uniform(-1, 2).cdf).pvalue
    assert min(check(q[:, 0, 0]), check(q[:, 2, 1])) > 1e-3
    signs = jnp.linalg.det(q) > 0
    assert abs(float(signs.mean()) - 0.5) < 5 * 0.5 / math.sqrt(4000)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_orthogonal_in_half_precision_is_the_float32_one_rounded(dtype):
    ours = I.orthogonal()(KEY, (9, 4), dtype)
    np.testing.assert_array_equal(ours, I.orthogonal()(KEY, (9, 4)).astype(dtype))


# Transformations.

KINDS = {
    "zeros": I.zeros,
    "uniform": I.uniform(),
    "normal": I.normal(),
    "truncated_normal": I.truncated_normal(),
    "he_normal": I.he_normal(),
    "he_uniform": I.he_uniform(),
    "orthogonal": I.orthogonal(),
}


def test_jit_gives_what_eager_gives():
    compiled = jax.jit(lambda key: {name: f(key, (24, 10)) for name, f in KINDS.items()})(KEY)
    for name, x in compiled.items():
        # XLA may fold √2 and the deviation into one factor: two roundings. QR: see above.
        eager, atol = KINDS[name](KEY, (24, 10)), 1e-6 if name == "orthogonal" else 0
        np.testing.assert_allclose(x, eager, rtol=2**-22, atol=atol, err_msg=name)


def test_vmap_over_keys_gives_what_a_loop_gives():
    # Only the default kind of key draws the same numbers in a vmap as alone.
    keys = jax.random.split(DEFAULT_KEY, 3)
    some = {name: KINDS[name] for name in ("zeros", "he_normal", "orthogonal")}
    mapped = jax.jit(jax.vmap(lambda key: {name: f(key, (24, 10)) for name, f in some.items()}))(keys)
    for name, x in mapped.items():
        loop = [some[name](key, (24, 10)) for key in keys]
        np.testing.assert_allclose(x, jnp.stack(loop), rtol=2**-22, atol=1e-6 * (name == "orthogonal"))


TRACED = {
    "uniform": I.uniform,
    "normal": I.normal,
    "truncated_normal": I.truncated_normal,
    "constant": I.constant,
    "orthogonal": I.orthogonal,
    "variance_scaling": lambda s: I.variance_scaling(s, "fan_avg", "truncated_normal"),
    "variance_scaling, normal": lambda s: I.variance_scaling(s, "fan_in", "normal"),
    "variance_scaling, uniform": lambda s: I.variance_scaling(s, "fan_out", "uniform"),
}


@pytest.mark.parametrize("name", TRACED)
def test_a_scale_may_be_traced(name):
    f, scales = TRACED[name], (0.5, 1.7)
    mapped = jax.jit(jax.vmap(lambda s: f(s)(KEY, (24, 10))))(jnp.array(scales))
    for x, scale in zip(mapped, scales, strict=True):
        np.testing.assert_allclose(x, f(scale)(KEY, (24, 10)), rtol=2**-21, atol=1e-7)
    half = jax.eval_shape(lambda s: f(s)(KEY, (24, 10), jnp.bfloat16), jnp.float32(0.5))
    assert half.dtype == jnp.bfloat16
    # d/ds of c·s is x/s, of c·√s it is x/(2s).
    slope = jax.jit(jax.jacfwd(lambda s: f(s)(KEY, (24, 10))))(1.7)
    power = 0.5 if name.startswith("variance") else 1
    np.testing.assert_allclose(slope, power * f(1.7)(KEY, (24, 10)) / 1.7, rtol=1e-6)


def test_traced_bounds_of_truncation():
    x = jax.jit(lambda high: I.truncated_normal(1.0, lower=-high, upper=high)(KEY, (24, 10)))(0.5)
    assert 0.4 < float(jnp.abs(x).max()) <= 0.5


def test_empty_shapes():
    for name in ("he_normal", "xavier_uniform"):
        assert getattr(I, name)()(KEY, (0, 4)).shape == (0, 4)
    for f in (I.zeros, I.normal(), I.truncated_normal(), I.orthogonal()):
        assert f(KEY, (4, 0)).shape == (4, 0)
    assert I.fans((0, 4)) == (0, 4)


# Bad input.

DRAWN = {
    "uniform": I.uniform(),
    "normal": I.normal(),
    "truncated_normal": I.truncated_normal(),
    "orthogonal": I.orthogonal(),
    "variance_scaling": I.variance_scaling(1.0, "fan_in", "normal"),
    **{name: getattr(I, name)() for name in list(SCALED)[:6]},
}


@pytest.mark.parametrize("name", DRAWN)
def test_bad_keys(name):
    for key, error, message in (
        (None, TypeError, f"{name} needs a PRNG key and got NoneType: pass jax.random.key"),
        (0, TypeError, f"{name} got the number 0 for a key: pass jax.random.key.0"),
        (
            np.zeros(2, np.uint32),
            TypeError,
            f"{name} got an old-style uint32 key: make it with jax.random.key",
        ),
        (jax.random.split(KEY), ValueError, f"{name} takes one key and got an array of keys"),
    ):
        with pytest.raises(error, match=message):
            DRAWN[name](key, (3, 4))


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, jnp.bool_, jnp.complex64])
def test_dtypes_that_are_not_floating_point(dtype):
    for name, f in {"zeros": I.zeros, "ones": I.ones, "constant": I.constant(1), **DRAWN}.items():
        message = f"{name} needs a floating-point dtype and got {jnp.dtype(dtype).name}: parameters are "
        with pytest.raises(TypeError, match=message + "differentiated, pass jnp.float32 or jnp.bfloat16"):
            f(KEY, (3, 4), dtype)


def test_too_few_axes():
    for name in list(SCALED)[:6]:
        for shape, message in (
            (
                (5,),
                r"shape \(5,\) has no axis in_axis=-2: a kernel is \(..., in, out\). Start biases with zeros",
            ),
            ((), r"shape \(\) has no axis in_axis=-2"),
            (5, r"shape \(5,\) has no axis in_axis=-2"),
        ):
            with pytest.raises(ValueError, match=f"{name}: {message}"):
                getattr(I, name)()(KEY, shape)
    with pytest.raises(ValueError, match=r"orthogonal needs a shape of at least two axes, got \(5,\)"):
        I.orthogonal()(KEY, (5,))
    with pytest.raises(ValueError, match=r"orthogonal: shape \(5, 5\) has no axis column_axis=2"):
        I.orthogonal(column_axis=2)(KEY, (5, 5))


def test_axes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"fans: shape \(3, 4\) has no axis out_axis=2"):
        I.fans((3, 4), out_axis=(1, 2))
    with pytest.raises(ValueError, match=r"has no axis batch_axis=-3"):
        I.fans((3, 4), batch_axis=-3)
    with pytest.raises(
        ValueError, match=r"name an axis of \(50, 8\) twice; for an embedding write in_axis=1"
    ):
        I.fans((50, 8), out_axis=0)
    with pytest.raises(ValueError, match=r"name an axis of \(3, 4\) twice"):
        I.fans((3, 4), batch_axis=1)


@pytest.mark.parametrize("groups", [0, -1, 3, 1.0])
def test_groups_that_do_not_fit(groups):
    with pytest.raises(
        ValueError, match=f"groups={groups} must be a positive int that divides the 64 outputs"
    ):
        I.fans((3, 3, 16, 64), groups=groups)


def test_unknown_names():
    with pytest.raises(
        ValueError, match=r"unknown mode 'fan_inn'; did you mean 'fan_in'.* Known: fan_avg, fan_geo"
    ):
        I.variance_scaling(1.0, "fan_inn", "normal")
    with pytest.raises(
        ValueError, match=r"unknown distribution 'gauss'. Known: normal, truncated_normal, uniform"
    ):
        I.variance_scaling(1.0, "fan_in", "gauss")
    with pytest.raises(ValueError, match="unknown mode 'lecture'"):
        I.xavier_normal(mode="lecture")


def test_bad_scales():
    factories: list[tuple[str, str, Callable]] = [
        ("uniform", "scale", I.uniform),
        ("normal", "stddev", I.normal),
        ("truncated_normal", "stddev", I.truncated_normal),
        ("orthogonal", "scale", I.orthogonal),
        ("variance_scaling", "scale", TRACED["variance_scaling"]),
    ]
    for name, argument, f in factories:
        for value in (-1, -0.5, np.float32(-2), math.nan, math.inf):
            with pytest.raises(
                ValueError, match=f"{name} needs a finite {argument} of at least 0, got {argument}="
            ):
                f(value)
        for value in ("1", None, [1.0], True):
            with pytest.raises(TypeError, match=f"{name} needs a number for {argument}, got {argument}="):
                f(value)
        assert float(jnp.abs(f(0)(KEY, (24, 10))).max()) == 0
    with pytest.raises(
        ValueError, match=r"truncated_normal needs lower < upper, got lower=1.0 and upper=-1.0"
    ):
        I.truncated_normal(lower=1.0, upper=-1.0)


# Wrong implementations of a kernel's initializer, each with the row of VARIANCES that it claims to be.


def wrong(variance: float, draw: Callable) -> Callable:
    return lambda key, shape: draw(key, shape) * math.sqrt(variance)


def cut(key, shape):
    return jax.random.truncated_normal(key, -2, 2, shape)


def even(key, shape):
    return jax.random.uniform(key, shape, minval=-1)


MUTANTS = {
    "fans exchanged": ("he_normal", I.he_normal(-1, -2)),
    "correction of the truncation forgotten": ("he_normal", wrong(2 / 400, cut)),
    "not truncated": ("he_normal", I.he_normal(truncated=False)),
    "truncated": ("he_normal, PyTorch's", I.he_normal()),
    "truncated at 3": (
        "he_normal",
        wrong(2 / 400 / truncated_moment(2, 3), lambda *of: jax.random.truncated_normal(of[0], -3, 3, of[1])),
    ),
    "variance for deviation": ("he_normal", wrong((2 / 400) ** 2 / truncated_moment(2), cut)),
    "deviation for variance": ("xavier_normal, PyTorch's", wrong(math.sqrt(2 / 650), jax.random.normal)),
    "the lecture's variance": ("xavier_normal, PyTorch's", wrong(1 / 650, jax.random.normal)),
    "PyTorch's variance": ("xavier_normal, the lecture's", I.xavier_normal(truncated=False)),
    "deviation for bound": ("he_uniform", wrong(2 / 400, even)),
    "one-sided": ("uniform, symmetric", I.uniform(0.3)),
    "geometric for arithmetic mean": ("fan_avg", I.variance_scaling(3.0, "fan_geo_avg", "normal")),
    "He for LeCun": ("lecun_uniform", I.he_uniform()),
    "one column for all": ("he_normal", lambda key, shape: jnp.tile(I.he_normal()(key, (400, 1)), (1, 250))),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name):
    claim, init = MUTANTS[name]
    _, variance, distribution = VARIANCES[claim]
    with pytest.raises(AssertionError):
        check_moments(init(KEY, KERNEL), math.sqrt(variance), distribution)


@cache
def connections() -> list[tuple[tuple[int, ...], int, tuple[int, int]]]:
    return [((3, 3, 8 // g, 16), g, reached(g, 16)) for g in (1, 2, 8)]


@pytest.mark.parametrize(
    "fans",
    [
        lambda shape, groups: I.fans(shape),  # groups ignored
        lambda shape, groups: (I.fans(shape)[0] // groups, I.fans(shape)[1] // groups),  # twice in fan_in
        lambda shape, groups: I.fans(shape, groups=groups)[::-1],
        lambda shape, groups: I.fans(shape[-2:], groups=groups),  # the window forgotten
        lambda shape, groups: I.fans(
            shape, in_axis=0, out_axis=1, groups=1
        ),  # the window's axes for channels
    ],
)
def test_mutant_fans_are_caught(fans):
    with pytest.raises(AssertionError):
        assert [fans(shape, g) for shape, g, _ in connections()] == [found for *_, found in connections()]
