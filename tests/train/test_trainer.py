from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nnkit import layers, losses, metrics, optim, regularizers, train
from nnkit.types import TrainState

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(20, 4)), jnp.float32)
Y = jnp.asarray(RNG.integers(0, 3, 20), jnp.int32)
KEY = jax.random.key(0)
# No bias before batch normalisation: its gradient would be rounding, which Adam makes into steps.
MODEL = layers.serial(
    layers.dense(8, use_bias=False), layers.batch_norm(), layers.relu, layers.dropout(0.5), layers.dense(3)
)


def _trainer(optimizer=None, **options):
    return train.trainer(MODEL, losses.softmax_cross_entropy, optimizer or optim.adam(1e-2), **options)


def test_a_step_is_gradient_update_and_count():
    """The step written out by hand, with optax's optimizer and JAX's own loss."""
    trainer = _trainer()
    ts = trainer.init(KEY, X[:1])
    after, found = trainer.step(ts, (X, Y))

    def loss(params):
        key = jax.random.fold_in(ts.key, 0)
        logits, state = MODEL.apply(params, ts.state, X, key=key, train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, Y).mean(), state

    (value, state), grads = jax.value_and_grad(loss, has_aux=True)(ts.params)
    optimizer = optax.adam(1e-2)
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        updates, _ = optimizer.update(grads, optimizer.init(ts.params), ts.params)
    expected = optax.apply_updates(ts.params, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), after.params, expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), after.state, state)
    np.testing.assert_allclose(found["loss"], value, rtol=1e-6)
    assert int(after.step) == 1
    assert (jax.random.key_data(after.key) == jax.random.key_data(ts.key)).all()


def test_steps_draw_different_masks_and_the_same_ones_again():
    trainer = _trainer()
    ts = trainer.init(KEY, X[:1])
    at_zero = trainer.step(ts, (X, Y))[1]["loss"]
    at_seven = trainer.step(ts._replace(step=jnp.int32(7)), (X, Y))[1]["loss"]
    assert at_zero != at_seven
    assert at_zero == trainer.step(ts, (X, Y))[1]["loss"]


def test_evaluation_uses_the_test_mode_and_changes_nothing():
    trainer = _trainer(metrics={"accuracy": metrics.accuracy})
    ts = trainer.init(KEY, X[:1])
    found = trainer.evaluate(ts, (X, Y))
    logits, _ = MODEL.apply(ts.params, ts.state, X, train=False)
    np.testing.assert_allclose(found["loss"], losses.softmax_cross_entropy(logits, Y).mean(), rtol=1e-6)
    np.testing.assert_allclose(found["accuracy"], (logits.argmax(-1) == Y).mean(), rtol=1e-6)


def test_the_penalty_is_minimised_and_reported_apart_from_the_loss():
    strong = _trainer(optim.sgd(0.1), regularizer=regularizers.l2(0.5))
    plain = _trainer(optim.sgd(0.1))
    ts = strong.init(KEY, X[:1])
    with_penalty, found = strong.step(ts, (X, Y))
    without, plain_found = plain.step(ts, (X, Y))
    assert found["loss"] == plain_found["loss"]
    assert found["penalty"] > 0
    # The penalty's part of the step is -rate * its gradient, on kernels and on nothing else.
    moved = jax.tree.map(lambda a, b: a - b, with_penalty.params, without.params)
    gradient = jax.grad(regularizers.l2(0.5))(ts.params)
    jax.tree.map(lambda m, g: np.testing.assert_allclose(m, -0.1 * g, atol=1e-6), moved, gradient)
    assert not moved["dense_1"]["bias"].any()
    assert not moved["batch_norm_0"]["scale"].any()


def test_an_optax_optimizer_works_in_its_place():
    trainer = _trainer(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)))
    with jax.numpy_dtype_promotion("standard"):
        ts, found = jax.jit(trainer.step)(trainer.init(KEY, X[:1]), (X, Y))
    assert jnp.isfinite(found["loss"])
    assert int(ts.step) == 1


def test_an_objective_of_any_form():
    def objective(params, state, batch, *, key, train):
        noise = jax.random.normal(key, batch.shape)
        loss = jnp.mean((batch + noise - params["center"]) ** 2)
        return loss, (state, {"center": params["center"].sum()})

    trainer = train.trainer(
        objective, init=lambda key, x: ({"center": jnp.zeros(4)}, {}), optimizer=optim.sgd(0.1)
    )
    ts = trainer.init(KEY, X)
    for _ in range(200):
        ts, found = jax.jit(trainer.step)(ts, X + 3)
    np.testing.assert_allclose(ts.params["center"], X.mean(axis=0) + 3, atol=0.5)
    assert set(found) == {"loss", "center"}
    assert trainer.evaluate(ts, X + 3)["loss"] == trainer.evaluate(ts, X + 3)["loss"]


