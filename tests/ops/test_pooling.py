"""Pooling against lax.reduce_window in float64, its derivatives of both orders, and PyTorch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnkit import ops
from nnkit.ops import pooling_windows


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


# sizes, window, strides, padding
CASES = {
    "halving": ((6, 4), (2, 2), (2, 2), ((0, 0), (0, 0))),
    "odd": ((7, 5), (2, 3), (2, 3), ((1, 0), (0, 0))),
    "overlapping": ((7, 6), (3, 3), (2, 2), ((1, 1), (0, 1))),
    "dense": ((4, 5), (3, 2), (1, 1), ((1, 1), (1, 0))),
    "gaps": ((8, 7), (2, 1), (3, 2), ((0, 0), (0, 0))),
    "axis by axis": ((7, 9), (5, 4), (2, 3), ((2, 2), (1, 2))),
    "line": ((9,), (3,), (2,), ((1, 1),)),
    "volume": ((3, 4, 3), (2, 2, 2), (1, 2, 2), ((0, 1), (0, 0), (1, 0))),
    "cut": ((8, 7), (2, 3), (2, 2), ((-1, 0), (1, -2))),
    "long": ((70,), (66,), (2,), ((0, 0),)),
    "none": ((2, 3), (3, 2), (1, 1), ((0, 0), (0, 0))),
}


def reference(x, start, f, window, strides, padding):
    x = jax.lax.pad(x, start, [(0, 0, 0), *((*p, 0) for p in padding), (0, 0, 0)])
    return jax.lax.reduce_window(x, start, f, (1, *window, 1), (1, *strides, 1), "VALID")


POOLS = {
    "max": (ops.max_pool, lambda x, *w: reference(x, -np.inf, jax.lax.max, *w)),
    "min": (ops.min_pool, lambda x, *w: reference(x, np.inf, jax.lax.min, *w)),
    "sum": (ops.sum_pool, lambda x, *w: reference(x, 0.0, jax.lax.add, *w)),
    "avg": (ops.avg_pool, lambda x, *w: reference(x, 0.0, jax.lax.add, *w) / float(np.prod(w[0]))),
}


def data(sizes: tuple[int, ...], kind: str) -> jax.Array:
    """Random numbers; or few different ones, so that most windows have several that are equal."""
    x = np.random.default_rng(0).normal(size=(3, *sizes, 2))
    return jnp.asarray(np.round(x) if kind == "ties" else x)


def close(ours: Any, theirs: Any, tolerance: float = 1e-12) -> None:
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def derivatives(pool: Any, x: jax.Array) -> Any:
    def gradient(x):
        return jax.grad(lambda x: jnp.sum(jnp.sin(pool(x)) * pool(x)))(x)

    return (
        pool(x),
        gradient(x),
        jax.jvp(pool, (x,), (jnp.cos(x),))[1],
        jax.jvp(gradient, (x,), (jnp.cos(x),))[1],
    )


def both(pool: str, case: str, kind: str = "random", run: Any = derivatives) -> Any:
    sizes, window, strides, padding = CASES[case]
    ours, theirs = POOLS[pool]
    fast = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(
        lambda x: (
            run(lambda x: ours(x, window, strides=strides, padding=padding), x),
            run(lambda x: theirs(x, window, strides, padding), x),
        ),
        compiler_options=fast,
    )(data(sizes, kind))


@pytest.mark.parametrize("case", CASES)
def test_maxima_equal_laxs_with_first_and_second_derivatives(case):
    close(*both("max", case))


@pytest.mark.parametrize("case", ["halving", "overlapping", "axis by axis"])
@pytest.mark.parametrize("pool", ["max", "min"])
def test_the_first_of_equal_elements_takes_the_gradient(pool, case):
    close(*both(pool, case, "ties"))


@pytest.mark.parametrize("case", [c for c in CASES if c != "long"])
def test_sums_equal_laxs_with_first_and_second_derivatives(case):
    close(*both("sum", case))


def mapped(pool: Any, x: jax.Array) -> Any:
    """Mapped over x, over the cotangent alone, and over another axis than the first."""
    back = jax.vjp(pool, x)[1]
    seeds = jnp.stack([jnp.cos(pool(x)), pool(x)])
    along = jax.vmap(lambda x: jax.grad(lambda x: jnp.sum(jnp.sin(pool(x))))(x), -1, -1)(
        jnp.stack([x, -x], -1)
    )
    return jax.vmap(back)(seeds), along


@pytest.mark.parametrize(("pool", "case"), [("max", "overlapping"), ("avg", "odd")])
def test_vmap_equals_laxs(pool, case):
    close(*both(pool, case, run=mapped))


def scanned(pool: Any, x: jax.Array) -> Any:
    def step(x, scale):
        return x - jax.grad(jax.checkpoint(lambda x: jnp.sum(pool(x * scale) ** 2)))(x), None

    return jax.lax.scan(step, x, jnp.asarray([0.1, 0.2]))[0]


def test_within_a_scan_and_a_remat_it_is_the_same():
    close(*both("max", "halving", run=scanned))


@pytest.mark.parametrize("case", ["overlapping", "odd", "dense"])
def test_pytorchs_pools(case):
    torch = pytest.importorskip("torch")
    sizes, window, strides, padding = CASES[case]
    padding = tuple((min(p), min(p)) for p in padding)
    x, options = data(sizes, "ties"), {"strides": strides, "padding": padding}
    before = tuple(p for p, _ in padding)
    f = torch.nn.functional
    theirs = {
        "max": lambda t: f.max_pool2d(t, window, strides, before),
        "avg": lambda t: f.avg_pool2d(t, window, strides, before),
        "avg of what is there": lambda t: f.avg_pool2d(t, window, strides, before, count_include_pad=False),
    }
    ours = {
        "max": lambda x: ops.max_pool(x, window, **options),
        "avg": lambda x: ops.avg_pool(x, window, **options),
        "avg of what is there": lambda x: ops.avg_pool(x, window, count_include_pad=False, **options),
    }
    for name in theirs:
        t = torch.tensor(np.asarray(x).transpose(0, 3, 1, 2), requires_grad=True)
        expected = theirs[name](t)
        expected.square().sum().backward()
        y, back = jax.vjp(ours[name], x)
        result = (y, back(2 * y)[0])
        close(result, [v.detach().numpy().transpose(0, 2, 3, 1) for v in (expected, t.grad)])


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float32, np.int32, np.uint8], ids=str)
def test_every_dtype_is_kept(dtype):
    x = jnp.asarray(np.arange(24).reshape(1, 4, 6, 1) % 7, dtype)
    options = {"strides": (2, 3), "padding": ((0, 0), (1, -1))}
    for pool, f in ((ops.max_pool, np.max), (ops.min_pool, np.min), (ops.sum_pool, np.sum)):
        y = pool(x, (2, 2), **options)
        assert y.dtype == dtype
        inner = np.asarray(x, np.float64)[0, :, :, 0]
        expected = [[f(inner[i : i + 2, max(j, 0) : j + 2]) for j in (-1, 2)] for i in (0, 2)]
        np.testing.assert_array_equal(np.asarray(y, np.float64)[0, :, :, 0], expected)


def test_half_precision_is_summed_in_float32():
    """300 ones: one by one in bfloat16 they would stop at 256."""
    x = jnp.ones((1, 300, 1), jnp.bfloat16)
    assert float(ops.sum_pool(x, (300,), strides=(300,), padding=((0, 0),))[0, 0, 0]) == 300


def test_a_nan_is_kept_and_takes_the_gradient_and_minus_infinity_is_no_nan():
    x = jnp.asarray([1.0, np.nan, 3.0, np.nan, -np.inf, -np.inf, 2.0, -np.inf]).reshape(1, 8, 1)

    def pool(x):
        return ops.max_pool(x, (2,), strides=(2,), padding=((0, 0),))

    y, back = jax.vjp(pool, x)
    np.testing.assert_array_equal(y.ravel(), [np.nan, np.nan, -np.inf, 2])
    np.testing.assert_array_equal(back(jnp.ones_like(y))[0].ravel(), [0, 1, 0, 1, 1, 0, 1, 0])
    wide = ops.max_pool(x, (2,), strides=(2,), padding=((2, 0),))
    np.testing.assert_array_equal(
        wide.ravel(), reference(x, -np.inf, jax.lax.max, (2,), (2,), ((2, 0),)).ravel()
    )


WRONG = {
    "all of equal elements": ("max", "halving", "_is_it", lambda x, y: x >= y - 2),
    "the last element": ("max", "overlapping", "_elements", lambda *a: _elements(*a)[::-1]),
    "blocks in the wrong order": ("sum", "gaps", "_from_blocks", lambda f, *a: _from_blocks(f, *a)[:, ::-1]),
}
_elements, _from_blocks = pooling_windows._elements, pooling_windows._from_blocks


@pytest.mark.parametrize("mutant", WRONG)
def test_a_wrong_pool_is_caught(mutant, monkeypatch):
    pool, case, function, wrong = WRONG[mutant]
    monkeypatch.setattr(pooling_windows, function, wrong)
    results = both(pool, case)
    with pytest.raises(AssertionError):
        close(*results)


@pytest.mark.parametrize("pool", ["max_pool", "min_pool", "sum_pool", "avg_pool"])
def test_errors_say_what_arrived(pool):
    x, f = jnp.ones((1, 4, 4, 2)), getattr(ops, pool)
    good: dict[str, Any] = {"window": (2, 2), "strides": (2, 2), "padding": ((0, 0), (0, 0))}
    for change, text in (
        (
            {"window": (2,)},
            rf"{pool} takes window of one positive integer .* got \(2,\) for x of shape \(1, 4, 4, 2\)",
        ),
        ({"strides": (0, 1)}, rf"{pool} takes strides of one positive integer .* got \(0, 1\)"),
        ({"padding": "SAME"}, rf"{pool} takes padding as 2 pairs .* got 'SAME'"),
    ):
        with pytest.raises(ValueError, match=text):
            f(x, **{**good, **change})


def test_an_average_of_integers_is_refused():
    with pytest.raises(TypeError, match="avg_pool takes floats, got int32"):
        ops.avg_pool(jnp.ones((1, 4, 1), np.int32), (2,), strides=(2,), padding=((0, 0),))


def test_a_program_does_not_grow_with_a_long_window():
    def gradient(x, k):
        return jax.grad(lambda x: jnp.sum(ops.max_pool(x, (k,), strides=(k,), padding=((0, 0),))))(x)

    lowered = jax.jit(gradient, static_argnums=1).lower(jnp.ones((1, 512, 1)), 512)
    assert len(lowered.as_text()) < 20_000


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("count_include_pad", [True, False])
def test_a_mean_in_half_precision_neither_overflows_nor_stands_still(dtype, count_include_pad):
    x = jnp.full((1, 32, 32, 1), 100, dtype)
    every = {"strides": (32, 32), "padding": ((0, 0), (0, 0))}
    y = ops.avg_pool(x, (32, 32), **every, count_include_pad=count_include_pad)
    assert y.dtype == dtype
    assert float(y[0, 0, 0, 0]) == 100
