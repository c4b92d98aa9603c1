from __future__ import annotations

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnkit import layers, tree
from nnkit.checks import LayerError
from nnkit.types import Layer

KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)


def test_serial_is_composition():
    model = layers.serial(layers.dense(5), layers.tanh, layers.dense(2))
    p, state = model.init(KEY, X)
    h = jnp.tanh(X @ p["dense_0"]["kernel"] + p["dense_0"]["bias"])
    y = h @ p["dense_1"]["kernel"] + p["dense_1"]["bias"]
    np.testing.assert_allclose(model.apply(p, state, X, train=False)[0], y, rtol=1e-6)


def test_serial_of_nothing_is_the_identity():
    params, state = layers.serial().init(KEY, X)
    assert (params, state) == ({}, {})
    np.testing.assert_array_equal(layers.serial().apply({}, {}, X, train=True)[0], X)


def test_paths_count_by_kind_so_that_an_activation_in_between_renames_nothing():
    def paths(*more):
        model = layers.serial(layers.dense(4), *more, layers.dense(4), layers.serial(layers.dense(2)))
        return set(tree.flatten(model.init(KEY, X)[0]))

    assert paths() == paths(layers.relu, layers.dropout(0.5))
    assert "dense_1/kernel" in paths()
    assert "serial_0/dense_0/bias" in paths()


def test_children_may_be_named():
    model = layers.serial(layers.named("stem", layers.dense(4)), layers.relu, head=layers.dense(2))
    assert set(model.init(KEY, X)[0]) == {"stem", "head"}


def test_each_child_has_a_key_of_its_own():
    model = layers.serial(layers.dense(4), layers.dense(4))
    params, _ = model.init(KEY, X)
    assert not jnp.allclose(params["dense_0"]["kernel"], params["dense_1"]["kernel"])
    twice = layers.branch(layers.dropout(0.5), layers.dropout(0.5))
    (a, b), _ = twice.apply({}, {}, jnp.ones((10, 10)), key=KEY, train=True)
    assert (a != b).any()