def test_a_train_state_is_a_pytree_and_the_step_keeps_its_form():
    trainer = _trainer()
    ts = trainer.init(KEY, X[:1])
    assert isinstance(ts, TrainState)
    after = jax.eval_shape(lambda ts: trainer.step(ts, (X, Y))[0], ts)
    before = jax.eval_shape(lambda ts: ts, ts)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    assert jax.tree.leaves(before) == jax.tree.leaves(after)


def _times_two(params, state, batch, *, key, train):
    return jnp.sum(params["w"]), ({"new": jnp.zeros(())}, {})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: train.trainer(MODEL, losses.softmax_cross_entropy),
            TypeError,
            r"trainer needs an optimizer and got none: pass trainer\(..., optimizer=optim.adam\(1e-3\)\)",
        ),
        (
            lambda: train.trainer(MODEL, losses.softmax_cross_entropy, 1e-3),
            TypeError,
            "trainer needs an optimizer and got float 0.001",
        ),
        (
            lambda: train.trainer(MODEL, optimizer=optim.sgd(0.1)),
            TypeError,
            r"trainer needs a loss for a layer: pass trainer\(model, losses.softmax_cross_entropy",
        ),
        (
            lambda: train.trainer(MODEL, losses.hinge, optim.sgd(0.1), init=MODEL.init),
            TypeError,
            r"trainer\(init=...\) goes with an objective; a layer has its own init",
        ),
        (
            lambda: train.trainer(_times_two, optimizer=optim.sgd(0.1)),
            TypeError,
            r"trainer needs init= with an objective: pass trainer\(objective, init=model.init",
        ),
        (
            lambda: train.trainer(_times_two, losses.hinge, optim.sgd(0.1), init=MODEL.init, regularizer=abs),
            TypeError,
            r"trainer: \['loss', 'regularizer'\] go with a layer",
        ),
        (
            lambda: train.trainer(3, optimizer=optim.sgd(0.1)),
            TypeError,
            "takes a layer or an objective and got int",
        ),
        (
            lambda: _trainer(metrics={"loss": metrics.accuracy}),
            ValueError,
            r"metrics: the names \['loss'\] are taken",
        ),
        (lambda: _trainer().init(0, X), TypeError, r"trainer.init got the number 0 for a key"),
        (
            lambda: _trainer().step(_trainer().init(KEY, X), X),
            TypeError,
            r"a supervised step takes a batch \(x, y\), got ArrayImpl",
        ),
        (
            lambda: (
                t := train.trainer(
                    _times_two, init=lambda k, x: ({"w": jnp.ones(2)}, {}), optimizer=optim.sgd(0.1)
                )
            ).step(t.init(KEY, X), X),
            ValueError,
            "the objective returned a state of structure",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            lambda p, y: (p - y) ** 2,
            r"would broadcast against each other: give them equal shapes, targets",
        ),
        (
            lambda p, y: jnp.mean((p - y) ** 2, axis=-1),
            r"predictions have shape \(20, 1\) and targets \(20,\), which",
        ),
        (losses.mean_squared_error, r"\(20, 1\).*\(20,\)"),
        (lambda p, y: ((p[:, 0] - y.astype(int)) ** 2).mean(), r"predictions have shape"),
    ],
)
def test_a_column_against_a_row_is_caught_before_it_broadcasts(loss, message):
    model = layers.dense(1)
    trainer = train.trainer(model, loss, optim.sgd(0.1))
    with pytest.raises(ValueError, match=message):
        trainer.step(trainer.init(KEY, X), (X, X[:, 0]))


def test_a_loss_of_one_number_or_of_another_shape_is_refused():
    def step(loss):
        trainer = train.trainer(layers.dense(3), loss, optim.sgd(0.1))
        return trainer.step(trainer.init(KEY, X), (X, Y))

    with pytest.raises(ValueError, match="the loss returned one number: return one value for each example"):
        step(lambda p, y: p.mean())
    with pytest.raises(
        ValueError, match=r"the loss returned shape \(3, 20\) for predictions of shape \(20, 3\)"
    ):
        step(lambda p, y: p.T)


