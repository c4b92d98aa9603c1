"""Updates that are dropped or cleaned: optax's numbers and counts, wrong ones, bad input."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnkit import optim
from tests.optim.oracle import beside, fields_of, parameters, rough_gradients, smooth_gradients, stack, ulps

NAN, INF = float("nan"), float("inf")


def raises(kind: type[Exception], text: str) -> Any:
    return pytest.raises(kind, match=f"^{re.escape(text)}$")


def spoilt(dtype: Any, steps: int, values: tuple[float, ...] = (NAN, INF, -INF)) -> list[Any]:
    """Rough gradients, runs of which have one bad number."""
    rng, grads = np.random.default_rng(5), rough_gradients(dtype, steps)
    for step in range(steps):
        if step % 9 in (2, 3, 5, 6, 7, 8):
            bias = grads[step]["dense_0"]["bias"]
            grads[step]["dense_0"]["bias"] = bias.at[rng.integers(129)].set(values[step % len(values)])
    return grads


ROWS: dict[str, Any] = {
    "zero_nans": lambda m: m.zero_nans(),
    "set_to_zero": lambda m: m.set_to_zero(),
    "apply_if_finite": lambda m: m.apply_if_finite(m.adam(0.1), 2),
    "apply_if_finite_never": lambda m: m.apply_if_finite(m.sgd(0.1, 0.9), 0),
    "apply_if_finite_always": lambda m: m.apply_if_finite(m.chain(m.zero_nans(), m.ema(0.9)), 1000),
}


def check(ours: Any, theirs: Any, dtype: Any = jnp.float32, steps: int = 200) -> None:
    params, grads = parameters(dtype), spoilt(dtype, steps)
    assert ulps(ours.init(params), theirs.init(params)) == 0
    updates, their_updates, states, their_states = beside(ours, theirs, params, grads)
    assert ulps(updates, their_updates) <= 2
    assert ulps(states, their_states) == 0  # of counts and flags one is far
    assert fields_of(ours.init(params)) == fields_of(theirs.init(params))


@pytest.mark.parametrize("name", ROWS)
def test_float32_within_2_ulp_a_step(name: str) -> None:
    check(ROWS[name](optim), ROWS[name](optax))


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
def test_other_dtypes_are_optax(name: str, dtype: Any) -> None:
    with jax.enable_x64(dtype == jnp.float64):
        check(ROWS[name](optim), ROWS[name](optax), dtype, 40)


def test_nothing_of_a_dropped_update_is_left() -> None:
    """Over a whole run: the one without the bad steps."""
    grads = smooth_gradients(jnp.float32, 12)
    bad = jax.tree.map(lambda g: g * NAN, grads[0])
    tx, plain = optim.apply_if_finite(optim.adam(0.1), 3), optim.adam(0.1)
    state, inner = tx.init(grads[0]), plain.init(grads[0])
    for i, grad in enumerate(grads):
        updates, state = jax.jit(tx.update)(bad, state)
        assert all(not u.any() for u in jax.tree.leaves(updates))
        assert int(state.total_notfinite) == i + 1
        updates, state = jax.jit(tx.update)(grad, state)
        expected, inner = jax.jit(plain.update)(grad, inner)
        assert ulps(updates, expected) == ulps(state.inner_state, inner) == 0


PLAIN = [jax.jit(optim.apply_if_finite(optim.scale(2.0), most).update) for most in range(4)]
TRACED = jax.jit(lambda u, s, most: optim.apply_if_finite(optim.scale(2.0), most).update(u, s))


@given(st.lists(st.booleans(), max_size=12), st.integers(0, 3))
def test_the_counts_are_those_of_a_loop(finite: list[bool], most: int) -> None:
    """Traced and untraced bounds."""
    state = other = optim.apply_if_finite(optim.scale(2.0), most).init(jnp.zeros(1))
    row = total = 0
    for ok in finite:
        row, total = (0, total) if ok else (row + 1, total + 1)
        grad = jnp.array([1.0 if ok else INF])
        updates, state = PLAIN[most](grad, state)
        again, other = TRACED(grad, other, jnp.int32(most))
        assert (int(state.notfinite_count), int(state.total_notfinite)) == (row, total)
        assert bool(state.last_finite) == ok
        assert float(updates[0]) == (2.0 if ok else INF if row > most else 0.0)
        assert ulps((updates, state), (again, other)) == 0


def test_mapped_over_members_that_differ() -> None:
    tx = optim.apply_if_finite(optim.sgd(1.0, 0.5), 5)
    grads = jnp.array([[1.0], [NAN], [INF]])
    states = jax.vmap(tx.init)(jnp.zeros((3, 1)))
    updates, states = jax.jit(jax.vmap(tx.update))(grads, states)
    assert updates.tolist() == [[-1.0], [0.0], [0.0]]
    assert states.notfinite_count.tolist() == [0, 1, 1]
    assert states.inner_state[0].trace.tolist() == [[1.0], [0.0], [0.0]]


def test_further_arguments_and_other_dtypes_inside() -> None:
    """An update of another dtype than the gradient, callables among the arguments, optax inside."""

    def update(u: Any, s: Any, p: Any = None, *, value: Any, value_fn: Any) -> Any:
        return jax.tree.map(lambda x: (x * value_fn(value)).astype(jnp.bfloat16), u), s + 1

    inner = optim.GradientTransformation(lambda p: 0, update)  # pyright: ignore[reportArgumentType]
    tx = optim.apply_if_finite(inner, 2)
    state = tx.init(jnp.zeros(1))
    updates, state = tx.update(jnp.ones(1), state, value=3.0, value_fn=lambda v: 2 * v, other=1)
    assert (updates.dtype, updates.tolist(), int(state.inner_state)) == (jnp.bfloat16, [6.0], 1)
    updates, state = tx.update(jnp.array([NAN]), state, value=3.0, value_fn=lambda v: 2 * v)
    assert (updates.dtype, updates.tolist(), int(state.inner_state)) == (jnp.bfloat16, [0.0], 1)
    polyak = optim.apply_if_finite(optax.polyak_sgd(1.0), 2)
    updates, _ = polyak.update(jnp.ones(1), polyak.init(jnp.ones(1)), jnp.ones(1), value=0.5)
    assert updates.tolist() == [-0.5]


def test_buffers_are_donated() -> None:
    tx, params = optim.apply_if_finite(optim.adam(0.1), 2), {"w": jnp.ones(100)}
    step = jax.jit(lambda g, s: tx.update(g, s), donate_argnums=(0, 1))
    updates, state = step(jax.tree.map(jnp.copy, params), tx.init(params))
    step(updates, state)
    assert state.inner_state[0].mu["w"].is_deleted()


def test_a_state_that_holds_a_key() -> None:
    """Keys are kept or replaced like anything else."""

    def update(u: Any, s: Any, p: Any = None, **_: Any) -> Any:
        return u, jax.random.split(s)[0]

    tx = optim.apply_if_finite(optim.GradientTransformation(lambda p: jax.random.key(0), update), 1)
    state = tx.init(jnp.zeros(1))
    _, same = tx.update(jnp.array([NAN]), state)
    _, new = tx.update(jnp.ones(1), state)
    assert same.inner_state == state.inner_state != new.inner_state


def test_zero_nans_tells_where() -> None:
    params = {"a": jnp.ones(2), "b": [jnp.ones(()), None], "c": jnp.ones(2)}
    tx = optim.zero_nans()
    state = tx.init(params)
    grads = {"a": jnp.array([NAN, 1.0]), "b": [jnp.array(INF), None], "c": None}
    updates, new = jax.jit(tx.update)(grads, state)
    assert updates["a"].tolist() == [0.0, 1.0]
    assert float(updates["b"][0]) == INF
    assert jax.tree.map(bool, new.found_nan) == {"a": True, "b": [False, None], "c": False}
    assert jax.tree.structure(new) == jax.tree.structure(state)
    z = jnp.array([complex(NAN, 1.0), 1j])
    assert tx.update(z, tx.init(z))[0].tolist() == [0, 1j]


def test_set_to_zero_takes_anything() -> None:
    tx = optim.set_to_zero()
    grads = {"w": jnp.array([NAN, INF]), "n": jnp.array([3]), "none": None}
    updates, _ = tx.update(grads, tx.init(grads))
    assert updates["w"].tolist() == [0, 0]
    assert (updates["n"].tolist(), updates["n"].dtype) == ([0], jnp.int32)


def _wrong(change: Any) -> Any:
    """apply_if_finite with another state after each update."""
    tx = optim.apply_if_finite(optim.sgd(0.1, 0.9), 2)

    def update(u: Any, s: Any, p: Any = None, **_: Any) -> Any:
        return change(*tx.update(u, s, p), u, s)

    return optim.GradientTransformation(tx.init, update)


_AIF = "apply_if_finite"
MUTANTS: dict[str, tuple[Any, Any]] = {
    "one more is dropped": (optim.apply_if_finite(optim.sgd(0.1, 0.9), 3), _AIF),
    "one less is dropped": (optim.apply_if_finite(optim.sgd(0.1, 0.9), 1), _AIF),
    "the row never ends": (
        _wrong(lambda u, n, g, s: (u, n._replace(notfinite_count=n.total_notfinite))),
        _AIF,
    ),
    "the total counts all": (
        _wrong(lambda u, n, g, s: (u, n._replace(total_notfinite=s.total_notfinite + 1))),
        _AIF,
    ),
    "the flag turned": (_wrong(lambda u, n, g, s: (u, n._replace(last_finite=~n.last_finite))), _AIF),
    "the gradient passes": (
        _wrong(lambda u, n, g, s: (jax.tree.map(lambda a, b: jnp.where(n.last_finite, a, b), u, g), n)),
        _AIF,
    ),
    "the state moves on": (
        _wrong(
            lambda u, n, g, s: (u, n._replace(inner_state=optim.sgd(0.1, 0.9).update(g, s.inner_state)[1]))
        ),
        _AIF,
    ),
    "inf becomes 0 too": (
        optim.GradientTransformation(
            optim.zero_nans().init,
            lambda u, s, p=None, **_: (
                jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 0), u),
                optim.zero_nans().update(u, s)[1],
            ),
        ),
        "zero_nans",
    ),
    "found where inf is": (
        optim.GradientTransformation(
            optim.zero_nans().init,
            lambda u, s, p=None, **_: (
                optim.zero_nans().update(u, s)[0],
                s._replace(found_nan=jax.tree.map(lambda x: ~jnp.isfinite(x).all(), u)),
            ),
        ),
        "zero_nans",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str) -> None:
    mutant, row = MUTANTS[name]
    theirs = optax.zero_nans() if row == "zero_nans" else optax.apply_if_finite(optax.sgd(0.1, 0.9), 2)
    with pytest.raises(AssertionError):
        check(mutant, theirs, steps=20)


def test_the_original_passes() -> None:
    check(
        optim.apply_if_finite(optim.sgd(0.1, 0.9), 2), optax.apply_if_finite(optax.sgd(0.1, 0.9), 2), steps=20
    )


def test_bad_input() -> None:
    with raises(
        TypeError,
        "apply_if_finite: inner must have init and update, got float: pass a transformation, sgd(0.1) for instance",
    ):
        optim.apply_if_finite(0.1, 2)  # pyright: ignore[reportArgumentType]
    with raises(ValueError, "max_consecutive_errors must be at least 0, got -1"):
        optim.apply_if_finite(optim.sgd(0.1), -1)
    for value in (1.5, True, "2", None):
        with raises(TypeError, f"max_consecutive_errors must be a whole number, got {value!r}"):
            optim.apply_if_finite(optim.sgd(0.1), value)
    params = {"w": jnp.ones(2)}
    advice = "pass what this optimizer's own init or update returned"
    with raises(
        TypeError,
        "apply_if_finite got the state of another transformation: tuple in place of ApplyIfFiniteState("
        f"notfinite_count, last_finite, total_notfinite, inner_state); {advice}",
    ):
        optim.apply_if_finite(optim.sgd(0.1), 1).update(params, optim.sgd(0.1).init(params))
    with raises(
        TypeError,
        "zero_nans got the state of another transformation: EmptyState in place of ZeroNansState(found_nan); "
        + advice,
    ):
        optim.zero_nans().update(params, optim.EmptyState())
    with raises(
        ValueError,
        "zero_nans: updates and state must be trees of one form, got PyTreeDef({'v': *}) and PyTreeDef({'w': *})",
    ):
        optim.zero_nans().update({"v": jnp.ones(2)}, optim.zero_nans().init(params))


def test_a_run_of_scanned_steps() -> None:
    """The state keeps its form, so it goes through a scan."""
    grads = spoilt(jnp.float32, 20)
    tx = optim.chain(optim.zero_nans(), optim.apply_if_finite(optim.adam(0.1), 3))
    stacked = jax.tree.map(lambda *g: jnp.stack(g), *grads)
    state, updates = jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], tx.init(grads[0]), stacked)
    loop, expected = tx.init(grads[0]), []
    for grad in grads:
        u, loop = jax.jit(tx.update)(grad, loop)
        expected.append(u)
    assert ulps(updates, stack(expected)) <= 2
    assert int(state[1].total_notfinite) == int(loop[1].total_notfinite) > 0


@pytest.mark.parametrize("make", [lambda: optim.apply_if_finite(optim.sgd(0.1), 2)])
def test_inside_shard_map(make: Any) -> None:
    """A population over a mesh of one device: what varies over an axis does so in both branches."""
    tx, mesh = make(), jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    params = {"w": jnp.ones((2, 4))}
    state = jax.vmap(tx.init)(params)
    spec = jax.sharding.PartitionSpec("d")
    run = jax.shard_map(
        lambda p, s: jax.vmap(tx.update)(p, s, p), mesh=mesh, in_specs=(spec, spec), out_specs=spec
    )
    updates, _ = jax.jit(run)(params, state)
    np.testing.assert_allclose(updates["w"], -0.1, rtol=1e-6)
