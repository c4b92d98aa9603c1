"""Activations against closed forms in float64, finite differences, PyTorch and jax.nn."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import special

from nnkit import activations as A

F = torch.nn.functional
HALF, WIDE = (jnp.float16, jnp.bfloat16), (jnp.float32, jnp.float64)


def phi(x):
    return np.exp(-x * x / 2) / np.sqrt(2 * np.pi)


def gelu_tanh(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu_tanh_slope(x):
    c = np.sqrt(2 / np.pi)
    t = np.tanh(c * (x + 0.044715 * x**3))
    return (1 + t) / 2 + x / 2 * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x)


class Row(NamedTuple):
    """One activation: nnkit's, its formula, its derivative's formula, PyTorch's, its limits, its kinks."""

    f: Callable[..., Any]
    formula: Callable[..., Any]
    slope: Callable[..., Any]
    torch: Callable[..., Any]
    low: float  # limit at -inf
    high: float  # limit at +inf
    low_slope: float = 0.0
    high_slope: float = 0.0
    kinks: tuple[float, ...] = ()


S, LAMBDA, ALPHA = special.expit, 1.0507009873554805, 1.6732632423543772
INF = math.inf
ROWS = {
    "identity": Row(A.identity, lambda x: x, np.ones_like, lambda x: x + 0, -INF, INF, 1, 1),
    "relu": Row(A.relu, lambda x: np.maximum(x, 0), lambda x: 1.0 * (x > 0), F.relu, 0, INF, 0, 1, (0,)),
    "relu6": Row(
        A.relu6, lambda x: np.clip(x, 0, 6), lambda x: 1.0 * ((x > 0) & (x < 6)), F.relu6, 0, 6, kinks=(0, 6)
    ),
    "leaky_relu": Row(
        A.leaky_relu,
        lambda x: np.where(x > 0, x, 0.01 * x),
        lambda x: np.where(x >= 0, 1, 0.01),
        F.leaky_relu,
        -INF,
        INF,
        0.01,
        1,
        (0,),
    ),
    "prelu": Row(
        lambda x: A.prelu(x, 0.25),
        lambda x: np.where(x > 0, x, 0.25 * x),
        lambda x: np.where(x >= 0, 1, 0.25),
        lambda x: F.prelu(x, torch.tensor([0.25], dtype=x.dtype)),
        -INF,
        INF,
        0.25,
        1,
        (0,),
    ),
    "elu": Row(
        A.elu,
        lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
        lambda x: np.exp(np.minimum(x, 0)),
        F.elu,
        -1,
        INF,
        0,
        1,
    ),
    "elu(alpha=0.5)": Row(
        lambda x: A.elu(x, 0.5),
        lambda x: np.where(x > 0, x, 0.5 * np.expm1(np.minimum(x, 0))),
        lambda x: np.where(x > 0, 1, 0.5 * np.exp(np.minimum(x, 0))),
        lambda x: F.elu(x, 0.5),
        -0.5,
        INF,
        0,
        1,
        (0,),
    ),
    "selu": Row(
        A.selu,
        lambda x: LAMBDA * np.where(x > 0, x, ALPHA * np.expm1(np.minimum(x, 0))),
        lambda x: LAMBDA * np.where(x > 0, 1, ALPHA * np.exp(np.minimum(x, 0))),
        F.selu,
        -LAMBDA * ALPHA,
        INF,
        0,
        LAMBDA,
        (0,),
    ),
    "celu(alpha=0.5)": Row(
        lambda x: A.celu(x, 0.5),
        lambda x: np.where(x > 0, x, 0.5 * np.expm1(np.minimum(x, 0) * 2)),
        lambda x: np.exp(np.minimum(x, 0) * 2),
        lambda x: F.celu(x, 0.5),
        -0.5,
        INF,
        0,
        1,
    ),
    "log_sigmoid": Row(A.log_sigmoid, lambda x: -np.logaddexp(-x, 0), lambda x: S(-x), F.logsigmoid, -INF, 0, 1, 0),
    "mish": Row(
        A.mish,
        lambda x: x * np.tanh(np.logaddexp(x, 0)),
        lambda x: np.tanh(np.logaddexp(x, 0)) + x * S(x) / np.cosh(np.logaddexp(x, 0)) ** 2,
        lambda x: x * torch.tanh(F.softplus(x, threshold=700)),
        0,
        INF,
        0,
        1,
    ),
    "hard_tanh": Row(
        A.hard_tanh, lambda x: np.clip(x, -1, 1), lambda x: 1.0 * (np.abs(x) <= 1), F.hardtanh, -1, 1, kinks=(-1, 1)
    ),
    "hard_silu": Row(
        A.hard_silu,
        lambda x: x * np.clip(x + 3, 0, 6) / 6,
        lambda x: np.where(np.abs(x) < 3, (2 * x + 3) / 6, x > 0),
        F.hardswish,
        0,
        INF,
        0,
        1,
        (-3, 3),
    ),
    "sigmoid": Row(A.sigmoid, S, lambda x: S(x) * S(-x), torch.sigmoid, 0, 1),
    "hard_sigmoid": Row(
        A.hard_sigmoid,
        lambda x: np.clip(x + 3, 0, 6) / 6,
        lambda x: (np.abs(x) < 3) / 6,
        F.hardsigmoid,
        0,
        1,
        kinks=(-3, 3),
    ),
    "tanh": Row(A.tanh, np.tanh, lambda x: 1 / np.cosh(x) ** 2, torch.tanh, -1, 1),
    "softplus": Row(
        A.softplus, lambda x: np.logaddexp(x, 0), S, lambda x: F.softplus(x, threshold=700), 0, INF, 0, 1
    ),
    "silu": Row(
        A.silu, lambda x: x * S(x), lambda x: S(x) + x * S(x) * S(-x), F.silu, 0, INF, 0, 1
    ),
    "gelu": Row(
        A.gelu, gelu_tanh, gelu_tanh_slope, lambda x: F.gelu(x, approximate="tanh"), 0, INF, 0, 1
    ),
    "gelu(approximate=False)": Row(
        lambda x: A.gelu(x, approximate=False),
        lambda x: x * special.ndtr(x),
        lambda x: special.ndtr(x) + x * phi(x),
        F.gelu,
        0,
        INF,
        0,
        1,
    ),
}  # fmt: skip
OVER_AXIS = {"softmax": (A.softmax, F.softmax), "log_softmax": (A.log_softmax, F.log_softmax)}
names = pytest.mark.parametrize("name", ROWS)

