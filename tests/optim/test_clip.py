"""Clipping and centring: optax's numbers, float64 oracles, what a clip may never do, wrong ones, bad input."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.transforms
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnkit import optim
from nnkit.optim.clip import unitwise_norm
from tests.optim.oracle import beside, parameters, rough_gradients, smooth_gradients, tree_of, ulps

ROWS: dict[str, Any] = {
    "clip": lambda m: m.clip(0.7),
    "clip_by_global_norm": lambda m: m.clip_by_global_norm(3.0),
    "clip_by_block_rms": lambda m: m.clip_by_block_rms(0.1),
    "adaptive_grad_clip": lambda m: m.adaptive_grad_clip(0.01),
    "adaptive_grad_clip_eps": lambda m: m.adaptive_grad_clip(2.0, 0.5),
    "centralize": lambda m: m.centralize(),
}


@functools.cache
def _optax(row: str) -> Any:
    """One object a row: compiled once, whatever is compared with it."""
    return ROWS[row](optax)


def raises(kind: type[Exception], text: str) -> Any:
    return pytest.raises(kind, match=f"^{re.escape(text)}$")


@functools.cache
def gradients(dtype: Any, steps: int = 200) -> list[Any]:
    """Rough ones, with and without 1e20, whose square is inf; and norms above and below the bounds."""
    n = steps // 4
    rough, smooth = rough_gradients(dtype, 2 * n), smooth_gradients(dtype, 2 * n)
    finite = jax.tree.map(lambda g: jnp.where(jnp.abs(g) > 1e17, 0, g), rough[n:])
    small = jax.tree.map(lambda g: g * jnp.asarray(0.01, dtype), smooth[n:])
    return rough[:n] + finite + smooth[:n] + small


def complex_tree(seed: int) -> Any:
    return jax.tree.map(jax.lax.complex, parameters(jnp.float32, seed), parameters(jnp.float32, seed + 1))


def check(ours: Any, theirs: Any, dtype: Any = jnp.float32, max_ulps: int = 2, steps: int = 200) -> None:
    updates, their_updates, states, their_states = beside(
        ours, theirs, parameters(dtype), gradients(dtype, steps)
    )
    assert ulps(updates, their_updates) <= max_ulps
    assert states == their_states == optim.EmptyState()


@pytest.mark.parametrize("name", ROWS)
def test_float32_within_2_ulp_of_optax(name: str) -> None:
    check(ROWS[name](optim), _optax(name))


@pytest.mark.parametrize("name", ROWS)
def test_float64_equals_optax(name: str) -> None:
    with jax.enable_x64(True):
        params, grads = parameters(jnp.float64), gradients(jnp.float64)
        updates, their_updates, _, _ = beside(ROWS[name](optim), _optax(name), params, grads)
        for x, y in zip(jax.tree.leaves(updates), jax.tree.leaves(their_updates), strict=True):
            assert x.dtype == np.float64
            np.testing.assert_allclose(x, y, rtol=1e-12, atol=0)


def _in_float64(name: str, dtype: Any) -> Any:
    """What the formulas give for gradients of ``dtype`` in float64, and optax's in ``dtype``."""
    params, grads = parameters(dtype), smooth_gradients(dtype, 20)
    updates, theirs, _, _ = beside(ROWS[name](optim), _optax(name), params, grads)
    with jax.enable_x64(True):
        double = lambda t: jax.tree.map(lambda x: np.asarray(x).astype(np.float64), t)
        exact = beside(ROWS[name](optim), _optax(name), double(params), [double(g) for g in grads])[1]
    return updates, exact, theirs


