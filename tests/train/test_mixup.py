"""Mixup: examples of a batch mixed in training, and the losses with their targets as they are."""

from __future__ import annotations

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnkit import layers, losses, metrics, optim, regularizers, train

objective_module = importlib.import_module("nnkit.train.objective")
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32)
Y = jnp.asarray([0, 1, 2, 0, 1, 2], jnp.int32)
KEY = jax.random.key(1)
MODEL = layers.serial(layers.dense(5), layers.tanh, layers.dropout(0.5), layers.dense(3))
PARAMS, STATE = MODEL.init(jax.random.key(0), X)
LOOK = layers.stateless(lambda x: x)  # a model that shows what it was given


def _supervised(**options):
    return train.supervised(
        MODEL, losses.softmax_cross_entropy, metrics={"accuracy": metrics.accuracy},
        regularizer=regularizers.l2(0.1), **options,
    )  # fmt: skip


def _seen(key, alpha=1.0, n=6):
    """λ and the partners, read off what a model is given of the unit vectors: λ at i, 1 − λ at p(i)."""
    seen = []
    look = layers.stateless(lambda x: (seen.append(x), x)[1])
    loss = lambda p, y: jnp.zeros(n)
    train.supervised(look, loss, mixup=alpha)({}, {}, (jnp.eye(n), Y[:n]), key=key, train=True)
    return np.asarray(seen[0])


def _lambda_and_partners(key):
    mixed = _seen(key)
    fixed = [i for i in range(6) if mixed[i, i] == 1]
    lam = next(mixed[i, i] for i in range(6) if i not in fixed)
    rest = mixed - lam * np.eye(6, dtype="f")
    return lam, rest.argmax(axis=1)