# The kinks are among these points: every library and every docstring says what happens there.
GRID = np.unique(np.concatenate([np.linspace(-15, 15, 601), [-50, -41, -40, -39, 20.5, 39, 40, 41, 50]]))
STEP = 1e-5


def derivatives(functions: Mapping[str, Callable], x: Any) -> dict[str, tuple[jax.Array, ...]]:
    """Values, first and second derivatives at every point, of all functions in one compilation."""

    def all_three(f):
        return [jax.vmap(g)(x) for g in (f, jax.grad(f), jax.grad(jax.grad(f)))]

    return jax.jit(lambda: {name: all_three(f) for name, f in functions.items()})()


@cache
def of_rows(dtype: Any, points: str) -> dict[str, tuple[np.ndarray, ...]]:
    x = {"grid": GRID, "before": GRID - STEP, "behind": GRID + STEP, "extremes": EXTREMES}[points]
    with jax.enable_x64(dtype == jnp.float64):
        found = derivatives({name: row.f for name, row in ROWS.items()}, jnp.asarray(x, dtype))
        return jax.tree.map(np.asarray, found)


EXTREMES = np.array([-INF, -1e4, 1e4, INF])


# The checks of this file, as functions so that the mutants below can be put to them.


def check_closed_form(row: Row, found: tuple[Any, ...], dtype: Any) -> None:
    """Values and derivatives on the grid in float64. What cancels is of the size of x, so the bound is
    as well: 16 roundings (2⁻⁵³ each) of values up to x, and of the x² in a derivative of GELU."""
    bound = 16 * 2.0**-53
    np.testing.assert_array_less(np.abs(found[0] - row.formula(GRID)), bound * np.maximum(1, abs(GRID)))
    np.testing.assert_array_less(np.abs(found[1] - row.slope(GRID)), bound * np.maximum(1, GRID**2))


def check_limits(row: Row, found: tuple[Any, ...], dtype: Any) -> None:
    """At ±1e4 and ±inf: the limits, the limits of the derivative, and second derivatives of 0."""
    big = float(np.asarray(1e4, jnp.dtype(dtype)))
    at = lambda limit, slope, end: limit if math.isfinite(limit) else slope * end
    values = [row.low, at(row.low, row.low_slope, -big), at(row.high, row.high_slope, big), row.high]
    slopes = [row.low_slope, row.low_slope, row.high_slope, row.high_slope]
    # A constant (0.01, λ) is itself rounded to the dtype, and so is its product.
    rtol = 2 * float(jnp.finfo(dtype).eps)
    for got, expected in zip(found, (values, slopes, np.zeros(4)), strict=True):
        np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=rtol)


