"""Ensembles: each member is a run, and together they predict with a spread."""

from __future__ import annotations

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnkit import layers, losses, optim, train, tree

module = importlib.import_module("nnkit.train.ensemble")  # train.ensemble is the function

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 4)).astype(np.float32)
Y = RNG.integers(0, 3, 40).astype(np.int32)
KEY = jax.random.key(0)
KEYS = jax.random.split(KEY, 3)
MODEL = layers.serial(layers.batch_norm(), layers.dropout(0.5), layers.dense(3))


def _trainer():
    return train.trainer(MODEL, losses.softmax_cross_entropy, optim.adam(0.1))


TRAINER = _trainer()
RULE = train.early_stopping("val_loss", patience=1, restore_best=True)
OPTIONS = {"batch_size": 16, "validation": (X[:10], Y[:10]), "early_stopping": RULE}


def _data(leaf):
    return jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def _same(a, b, rtol=0.0, atol=0.0):
    a, b = (tree.flatten(jax.tree.map(_data, t)) for t in (a, b))
    for path, leaf in a.items():
        np.testing.assert_allclose(leaf, b[path], rtol, atol, err_msg=path)


@functools.cache
def _alone():
    return [train.run(TRAINER, key, (X, Y), 6, **OPTIONS) for key in KEYS]


def _check_members(trainer, rtol=0.0, atol=0.0, **how):
    members = train.ensemble(trainer, KEYS, (X, Y), 6, **how, **OPTIONS)
    for i, alone in enumerate(_alone()):
        _same(jax.tree.map(lambda a, i=i: a[i], members), alone, rtol, atol)
    return members


def test_an_exact_member_is_its_run_to_the_last_bit():
    ts, history = _check_members(TRAINER)
    assert len(set(ts.stopping.epoch.tolist())) > 1  # they stop when each of them should
    assert history["loss"].shape == (3, 6)
    assert jax.random.key_data(ts.key).shape[0] == 3


def test_a_mapped_member_is_its_run_to_rounding():
    # Batched products of matrices sum in another order, and 18 steps of Adam with a rate of 0.1 go on from
    # there: a step that is normalised by a small average turns rounding into a difference of its own size.
    _check_members(TRAINER, 1e-3, 1e-3, members="mapped")


def test_it_splits_one_key():
    short = {"batch_size": 16, "epochs": 1, "data": (X, Y)}
    split, given = train.ensemble(TRAINER, KEY, n=3, **short), train.ensemble(TRAINER, KEYS, **short)
    _same(split, given)


@pytest.mark.slow
@pytest.mark.parametrize("members", ["exact", "mapped"])
def test_it_is_pure(members):
    """Jitted, with a traced rate, and differentiated."""
    model = layers.dense(3)

    @jax.jit
    def loss(rate):
        trainer = train.trainer(model, losses.softmax_cross_entropy, optim.sgd(rate))
        _, history = train.ensemble(trainer, KEYS[:2], (X, Y), 2, members=members, batch_size=16)
        return jnp.mean(history["loss"])

    trainer = train.trainer(model, losses.softmax_cross_entropy, optim.sgd(0.1))
    _, history = train.ensemble(trainer, KEYS[:2], (X, Y), 2, batch_size=16)
    np.testing.assert_allclose(loss(0.1), np.mean(history["loss"]), 1e-5)
    assert jax.grad(loss)(0.01) < 0


def _one_for_all(f, keys):
    return jax.lax.map(lambda i: f(jax.tree.map(lambda a: a[0], keys)), jnp.arange(3))


def test_members_that_are_all_the_first_are_found(monkeypatch):
    monkeypatch.setitem(module._MAPS, "exact", _one_for_all)
    with pytest.raises(AssertionError):
        _check_members(_trainer())


# --- what they predict together ---------------------------------------------------------------------


def _stack(n):
    return jax.vmap(lambda key: MODEL.init(key, X[:1]))(jax.random.split(KEY, n))


def _by_hand(params, state, outputs):
    logits = np.stack(
        [
            MODEL.apply(*jax.tree.map(lambda a, i=i: a[i], (params, state)), X, train=False)[0]
            for i in range(len(params["dense_0"]["bias"]))
        ]
    ).astype(np.float64)
    if outputs == "values":
        return logits.mean(0), logits.std(0, ddof=1), None, None
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    doubt = -np.sum(p.mean(0) * np.log(p.mean(0)), axis=-1)
    return p.mean(0), p.std(0, ddof=1), doubt, doubt + np.mean(np.sum(p * np.log(p), axis=-1), axis=0)


@pytest.mark.parametrize("outputs", ["logits", "values"])
def test_mean_spread_and_disagreement(outputs):
    params, state = _stack(4)
    sure = train.predict_ensemble(MODEL, params, state, X, batch_size=16, outputs=outputs)
    assert isinstance(sure, train.Uncertain)
    for got, expected in zip(sure, _by_hand(params, state, outputs), strict=True):
        if expected is None:
            assert got is None
        else:
            # Softmax, logarithm and four additions in float32.
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-6)


def test_members_that_agree_have_no_spread():
    params, state = jax.tree.map(lambda a: jnp.repeat(a[:1], 3, axis=0), _stack(1))
    sure = train.predict_ensemble(MODEL, params, state, X)
    assert float(np.max(sure.spread)) < 1e-6
    assert 0 <= float(np.min(sure.mutual_information)) <= float(np.max(sure.mutual_information)) < 1e-6
    np.testing.assert_allclose(np.sum(sure.mean, axis=-1), 1, 1e-6)


def test_it_is_pure_too():
    params, state = _stack(3)
    sure = jax.jit(lambda *args: train.predict_ensemble(MODEL, *args))(params, state, X)
    other = train.predict_ensemble(MODEL, params, state, X)
    _same(sure, other, 1e-5, 1e-6)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"keys": KEY}, TypeError, r"ensemble needs to know how many members: pass ensemble\(\.\.\., n=5\)"),
        ({"n": 3}, TypeError, "ensemble got 3 keys and n=3: pass an array of keys"),
        (
            {"keys": KEY, "n": 0},
            ValueError,
            r"ensemble\(n=\.\.\.\) must be a whole number of at least 1, got 0",
        ),
        ({"keys": KEYS[:0]}, ValueError, "ensemble got no keys"),
        ({"keys": 5, "n": 2}, TypeError, "ensemble got the number 5 for a key"),
        ({"members": "both"}, ValueError, "unknown members 'both'"),
        ({"epochs": 0}, ValueError, r"ensemble\(epochs=\.\.\.\) must be a whole number"),
        ({"data": (X, Y + 3)}, ValueError, "label targets"),
    ],
)
def test_errors(change, error, text):
    given = {"keys": KEYS, "data": (X, Y), "epochs": 1, "batch_size": 16} | change
    with pytest.raises(error, match=text):
        train.ensemble(TRAINER, **given)


def test_parameters_that_are_no_ensembles():
    params, state = MODEL.init(KEY, X[:1])
    with pytest.raises(ValueError, match="members' parameters stacked on a first axis, and got leaves with"):
        train.predict_ensemble(MODEL, params, state, X)
    with pytest.raises(ValueError, match=r"got one member, which has no spread: use train.predict"):
        train.predict_ensemble(MODEL, *_stack(1), X)
    with pytest.raises(ValueError, match=r"outputs=.* must be 'logits', 'probabilities' or 'values'"):
        train.predict_ensemble(MODEL, *_stack(2), X, outputs="classes")