def _by_hand(key):
    """Loss, penalty and accuracy of the mixed batch in numpy, but for the network itself."""
    lam, p = _lambda_and_partners(key)
    x = np.asarray(X)
    mixed = lam * x + (1 - lam) * x[p]
    logits, _ = MODEL.apply(PARAMS, STATE, jnp.asarray(mixed), key=key, train=True)
    logits = np.asarray(logits, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    y = np.asarray(Y)
    # As with mixed one-hot labels, which a cross-entropy cannot tell from mixed losses.
    target = lam * np.eye(3)[y] + (1 - lam) * np.eye(3)[y[p]]
    hits = lam * (logits.argmax(1) == y) + (1 - lam) * (logits.argmax(1) == y[p])
    penalty = 0.1 * sum(float((np.asarray(layer["kernel"]) ** 2).sum()) for layer in PARAMS.values() if layer)
    return -(target * log_p).sum(1).mean(), penalty, hits.mean()


def _check_by_hand():
    value, (_, found) = _supervised(mixup=1.0)(PARAMS, STATE, (X, Y), key=KEY, train=True)
    loss, penalty, accuracy = _by_hand(KEY)
    np.testing.assert_allclose(value, loss + penalty, rtol=1e-5)
    np.testing.assert_allclose(found["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(found["penalty"], penalty, rtol=1e-5)
    np.testing.assert_allclose(found["accuracy"], accuracy, rtol=1e-5)


def test_the_loss_of_a_mixed_batch_by_hand():
    lam, p = _lambda_and_partners(KEY)
    assert 0.05 < lam < 0.95  # so that every mistake shows
    assert sorted(p) == list(range(6))
    assert (np.asarray(Y)[p] != np.asarray(Y)).any()
    _check_by_hand()


right = objective_module._mixed
WRONG = {
    "labels as they are": lambda x, y, a, k: (right(x, y, a, k)[0], (right(x, y, a, k)[1][0], y)),
    "λ of the other": lambda x, y, a, k: (
        (m := right(x, y, a, k))[0],
        (1 - m[1][0], m[1][1]),
    ),
    "inputs as they are": lambda x, y, a, k: (x, right(x, y, a, k)[1]),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_mixture_is_seen(wrong, monkeypatch):
    # The model that shows its input is mixed rightly, by whichever function is in place when it is called.
    expected = _by_hand(KEY)
    monkeypatch.setattr(objective_module, "_mixed", wrong)
    monkeypatch.setattr(f"{__name__}._by_hand", lambda key: expected)
    with pytest.raises(AssertionError):
        _check_by_hand()


def test_lambda_is_of_beta_and_the_partners_are_any():
    """Over 4000 batches. Beta(a, a) has mean 1/2 and variance v = 1/(4(2a + 1))."""
    n, draws = 4, 4000

    def one(key):
        return objective_module._mixed(jnp.eye(n), jnp.arange(n), 0.5, key)

    _, (lam, partner) = jax.jit(jax.vmap(one))(jax.random.split(KEY, draws))
    v = 1 / (4 * (2 * 0.5 + 1))
    # Standard errors: of the mean √(v/draws), and of the variance below √(1/64/draws), as |x−½| ≤ ½.
    assert abs(lam.mean() - 0.5) < 4 * (v / draws) ** 0.5
    assert abs(lam.var() - v) < 4 * (1 / 64 / draws) ** 0.5
    often = np.asarray([(partner[:, i] == j).mean() for i in range(n) for j in range(n)])
    assert np.abs(often - 1 / n).max() < 4.5 * (1 / n * (1 - 1 / n) / draws) ** 0.5
    assert np.unique(np.asarray(lam)).size > draws // 2  # another for every batch


def test_a_mixture_of_0_is_none_traced_or_not():
    plain = _supervised()(PARAMS, STATE, (X, Y), key=KEY, train=True)
    for alpha in (0.0, 0, jnp.float32(0.0)):
        found = _supervised(mixup=alpha)(PARAMS, STATE, (X, Y), key=KEY, train=True)
        jax.tree.map(np.testing.assert_array_equal, plain, found)
    of_alpha = lambda a: _supervised(mixup=a)(PARAMS, STATE, (X, Y), key=KEY, train=True)
    traced = jax.jit(of_alpha)(0.0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), plain, traced)


def test_alphas_are_mapped_over_and_each_is_itself():
    of_alpha = lambda a: _supervised(mixup=a)(PARAMS, STATE, (X, Y), key=KEY, train=True)[0]
    alphas = jnp.asarray([0.0, 0.2, 1.0, 8.0])
    together = jax.jit(jax.vmap(of_alpha))(alphas)
    alone = [of_alpha(float(a)) for a in alphas]
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    assert len(set(np.asarray(together).tolist())) == 4
    slopes = jax.jit(jax.vmap(jax.grad(of_alpha)))(alphas)
    assert np.isfinite(slopes).all()


def test_evaluation_mixes_nothing():
    mixed, plain = (_supervised(mixup=a)(PARAMS, STATE, (X, Y), key=None, train=False) for a in (1.0, None))
    jax.tree.map(np.testing.assert_array_equal, mixed, plain)


def test_a_trainer_mixes_anew_in_every_step_and_part():
    trainer = train.trainer(MODEL, losses.softmax_cross_entropy, optim.sgd(0.0), mixup=0.4, micro_batches=2)
    ts = trainer.init(KEY, X[:1])
    step = jax.jit(trainer.step)
    found = [float(step(ts._replace(step=jnp.int32(i)), (X, Y))[1]["loss"]) for i in (0, 1, 0)]
    assert found[0] == found[2] != found[1]
    # Evaluation neither mixes nor drops, so it is one number.
    assert trainer.evaluate(ts, (X, Y)) == trainer.evaluate(ts._replace(step=jnp.int32(1)), (X, Y))


def test_inputs_and_targets_may_be_trees_of_any_floats_and_numpy_arrays():
    seen = []
    look = layers.stateless(lambda x: (seen.append(x), x["a"].astype(jnp.float32))[1])
    x = {"a": np.eye(6, dtype="f"), "b": np.eye(6, dtype="f").astype(jnp.bfloat16)}
    objective = train.supervised(look, lambda p, y: (p[:, 0] - y["t"]) ** 2, mixup=1.0)
    objective({}, {}, (x, {"t": np.arange(6, dtype="f")}), key=KEY, train=True)
    assert seen[0]["b"].dtype == jnp.bfloat16
    np.testing.assert_allclose(seen[0]["a"], seen[0]["b"].astype(jnp.float32), atol=2.0**-8)


def test_no_key_is_used_twice():
    with jax.debug_key_reuse(True):
        jax.jit(lambda k: _supervised(mixup=0.5)(PARAMS, STATE, (X, Y), key=k, train=True)[0])(KEY)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: _supervised(mixup=-1.0),
            ValueError,
            r"mixup must be in \[0, inf\), got -1.0: it is the param",
        ),
        (lambda: _supervised(mixup="1"), TypeError, "mixup must be a number or a scalar array, got '1'"),
        (lambda: _supervised(mixup=jnp.ones(2)), ValueError, "mixup must be a scalar, got an array of shape"),
        (
            lambda: _supervised(mixup=1.0)(PARAMS, STATE, (Y, Y), key=KEY, train=True),
            TypeError,
            "mixup mixes inputs and got int32, of which there is nothing in between: convert images to",
        ),
        (
            lambda: _supervised(mixup=1.0)(PARAMS, STATE, (X, Y), key=None, train=True),
            TypeError,
            r"mixup draws random numbers: pass objective\(..., key=key\)",
        ),
        (
            lambda: train.trainer(lambda *a, **k: None, optimizer=optim.sgd(0.1), init=MODEL.init, mixup=0.2),
            TypeError,
            r"trainer: \['mixup'\] go with a layer",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