def check_softmax(f: Callable) -> None:
    x = jnp.array([[-1.0, 0.5, 2.0], [1e4, -1e4, 1e4 - 1]])
    expected = torch.softmax(torch.tensor(np.asarray(x), dtype=torch.float64), -1)
    np.testing.assert_allclose(f(x), expected, atol=2e-7)
    np.testing.assert_array_equal(np.isfinite(jax.jit(jax.jacobian(f))(x)), True)


def check_log_softmax(f: Callable) -> None:
    x = jnp.array([[-1.0, 0.5, 2.0], [100.0, -100.0, 99.0]])
    expected = torch.log_softmax(torch.tensor(np.asarray(x), dtype=torch.float64), -1)
    np.testing.assert_allclose(f(x), expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(np.isfinite(jax.jit(jax.jacobian(f))(x)), True)


@names
def test_values_and_derivatives_are_the_docstring_formulas(name):
    check_closed_form(ROWS[name], of_rows(jnp.float64, "grid")[name], jnp.float64)


@pytest.mark.parametrize("dtype", HALF + WIDE)
@names
def test_limits(name, dtype):
    check_limits(ROWS[name], of_rows(dtype, "extremes")[name], dtype)


@names
def test_derivatives_against_finite_differences(name):
    before, here, behind = (of_rows(jnp.float64, at)[name] for at in ("before", "grid", "behind"))
    # elu's second derivative jumps at 0, where its first is still continuous.
    smooth = np.min([np.abs(GRID - kink) for kink in (*ROWS[name].kinks, 0)], axis=0) > 1e-3
    # 2·h²: a third derivative of at most 12 over 6; roundings of x and of the x² in f' of GELU, over h.
    bound = 2 * STEP**2 + 16 * 2.0**-53 * np.maximum(1, GRID**2) / STEP
    for order in (0, 1):
        numeric = (behind[order] - before[order]) / (2 * STEP)
        np.testing.assert_array_less(np.abs(here[order + 1] - numeric)[smooth], bound[smooth])


OTHER_KINKS = ("leaky_relu", "prelu", "hard_tanh")


@pytest.mark.parametrize("name", [name for name in ROWS if name not in OTHER_KINKS])
def test_pytorch_gives_the_same_values_and_gradients_even_at_kinks(name):
    def theirs(dtype):
        x = torch.tensor(GRID, dtype=dtype, requires_grad=True)
        y = ROWS[name].torch(x)
        return y.detach().numpy(), torch.autograd.grad(y.sum(), x)[0].numpy()

    size = np.maximum(1, np.abs(GRID))
    for torch_type, dtype, eps in (
        (torch.float64, jnp.float64, 2.0**-53),
        (torch.float32, jnp.float32, 2.0**-24),
    ):
        (y, slope), ours = theirs(torch_type), of_rows(dtype, "grid")[name]
        # PyTorch's own derivative of hardsigmoid is a float32 1/6, also in float64.
        coarse = 2.0**-24 if name == "hard_sigmoid" else eps
        # The bounds of check_closed_form, twice: neither side is exact.
        np.testing.assert_array_less(np.abs(ours[0] - y), 32 * eps * size)
        np.testing.assert_array_less(np.abs(ours[1] - slope), 32 * coarse * size**2)


@pytest.mark.parametrize(
    ("name", "jax_s", "pytorch_s"),
    [
        ("leaky_relu", (1,), (0.01,)),
        ("prelu", (1,), (0.25,)),
        ("hard_tanh", (1, 1), (0, 0)),
    ],
)
def test_the_derivative_at_the_kink_is_jax_s_and_not_pytorch_s(name, jax_s, pytorch_s):
    row = ROWS[name]
    points = np.array([-5.0, -2.0, -0.5, 0.5, 2.0, 5.0, *row.kinks], np.float32)
    x = torch.tensor(points, requires_grad=True)
    y = row.torch(x)
    slope = torch.autograd.grad(y.sum(), x)[0].numpy()
    ours = jax.vmap(jax.grad(row.f))(jnp.asarray(points))
    np.testing.assert_array_equal(row.f(jnp.asarray(points)), y.detach())
    np.testing.assert_array_equal(ours[:6], slope[:6])
    np.testing.assert_array_equal(ours[6:], np.float32(jax_s))
    np.testing.assert_array_equal(slope[6:], np.float32(pytorch_s))


def test_kinks():
    at = lambda f, x: float(jax.grad(f)(x))
    assert [at(A.relu, 0.0), at(A.relu6, 0.0), at(A.relu6, 6.0)] == [0, 0, 0]
    assert [at(A.hard_sigmoid, -3.0), at(A.hard_sigmoid, 3.0)] == [0, 0]
    assert [at(A.leaky_relu, 0.0), at(lambda x: A.elu(x, 0.5), 0.0)] == [1, 0.5]
    assert at(A.leaky_relu, 0.0) == at(jax.nn.leaky_relu, 0.0)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32])
