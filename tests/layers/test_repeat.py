"""``repeat`` against ``serial`` of as many blocks, the size of its program, and what observers see."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnkit import layers, tree
from nnkit.checks import LayerError
from nnkit.layers.observe import rows
from nnkit.types import Layer

KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)
N = 3


def block() -> Layer:
    """Without a bias before batch normalisation, whose gradient would be rounding."""
    return layers.residual(
        layers.serial(layers.dense(4, use_bias=False), layers.batch_norm(), layers.tanh, layers.dropout(0.5))
    )


def stacked(serial_tree: Any) -> Any:
    """``serial``'s children stacked, as ``repeat`` has them."""
    return {"block": jax.tree.map(lambda *a: jnp.stack(a), *serial_tree.values())} if serial_tree else {}


def close(a: Any, b: Any, rtol: float = 1e-5) -> None:
    """Relative to the largest number of each leaf: sums in another order differ by some of its ulps."""
    left, right = tree.flatten(a), tree.flatten(b)
    assert left.keys() == right.keys(), (list(left), list(right))
    for path, x in left.items():
        y = right[path]
        assert (x.shape, x.dtype) == (y.shape, y.dtype), path
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * float(jnp.abs(y).max()), err_msg=path)


def results(layer: Layer, params: Any, state: Any, x: Any, train: bool) -> Any:
    """Both gradients, output and state."""

    def value(params: Any, x: Any) -> Any:
        y, new = layer.apply(params, state, x, key=jax.random.key(1), train=train)
        return jnp.sum(jnp.sin(y)), (y, new)

    return jax.jit(jax.grad(value, (0, 1), has_aux=True))(params, x)


@functools.cache
def of_serial(dtype: Any) -> Any:
    """Initial numbers, a state that differs from block to block, and the results in training and not."""
    plain, x = layers.serial(*[block()] * N), X.astype(dtype)
    params, start = plain.init(KEY, x)
    state = {
        name: jax.tree.map(lambda s, i=i: s + 0.1 * i, part) for i, (name, part) in enumerate(start.items())
    }
    found = []
    for train in (True, False):
        (p, g_x), (y, new) = results(plain, params, state, x, train)
        found.append(((stacked(p), g_x), (y, stacked(new))))
    return stacked(params), stacked(start), stacked(state), found


def same_as_serial(layer: Layer, dtype: Any = jnp.float32, rtol: float = 1e-5) -> None:
    """Initial numbers, outputs, state and all gradients in both modes."""
    params, start, state, expected = of_serial(dtype)
    close(layer.init(KEY, X.astype(dtype)), (params, start), rtol)
    for train, found in zip((True, False), expected, strict=True):
        close(results(layer, params, state, X.astype(dtype), train), found, rtol)


@pytest.mark.parametrize("unroll", [1, 2, True])
def test_equals_serial(unroll):
    same_as_serial(layers.repeat(block(), N, unroll=unroll))


def test_equals_serial_with_remat_inside_and_around():
    same_as_serial(layers.repeat(layers.remat(block(), prevent_cse=False), N))
    same_as_serial(layers.remat(layers.repeat(block(), N)))


def test_equals_serial_in_float64():
    with jax.enable_x64(True):
        same_as_serial(layers.repeat(block(), N), jnp.float64, 1e-10)


def _apply(change: Any) -> Layer:
    """A wrong repeat, by what is changed of the arguments or the result of the right one."""
    right = layers.repeat(block(), N)

    def apply(params, state, x, *, key=None, train):
        return change(right, params, state, x, key, train)

    return right._replace(apply=apply)


def _flip(t: Any) -> Any:
    return jax.tree.map(lambda a: a[::-1], t)


def _as_init(change: Any) -> Layer:
    right = layers.repeat(block(), N)
    return right._replace(init=lambda key, x: change(right, key, x))