@pytest.mark.parametrize(
    "name", ["clip_by_global_norm", "clip_by_block_rms", "adaptive_grad_clip", "centralize"]
)
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_is_rounded_once(name: str, dtype: Any) -> None:
    """Within half an ulp of the formula; optax, which rounds the norm too, is up to 3 ulp from that."""
    updates, exact, theirs = _in_float64(name, dtype)
    rounded = jax.tree.map(lambda x: np.asarray(jnp.asarray(x.astype(np.float32)).astype(dtype)), exact)
    for u, e, x, t in zip(*map(jax.tree.leaves, (updates, rounded, exact, theirs)), strict=True):
        # After a mean is taken off, an ulp is one of what it was taken from, which is below 8.
        slack = 8 * 2.0**-23 if name == "centralize" else 0
        gap = np.abs(
            (np.spacing(np.abs(e)) if dtype == jnp.float16 else e * e.dtype.type(2.0**-7)).astype(np.float64)
        )
        assert (np.abs(u.astype(np.float64) - x) <= 0.51 * gap + slack).all()
        np.testing.assert_allclose(
            t.astype(np.float64), x, rtol=4 * 2.0 ** (-7 if dtype == jnp.bfloat16 else -10), atol=0.1
        )


def test_float16_norms_do_not_overflow() -> None:
    """Optax sums the squares in float16 and makes 0 of gradients above 255."""
    grads = {"w": jnp.array([300.0, 400.0], jnp.float16)}
    assert float(optim.global_norm(grads)) == 500
    for name in ("clip_by_global_norm", "clip_by_block_rms", "adaptive_grad_clip"):
        tx, theirs = getattr(optim, name)(1.0), getattr(optax, name)(1.0)
        updates, _ = tx.update(grads, tx.init(grads), {"w": jnp.array([0.3, 0.4], jnp.float16)})
        assert 0.4 < float(optim.global_norm(updates)) < 1.5
        with jax.numpy_dtype_promotion("standard"):
            zeros, _ = theirs.update(grads, theirs.init(grads), {"w": jnp.ones(2, jnp.float16)})
        assert not zeros["w"].any()


@pytest.mark.filterwarnings("ignore:optax.global_norm:DeprecationWarning")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.complex64])
def test_global_norm_is_optax(dtype: Any) -> None:
    tree = complex_tree(3) if dtype == jnp.complex64 else parameters(dtype)
    assert ulps(optim.global_norm(tree), optax.global_norm(tree)) <= 1
    assert float(optim.global_norm({})) == float(optim.global_norm({"a": None})) == 0
    with jax.numpy_dtype_promotion("standard"):
        mixed = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2)}
        assert ulps(optim.global_norm(mixed), optax.global_norm(mixed)) == 0


@pytest.mark.parametrize("name", ["clip_by_global_norm", "clip_by_block_rms", "adaptive_grad_clip"])
def test_complex_numbers_as_in_optax(name: str) -> None:
    z = complex_tree(3)
    updates, theirs, _, _ = beside(ROWS[name](optim), _optax(name), z, [z])
    for x, y in zip(jax.tree.leaves(updates), jax.tree.leaves(theirs), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=1e-6)


@pytest.mark.parametrize(
    "shape", [(), (1, 4), (3, 4), (2, 3, 4), (2, 3, 2, 4), (2, 2, 2, 3, 4), (1, 1, 1, 1, 1, 5)]
)
def test_unit_norms_are_optax(shape: tuple[int, ...]) -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    assert ulps(unitwise_norm(x), optax.transforms.unitwise_norm(x)) <= 1
    if len(shape) > 2:
        assert ulps(unitwise_norm(x, (0, 1)), optax.transforms.unitwise_norm(x, (0, 1))) <= 1
    params = {"w": x, "b": jnp.ones(3)}
    grads = jax.tree.map(lambda p: 10 * p + 1, params)
    a, _ = optim.adaptive_grad_clip(0.1).update(grads, optim.EmptyState(), params)
    b, _ = optax.adaptive_grad_clip(0.1).update(grads, optax.EmptyState(), params)
    assert ulps(a, b) <= 3  # not compiled: a norm may differ by an ulp


def test_units_of_the_paper() -> None:
    """``unit_axis=-1`` is optax's centring of the transposed kernels."""
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 5)), jnp.float32)
    ours, _ = optim.centralize(unit_axis=-1).update({"w": kernel}, optim.EmptyState())
    moved, _ = optax.centralize().update({"w": jnp.moveaxis(kernel, -1, 0)}, optax.EmptyState())
    np.testing.assert_allclose(ours["w"], jnp.moveaxis(moved["w"], 0, -1), atol=1e-6)
    np.testing.assert_allclose(ours["w"].mean((0, 1)), jnp.zeros(5), atol=1e-6)