def test_jax_nn_gives_the_same_bits_where_both_are_finite(dtype):
    x = jnp.asarray(np.linspace(-30, 30, 1201), dtype)
    for name in ("relu", "relu6", "leaky_relu", "elu", "selu", "sigmoid", "hard_sigmoid", "softplus", "silu",
                 "celu", "mish", "log_sigmoid", "hard_tanh", "hard_silu", "gelu", "softmax",
                 "log_softmax"):  # fmt: skip
        np.testing.assert_array_equal(getattr(A, name)(x), getattr(jax.nn, name)(x), err_msg=name)
    np.testing.assert_array_equal(A.gelu(x, False), jax.nn.gelu(x, False))


def test_gelu_s_gradient_is_finite_where_jax_nn_s_is_not():
    x = jnp.float16(148)
    assert np.isnan(jax.grad(jax.nn.gelu)(x))
    assert float(jax.grad(A.gelu)(x)) == 1


@pytest.mark.parametrize("dtype", HALF)
@names
def test_half_precision_is_a_few_roundings_off(name, dtype):
    given = np.asarray(jnp.asarray(GRID, dtype), np.float64)
    # A factor that cancels, as 1 + tanh in GELU, is off by a rounding of 1 and is then multiplied by x.
    bound = 2 * float(jnp.finfo(dtype).eps) * np.maximum(1, np.abs(given))
    y = np.asarray(of_rows(dtype, "grid")[name][0], np.float64)
    np.testing.assert_array_less(np.abs(y - ROWS[name].formula(given)), bound)


@pytest.mark.parametrize("dtype", HALF + WIDE)
def test_dtype_and_shape_are_kept(dtype):
    with jax.enable_x64(dtype == jnp.float64):
        x = jax.ShapeDtypeStruct((2, 3), dtype)
        for f in [*(row.f for row in ROWS.values()), A.softmax, A.log_softmax]:
            y = jax.eval_shape(f, x)
            assert (y.dtype, y.shape) == (x.dtype, x.shape)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(("f", "value"), [(A.leaky_relu, 0.125), (A.elu, 0.5), (A.prelu, 0.25)])
def test_a_traced_float32_hyper_parameter_keeps_the_dtype_of_x(f, value, dtype):
    x = jnp.array([-2.0, 0.0, 3.0], dtype)
    traced = jax.jit(f)(x, jnp.float32(value))
    assert traced.dtype == dtype
    np.testing.assert_array_equal(traced, f(x, value))
    mapped = jax.vmap(f, (None, 0))(x, jnp.array([value, 0.75]))
    np.testing.assert_array_equal(mapped[0], f(x, value))


def test_slopes_have_a_gradient_even_beside_an_infinity():
    x = jnp.array([-2.0, -1.0, 0.0, 3.0, INF])
    for f in (A.leaky_relu, A.prelu):
        assert float(jax.grad(lambda a, f=f: f(x, a)[:4].sum() + 0 * a)(0.25)) == -3
        assert float(jax.grad(lambda a, f=f: jnp.minimum(f(x, a), 9).sum())(0.25)) == -3
    assert float(jax.grad(lambda a: A.elu(x, a)[:4].sum())(0.25)) == pytest.approx(
        math.expm1(-2) + math.expm1(-1)
    )


