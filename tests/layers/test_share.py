"""``share``: tied parameters against the same network written with the parameter used twice."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nnkit import layers, optim, tree
from nnkit.checks import LayerError
from nnkit.types import Layer

KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 5)), jnp.float32)
TIES: Any = {"back/kernel": ("code/kernel", jnp.transpose)}


def autoencoder() -> Layer:
    return layers.serial(code=layers.dense(3), act=layers.tanh, back=layers.dense(5))


def by_hand(params: Any, x: Any) -> Any:
    kernel = params["code"]["kernel"]
    h = jnp.tanh(x @ kernel + params["code"]["bias"])
    return h @ kernel.T + params["back"]["bias"]


def value(y: Any) -> Any:
    return jnp.sum(jnp.sin(y))


def equals_by_hand(model: Layer, x: Any, rtol: float) -> None:
    params, state = model.init(KEY, x)
    y, _ = model.apply(params, state, x, train=True)
    np.testing.assert_allclose(y, by_hand(params, x), rtol=rtol, atol=rtol)
    grads = jax.grad(lambda p, x: value(model.apply(p, state, x, train=True)[0]), (0, 1))(params, x)
    expected = jax.grad(lambda p, x: value(by_hand(p, x)), (0, 1))(params, x)
    assert jax.tree.structure(grads) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol), grads, expected)


def test_equals_the_network_by_hand():
    equals_by_hand(layers.share(autoencoder(), TIES), X, 1e-5)
    with jax.enable_x64(True):
        equals_by_hand(layers.share(autoencoder(), TIES), X.astype(jnp.float64), 1e-10)


def _stopped(a: Any) -> Any:
    return jax.lax.stop_gradient(a).T


@pytest.mark.parametrize(
    "ties",
    [
        {},
        {"back/kernel": ("code/kernel", _stopped)},
        {"back/kernel": ("code/kernel", lambda a: 2 * a.T)},
        {"back/kernel": ("code/kernel", lambda a: a.reshape(3, 5))},
        {"code/kernel": ("back/kernel", jnp.transpose)},
    ],
)
def test_mutants_are_caught(ties):
    with pytest.raises((AssertionError, KeyError)):
        equals_by_hand(layers.share(autoencoder(), ties), X, 1e-5)


def test_the_target_is_gone_from_parameters_updates_and_counts():
    model = layers.share(autoencoder(), TIES)
    params, state = model.init(KEY, X)
    assert set(tree.flatten(params)) == {"code/kernel", "code/bias", "back/bias"}
    grads = jax.grad(lambda p: value(model.apply(p, state, X, train=True)[0]))(params)
    for tx in (optim.adam(0.1), optax.adam(0.1)):
        with jax.numpy_dtype_promotion("standard"):  # optax relies on it
            updates, _ = tx.update(grads, tx.init(params), params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert layers.summary(model, X).splitlines()[-1].split()[1] == str(15 + 3 + 5)
    outputs = layers.observe(model, params, state, X, train=True)[2]
    assert list(outputs) == ["code", "act", "back"]


def test_the_output_matrix_of_a_language_model():
    ids = jnp.array([[0, 3, 6], [1, 2, 2]])
    model = layers.serial(layers.embedding(7, 4), layers.residual(layers.dense(4)), head=layers.dense(7))
    tied = layers.named("lm", layers.share(model, {"head/kernel": ("embedding_0/embedding", jnp.transpose)}))
    params, state = layers.serial(tied).init(KEY, ids)
    assert "kernel" not in params["lm"]["head"]
    p = params["lm"]
    h = p["embedding_0"]["embedding"][ids]
    h = h + h @ p["residual_0"]["body"]["kernel"] + p["residual_0"]["body"]["bias"]
    expected = h @ p["embedding_0"]["embedding"].T + p["head"]["bias"]
    y, _ = layers.serial(tied).apply(params, state, ids, train=False)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_whole_layers_and_chains_of_repeats_may_be_tied():
    block = layers.serial(layers.dense(5), layers.tanh)
    model = layers.serial(a=block, b=block, c=layers.repeat(block, 2), d=layers.repeat(block, 2))
    tied = layers.share(model, {"b": "a", "d/block": "c/block"})
    params, state = tied.init(KEY, X)
    assert set(params) == {"a", "c"}
    whole = {**params, "b": params["a"], "d": params["c"]}
    np.testing.assert_array_equal(
        tied.apply(params, state, X, train=False)[0], model.apply(whole, state, X, train=False)[0]
    )


def test_state_keys_jit_and_vmap():
    block = layers.serial(layers.dense(5), layers.batch_norm(), layers.dropout(0.5))
    model = layers.share(layers.serial(a=block, b=block), {"b/dense_0/kernel": "a/dense_0/kernel"})
    members = [model.init(jax.random.key(seed), X) for seed in range(2)]
    params, states = jax.tree.map(lambda *a: jnp.stack(a), *members)

    def run(p: Any, s: Any) -> Any:
        return model.apply(p, s, X, key=KEY, train=True)

    y, new = jax.jit(jax.vmap(run))(params, states)
    for i, (p, s) in enumerate(members):
        expected, after = run(p, s)
        np.testing.assert_allclose(y[i], expected, rtol=1e-5, atol=1e-5)
        assert jax.tree.structure(after) == jax.tree.structure(s)
    assert set(new) == {"a", "b"}


def _tied(ties: Any) -> Any:
    return lambda: layers.serial(inner=layers.share(autoencoder(), ties)).init(KEY, X)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            _tied({"back/kernl": "code/kernel"}),
            LayerError,
            r"^inner ties an unknown parameter 'back/kernl'; did you mean 'back/kernel' or 'code/kernel'\?",
        ),
        (
            _tied({"back/kernel": "cod/kernel"}),
            LayerError,
            "^inner ties an unknown parameter 'cod/kernel'; did you mean 'code/kernel'",
        ),
        (
            _tied({"back/kernel": "code/kernel"}),
            LayerError,
            r"^inner ties 'back/kernel', float32\(3, 5\), to 'code/kernel', which gives float32\(5, 3\): write "
            r"'back/kernel': \('code/kernel', jnp.transpose\)$",
        ),
        (
            _tied({"back/bias": "code/bias"}),
            LayerError,
            r"ties 'back/bias', float32\(5,\), to 'code/bias', which gives float32\(3,\)$",
        ),
        (
            _tied({"back": "code/kernel"}),
            LayerError,
            r"ties 'back', which has \['bias', 'kernel'\], to 'code/kernel', which has \[''\]",
        ),
        (
            _tied({"back": ("code", jnp.transpose)}),
            LayerError,
            r"ties 'back/bias', float32\(5,\), to 'code', which gives float32\(3,\)$",
        ),
        (
            _tied({"a": "b", "b": "c"}),
            ValueError,
            "share: 'b' is tied and cannot also be, hold or lie in 'b', which is tied or a source: tie each",
        ),
        (_tied({"a/b": "a"}), ValueError, "share: 'a/b' is tied and cannot also be, hold or lie in 'a'"),
        (
            _tied({"a": "b", "a/c": "d"}),
            ValueError,
            "share: 'a' is tied and cannot also be, hold or lie in 'a/c'",
        ),
        (
            _tied({"a": 3}),
            TypeError,
            "share takes a dict from the path of a parameter to that of its source, .* 3",
        ),
        (
            lambda: layers.share(autoencoder(), TIES).apply(*autoencoder().init(KEY, X), X, train=False),
            LayerError,
            "share got the parameter 'back/kernel', which it ties to 'code/kernel': pass what its own init ret",
        ),
        (
            lambda: layers.share(autoencoder(), TIES).apply({"back": {}}, {}, X, train=False),
            LayerError,
            "share got parameters without 'code/kernel'",
        ),
        (lambda: layers.share(layers.dense, {}), TypeError, "share got the function dense: call it"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