numbers = st.floats(-(2.0**59), 2.0**59, width=32, allow_subnormal=False)
trees = st.lists(st.lists(numbers, min_size=4, max_size=4), min_size=2, max_size=2)


@given(trees, st.floats(0, 2.0**59, width=32, allow_subnormal=False))
def test_a_clip_never_increases_a_norm(leaves: list[list[float]], bound: float) -> None:
    """Not by rounding either, and no element; and the norm is brought to the bound."""
    grads = [jnp.array(leaf, jnp.float32) for leaf in leaves]
    for tx in (optim.clip_by_global_norm(bound), optim.clip_by_block_rms(bound), optim.clip(bound)):
        updates, _ = tx.update(grads, tx.init(grads))
        for g, u in zip(grads, updates, strict=True):
            assert (jnp.abs(u) <= jnp.abs(g)).all()
            assert (u * g >= 0).all()
        assert optim.global_norm(updates) <= optim.global_norm(grads)
    updates, _ = optim.clip_by_global_norm(bound).update(grads, optim.EmptyState())
    before, after = float(optim.global_norm(grads)), float(optim.global_norm(updates))
    if before <= bound:
        assert ulps(updates, grads) == 0
    elif bound > 1e-12:
        np.testing.assert_allclose(after, bound, rtol=1e-6)


@given(trees, trees, st.floats(0, 10, width=32, allow_subnormal=False))
def test_adaptive_clipping_never_increases_an_element(a: Any, b: Any, ratio: float) -> None:
    grads = [jnp.array(leaf, jnp.float32) for leaf in a]
    params = [jnp.array(leaf, jnp.float32) for leaf in b]
    updates, _ = optim.adaptive_grad_clip(ratio).update(grads, optim.EmptyState(), params)
    for g, u in zip(grads, updates, strict=True):
        assert (jnp.abs(u) <= jnp.abs(g)).all()


@pytest.mark.parametrize("bad", [jnp.inf, -jnp.inf, jnp.nan])
@pytest.mark.parametrize("name", ["clip", "clip_by_global_norm", "clip_by_block_rms", "adaptive_grad_clip"])
def test_inf_and_nan_as_in_optax(name: str, bad: float) -> None:
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    grads = {"a": jnp.array([1.0, bad, 2.0]), "b": jnp.array([5.0, 0.0])}
    ours, theirs = ROWS[name](optim), _optax(name)
    updates, _ = ours.update(grads, ours.init(params), params)
    their_updates, _ = theirs.update(grads, theirs.init(params), params)
    assert ulps(updates, their_updates) <= 1


def test_no_norm_and_no_bound() -> None:
    """optax gives NaN: 0/0 for the bound 0, inf/inf for the bound inf."""
    zeros, inf = {"w": jnp.zeros(2)}, {"w": jnp.array([1.0, jnp.inf])}
    for name in ("clip_by_global_norm", "clip_by_block_rms"):
        ours, theirs = getattr(optim, name), getattr(optax, name)
        assert ulps(ours(0.0).update(zeros, ())[0], zeros) == 0
        assert ulps(ours(jnp.inf).update(inf, ())[0], inf) == 0
        assert jnp.isnan(theirs(0.0).update(zeros, ())[0]["w"]).all()
        assert jnp.isnan(theirs(jnp.inf).update(inf, ())[0]["w"]).any()