MUTANTS = {
    "the last block first": _apply(
        lambda r, p, s, x, k, t: (r.apply(_flip(p), s, x, key=k, train=t)[0], r.apply(p, s, x, key=k, train=t)[1])
    ),
    "one block's parameters for all": _apply(
        lambda r, p, s, x, k, t: r.apply(jax.tree.map(lambda a: a.at[:].set(a[0]), p), s, x, key=k, train=t)
    ),
    "the state of the call before": _apply(
        lambda r, p, s, x, k, t: (r.apply(p, s, x, key=k, train=t)[0], s)
    ),
    "the state in another order": _apply(
        lambda r, p, s, x, k, t: (
            r.apply(p, s, x, key=k, train=t)[0], _flip(r.apply(p, s, x, key=k, train=t)[1])
        )
    ),
    "other draws": _apply(
        lambda r, p, s, x, k, t: r.apply(p, s, x, key=jax.random.fold_in(k, 7), train=t)
    ),
    "initialised alike": _as_init(
        lambda r, k, x: jax.tree.map(lambda a: a.at[:].set(a[0]), r.init(k, x))
    ),
    "the fan sees the stacking": _as_init(
        lambda r, k, x: (jax.tree.map(lambda a: a / np.sqrt(N), r.init(k, x)[0]), r.init(k, x)[1])
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name):
    with pytest.raises(AssertionError):
        same_as_serial(MUTANTS[name])


def equations(jaxpr: Any) -> int:
    """How many there are, those of inner programs among them."""
    params = [leaf for eqn in jaxpr.eqns for leaf in jax.tree.leaves(eqn.params)]
    inner = [leaf for leaf in params if hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr")]
    return len(jaxpr.eqns) + sum(equations(getattr(sub, "jaxpr", sub)) for sub in inner)


def _sizes(model: Layer) -> tuple[int, int]:
    """Equations and lines of HLO of a training step."""
    params, state = jax.eval_shape(model.init, KEY, X)

    def grads(params: Any, state: Any) -> Any:
        return jax.grad(lambda p: model.apply(p, state, X, key=KEY, train=True)[0].sum())(params)

    traced = jax.jit(grads).trace(params, state)
    return equations(traced.jaxpr.jaxpr), len(traced.lower().as_text().splitlines())


def test_the_program_does_not_grow_with_the_number_of_blocks():
    few, many = (_sizes(layers.repeat(block(), n)) for n in (2, 50))
    assert few == many
    in_series = _sizes(layers.serial(*[block()] * 4))
    assert in_series[0] > 3 * _sizes(layers.serial(block()))[0]
    # Initialisation likewise.
    lines = [
        len(jax.jit(layers.repeat(block(), n).init).lower(KEY, X).as_text().splitlines()) for n in (2, 50)
    ]
    assert lines[0] == lines[1]


def test_observe_gives_stacked_outputs_and_nothing_leaks():
    for inner in (block(), layers.remat(block())):
        model = layers.serial(layers.dense(4), layers.repeat(inner, N))
        params, state = model.init(KEY, X)

        def look(params, state=state, model=model):
            return layers.observe(model, params, state, X, key=KEY, train=True)

        with jax.checking_leaks():
            y, new, outputs = jax.jit(look)(params)
        path = "repeat_0/block"
        assert sorted(outputs) == sorted([
            "dense_0", *(f"{path}/body/{n}" for n in ("dense_0", "batch_norm_0", "tanh_0", "dropout_0")),
            f"{path}/body", f"{path}/shortcut", path, "repeat_0",
        ])  # fmt: skip
        np.testing.assert_array_equal(outputs[path][-1], y)
        np.testing.assert_array_equal(outputs[f"{path}/shortcut"][1:], outputs[path][:-1])
        np.testing.assert_array_equal(outputs[f"{path}/shortcut"][0], outputs["dense_0"])
        close((y, new), jax.jit(lambda p, m=model, s=state: m.apply(p, s, X, key=KEY, train=True))(params))


def test_summary_counts_every_repetition():
    model = layers.serial(layers.repeat(layers.serial(layers.dense(4), layers.batch_norm()), 5))
    found = {row.path: row for row in rows(model, X)}
    assert list(found) == ["repeat_0/block/dense_0", "repeat_0/block/batch_norm_0"]
    assert found["repeat_0/block/dense_0"][1:5] == ("dense", "(5,6,4)", 5 * 20, 0)
    assert found["repeat_0/block/batch_norm_0"][3:5] == (5 * 8, 5 * 8)


def test_repeats_of_repeats_and_of_named_blocks():
    inner = layers.named("inner", layers.repeat(layers.dense(4), 2))
    model = layers.serial(layers.repeat(inner, 3))
    params, state = model.init(KEY, X)
    assert {p: a.shape for p, a in tree.flatten(params).items()} == {
        "repeat_0/inner/block/kernel": (3, 2, 4, 4),
        "repeat_0/inner/block/bias": (3, 2, 4),
    }
    y = X
    kernels = params["repeat_0"]["inner"]["block"]["kernel"].reshape(6, 4, 4)
    for kernel in kernels:
        y = y @ kernel
    np.testing.assert_allclose(model.apply(params, state, X, train=False)[0], y, rtol=1e-4, atol=1e-6)


def test_frozen_repeats_keep_their_statistics():
    model = layers.frozen(layers.repeat(block(), N))
    params, state = model.init(KEY, X)
    y, new = model.apply(params, state, X, train=True)
    close((y, new), layers.repeat(block(), N).apply(params, state, X, train=False))
    grads = jax.grad(lambda p: model.apply(p, state, X, train=True)[0].sum())(params)
    assert not any(g.any() for g in jax.tree.leaves(grads))


def test_inputs_may_be_trees():
    swap = layers.stateless(lambda pair: (pair[1], pair[0] + 1))
    (a, b), _ = layers.repeat(swap, 3).apply({}, {}, (X, 2 * X), train=False)
    np.testing.assert_array_equal(a, 2 * X + 1)
    np.testing.assert_array_equal(b, X + 1 + 1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: layers.repeat(layers.relu, 0), ValueError, r"repeat\(n=...\) must be at least 1, got 0"),
        (
            lambda: layers.repeat(layers.relu, 2, unroll=0),
            ValueError,
            r"repeat\(unroll=...\) must be at least 1, got 0",
        ),
        (lambda: layers.repeat(layers.dense, 2), TypeError, "repeat got the function dense: call it"),
        (
            lambda: layers.serial(layers.repeat(layers.dense(3), 2), layers.relu).init(KEY, X),
            LayerError,
            r"^repeat_0 needs a block that gives what it takes, and it takes float32\(6, 4\) and gives float32\(6, 3\)",
        ),
        (
            lambda: layers.repeat(layers.stateless(lambda x: (x, x)), 2).apply({}, {}, X, train=False),
            LayerError,
            r"and gives \('float32\(6, 4\)', 'float32\(6, 4\)'\)",
        ),
        (
            lambda: layers.serial(layers.repeat(block(), 2)).apply({}, {}, X.astype(int), train=False),
            LayerError,
            "^repeat_0/block/body/dense_0 takes floating-point input",
        ),
        (
            lambda: (b := layers.repeat(block(), 2)).apply(*b.init(KEY, X), X, train=True),
            LayerError,
            "^block/body/dropout_0 needs a key when train=True",
        ),
        (
            lambda: layers.repeat(block(), 2).apply(*layers.repeat(block(), 3).init(KEY, X), X, train=False),
            LayerError,
            r"^repeat repeats its block 2 times and got a parameter or state of shape \(3, 4\)",
        ),
        (
            lambda: layers.repeat(layers.relu, 2).apply({"dense_0": {}}, {}, X, train=False),
            LayerError,
            r"repeat got parameters of another model: \['dense_0'\] where its children are \['block'\]",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
