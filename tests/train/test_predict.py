from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnkit import layers, train
from nnkit.train.preflight import checked_batch_size

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(23, 4)).astype(np.float32)
MODEL = layers.serial(layers.dense(8), layers.batch_norm(), layers.relu, layers.dropout(0.5), layers.dense(3))
PARAMS, STATE = MODEL.init(KEY, X[:1])


def counting(model):
    """The model, and a list with one entry for each time that it was traced."""
    traces: list[None] = []

    def apply(params, state, x, *, key=None, train):
        traces.append(None)
        return model.apply(params, state, x, key=key, train=train)

    return model._replace(apply=apply), traces


@pytest.mark.parametrize("n", [1, 4, 5, 8, 23])
@pytest.mark.parametrize("array", [np.asarray, jnp.asarray], ids=["host", "device"])
def test_every_row_is_predicted_as_by_the_model(n, array):
    found = train.predict(MODEL, PARAMS, STATE, array(X[:n]), batch_size=4)
    expected, _ = MODEL.apply(PARAMS, STATE, X[:n], train=False)
    assert isinstance(found, jax.Array if array is jnp.asarray else np.ndarray)
    assert found.shape == (n, 3)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray], ids=["host", "device"])
@pytest.mark.parametrize("sampling", [{}, {"samples": 3, "key": KEY}], ids=["plain", "samples"])
def test_one_compilation_serves_any_number_of_inputs(array, sampling):
    model, traces = counting(MODEL)
    train.predict(model, PARAMS, STATE, array(X[:8]), batch_size=8, **sampling)
    before = len(traces)  # 1, and with samples more for the shapes of the program's parts
    assert before == 1 or sampling
    for n in (1, 7, 16, 23):
        train.predict(model, PARAMS, STATE, array(X[:n]), batch_size=8, **sampling)
    assert len(traces) == before


def test_a_row_has_the_same_bits_however_many_come_after_it():
    whole = train.predict(MODEL, PARAMS, STATE, X, batch_size=10)
    for n in (1, 9, 10, 11):
        np.testing.assert_array_equal(train.predict(MODEL, PARAMS, STATE, X[:n], batch_size=10), whole[:n])


class Watched(np.ndarray):
    """An array that notes what is read of it, and may not be copied whole."""

    read: list[slice]

    def __getitem__(self, index):
        if isinstance(index, slice):
            self.read.append(index)
        return np.asarray(super().__getitem__(index))

    def __array__(self, *_, **__):
        raise AssertionError("copied whole")


def test_a_memory_mapped_file_is_read_batch_by_batch(tmp_path):
    file = tmp_path / "x.npy"
    np.save(file, X)
    mapped = np.load(file, mmap_mode="r")
    assert isinstance(mapped, np.memmap)
    found = train.predict(MODEL, PARAMS, STATE, mapped, batch_size=5)
    np.testing.assert_array_equal(found, train.predict(MODEL, PARAMS, STATE, X, batch_size=5))
    watched = X.view(Watched)
    watched.read = []
    np.testing.assert_array_equal(train.predict(MODEL, PARAMS, STATE, watched, batch_size=5), found)
    assert [(s.start, s.stop) for s in watched.read] == [(0, 5), (5, 10), (10, 15), (15, 20), (20, 25)]


def test_at_most_two_batches_are_on_the_device(monkeypatch):
    """Counted as bytes of live arrays: x would be 4 MB, a batch is 40 kB."""
    x = np.zeros((10_000, 100), np.float32)
    model = layers.stateless(lambda x: x.sum(1))
    most = 0

    def watch(x):
        nonlocal most
        most = max(most, sum(a.nbytes for a in jax.live_arrays()) - before)
        return x

    program = train.predict.__globals__["_plain"]
    monkeypatch.setitem(train.predict.__globals__, "_plain", lambda *a: watch(program(*a)))
    before = sum(a.nbytes for a in jax.live_arrays())
    train.predict(model, {}, {}, x, batch_size=100)
    assert most <= 3 * 100 * 100 * 4


@pytest.mark.parametrize("where", ["host", "device", "traced"])
@pytest.mark.parametrize(
    ("output", "shape"),
    [
        (lambda x: x.mean(0), r"\['b'\] has shape \(4,\)"),
        (lambda x: x.sum(), r"\['b'\] has shape \(\)"),
        (lambda x: jnp.concatenate([x, x]), r"\['b'\] has shape \(10, 4\)"),
        (lambda x: jnp.ones((7, 4)), r"\['b'\] has shape \(7, 4\)"),
    ],
    ids=["mean", "scalar", "more rows", "table"],
)
def test_an_output_without_a_row_for_each_example_is_refused(output, shape, where):
    model = layers.stateless(lambda x: {"a": x, "b": output(x)})
    predict = lambda x: train.predict(model, {}, {}, x, batch_size=5)
    run, x = {"host": (predict, X), "device": (predict, jnp.asarray(X)), "traced": (jax.jit(predict), X)}[
        where
    ]
    with pytest.raises(ValueError, match=rf"{shape} for a batch of 5 examples, .* \(5, ...\): return"):
        run(x)