def test_stochastic_rounding_keeps_what_rounding_to_nearest_loses():
    """Steps of an eighth of the distance between bfloat16 numbers: 400 of them are 50 such distances."""

    def objective(params, state, batch, *, key, train):
        return jnp.sum(params["w"].astype(jnp.float32) * batch), (state, {})

    def run(**options):
        trainer = train.trainer(
            objective,
            optimizer=optim.adam(2.0**-11, eps=0.0, mu_dtype=jnp.float32, nu_dtype=jnp.float32),
            init=lambda key, x: ({"w": jnp.full(1000, 0.75, jnp.bfloat16)}, {}),
            **options,
        )
        ts = trainer.init(jax.random.key(0), jnp.zeros(()))
        step = jax.jit(trainer.step)
        for _ in range(400):
            ts, _ = step(ts, jnp.float32(1.0))
        assert ts.params["w"].dtype == jnp.bfloat16
        return np.asarray(ts.params["w"], np.float32)

    np.testing.assert_array_equal(run(), 0.75)
    rounded = run(stochastic_rounding=True)
    # The deviation of the mean of 1000 is under 400^½ · 2⁻⁸ / 2 / 1000^½ = 0.0013.
    assert abs(rounded.mean() - (0.75 - 400 * 2.0**-11)) < 4 * 0.0013
    np.testing.assert_array_equal(rounded, run(stochastic_rounding=True))


# What goes through a trainer and an epoch of compiled steps: each against the steps written out with optax.


def _smooth(logits, labels):
    return losses.softmax_cross_entropy(logits, labels, label_smoothing=0.1)


def _by_name(params):
    return {
        name: jax.tree.map(lambda _, n=name: "head" if n == "dense_1" else "body", p)
        for name, p in params.items()
    }


_NET = layers.serial(layers.dense(8), layers.relu, layers.dense(3))
_FROZEN = layers.serial(layers.frozen(layers.dense(8)), layers.relu, layers.dense(3))
# 20 examples in batches of 8 are 3 steps an epoch; the second epoch has a tenth of the rate.
_BY_EPOCH = optim.step_decay(0.5, step_size=1, gamma=0.1, steps_per_epoch=3)
_THEIRS = optax.exponential_decay(0.5, transition_steps=3, decay_rate=0.1, staircase=True)
_BY_STEP = optim.cosine_decay_schedule(0.5, decay_steps=6)

THROUGH = {
    "clipping": (
        _NET, _smooth,
        optim.chain(optim.clip_by_global_norm(0.05), optim.sgd(0.5)),
        optax.chain(optax.clip_by_global_norm(0.05), optax.sgd(0.5)),
    ),
    "optimizers by part": (
        _NET, _smooth,
        optim.partition({"body": optim.sgd(0.1), "head": optim.adam(0.01)}, _by_name),
        optax.multi_transform({"body": optax.sgd(0.1), "head": optax.adam(0.01)}, _by_name),
    ),
    "a frozen part": (_FROZEN, _smooth, optim.sgd(0.5), optax.sgd(0.5)),
    "a rate by epoch": (_NET, _smooth, optim.sgd(_BY_EPOCH), optax.sgd(_THEIRS)),
    "a rate by step": (_NET, _smooth, optim.sgd(_BY_STEP), optax.sgd(optax.cosine_decay_schedule(0.5, 6))),
}  # fmt: skip


def _two_epochs(name):
    model, loss, ours, theirs = THROUGH[name]
    trainer = train.trainer(model, loss, ours)
    start = ts = trainer.init(KEY, X[:1])
    params = jax.tree.map(jnp.copy, ts.params)
    ts = jax.tree.map(jnp.copy, ts)
    for _ in range(2):
        ts, _ = train.run_epoch(trainer, ts, (X, Y), batch_size=8, shuffle=False)

    def mean(params, x, y):
        logits, _ = model.apply(params, start.state, x, train=True)
        target = 0.9 * jax.nn.one_hot(y, 3) + 0.1 / 3
        return optax.softmax_cross_entropy(logits, target).mean()

    opt_state = theirs.init(params)
    slope = jax.jit(jax.grad(mean))
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        for i in range(6):
            rows = slice(8 * (i % 3), 8 * (i % 3) + 8)
            updates, opt_state = theirs.update(slope(params, X[rows], Y[rows]), opt_state, params)
            params = optax.apply_updates(params, updates)
    return start.params, ts.params, params


@pytest.mark.parametrize("name", THROUGH)
def test_what_goes_through_an_epoch(name):
    start, found, expected = _two_epochs(name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)
    moved = np.abs(found["dense_0"]["kernel"] - start["dense_0"]["kernel"]).max()
    assert (moved == 0) == (name == "a frozen part")
    # Were it left out, the difference would be far beyond the tolerance.
    model, loss, _, theirs = THROUGH[name]
    without = {
        "a frozen part": (_NET, loss, optim.sgd(0.5), theirs),
        "optimizers by part": (model, loss, optim.sgd(0.1), theirs),
    }.get(name, (model, loss, optim.sgd(0.5), theirs))
    try:
        THROUGH["without"] = without
        _, wrong, _ = _two_epochs("without")
    finally:
        del THROUGH["without"]
    head = lambda params: np.asarray(params["dense_1"]["kernel"])
    assert np.abs(head(wrong) - head(expected)).max() > 1e-3
