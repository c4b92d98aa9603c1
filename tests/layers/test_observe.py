from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from nnkit import layers, tree
from nnkit.layers.observe import rows
from tests.catalog import LAYERS

KEY = jax.random.key(0)
X = jnp.ones((2, 4))
MODEL = layers.serial(
    layers.dense(3),
    layers.residual(layers.serial(layers.dense(3), layers.batch_norm())),
    head=layers.dense(2),
)


def test_observe_returns_what_apply_returns_and_each_output():
    params, state = MODEL.init(KEY, X)
    y, new, outputs = layers.observe(MODEL, params, state, X, train=True)
    expected, expected_state = MODEL.apply(params, state, X, train=True)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(
        new["residual_0"]["body"]["batch_norm_0"]["var"],
        expected_state["residual_0"]["body"]["batch_norm_0"]["var"],
    )
    assert list(outputs) == [
        "dense_0", "residual_0/body/dense_0", "residual_0/body/batch_norm_0", "residual_0/body",
        "residual_0/shortcut", "residual_0", "head",
    ]  # fmt: skip
    np.testing.assert_array_equal(outputs["head"], y)
    np.testing.assert_array_equal(outputs["residual_0"], outputs["dense_0"] + outputs["residual_0/body"])


def test_observe_is_pure_under_jit_and_grad():
    params, state = MODEL.init(KEY, X)

    def deepest(params):
        return layers.observe(MODEL, params, state, X, train=False)[2]["residual_0/body/dense_0"].sum()

    grads = jax.jit(jax.grad(deepest))(params)
    assert grads["dense_0"]["kernel"].any()
    assert not grads["head"]["kernel"].any()
    MODEL.apply(params, state, X, train=False)  # nothing is observed any more, and nothing leaks


def test_rows_count_every_parameter_of_every_layer_of_the_catalog():
    for row in LAYERS:
        params, state = row.layer.init(KEY, row.x)
        found = rows(row.layer, row.x)
        assert sum(r.params for r in found) == tree.count(params), row.name
        assert sum(r.state for r in found) == tree.count(state), row.name
        assert sum(r.bytes for r in found) == tree.nbytes((params, state)), row.name


def test_summary_computes_nothing_and_totals():
    spec = jax.ShapeDtypeStruct((128, 100_000), jnp.float32)  # 800 GB of parameters, were they made
    text = layers.summary(layers.serial(layers.dense(2_000_000), layers.dense(10)), spec)
    assert "200,002,000,000" in text.splitlines()[2]
    assert text.splitlines()[-1].split() == ["total", "200,022,000,010", "0", "800,088,000,040"]


def test_a_layer_of_layers_has_a_row_for_what_is_its_own():
    model = layers.serial(
        layers.probe(layers.serial(layers.dense(3), layers.batch_norm()), statistics=("mean", "std"))
    )
    found = {row.path: row[3:] for row in rows(model, X)}
    assert found == {
        "serial_0/dense_0": (15, 0, 60),
        "serial_0/batch_norm_0": (6, 6, 48),
        "serial_0": (0, 2, 8),
    }


def test_summary_of_one_layer_and_of_several_outputs():
    assert layers.summary(layers.dense(3), X).splitlines()[2].split()[:3] == ["dense", "dense", "(2,3)"]
    both = layers.branch(layers.dense(3), layers.serial(pair=layers.branch(layers.relu, layers.relu)))
    assert "branch_0" not in layers.summary(both, X)