def test_prelu_takes_one_slope_a_channel():
    x = np.random.default_rng(0).normal(size=(4, 5, 3)).astype(np.float32)
    slope = np.array([0.1, 0.25, -0.5], np.float32)
    ours = A.prelu(jnp.asarray(x), jnp.asarray(slope))
    # PyTorch's channels are axis 1.
    theirs = F.prelu(torch.tensor(x).movedim(-1, 1), torch.tensor(slope)).movedim(1, -1)
    np.testing.assert_array_equal(ours, theirs)


@names
def test_jit_and_vmap_change_nothing(name):
    x, f = jnp.asarray(GRID, jnp.float32), ROWS[name].f
    # The grid's values are jitted and mapped. Four roundings of what cancels; see check_closed_form.
    error = np.abs(of_rows(jnp.float32, "grid")[name][0] - f(x))
    assert (error <= 4 * 2.0**-24 * np.maximum(1, np.abs(GRID))).all()


def test_nan_stays_nan():
    for name, row in ROWS.items():
        assert np.isnan(row.f(jnp.float32(math.nan))), name


@pytest.mark.parametrize("axis", [-1, 0, (0, 2), None])
@pytest.mark.parametrize("name", OVER_AXIS)
def test_over_an_axis(name, axis):
    with jax.enable_x64(True):
        x = np.random.default_rng(1).normal(size=(3, 4, 5)) * 3
        f, oracle = OVER_AXIS[name]
        axes = tuple(range(3)) if axis is None else axis if isinstance(axis, tuple) else (axis,)
        back = [3 - len(axes) + i for i in range(len(axes))]
        moved = torch.tensor(np.moveaxis(x, axes, back))
        expected = oracle(moved.flatten(3 - len(axes)), -1).reshape(moved.shape)
        np.testing.assert_allclose(
            f(jnp.asarray(x), axis), np.moveaxis(expected.numpy(), back, axes), rtol=1e-13
        )


@pytest.mark.parametrize("name", OVER_AXIS)
def test_gradients_over_an_axis(name):
    f, oracle = OVER_AXIS[name]
    with jax.enable_x64(True):
        x = np.array([0.3, -1.0, 2.0, 1e4]) if name == "softmax" else np.array([0.3, -1.0, 2.0, 40.0])
        expected = torch.autograd.functional.jacobian(lambda x: oracle(x, -1), torch.tensor(x))
        np.testing.assert_allclose(
            jax.jit(jax.jacobian(f))(jnp.asarray(x)), expected, rtol=1e-13, atol=1e-300
        )
        assert np.isfinite(jax.jit(jax.hessian(f))(jnp.asarray(x))).all()


@pytest.mark.parametrize("dtype", HALF + WIDE)
def test_softmax_at_extremes(dtype):
    with jax.enable_x64(dtype == jnp.float64):
        x = jnp.array([-INF, -1e4, 1e4, 1e4], dtype)
        np.testing.assert_array_equal(A.softmax(x), jnp.array([0, 0, 0.5, 0.5], dtype))
        assert float(A.log_softmax(x)[0]) == -INF
        for f in (A.softmax, lambda x: A.log_softmax(x)[1:]):
            for derivative in jax.jit(lambda x, f=f: (jax.jacobian(f)(x), jax.hessian(f)(x)))(x):
                assert np.isfinite(np.asarray(derivative, np.float64)).all()


@pytest.mark.parametrize("axis", [-1, 0])
def test_gates_equal_pytorch_and_need_two_halves(axis):
    with jax.enable_x64(True):
        x = np.random.default_rng(2).normal(size=(4, 3, 6))
        theirs = torch.tensor(x, requires_grad=True)
        expected = F.glu(theirs, axis)
        expected.sin().sum().backward()
        np.testing.assert_allclose(A.glu(jnp.asarray(x), axis), expected.detach(), rtol=1e-13)
        grad = jax.grad(lambda x: jnp.sin(A.glu(x, axis)).sum())(jnp.asarray(x))
        np.testing.assert_allclose(grad, theirs.grad, rtol=1e-12)
        swapped = A.glu(jnp.flip(jnp.asarray(x), axis), axis)
        assert not np.allclose(swapped, expected.detach())
    with pytest.raises(
        ValueError, match=r"glu halves axis 1 and got shape \(4, 3, 6\): give it an even number"
    ):
        A.glu(jnp.asarray(x, jnp.float32), 1)
    assert float(A.glu(jnp.array([2.0, -1e4]))[0]) == 0