@pytest.mark.parametrize("name", ["clip", "clip_by_global_norm", "clip_by_block_rms", "adaptive_grad_clip"])
def test_traced_bounds_map(name: str) -> None:
    params, grads = parameters(jnp.float32), smooth_gradients(jnp.float32, 1)[0]
    make = getattr(optim, name)

    def run(bound: Any) -> Any:
        return make(bound).update(grads, optim.EmptyState(), params)[0]

    bounds = [0.0, 0.1, 3.0, 1e4]
    mapped = jax.jit(jax.vmap(run))(jnp.array(bounds))
    for i, bound in enumerate(bounds):
        for x, y in zip(
            jax.tree.leaves(mapped), jax.tree.leaves(jax.jit(lambda b=bound: run(b))()), strict=True
        ):
            np.testing.assert_allclose(x[i], y, rtol=1e-6)
    low = jax.tree.map(lambda g: g.astype(jnp.bfloat16), grads)
    out, _ = make(jnp.float32(0.1)).update(low, optim.EmptyState(), low)
    assert {u.dtype for u in jax.tree.leaves(out)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("name", ["clip_by_global_norm", "clip_by_block_rms", "adaptive_grad_clip"])
def test_derivatives_where_there_is_no_gradient(name: str) -> None:
    """Through a whole run, as hypergradients need it; optax's are NaN."""

    def loss(g: Any, bound: Any, m: Any) -> Any:
        return jnp.sum(getattr(m, name)(bound).update({"w": g}, (), {"w": jnp.ones(2)})[0]["w"])

    for bound in (0.5, 0.0):
        for g in (jnp.zeros(2), jnp.array([1.0, 0.0])):
            assert jnp.isfinite(jnp.array(jax.grad(loss, (0, 1))(g, bound, optim)[0])).all()
    assert jax.grad(loss)(jnp.zeros(2), 0.5, optim).tolist() == [1, 1]
    assert jnp.isnan(jax.grad(loss)(jnp.zeros(2), 0.5, optax)).all()


def _by_each_leafs_norm(bound: float) -> Any:
    return optim.GradientTransformation(
        lambda p: optim.EmptyState(),
        lambda u, s, p=None, **_: ([optim.clip_by_global_norm(bound).update([x], s)[0][0] for x in u], s),
    )


def _leaves(change: Any) -> Any:
    """A transformation that is ``change`` of the list of leaves and the parameters' leaves."""

    def update(u: Any, s: Any, p: Any = None, **_: Any) -> Any:
        leaves, structure = jax.tree.flatten(u)
        return structure.unflatten(change(leaves, jax.tree.leaves(p))), s

    return optim.GradientTransformation(lambda p: optim.EmptyState(), update)


def _norm(leaves: list[Any]) -> Any:
    return jnp.sqrt(sum(jnp.sum(x**2) for x in leaves))


MUTANTS: dict[str, tuple[str, Any]] = {
    "each leaf by its own norm": (
        "clip_by_global_norm",
        _leaves(lambda u, p: [x * jnp.minimum(1, 3 / (_norm([x]) + 1e-30)) for x in u]),
    ),
    "always to the bound": ("clip_by_global_norm", _leaves(lambda u, p: [x * (3 / _norm(u)) for x in u])),
    "the squared norm": (
        "clip_by_global_norm",
        _leaves(lambda u, p: [x * jnp.minimum(1, 3 / _norm(u) ** 2) for x in u]),
    ),
    "PyTorch's 1e-6": (
        "clip_by_global_norm",
        _leaves(lambda u, p: [x * jnp.minimum(1, 3 / (_norm(u) + 1e-6)) for x in u]),
    ),
    "from above only": ("clip", _leaves(lambda u, p: [jnp.minimum(x, 0.7) for x in u])),
    "the norm, not the mean": (
        "clip_by_block_rms",
        _leaves(lambda u, p: [x / jnp.maximum(1, _norm([x]) / 0.1) for x in u]),
    ),
    "all units together": (
        "adaptive_grad_clip",
        _leaves(
            lambda u, p: [
                x * jnp.minimum(1, 0.01 * jnp.maximum(_norm([y]), 1e-3) / jnp.maximum(_norm([x]), 1e-6))
                for x, y in zip(u, p, strict=True)
            ]
        ),
    ),
    "without eps": ("adaptive_grad_clip", optim.adaptive_grad_clip(0.01, 0.0)),
    "the other axis": ("centralize", optim.centralize(unit_axis=-1)),
    "vectors centred too": ("centralize", _leaves(lambda u, p: [x - x.mean() if x.size else x for x in u])),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str) -> None:
    row, mutant = MUTANTS[name]
    params = tree_of(lambda i, shape: jnp.zeros(shape)) if name == "without eps" else parameters(jnp.float32)
    updates, theirs, _, _ = beside(mutant, _optax(row), params, gradients(jnp.float32, 20))
    with pytest.raises(AssertionError):
        assert ulps(updates, theirs) <= 2


@pytest.mark.parametrize(
    ("make", "name", "why"),
    [
        (optim.clip, "max_delta", "it is the largest magnitude that an element may have"),
        (optim.clip_by_global_norm, "max_norm", "it is the largest norm that the updates may have"),
        (optim.clip_by_block_rms, "threshold", "it is the largest root mean square of a leaf"),
    ],
)
def test_negative_and_missing_bounds(make: Any, name: str, why: str) -> None:
    for value in (-1.0, float("nan")):
        with raises(ValueError, f"{name} must be in [0, inf], got {value}: {why}"):
            make(value)
    with raises(TypeError, f"{name} must be a number or a scalar array, got None: {why}"):
        make(None)
    with raises(
        ValueError, f"{name} must be a scalar, got an array of shape (2,): map over its values with jax.vmap"
    ):
        make(jnp.ones(2))


def test_bad_adaptive_clipping() -> None:
    with raises(ValueError, "clipping must be in [0, inf), got -1.0: it is a ratio of norms"):
        optim.adaptive_grad_clip(-1.0)
    with raises(ValueError, "eps must be in [0, inf), got nan"):
        optim.adaptive_grad_clip(0.1, float("nan"))
    tx, params = optim.adaptive_grad_clip(0.1), {"w": jnp.ones(3)}
    text = "adaptive_grad_clip needs the parameters: call update(grads, opt_state, params) with params"
    with raises(ValueError, text):
        tx.update(params, tx.init(params))
    form = "gradients, optimizer state and parameters must be trees of one form"
    with raises(ValueError, f"adaptive_grad_clip: params has b, which updates has not; {form}"):
        tx.update(params, tx.init(params), {"w": jnp.ones(3), "b": jnp.ones(3)})
    with raises(
        ValueError, f"adaptive_grad_clip: updates has shape (3,) at w, params has shape (1,); {form}"
    ):
        tx.update(params, tx.init(params), {"w": jnp.ones(1)})
    many = {"w": jnp.ones((2,) * 6)}
    text = (
        "a parameter of shape (2, 2, 2, 2, 2, 2) has more than five axes, of which the units are not known: "
        "say what to sum over, axis=(0, 1) for instance"
    )
    with raises(ValueError, text):
        tx.update(many, tx.init(many), many)


def test_other_bad_input() -> None:
    with raises(TypeError, "clip: complex numbers have no order: use clip_by_global_norm"):
        optim.clip(1.0).update({"w": jnp.ones(2, jnp.complex64)}, optim.EmptyState())
    with raises(TypeError, "unit_axis must be an integer, 0 or -1 for instance, got 'in'"):
        optim.centralize(unit_axis="in")  # pyright: ignore[reportArgumentType]
    for tx, where in ((optim.clip(1.0), "clip"), (optim.centralize(), "centralize")):
        with pytest.raises(TypeError, match=f"{where}: updates has dtype int32 at w: only floating-point"):
            tx.update({"w": jnp.ones(2, jnp.int32)}, optim.EmptyState())
        with pytest.raises(TypeError, match=f"{where}: params has dtype int32 at w: only floating-point"):
            tx.init({"w": jnp.ones(2, jnp.int32)})


def test_parameters_without_a_gradient() -> None:
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones(3)}
    for row in ROWS.values():
        tx = row(optim)
        updates, _ = tx.update({"a": params["a"], "b": None}, tx.init(params), params)
        assert updates["b"] is None
        assert updates["a"].shape == (2, 2)
