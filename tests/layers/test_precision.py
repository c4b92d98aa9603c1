"""``policy`` and ``with_dtype``: which dtype stands where, and the numbers of the same network cast by hand."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnkit import layers, tree
from nnkit.types import Layer

KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)
HALVES = pytest.mark.parametrize("half", [jnp.bfloat16, jnp.float16])


def body() -> Layer:
    return layers.serial(layers.dense(8), layers.batch_norm(), layers.relu, layers.dense(3))


def dtypes(part: Any) -> set[str]:
    return {str(leaf.dtype) for leaf in jax.tree.leaves(part)}


def mixed(half: Any, make: Any = body, **more: Any) -> Layer:
    options = {"param_dtype": jnp.float32, "compute_dtype": half, "output_dtype": jnp.float32} | more
    return layers.policy(make(), **options)


@HALVES
def test_every_dtype_is_where_it_belongs(half):
    model = mixed(half)
    for x in (X, X.astype(half)):
        params, state = model.init(KEY, x)
        assert dtypes(params) == dtypes(state) == {"float32"}
        y, new, outputs = layers.observe(model, params, state, x, train=True)
        assert (dtypes(y), dtypes(new)) == ({"float32"}, {"float32"})
        assert dtypes(outputs) == {jnp.dtype(half).name}
        grads = jax.grad(lambda p, x=x, state=state: model.apply(p, state, x, train=True)[0].sum())(params)
        assert dtypes(grads) == {"float32"}


@HALVES
def test_the_numbers_are_those_of_the_network_cast_by_hand(half):
    model, plain = mixed(half), body()
    params, state = model.init(KEY, X)
    jax.tree.map(np.testing.assert_array_equal, (params, state), plain.init(KEY, X))
    low = jax.tree.map(lambda a: a.astype(half), params)
    for train in (True, False):
        y, new = model.apply(params, state, X, train=train)
        expected, after = plain.apply(low, state, X.astype(half), train=train)
        np.testing.assert_array_equal(y, expected.astype(jnp.float32))
        jax.tree.map(np.testing.assert_array_equal, new, after)
    grads = jax.grad(lambda p: model.apply(p, state, X, train=True)[0].sum())(params)
    expected = jax.grad(lambda p: plain.apply(p, state, X.astype(half), train=True)[0].sum())(low)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.float32)), grads, expected)


def test_dense_equals_flaxs_dtype_and_param_dtype():
    theirs = nn.Dense(3, dtype=jnp.bfloat16, param_dtype=jnp.float32)
    variables = theirs.init(KEY, X)
    ours = mixed(jnp.bfloat16, lambda: layers.dense(3), output_dtype=jnp.bfloat16)
    y, _ = ours.apply(variables["params"], {}, X, train=False)
    expected = theirs.apply(variables, X)
    assert y.dtype == expected.dtype
    np.testing.assert_array_equal(y, expected)


def test_tokens_stay_and_their_network_computes_in_half():
    ids = jnp.array([[0, 300, 1000]])  # 300 and 1000 are not bfloat16 numbers next to each other
    model = layers.policy(
        layers.serial(layers.embedding(1001, 4), layers.dense(3)),
        param_dtype=jnp.float32, compute_dtype=jnp.bfloat16,
    )  # fmt: skip
    params, state = model.init(KEY, ids)
    assert dtypes(params) == {"float32"}
    y, _, outputs = layers.observe(model, params, state, ids, train=False)
    assert dtypes((y, outputs)) == {"bfloat16"}
    table = params["embedding_0"]["embedding"]
    np.testing.assert_array_equal(outputs["embedding_0"], table[ids].astype(jnp.bfloat16))


def test_parameters_in_half_precision_and_those_that_are_kept():
    options: Any = {"param_dtype": jnp.bfloat16, "compute_dtype": jnp.bfloat16}
    assert dtypes(layers.policy(body(), **options).init(KEY, X)[0]) == {"bfloat16"}
    model = layers.policy(body(), keep=r"batch_norm_0/.*", **options)
    params, state = model.init(KEY, X)
    found = {path: str(leaf.dtype) for path, leaf in tree.flatten(params).items()}
    assert {p for p, d in found.items() if d == "float32"} == {"batch_norm_0/scale", "batch_norm_0/bias"}
    y, new = model.apply(params, state, X, train=True)
    assert (dtypes(y), dtypes(new)) == ({"float32"}, {"float32"})
    # A kept one is used unrounded.
    params["batch_norm_0"]["bias"] += 1 / 3
    inner: dict[str, Any] = {}
    _, _, inner = layers.observe(model, params, state, X, train=True)
    plain = body().apply(params, state, X.astype(jnp.bfloat16), train=True)[0]
    np.testing.assert_array_equal(inner["dense_1"], plain)


def test_a_kept_kernel_is_for_a_layer_with_a_dtype_of_its_own():
    options: Any = {"param_dtype": jnp.float32, "compute_dtype": jnp.bfloat16, "keep": "head/.*"}
    x = jnp.ones((2, 5, 3))
    model = layers.policy(layers.serial(head=layers.lstm(4)), **options)
    params, state = model.init(KEY, x)
    with pytest.raises(ValueError, match="dtype") as info:
        model.apply(params, state, x, train=True)
    assert any(
        note.startswith("policy(keep=...) keeps head/") and "out of bfloat16" in note and "with_dtype" in note
        for note in info.value.__notes__
    )
    model = layers.policy(layers.serial(head=layers.with_dtype(layers.dense(4), jnp.float32)), **options)
    params, state = model.init(KEY, X)
    y, _ = model.apply(params, state, X, train=True)
    wide = layers.dense(4).apply(params["head"], {}, X.astype(jnp.bfloat16).astype(jnp.float32), train=True)[
        0
    ]
    np.testing.assert_array_equal(y, wide.astype(jnp.bfloat16).astype(jnp.float32))


def test_with_dtype_is_an_island():
    model = layers.serial(layers.dense(4), layers.with_dtype(layers.serial(layers.dense(3)), jnp.float32))
    low = X.astype(jnp.bfloat16)
    params, state = model.init(KEY, low)
    assert (dtypes(params["dense_0"]), dtypes(params["serial_0"])) == ({"bfloat16"}, {"float32"})
    y, _, outputs = layers.observe(model, params, state, low, train=True)
    assert [outputs[p].dtype for p in ("dense_0", "serial_0/dense_0", "serial_0")] == [
        "bfloat16",
        "float32",
        "bfloat16",
    ]
    h = outputs["dense_0"].astype(jnp.float32)
    island = params["serial_0"]["dense_0"]
    np.testing.assert_array_equal(y, (h @ island["kernel"] + island["bias"]).astype(jnp.bfloat16))


class _Keeper:
    """A layer whose state takes the dtype of its input, and what it returns too."""

    @staticmethod
    def layer() -> Layer:
        def init(key, x, /):
            return {}, {"last": jnp.zeros(x.shape[1:], x.dtype), "count": jnp.zeros((), jnp.int32)}

        def apply(params, state, x, *, key=None, train):
            return x + state["last"], {"last": x.mean(0), "count": state["count"] + 1}

        return Layer(init, apply, "keeper_")


def test_state_in_the_inputs_dtype_fits_the_computation_and_keeps_its_form():
    model = mixed(jnp.float16, _Keeper.layer)
    params, state = model.init(KEY, X)
    assert state["last"].dtype == jnp.float16
    y, new = jax.jit(model.apply, static_argnames="train")(params, state, X, train=True)
    assert [new[k].dtype for k in ("last", "count")] == ["float16", "int32"]
    assert y.dtype == jnp.float32
    wider = {**state, "last": state["last"].astype(jnp.float32)}
    with jax.numpy_dtype_promotion("standard"):
        assert model.apply(params, wider, X, train=True)[1]["last"].dtype == jnp.float32


def test_the_input_gives_the_output_its_dtype_where_none_is_named():
    model = layers.policy(layers.branch(layers.dense(2), layers.relu), compute_dtype=jnp.float16)
    for dtype in (jnp.float32, jnp.bfloat16):
        params, state = model.init(KEY, X.astype(dtype))
        y, _ = model.apply(params, state, X.astype(dtype), train=False)
        assert (dtypes(params), dtypes(y)) == ({jnp.dtype(dtype).name}, {jnp.dtype(dtype).name})
    both = layers.policy(layers.parallel(layers.relu, layers.relu), compute_dtype=jnp.float32)
    y, _ = both.apply({}, {}, (X.astype(jnp.float16), X.astype(jnp.bfloat16)), train=False)
    assert dtypes(y) == {"float32"}


def test_through_repeat_remat_share_and_around_them():
    block = layers.serial(layers.dense(4, use_bias=False), layers.batch_norm(), layers.dropout(0.5))
    inside = layers.repeat(layers.remat(mixed(jnp.bfloat16, lambda: block, output_dtype=None)), 2)
    outside = mixed(jnp.bfloat16, lambda: layers.repeat(layers.remat(block), 2))
    for model in (inside, outside):
        params, state = model.init(KEY, X)
        assert dtypes((params, state)) == {"float32"}
        y, new = model.apply(params, state, X, key=KEY, train=True)
        assert dtypes((y, new)) == {"float32"}
        bytes_of = layers.summary(layers.serial(model), X).splitlines()[-1].split()[-1]
        assert int(bytes_of) == tree.nbytes((params, state))


def _wrong(change: Any) -> Layer:
    right = mixed(jnp.bfloat16)
    return right._replace(**change(right, body()))


MUTANTS: dict[str, Any] = {
    "nothing is cast": lambda right, plain: {"apply": plain.apply},
    "the output is not": lambda right, plain: {"apply": mixed(jnp.bfloat16, output_dtype=jnp.bfloat16).apply},
    "parameters in half": lambda right, plain: {"init": mixed(jnp.bfloat16, param_dtype=jnp.bfloat16).init},
    "only the output is": lambda right, plain: {"apply": mixed(jnp.float32).apply},
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name, monkeypatch):
    model = _wrong(MUTANTS[name])
    monkeypatch.setattr(layers, "policy", lambda layer, **options: model)
    with pytest.raises(AssertionError):
        test_every_dtype_is_where_it_belongs(jnp.bfloat16)


def test_bad_input():
    with pytest.raises(
        TypeError, match=r"policy\(compute_dtype=...\) must be a real floating-point dtype, got int32"
    ):
        layers.policy(layers.relu, compute_dtype=jnp.int32)
    with pytest.raises(
        TypeError, match=r"with_dtype\(dtype=...\) must be a real floating-point dtype, got complex64"
    ):
        layers.with_dtype(layers.relu, jnp.complex64)
    with pytest.raises(TypeError, match="policy got the function dense: call it"):
        layers.policy(layers.dense)
    model = layers.serial(mixed(jnp.float16, lambda: layers.serial(layers.dropout(0.5))))
    with pytest.raises(ValueError, match=r"^serial_0/dropout_0 needs a key"):
        model.apply({}, {}, X, train=True)