@pytest.mark.parametrize("dtype", HALF + WIDE)
def test_exp_is_its_own_derivative(dtype):
    with jax.enable_x64(dtype == jnp.float64):
        x = jnp.asarray(np.linspace(-5, 5, 21), dtype)
        y, slope, curve = derivatives({"exp": A.exp}, x)["exp"]
        expected = np.exp(np.asarray(x, np.float64))
        for got in (y, slope, curve):
            np.testing.assert_allclose(
                np.asarray(got, np.float64), expected, rtol=2 * float(jnp.finfo(dtype).eps)
            )
        ends = [jax.grad(A.exp)(jnp.asarray(end, dtype)) for end in (-INF, -1e4)]
        np.testing.assert_array_equal(np.asarray(ends, np.float64), 0)


@given(st.lists(st.floats(-50, 50, width=32), min_size=6, max_size=6), st.floats(-20, 20, width=32))
def test_softmax_is_a_distribution_that_a_shift_leaves_alone(values, shift):
    with jax.enable_x64(True):
        x = jnp.asarray(values, jnp.float64)
        p = A.softmax(x)
        assert float(p.sum()) == pytest.approx(1, abs=1e-14)
        assert (p >= 0).all()
        np.testing.assert_allclose(A.softmax(x + shift), p, rtol=1e-12)
        np.testing.assert_allclose(jnp.exp(A.log_softmax(x)), p, rtol=1e-12)


@given(st.floats(-60, 60, width=32))
def test_identities_between_activations(value):
    with jax.enable_x64(True):
        x = jnp.float64(value)
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-14)
        close(A.tanh(x), 2 * A.sigmoid(2 * x) - 1)
        close(A.sigmoid(x) + A.sigmoid(-x), 1)
        close(A.softplus(x) - A.softplus(-x), x)
        close(A.silu(x) - A.silu(-x), x)
        close(A.gelu(x, False) - A.gelu(-x, False), x)
        close(A.relu(x) - A.relu(-x), x)


def test_the_numbers_in_the_docstrings():
    with jax.enable_x64(True):
        x = jnp.linspace(-8, 8, 160001)
        span = lambda y: (round(float(y.min()), 4), round(float(y.max()), 4))
        slope_of = lambda f, x: jax.jit(jax.vmap(jax.grad(f)))(x)
        assert span(slope_of(A.silu, x)) == (-0.0998, 1.0998)
        assert round(float(A.silu(x).min()), 4) == -0.2785
        exact = lambda x: A.gelu(x, approximate=False)
        assert tuple(round(v, 3) for v in span(slope_of(exact, x))) == (-0.129, 1.129)
        assert round(float(A.gelu(x).min()), 2) == -0.17
        assert 4e-4 < float(jnp.abs(A.gelu(x) - exact(x)).max()) < 5e-4
        assert round(float(A.mish(x).min()), 4) == -0.3088
        assert span(slope_of(A.mish, x)) == (-0.1125, 1.0885)
        assert span(slope_of(A.sigmoid, x))[1] == 0.25
        assert span(slope_of(A.tanh, x))[1] == 1
        # PyTorch's softplus is x itself above its threshold of 20.
        assert float(F.softplus(torch.tensor(20.5, dtype=torch.float64))) == 20.5
        assert float(A.softplus(jnp.float64(20.5)) - 20.5) == pytest.approx(math.exp(-20.5), rel=1e-5)


FUNCTIONS = {
    name: getattr(A, name) for name in A.__all__ if name not in ("identity", "prelu", "swish")
} | {"prelu": lambda x: A.prelu(x, 0.25)}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_whole_numbers_are_refused_with_what_to_write(name):
    images = np.zeros((2, 28, 28), np.uint8)
    message = (
        rf"{name} needs floating-point numbers and got uint8 of shape \(2, 28, 28\): "
        rf"write {name}\(x.astype\(jnp.float32\)\), for images of 0..255 {name}\(x.astype\(jnp.float32\) / 255\)"
    )
    for f in (FUNCTIONS[name], jax.jit(FUNCTIONS[name])):
        for x in (images, jnp.asarray(images)):
            with pytest.raises(TypeError, match=message):
                f(x)
    for x, got in [(np.arange(3), "int64"), (jnp.array([True]), "bool"), (jnp.ones(2, complex), "complex64")]:
        with pytest.raises(TypeError, match=f"{name} needs floating-point numbers and got {got}"):
            FUNCTIONS[name](x)


def test_identity_takes_anything():
    assert A.identity(images := np.zeros(3, np.uint8)) is images


