"""``shape_dependent``: the layer that fits the input."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnkit import layers

KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 8)), jnp.float32)


def bottleneck(spec):
    assert isinstance(spec, jax.ShapeDtypeStruct)
    n = spec.shape[-1]
    return layers.serial(layers.dense(n // 4), layers.batch_norm(), layers.dropout(0.5), layers.dense(n))


def test_is_the_layer_that_is_made():
    model, fixed = layers.shape_dependent(bottleneck), bottleneck(jax.ShapeDtypeStruct((1, 8), jnp.float32))
    params, state = model.init(KEY, X[:1])
    jax.tree.map(np.testing.assert_array_equal, (params, state), fixed.init(KEY, X[:1]))
    found, expected = (m.apply(params, state, X, key=KEY, train=True) for m in (model, fixed))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    wider, _ = model.init(KEY, jnp.zeros((1, 16)))
    assert wider["dense_0"]["kernel"].shape == (16, 4)


def test_its_name_is_that_of_the_function():
    model = layers.serial(
        layers.shape_dependent(bottleneck),
        layers.shape_dependent(lambda spec: layers.dense(12)),
        layers.shape_dependent(lambda spec: layers.tanh, name="last"),
        top=layers.shape_dependent(bottleneck),
    )
    params, state = model.init(KEY, X)
    assert list(params) == ["bottleneck_0", "shape_dependent_0", "top"]
    outputs = layers.observe(model, params, state, X, train=False)[2]
    assert [path for path in outputs if "/" not in path] == [*list(params)[:2], "last", "top"]
    assert "bottleneck_0/dense_0" in outputs


def test_inputs_may_be_trees():
    seen = []
    model = layers.shape_dependent(lambda spec: seen.append(spec) or layers.add)
    model.apply({}, {}, (X, X), train=False)
    assert [s.shape for s in seen[0]] == [(6, 8), (6, 8)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: layers.shape_dependent(layers.relu),
            "shape_dependent takes a function of the input's spec, got Layer",
        ),
        (lambda: layers.shape_dependent(3), "shape_dependent takes a function of the input's spec, got int"),
        (
            lambda: layers.shape_dependent(lambda spec: spec.shape).init(KEY, X),
            r"shape_dependent\(<lambda>\) takes layers and got tuple",
        ),
        (
            lambda: layers.shape_dependent(lambda spec: layers.dense).init(KEY, X),
            r"shape_dependent\(<lambda>\) got the function dense: call it, as in dense\(...\)",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_errors_name_the_path():
    model = layers.serial(layers.shape_dependent(bottleneck))
    params, state = model.init(KEY, X)
    with pytest.raises(ValueError, match=r"^bottleneck_0/dropout_0 needs a key"):
        model.apply(params, state, X, train=True)
