"""``activation_gradients`` against ``jax.grad`` of the network cut in two by hand."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnkit import layers
from nnkit.layers.children import visiting
from nnkit.types import Layer

KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)


def value(y: Any) -> jax.Array:
    return jnp.sum(jnp.sin(y) * jnp.arange(1, y.shape[-1] + 1, dtype=y.dtype))


PARTS: list[Any] = [
    ("dense_0", layers.dense(5)),
    ("batch_norm_0", layers.batch_norm()),
    ("tanh_0", layers.tanh),
    ("dropout_0", layers.dropout(0.5)),
    ("dense_1", layers.dense(3)),
]
MODEL = layers.serial(*[layer for _, layer in PARTS])


def by_hand(params: Any, state: Any, x: Any, key: Any) -> dict[str, Any]:
    """For each layer the gradient of what follows it, taken at its output."""

    def apply(i: int, x: Any) -> Any:
        name, layer = PARTS[i]
        own = params.get(name, {}), state.get(name, {})
        return layer.apply(*own, x, key=jax.random.fold_in(key, i), train=True)[0]

    def rest(y: Any, i: int) -> jax.Array:
        for j in range(i + 1, len(PARTS)):
            y = apply(j, y)
        return value(y)

    found = {}
    for i, (name, _) in enumerate(PARTS):
        x = apply(i, x)
        found[name] = jax.grad(rest)(x, i)
    return found


def equals_by_hand(run: Any, x: Any, rtol: float) -> None:
    params, state = MODEL.init(KEY, x)
    grads = run(MODEL, params, state, x, value, key=KEY, train=True)
    expected = by_hand(params, state, x, KEY)
    assert list(grads) == list(expected)
    for path, grad in grads.items():
        assert grad.dtype == expected[path].dtype
        np.testing.assert_allclose(grad, expected[path], rtol=rtol, atol=rtol, err_msg=path)


def test_equals_the_split_network():
    equals_by_hand(layers.activation_gradients, X, 1e-5)
    with jax.enable_x64(True):
        equals_by_hand(layers.activation_gradients, X.astype(jnp.float64), 1e-10)


def _before(model: Layer, params: Any, state: Any, x: Any, loss: Any, **options: Any) -> Any:
    """The gradients of the inputs instead of the outputs."""
    right = layers.activation_gradients(model, params, state, x, loss, **options)
    paths = list(right)
    return {b: right[a] for a, b in zip([paths[-1], *paths], paths, strict=False)}


@pytest.mark.parametrize(
    "wrong",
    [
        _before,
        lambda *a, **k: layers.activation_gradients(*a, **{**k, "key": jax.random.key(9)}),
        lambda *a, **k: layers.activation_gradients(*a, **{**k, "train": False}),
        lambda *a, **k: jax.tree.map(lambda g: 2 * g, layers.activation_gradients(*a, **k)),
        lambda *a, **k: {p: g for p, g in layers.activation_gradients(*a, **k).items() if p != "tanh_0"},
    ],
)
def test_mutants_are_caught(wrong):
    with pytest.raises(AssertionError):
        equals_by_hand(wrong, X, 1e-5)


def test_inside_repeat_and_remat_they_are_those_of_serial():
    block = layers.residual(layers.serial(layers.dense(4), layers.tanh, layers.dropout(0.5)))
    deep = layers.serial(layers.repeat(layers.remat(block), 3), head=layers.dense(2))
    flat = layers.serial(layers.serial(block, block, block), head=layers.dense(2))
    params, state = flat.init(KEY, X)
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *params["serial_0"].values())
    theirs = {"repeat_0": {"block": stacked}, "head": params["head"]}
    with jax.checking_leaks():
        ours = jax.jit(lambda p: layers.activation_gradients(deep, p, state, X, value, key=KEY, train=True))(
            theirs
        )
    expected = layers.activation_gradients(flat, params, state, X, value, key=KEY, train=True)
    for path in ("", "/body", "/shortcut", "/body/dense_0", "/body/tanh_0", "/body/dropout_0"):
        each = jnp.stack([expected[f"serial_0/residual_{i}{path}"] for i in range(3)])
        np.testing.assert_allclose(ours[f"repeat_0/block{path}"], each, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours["repeat_0"], expected["serial_0"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours["head"], expected["head"], rtol=1e-5, atol=1e-6)


def test_of_a_layer_called_twice_it_is_the_last_outputs_and_shapes_may_differ():
    def forward(net: Any, x: Any) -> Any:
        h = net.act(x)
        return net.act(net.dense(h))

    model = layers.wire(forward, act=layers.tanh, dense=layers.dense(3))
    params, state = model.init(KEY, X)
    grads = layers.activation_gradients(model, params, state, X, value, train=False)
    y, _ = model.apply(params, state, X, train=False)
    np.testing.assert_allclose(grads["act"], jax.grad(value)(y), rtol=1e-6)
    twice = layers.repeat(layers.tanh, 2)
    model = layers.wire(lambda net, x: net.head(net.twice(net.twice(x))), twice=twice, head=layers.dense(2))
    params, state = model.init(KEY, X)
    grads = layers.activation_gradients(model, params, state, X, value, train=False)
    h = jnp.tanh(jnp.tanh(X))
    last = [jnp.tanh(h), jnp.tanh(jnp.tanh(h))]
    rest = [lambda a: jnp.tanh(a), lambda a: a]
    for i in range(2):
        expected = jax.grad(
            lambda a, i=i: value(layers.dense(2).apply(params["head"], {}, rest[i](a), train=False)[0])
        )(last[i])
        np.testing.assert_allclose(grads["twice/block"][i], expected, rtol=1e-5, atol=1e-6)


def test_outputs_that_are_trees_or_integers():
    model = layers.serial(
        layers.branch(layers.relu, layers.stateless(lambda x: x.argmax(-1), name="best")),
        layers.stateless(lambda pair: pair[0] * (1 + pair[1][:, None].astype(jnp.float32))),
    )
    grads = layers.activation_gradients(model, {}, {}, X, jnp.sum, train=False)
    assert "branch_0/best" not in grads
    floats, none = grads["branch_0"]
    np.testing.assert_allclose(floats, jnp.broadcast_to((1 + X.argmax(-1))[:, None], X.shape))
    assert none is None


def test_under_policy_and_share_and_mapped_over_members():
    half = layers.policy(MODEL, param_dtype=jnp.float32, compute_dtype=jnp.bfloat16, output_dtype=jnp.float32)
    params, state = half.init(KEY, X)
    grads = layers.activation_gradients(half, params, state, X, value, key=KEY, train=True)
    assert {g.dtype for g in grads.values()} == {jnp.dtype("bfloat16")}

    def run(x: Any) -> Any:
        return layers.activation_gradients(MODEL, params, state, x, value, key=KEY, train=True)

    mapped = jax.vmap(run)(jnp.stack([X, 2 * X]))
    for i, x in enumerate((X, 2 * X)):
        for path, grad in run(x).items():
            np.testing.assert_allclose(mapped[path][i], grad, rtol=1e-4, atol=1e-5)


def test_it_may_be_differentiated():
    """A penalty on the activations' gradients: the derivative of Σ(∂loss/∂h)² by finite differences."""
    with jax.enable_x64(True):
        x = X.astype(jnp.float64)
        params, state = MODEL.init(KEY, x)

        def penalty(t: Any) -> Any:
            moved = jax.tree.map(lambda p: p * (1 + t), params)
            grads = layers.activation_gradients(MODEL, moved, state, x, value, key=KEY, train=True)
            return jnp.sum(grads["dense_0"] ** 2)

        h = 1e-6
        numeric = (penalty(h) - penalty(-h)) / (2 * h)
        np.testing.assert_allclose(jax.grad(penalty)(0.0), numeric, rtol=1e-6)


def test_nothing_is_left_behind_and_errors():
    params, state = MODEL.init(KEY, X)
    expected, _ = MODEL.apply(params, state, X, train=False)
    layers.activation_gradients(MODEL, params, state, X, value, key=KEY, train=True)
    np.testing.assert_array_equal(MODEL.apply(params, state, X, train=False)[0], expected)
    with pytest.raises(
        ValueError, match=r"activation_gradients\(loss=...\) must give one number and gave shape \(6, 3\)"
    ):
        layers.activation_gradients(MODEL, params, state, X, lambda y: y, key=KEY, train=True)


def test_what_is_added_is_added_to_the_call_with_its_number():
    model = layers.wire(lambda net, x: net.f(net.f(x)), f=layers.stateless(lambda x: 2 * x))
    numbers = []
    with visiting(lambda visit: numbers.append((visit.path, visit.number)), {("f", 1): [jnp.ones_like(X)]}):
        y, _ = model.apply({}, {}, X, train=False)
    assert numbers == [("f", 0), ("f", 1)]
    np.testing.assert_array_equal(y, 4 * X + 1)