@pytest.mark.parametrize(("shape", "slope"), [((3, 1), (5,)), ((2, 3), (4,)), ((3,), (2, 3))])
def test_a_slope_that_does_not_fit_is_refused(shape, slope):
    with pytest.raises(
        ValueError, match=r"prelu got a slope of shape .* for x of shape .*: pass a number, or one"
    ):
        A.prelu(jnp.zeros(shape), jnp.zeros(slope))


def test_aliases_and_plain_numbers():
    assert A.swish is A.silu
    number: Any = 2.5
    assert float(A.relu(number)) == 2.5
    with pytest.raises(TypeError, match="relu needs floating-point numbers and got int32 of shape"):
        A.relu(round(number))


# Wrong implementations that the checks above must tell from the right ones.
MUTANTS = [
    ("relu", lambda x: jnp.maximum(x, 0), check_closed_form),  # derivative 1/2 at 0
    ("relu6", lambda x: jnp.clip(x, 0, 6), check_closed_form),
    ("leaky_relu", lambda x: jnp.where(x > 0, x, 0.01 * x), check_closed_form),  # PyTorch's kink
    ("leaky_relu", lambda x: jnp.where(x >= 0, x, 0.2 * x), check_closed_form),
    ("prelu", lambda x: jnp.where(x >= 0, x, 0.01 * x), check_closed_form),
    ("elu", lambda x: jnp.where(x > 0, x, jnp.exp(x) - 1), check_limits),  # inf · 0 in the gradient
    ("elu(alpha=0.5)", A.elu, check_closed_form),
    ("sigmoid", lambda x: 1 / (1 + jnp.exp(-x)), check_limits),
    ("tanh", lambda x: (jnp.exp(x) - jnp.exp(-x)) / (jnp.exp(x) + jnp.exp(-x)), check_limits),
    ("softplus", lambda x: jnp.log1p(jnp.exp(x)), check_limits),
    ("softplus", lambda x: jnp.where(x > 20, x, jnp.logaddexp(x, 0)), check_closed_form),
    ("silu", jax.nn.silu, check_limits),
    ("silu", lambda x: x * A.sigmoid(1.702 * x), check_closed_form),
    ("gelu", jax.nn.gelu, check_limits),
    ("gelu", lambda x: A.gelu(x, approximate=False), check_closed_form),
    ("gelu(approximate=False)", A.gelu, check_closed_form),
    ("celu(alpha=0.5)", lambda x: A.elu(x, 0.5), check_closed_form),
    ("log_sigmoid", lambda x: jnp.log(A.sigmoid(x)), check_limits),
    ("mish", jax.nn.mish, check_limits),
    ("mish", A.silu, check_closed_form),
    ("hard_tanh", lambda x: jnp.clip(x, -1, 1), check_closed_form),
    ("hard_silu", jax.nn.hard_silu, check_limits),
    ("hard_sigmoid", lambda x: jnp.clip(0.2 * x + 0.5, 0, 1), check_closed_form),
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(MUTANTS)))
def test_mutants_are_caught(index):
    name, _, check = MUTANTS[index]
    found, dtype = of_mutants(check)
    with pytest.raises(AssertionError):
        check(ROWS[name], found[str(index)], dtype)


@cache
def of_mutants(check: Callable) -> tuple[dict[str, Any], Any]:
    x, dtype = (EXTREMES, jnp.float16) if check is check_limits else (GRID, jnp.float64)
    with jax.enable_x64(dtype == jnp.float64):
        chosen = {str(i): mutant for i, (_, mutant, for_check) in enumerate(MUTANTS) if for_check is check}
        return jax.tree.map(np.asarray, derivatives(chosen, jnp.asarray(x, dtype))), dtype


@pytest.mark.parametrize(
    ("mutant", "check"),
    [
        (lambda x: jnp.exp(x) / jnp.exp(x).sum(-1, keepdims=True), check_softmax),
        (lambda x: A.softmax(x, 0), check_softmax),
        (lambda x: A.softmax(x, None), check_softmax),
        (lambda x: jnp.log(A.softmax(x)), check_log_softmax),
        (lambda x: x - jnp.log(jnp.exp(x).sum(-1, keepdims=True)), check_log_softmax),
    ],
)
def test_mutants_over_an_axis_are_caught(mutant, check):
    check(A.softmax if check is check_softmax else A.log_softmax)
    with pytest.raises(AssertionError):
        check(mutant)