def test_samples_and_ensembles_refuse_such_outputs_too():
    mean = layers.stateless(lambda x: x.mean(0, keepdims=True))
    model = layers.serial(layers.dropout(0.5), mean)
    with pytest.raises(ValueError, match=r"the output.mean has shape \(1, 4\) for a batch of 5 examples"):
        train.predict(model, *model.init(KEY, X), X, batch_size=5, samples=3, key=KEY)
    model = layers.serial(layers.dense(3), mean)
    params, state = jax.vmap(lambda key: model.init(key, X))(jax.random.split(KEY, 2))
    with pytest.raises(ValueError, match=r"the output.mean has shape \(1, 3\) for a batch of 5 examples"):
        train.predict_ensemble(model, params, state, X, batch_size=5)


def test_numpys_integers_are_batch_sizes_larger_than_the_data_too():
    found = train.predict(MODEL, PARAMS, STATE, X, batch_size=np.int64(30))
    np.testing.assert_array_equal(found, train.predict(MODEL, PARAMS, STATE, X, batch_size=30))
    size = checked_batch_size(np.int64(30), 23)
    assert size == 23
    assert type(size) is int
    assert checked_batch_size(np.int32(3), 23) == 3


def test_any_tree_of_inputs_and_outputs():
    def forward(net, x):
        y = net.body(x["left"]) + x["right"][0]
        return {"y": y, "parts": (y[:, 0], [jnp.argmax(y, -1)])}

    model = layers.wire(forward, body=layers.dense(3))
    x = {"left": X, "right": (RNG.normal(size=(23, 3)).astype(np.float32),)}
    params, state = model.init(KEY, x)
    expected, _ = model.apply(params, state, x, train=False)
    for inputs in (x, jax.tree.map(jnp.asarray, x)):
        found = train.predict(model, params, state, inputs, batch_size=10)
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


def test_recurrent_layers_get_their_lengths():
    model = layers.lstm(4, last_only=True)
    lengths = np.arange(1, 8, dtype=np.int32)
    x = layers.Sequence(RNG.normal(size=(7, 7, 3)).astype(np.float32), lengths)
    params, state = model.init(KEY, x)
    expected, _ = model.apply(params, state, x, train=False)
    found = train.predict(model, params, state, x, batch_size=3)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_it_can_be_transformed():
    stacked = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), PARAMS)
    found = jax.jit(jax.vmap(lambda p: train.predict(MODEL, p, STATE, X, batch_size=10)))(stacked)
    assert found.shape == (2, 23, 3)
    expected, _ = MODEL.apply(PARAMS, STATE, X, train=False)
    np.testing.assert_allclose(found[0], expected, rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda x: train.predict(MODEL, PARAMS, STATE, x, batch_size=10).sum())(jnp.asarray(X))
    whole = jax.grad(lambda x: MODEL.apply(PARAMS, STATE, x, train=False)[0].sum())(jnp.asarray(X))
    np.testing.assert_allclose(gradient, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": X[:0]}, ValueError, r"one common, non-empty leading axis, got lengths \[0\]"),
        ({"x": (X, X[:3])}, ValueError, r"got lengths \[3, 23\]"),
        ({"batch_size": 0}, ValueError, "batch_size must be 1 or more, got 0"),
        ({"batch_size": 2.0}, TypeError, "batch_size must be an integer, got 2.0"),
        ({"key": KEY}, TypeError, "predict got a key and draws nothing: pass samples=100 too"),
        ({"samples": 5}, TypeError, r"predict\(samples=...\) needs a key: pass predict\(..., key=jax.random.key"),
        ({"samples": 5, "key": 3}, TypeError, r"predict got the number 3 for a key: pass jax.random.key\(3\)"),
        ({"samples": 1, "key": KEY}, ValueError, r"predict\(samples=1\) has no spread: draw at least 2"),
        ({"samples": 0, "key": KEY}, ValueError, r"predict\(samples=...\) must be a whole number of at least 2, got 0"),
        ({"samples": 2.5, "key": KEY}, ValueError, r"must be a whole number of at least 2, got 2.5"),
        ({"samples_at_once": 0}, ValueError, r"predict\(samples_at_once=...\) must be a whole number of at least 1"),
        ({"outputs": "logit"}, ValueError, "must be 'logits', 'probabilities' or 'values', got 'logit'"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_said(changes, error, message):
    arguments = {"x": X, "batch_size": 4} | changes
    with pytest.raises(error, match=message):
        train.predict(MODEL, PARAMS, STATE, arguments.pop("x"), **arguments)
