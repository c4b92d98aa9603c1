"""Micro-batches: the step of the whole batch, one part after the other."""

from __future__ import annotations

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnkit import layers, losses, metrics, optim, regularizers, train
from nnkit.train.gradients import StepLoss
from nnkit.types import GradientTransformation

trainer_module = importlib.import_module("nnkit.train.trainer")
RNG = np.random.default_rng(0)
X = RNG.normal(size=(20, 4))
Y = jnp.asarray(RNG.integers(0, 3, 20), jnp.int32)
KEY = jax.random.key(0)
PLAIN = layers.serial(layers.dense(8), layers.tanh, layers.dense(3))
NOISY = layers.serial(layers.dense(8), layers.batch_norm(), layers.relu, layers.dropout(0.5), layers.dense(3))


def _trainer(model=PLAIN, optimizer=None, **options):
    return train.trainer(
        model,
        losses.softmax_cross_entropy,
        optimizer or optim.adam(1e-2),
        metrics={"accuracy": metrics.accuracy},
        regularizer=regularizers.l2(0.1),
        **options,
    )


def _recording() -> GradientTransformation:
    """Plain descent whose state is what it was told: gradients, loss, and loss elsewhere with its slope."""

    def told(params, updates, value, value_fn):
        elsewhere = jax.tree.map(lambda p: 0.5 * p, params)
        return {"grads": updates, "value": value, "there": jax.value_and_grad(value_fn)(elsewhere)}

    def init(params):
        zero = jnp.zeros((), jax.tree.leaves(params)[0].dtype)
        return {"grads": params, "value": zero, "there": (zero, params)}

    def update(updates, state, params=None, *, value, value_fn, **_):
        return jax.tree.map(lambda g: -0.1 * g, updates), told(params, updates, value, value_fn)

    return GradientTransformation(init, update)


def _step(n: int, parts: int, scaled: bool):
    with jax.enable_x64(True):
        optimizer = optim.dynamic_loss_scale(_recording()) if scaled else _recording()
        trainer = _trainer(optimizer=optimizer, micro_batches=parts)
        ts = trainer.init(KEY, jnp.asarray(X[:1]))
        after, found = jax.jit(trainer.step)(ts, (jnp.asarray(X[:n]), Y[:n]))
        return jax.device_get((after._replace(key=()), found))


_whole = functools.cache(functools.partial(_step, parts=1))


def _check_equal_to_the_whole_batch(n: int, parts: int, scaled: bool = False) -> None:
    """A step's parameters, metrics, gradients and value_fn, in float64; an accuracy is float32 anywhere."""

    def same(a, b):
        digits = 1e-12 if a.dtype == np.float64 else 1e-6
        np.testing.assert_allclose(a, b, rtol=digits, atol=digits)

    jax.tree.map(same, _whole(n, scaled=scaled), _step(n, parts, scaled))


@pytest.mark.parametrize(("n", "parts"), [(20, 4), (18, 4), (3, 4)])
def test_a_step_in_parts_is_the_step_of_the_whole_batch(n, parts):
    _check_equal_to_the_whole_batch(n, parts)


def test_a_loss_scale_scales_each_part():
    _check_equal_to_the_whole_batch(18, 4, scaled=True)


class EqualWeights(StepLoss):
    def _mean(self, of_part):
        n = (len(self.batch[1]) // self.parts) * self.parts  # drops the rest, so all parts are of one size
        return self._replace(batch=jax.tree.map(lambda a: a[:n], self.batch))._whole_mean(of_part)

    _whole_mean = StepLoss._mean


class Summed(StepLoss):
    """Adds up where it should average: the penalty counts once for each part."""

    def gradients(self, params, scale):
        value, state, found, grads = StepLoss.gradients(self, params, scale)
        return value, state, found, jax.tree.map(lambda g: g * self.parts, grads)


class ValueOfOnePart(StepLoss):
    def value(self, params):
        first = jax.tree.map(lambda a: a[:: self.parts], self.batch)
        return self.objective(params, self.state, first, key=self.key, train=True)[0]


@pytest.mark.parametrize("wrong", [EqualWeights, Summed, ValueOfOnePart], ids=lambda c: c.__name__)
def test_a_wrong_mean_is_seen(wrong, monkeypatch):
    monkeypatch.setattr(trainer_module, "StepLoss", wrong)
    if wrong is not EqualWeights:
        monkeypatch.setattr(trainer_module, "StepLoss", lambda *a: (wrong if a[-1] > 1 else StepLoss)(*a))
    with pytest.raises(AssertionError):
        _check_equal_to_the_whole_batch(18, 4)


def test_parts_have_keys_of_their_own_and_the_state_goes_from_one_to_the_next():
    """By hand: every third example, its key folded in, batch norm's statistics moved three times."""
    trainer = _trainer(NOISY, optim.sgd(0.1), micro_batches=3)
    ts = trainer.init(KEY, jnp.asarray(X[:1], jnp.float32))
    x = jnp.asarray(X, jnp.float32)
    after, found = jax.jit(trainer.step)(ts, (x, Y))
    objective = train.supervised(
        NOISY, losses.softmax_cross_entropy, metrics={"accuracy": metrics.accuracy},
        regularizer=regularizers.l2(0.1),
    )  # fmt: skip
    state, grads, total = ts.state, jax.tree.map(jnp.zeros_like, ts.params), 0.0
    for i in range(3):
        key = jax.random.fold_in(jax.random.fold_in(ts.key, 0), i)
        weight = len(Y[i::3]) / 20

        def loss(params, i=i, key=key, state=state):
            return objective(params, state, (x[i::3], Y[i::3]), key=key, train=True)

        (_, (state, m)), g = jax.value_and_grad(loss, has_aux=True)(ts.params)
        grads = jax.tree.map(lambda a, b, w=weight: a + w * b, grads, g)
        total += weight * m["loss"]
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, ts.params, grads)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        (after.params, after.state, found["loss"]),
        (expected, state, total),
    )
    # A state that is not handed on moves once.
    once = NOISY.apply(ts.params, ts.state, x[2::3], key=KEY, train=True)[1]
    assert not np.allclose(after.state["batch_norm_0"]["var"], once["batch_norm_0"]["var"], rtol=1e-3)


