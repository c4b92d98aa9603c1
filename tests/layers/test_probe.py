"""``probe``: its numbers by numpy, when they are recorded and where they stand."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnkit import layers, losses, optim, train, tree
from nnkit.checks import LayerError
from nnkit.types import Layer

KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)


def network() -> Layer:
    return layers.serial(layers.dense(8), layers.probe(layers.relu), layers.dropout(0.5), layers.dense(2))


def by_numpy(y: Any) -> dict[str, Any]:
    y = np.asarray(y, np.float64)
    return {"mean": y.mean(), "std": y.std(), "zeros": (y == 0).mean(), "max_abs": np.abs(y).max()}


def records_what_numpy_says(make: Any, x: Any = X) -> None:
    model = make()
    params, state = model.init(KEY, x)
    assert all(not s.any() for s in jax.tree.leaves(state))
    y, new, outputs = layers.observe(model, params, state, x, key=KEY, train=True)
    expected = by_numpy(outputs["relu_0"])
    assert set(tree.flatten(new)) == {f"relu_0/probe/{name}" for name in expected}
    for name, value in expected.items():
        np.testing.assert_allclose(new["relu_0"]["probe"][name], value, rtol=1e-6, err_msg=name)
    _, tested = model.apply(params, new, 2 * x, train=False)
    jax.tree.map(np.testing.assert_array_equal, tested, new)
    plain = layers.serial(layers.dense(8), layers.relu, layers.dropout(0.5), layers.dense(2))
    np.testing.assert_array_equal(y, plain.apply(params, {}, x, key=KEY, train=True)[0])
    assert jax.tree.structure(params) == jax.tree.structure(plain.init(KEY, x)[0])


def test_records_what_numpy_says():
    records_what_numpy_says(network)
    with jax.enable_x64(True):
        records_what_numpy_says(network, X.astype(jnp.float64))


def _wrong(change: Any) -> Any:
    def make() -> Layer:
        right = network()

        def apply(params, state, x, *, key=None, train):
            y, new = right.apply(params, state, x, key=key, train=train)
            return change(y, new, state, right.apply(params, state, x, key=key, train=True)[1])

        return right._replace(apply=apply)

    return make


MUTANTS = {
    "not recorded": _wrong(lambda y, new, old, seen: (y, old)),
    "recorded at test time": _wrong(lambda y, new, old, seen: (y, seen)),
    "of other numbers": _wrong(lambda y, new, old, seen: (y, jax.tree.map(lambda s: s * 1.01, new))),
    "the output is changed": _wrong(lambda y, new, old, seen: (y + 1, new)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name):
    with pytest.raises((AssertionError, LayerError)):
        records_what_numpy_says(MUTANTS[name])


def test_half_precision_is_summed_in_float32():
    ones = jnp.full((300, 300), 0.1, jnp.bfloat16)
    model = layers.probe(layers.identity)
    _, state = model.apply({}, model.init(KEY, ones)[1], ones, train=True)
    assert {s.dtype for s in jax.tree.leaves(state)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(state["probe"]["mean"], float(ones[0, 0]), rtol=1e-6)


def test_no_gradient_goes_through():
    model = layers.probe(layers.dense(3))
    params, state = model.init(KEY, X)
    grads = jax.grad(lambda p: model.apply(p, state, X, train=True)[1]["probe"]["mean"])(params)
    assert not any(g.any() for g in jax.tree.leaves(grads))


def test_own_functions_also_of_several_numbers():
    model = layers.probe(layers.tanh, statistics={"norm": jnp.linalg.norm, "by_unit": lambda y: y.mean(0)})
    params, state = model.init(KEY, X[:1])
    assert {name: s.shape for name, s in state["probe"].items()} == {"norm": (), "by_unit": (4,)}
    _, state = model.apply(params, state, X, train=True)
    np.testing.assert_allclose(state["probe"]["by_unit"], np.tanh(X).mean(0), rtol=1e-5, atol=1e-6)


def test_beside_a_state_of_the_layers_own_and_inside_frozen_repeat_and_vmap():
    model = layers.probe(layers.batch_norm(), statistics="mean")
    params, state = model.init(KEY, X)
    assert set(state) == {"mean", "var", "probe"}
    _, new = model.apply(params, state, X, train=True)
    plain = {name: part for name, part in state.items() if name != "probe"}
    np.testing.assert_array_equal(
        new["mean"], layers.batch_norm().apply(params, plain, X, train=True)[1]["mean"]
    )
    _, kept = layers.frozen(model).apply(params, state, X, train=True)
    jax.tree.map(np.testing.assert_array_equal, kept, state)

    deep = layers.repeat(layers.probe(layers.dense(4)), 3)
    params, state = deep.init(KEY, X)
    _, new, outputs = layers.observe(
        layers.serial(deep), {"repeat_0": params}, {"repeat_0": state}, X, train=True
    )
    std = new["repeat_0"]["block"]["probe"]["std"]
    np.testing.assert_allclose(std, outputs["repeat_0/block"].std(axis=(1, 2)), rtol=1e-6)

    inputs = jnp.stack([X, 2 * X])
    members = jax.vmap(lambda x: deep.apply(params, state, x, train=True)[1])(inputs)
    assert members["block"]["probe"]["std"].shape == (2, 3)


def test_in_a_compiled_run():
    """The trainer's state says what the last step saw."""
    model = network()
    trainer = train.trainer(model, losses.mean_squared_error, optim.sgd(0.1))
    ts = trainer.init(KEY, X)
    batches = jnp.stack([X, 3 * X]), jnp.zeros((2, 6, 2))
    ts2, _ = jax.jit(lambda ts: jax.lax.scan(trainer.step, ts, batches))(ts)
    before, _ = trainer.step(ts, (X, jnp.zeros((6, 2))))
    p = before.params["dense_0"]
    seen = jnp.maximum(3 * X @ p["kernel"] + p["bias"], 0)
    np.testing.assert_allclose(ts2.state["relu_0"]["probe"]["mean"], seen.mean(), rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: layers.probe(layers.relu, statistics=("means",)),
            ValueError,
            "unknown statistic 'means'; did you mean 'mean'",
        ),
        (
            lambda: layers.probe(layers.relu, statistics={"mean": "mean"}),
            TypeError,
            r"probe\(statistics=...\) must be a dict of functions, \['mean'\] are none",
        ),
        (
            lambda: layers.serial(layers.probe(layers.branch(layers.relu, layers.relu))).init(KEY, X),
            LayerError,
            "^branch_0 is around a layer whose output is one floating-point array, got tuple",
        ),
        (
            lambda: layers.probe(layers.stateless(lambda x: x > 0)).init(KEY, X),
            LayerError,
            "is around a layer whose output is one floating-point array, got bool",
        ),
        (
            lambda: layers.probe(layers.probe(layers.relu)).init(KEY, X),
            LayerError,
            "probe is around a layer that has a state called 'probe': one probe is enough",
        ),
        (
            lambda: (m := layers.probe(layers.relu, statistics={"all": lambda y: y})).apply(
                *m.init(KEY, X[:1]), X, train=True
            ),
            LayerError,
            r"probe got the statistic 'all' of shape \(6, 4\) and has shape \(1, 4\) in its state: it must not dep",
        ),
        (
            lambda: layers.probe(layers.relu).apply({}, {}, X, train=True),
            LayerError,
            r"probe has no 'probe' among \[\]: pass the state that its init made",
        ),
        (lambda: layers.probe(layers.dense), TypeError, "probe got the function dense: call it"),
    ],
)  # fmt: skip
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