def test_state_goes_to_the_right_child():
    model = layers.serial(
        layers.batch_norm(momentum=0.0), layers.stateless(lambda x: x + 5), layers.batch_norm(momentum=0.0)
    )
    params, state = model.init(KEY, X)
    _, state = model.apply(params, state, X, train=True)
    np.testing.assert_allclose(state["batch_norm_0"]["mean"], X.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(state["batch_norm_1"]["mean"], 5, atol=1e-5)


def test_parallel_and_branch():
    both = layers.parallel(layers.relu, layers.tanh)
    a, b = both.apply({}, {}, (X, X), train=False)[0]
    np.testing.assert_array_equal(a, jnp.maximum(X, 0))
    np.testing.assert_array_equal(b, jnp.tanh(X))
    spread = layers.branch(layers.relu, layers.tanh).apply({}, {}, X, train=False)[0]
    np.testing.assert_array_equal(spread, (a, b))


def test_add_and_concatenate():
    np.testing.assert_array_equal(layers.add.apply({}, {}, (X, X, X), train=False)[0], 3 * X)
    y, _ = layers.concatenate(axis=0).apply({}, {}, (X, X), train=False)
    np.testing.assert_array_equal(y, jnp.concatenate([X, X]))


def test_residual_adds_the_input_or_its_projection():
    block = layers.residual(layers.stateless(lambda x: 2 * x))
    np.testing.assert_array_equal(block.apply({}, {}, X, train=False)[0], 3 * X)
    block = layers.residual(layers.dense(3), layers.dense(3))
    p, state = block.init(KEY, X)
    assert set(p) == {"body", "shortcut"}
    y = layers.dense(3).apply(p["body"], {}, X, train=False)[0]
    around = layers.dense(3).apply(p["shortcut"], {}, X, train=False)[0]
    np.testing.assert_allclose(block.apply(p, state, X, train=False)[0], y + around, rtol=1e-6)


def test_any_graph_of_layers_by_branches_alone():
    """A diamond with a skip over it: y = c(a(x) + b(x)) joined with x."""
    diamond = layers.serial(
        layers.branch(
            layers.serial(layers.branch(layers.dense(3), layers.dense(3)), layers.add), layers.identity
        ),
        layers.concatenate(),
    )
    params, state = diamond.init(KEY, X)
    assert diamond.apply(params, state, X, train=False)[0].shape == (6, 7)


def test_frozen_keeps_statistics_parameters_and_dropout_still():
    inner = layers.serial(layers.dense(4), layers.batch_norm(), layers.dropout(0.5))
    model = layers.frozen(inner)
    params, state = model.init(KEY, X)
    y, new = model.apply(params, state, X, key=KEY, train=True)
    np.testing.assert_array_equal(y, inner.apply(params, state, X, train=False)[0])
    np.testing.assert_array_equal(new["batch_norm_0"]["mean"], state["batch_norm_0"]["mean"])
    grads = jax.grad(lambda p, x: model.apply(p, state, x, train=True)[0].sum(), argnums=(0, 1))(params, X)
    assert not any(g.any() for g in jax.tree.leaves(grads[0]))
    assert grads[1].any()


def test_frozen_layers_with_a_cache_decode_at_test_time_only():
    attention = layers.multi_head_attention(2, causal=True, cache_length=3)
    model, x = layers.frozen(attention), jnp.ones((1, 3, 4))
    params, state = model.init(KEY, x)
    y, new = model.apply(params, state, x, train=True)
    jax.tree.map(np.testing.assert_array_equal, new, state)
    np.testing.assert_allclose(y, attention.apply(params, state, x, train=True)[0], rtol=1e-5, atol=1e-6)
    assert model.apply(params, state, x, train=False)[1]["index"] == 3


def test_serial_does_not_lose_lengths_silently():
    deep = layers.serial(layers.lstm(4), layers.tanh, head=layers.lstm(4, last_only=True))
    x = layers.Sequence(jnp.ones((2, 5, 3)), jnp.array([5, 2]))
    message = (
        r"^deep was given lengths and has lost them where head runs, since layers give arrays: put the recurrent "
        r"layers together in stacked\(...\), or call each with layers.Sequence\(x, lengths\) in wire"
    )
    with pytest.raises(LayerError, match=message):
        layers.serial(deep=deep).init(KEY, x)
    params, _ = deep.init(KEY, x.x)
    with pytest.raises(LayerError, match="serial was given lengths and has lost them"):
        deep.apply(params, {}, x, train=False)
    deep.apply(params, {}, layers.Sequence(x.x), train=False)
    encoder = layers.lstm(5, last_only=True)
    again = layers.stateless(lambda h: jnp.repeat(h[:, None], 3, axis=1), name="again_")
    for model in (
        layers.serial(layers.lstm(4), layers.dense(2)),
        layers.serial(encoder, again, layers.gru(2)),  # the sequence that is decoded has lengths of its own
        layers.serial(layers.stacked(layers.lstm(4), layers.gru(4))),
    ):
        model.init(KEY, x)


def _model():
    return layers.serial(
        encoder=layers.serial(layers.dense(4), layers.dropout(0.5), layers.relu, layers.dropout(0.5)),
        head=layers.dense(2),
    )


def test_an_error_names_the_whole_path():
    params, state = _model().init(KEY, X)
    with pytest.raises(LayerError, match=r"^encoder/dropout_0 needs a key when train=True"):
        _model().apply(params, state, X, train=True)
    with pytest.raises(
        LayerError, match=r"^encoder/dense_0 has a kernel of shape \(4, 4\) and needs \(7, 4\)"
    ):
        _model().apply(params, state, jnp.zeros((2, 7)), train=False)


def test_a_foreign_error_keeps_its_type_and_gets_a_note():
    def fails(x):
        raise ZeroDivisionError("mine")

    model = layers.serial(block=layers.serial(layers.stateless(fails)))
    with pytest.raises(ZeroDivisionError, match="mine") as info:
        model.apply({}, {}, X, train=False)
    assert info.value.__notes__ == ["while applying layer block/fails_0"]


def test_an_error_survives_pickling():
    error = LayerError("dense_", "is wrong", ("a", "b"))
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "a/b is wrong"


def test_the_names_reach_the_profiler():
    params, state = _model().init(KEY, X)
    text = (
        jax.jit(_model().apply, static_argnames="train")
        .lower(params, state, X, train=False)
        .as_text(debug_info=True)
    )
    assert "encoder/dense_0" in text


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: layers.serial(layers.named("a", layers.relu), layers.named("a", layers.tanh)),
            ValueError,
            r"serial: two children are called 'a': give one another name with named\(...\)",
        ),
        (
            lambda: layers.serial(layers.dense(2), dense_0=layers.dense(2)),
            ValueError,
            "two children are called 'dense_0'",
        ),
        (lambda: layers.named("a/b", layers.relu), ValueError, "a layer's name must be a string without '/'"),
        (lambda: layers.named("a_", layers.relu), ValueError, "without '_' at its end, got 'a_'"),
        (
            lambda: layers.serial(Layer(lambda k, x: ({}, {}), lambda *a, **k: None, "")),
            ValueError,
            "must be non-empty",
        ),
        (
            lambda: layers.serial(layers.batch_norm),
            TypeError,
            r"serial got the function batch_norm: call it, as in batch_norm\(...\), to have the layer",
        ),
        (
            lambda: layers.serial(jnp.tanh),
            TypeError,
            r"serial got the function tanh: lift it to a layer with stateless\(tanh\)",
        ),
        (lambda: layers.serial(3), TypeError, r"serial takes layers and got int \(3\)"),
        (
            lambda: layers.parallel(layers.relu, layers.relu).apply({}, {}, (X,), train=False),
            LayerError,
            "parallel has 2 layers and takes a tuple of 2 inputs, got 1 of them",
        ),
        (
            lambda: layers.add.apply({}, {}, X, train=False),
            LayerError,
            r"add takes a tuple of inputs, as branch\(...\) returns, got ArrayImpl",
        ),
        (
            lambda: layers.add.apply({}, {}, (X, X[:1]), train=False),
            LayerError,
            r"add got shapes \(6, 4\), \(1, 4\): they must be equal",
        ),
        (
            lambda: (b := layers.residual(layers.dense(3))).apply(*b.init(KEY, X), X, train=False),
            LayerError,
            r"residual has a body that gives \(6, 3\) and a shortcut that gives \(6, 4\): pass residual\(body, sho",
        ),
        (
            lambda: (b := layers.residual(layers.batch_norm())).apply(
                *b.init(KEY, (X, X[:, 0] > 0)), (X, X[:, 0] > 0), train=True
            ),
            LayerError,
            r"residual adds arrays and has a shortcut that gives tuple: write the sum in wire, as in wire\(lambda net,",
        ),
        (
            lambda: layers.residual(layers.identity, layers.stateless(lambda xs: xs[0])).apply(
                {}, {}, (X, X), train=True
            ),
            LayerError,
            "residual adds arrays and has a body that gives tuple",
        ),
        (
            lambda: _model().apply({"conv_0": {}}, {}, X, train=False),
            LayerError,
            r"serial got parameters of another model: \['conv_0'\] where its children are \['encoder', 'head'\]",
        ),
        (
            lambda: _model().apply([X], {}, X, train=False),
            LayerError,
            "serial takes parameters as a dict and got list",
        ),
        (
            lambda: _model().init(0, X),
            TypeError,
            r"serial.init got the number 0 for a key: pass jax.random.key\(0\)",
        ),
        (
            lambda: _model().init(jax.random.PRNGKey(0), X),
            TypeError,
            "serial.init got an old-style uint32 key",
        ),
        (lambda: _model().init(None, X), TypeError, "serial.init needs a PRNG key and got NoneType"),
        (
            lambda: layers.flatten.apply({}, {}, jnp.zeros(()), train=False),
            LayerError,
            "flatten needs a batch axis",
        ),
        (lambda: layers.stateless(3), TypeError, "stateless takes a function of the input, got int"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_flatten_takes_a_batch_of_none():
    assert layers.flatten.apply({}, {}, jnp.zeros((0, 2, 3)), train=False)[0].shape == (0, 6)