def test_the_activations_of_one_part_are_in_memory():
    # The hidden layer's output, 256 x 1024 float32, is 1 MB, and its parameters 16 KB.
    model = layers.serial(layers.dense(1024), layers.tanh, layers.dense(3))
    batch = jnp.ones((256, 4)), jnp.zeros(256, jnp.int32)

    def temporary(parts):
        trainer = _trainer(model, optim.sgd(0.1), micro_batches=parts)
        ts = trainer.init(KEY, batch[0][:1])
        return jax.jit(trainer.step).lower(ts, batch).compile().memory_analysis().temp_size_in_bytes

    assert temporary(16) < temporary(1) / 4


def test_a_mapped_population_steps_in_parts():
    trainer = _trainer(NOISY, micro_batches=3)
    x = jnp.asarray(X, jnp.float32)
    many = jax.vmap(lambda key: trainer.init(key, x[:1]))(jax.random.split(KEY, 2))
    together = jax.jit(jax.vmap(trainer.step, in_axes=(0, None)))(many, (x, Y))
    for i in range(2):
        alone = jax.jit(trainer.step)(jax.tree.map(lambda a, i=i: a[i], many), (x, Y))
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-5),
            (together[0]._replace(key=()), together[1]),
            (alone[0]._replace(key=()), alone[1]),
        )


def test_an_epoch_with_an_uneven_last_batch():
    """20 examples in batches of 8: the last has 4, cut into parts of 2, 1 and 1."""
    x = jnp.asarray(X, jnp.float32)

    def epoch(parts):
        trainer = _trainer(optimizer=optim.sgd(0.1), micro_batches=parts)
        return train.run_epoch(trainer, trainer.init(KEY, x[:1]), (x, Y), batch_size=8)

    (whole, means), (cut, cut_means) = epoch(1), epoch(3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole.params, cut.params)
    assert means == pytest.approx(cut_means, abs=1e-6)


def test_metrics_of_any_dtype_are_averaged_and_half_precision_gradients_in_float32():
    def objective(params, state, batch, *, key, train):
        # Of 64 parts: 1 + 2⁻⁷ is the next bfloat16 after 1, so a sum in bfloat16 would stop growing.
        loss = jnp.sum(params["w"] * jnp.mean(batch).astype(jnp.bfloat16))
        return loss, (state, {"rows": jnp.int32(len(batch)), "odd": jnp.array(True)})

    trainer = train.trainer(
        objective, init=lambda key, x: ({"w": jnp.zeros(2, jnp.bfloat16)}, {}), optimizer=optim.sgd(1.0),
        micro_batches=512,
    )  # fmt: skip
    ts = trainer.init(KEY, X)
    ts, found = jax.jit(trainer.step)(ts, jnp.ones(512))
    assert ts.params["w"].dtype == jnp.bfloat16
    assert ts.params["w"].tolist() == [-1.0, -1.0]
    assert (float(found["rows"]), float(found["odd"])) == (1.0, 1.0)


@pytest.mark.parametrize("wrong", [0, -1, 2.0, True, "2"])
def test_a_number_of_parts_that_is_none_is_refused(wrong):
    with pytest.raises(
        ValueError, match=r"trainer\(micro_batches=...\) must be a whole number of at least 1"
    ):
        _trainer(micro_batches=wrong)


def test_a_batch_without_a_common_axis_cannot_be_cut():
    trainer = _trainer(micro_batches=2)
    ts = trainer.init(KEY, jnp.asarray(X[:1], jnp.float32))
    with pytest.raises(ValueError, match="one common, non-empty leading axis") as caught:
        trainer.step(ts, (jnp.zeros((4, 4)), Y[:3]))
    assert caught.value.__notes__ == ["trainer(micro_batches=2) cuts each batch along that axis"]
    with pytest.raises(ValueError, match="the objective returned a state of structure"):
        train.trainer(
            lambda p, s, b, *, key, train: (p["w"].sum(), ({"new": p["w"]}, {})),
            init=lambda key, x: ({"w": jnp.ones(2)}, {}), optimizer=optim.sgd(0.1), micro_batches=2,
        ).step(ts._replace(params={"w": jnp.ones(2)}, state={}), X)  # fmt: skip
