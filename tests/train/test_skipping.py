"""Steps that are left out: where the loss or a gradient is not finite, all but the count stays."""

from __future__ import annotations

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnkit import layers, optim, train
from nnkit.train.skipping import is_finite

trainer_module = importlib.import_module("nnkit.train.trainer")
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(12, 4)), jnp.float32)
Y = jnp.asarray(RNG.normal(size=(12, 3)), jnp.float32)
BAD = X.at[3, 1].set(jnp.nan)
KEY = jax.random.key(0)
MODEL = layers.serial(layers.dense(8), layers.batch_norm(), layers.relu, layers.dropout(0.5), layers.dense(3))
SCHEDULE = optim.exponential_decay(1e-2, transition_steps=1, decay_rate=0.5)


def _squares(p, y):
    """A mean of squares; a target of 7 has a finite loss with an infinite slope, one of 8 an infinite loss."""
    cost = jnp.mean((p - y) ** 2, axis=-1)
    off = p[:, 0] - jax.lax.stop_gradient(p[:, 0])  # 0, with slope 1
    sharp = jnp.sqrt(jnp.where(y[:, 0] == 7, off, 1))
    return cost + sharp + jnp.where(y[:, 0] == 8, jnp.inf, 0)


def _trainer(optimizer=None, model=MODEL, **options):
    return train.trainer(model, _squares, optimizer or optim.adam(SCHEDULE), **options)


def _started(trainer):
    ts = trainer.init(KEY, X[:1])
    return jax.jit(trainer.step)(ts, (X, Y))[0]


BATCHES = {
    "NaN in the inputs": (BAD, Y),
    "a slope without bound": (X, Y.at[2, 0].set(7)),
    "a loss without bound": (X, Y.at[2, 0].set(8)),
}


def _same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a._replace(key=(), step=()), b._replace(key=(), step=()))


def _check_skips(trainer):
    ts = _started(trainer)
    skipping = jax.jit(trainer.skipping)
    for batch in BATCHES.values():
        after, found = skipping(ts, batch)
        assert float(found["skipped"]) == 1
        assert int(after.step) == 2
        _same(ts, after)
        # The next step is that of the same state with another number, so with other random numbers.
        late, ok = skipping(after, (X, Y))
        assert float(ok["skipped"]) == 0
        expected, loss = jax.jit(trainer.step)(ts._replace(step=jnp.int32(2)), (X, Y))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
            late._replace(key=()),
            expected._replace(key=()),
        )
        other = skipping(ts, (X, Y))[1]["loss"]
        assert float(ok["loss"]) == pytest.approx(float(loss["loss"]), rel=1e-6)
        assert float(ok["loss"]) != pytest.approx(float(other), rel=1e-3)


def test_a_skipped_step_leaves_all_but_the_count():
    _check_skips(_trainer())


def _own(trainer):
    return train.skip_nonfinite(trainer._replace(skipping=None))


def test_any_trainer_can_be_made_to_skip():
    # Adam makes an infinite slope a NaN among the parameters, which is what there is to see.
    _check_skips(_own(_trainer()))
    trainer = _trainer()
    assert train.skip_nonfinite(trainer) is trainer


@pytest.mark.parametrize("kind", BATCHES)
def test_the_batches_are_as_bad_as_they_are_said_to_be(kind):
    trainer = _trainer()
    after, found = jax.jit(trainer.step)(_started(trainer), BATCHES[kind])
    assert np.isfinite(found["loss"]) == (kind == "a slope without bound")
    assert np.isnan(after.params["dense_1"]["kernel"]).any() == (kind != "a loss without bound")


def _keeps_state(finite, new, old):
    params, state, opt_state = new()
    return jax.lax.cond(finite, lambda: params, lambda: old[0]), state, opt_state


WRONG = {
    "state moves": {"keep_unless": _keeps_state},
    "the loss alone": {"is_finite": lambda value, grads: jnp.isfinite(value)},
    "gradients alone": {"is_finite": lambda value, grads: is_finite(jnp.zeros(()), grads)},
    "never": {"is_finite": lambda value, grads: jnp.array(True)},
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_skip_is_seen(wrong, monkeypatch):
    for name, function in wrong.items():
        monkeypatch.setattr(trainer_module, name, function)
    with pytest.raises(AssertionError):
        _check_skips(_trainer())


def test_a_good_step_is_the_step():
    trainer = _trainer()
    ts = _started(trainer)
    (a, metrics), (b, found) = jax.jit(trainer.step)(ts, (X, Y)), jax.jit(trainer.skipping)(ts, (X, Y))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
        (a._replace(key=()), {**metrics, "skipped": jnp.float32(0)}),
        (b._replace(key=()), found),
    )


@pytest.mark.parametrize("make", [lambda t: t, _own], ids=["own", "any"])
def test_a_loss_scale_falls_in_a_skipped_step(make):
    trainer = make(_trainer(optim.dynamic_loss_scale(optim.adam(SCHEDULE), initial_scale=64.0)))
    ts = _started(trainer)
    for batch in [BATCHES["NaN in the inputs"], BATCHES["a loss without bound"]]:
        after, found = jax.jit(trainer.skipping)(ts, batch)
        assert float(found["skipped"]) == 1
        jax.tree.map(
            np.testing.assert_array_equal,
            (ts.params, ts.state, ts.opt_state.inner_state),
            (after.params, after.state, after.opt_state.inner_state),
        )
        if make is not _own or batch[0] is BAD:
            assert float(optim.loss_scale(after.opt_state)) == 32


@pytest.mark.parametrize("make", [lambda t: t, _own], ids=["own", "any"])
def test_what_stands_behind_a_loss_scale_stays_in_a_skipped_step(make):
    inner = optim.dynamic_loss_scale(optim.adam(SCHEDULE), initial_scale=64.0)
    trainer = make(_trainer(optim.chain(inner, optim.trace(0.9))))
    ts = _started(trainer)
    after, found = jax.jit(trainer.skipping)(ts, (BAD, Y))
    assert float(found["skipped"]) == 1
    assert float(optim.loss_scale(after.opt_state)) == 32
    jax.tree.map(
        np.testing.assert_array_equal,
        (ts.params, ts.state, ts.opt_state[0].inner_state, ts.opt_state[1]),
        (after.params, after.state, after.opt_state[0].inner_state, after.opt_state[1]),
    )
    moved, found = jax.jit(trainer.skipping)(after, (X, Y))
    assert float(found["skipped"]) == 0
    assert any((a != b).any() for a, b in zip(
        jax.tree.leaves(ts.opt_state[1]), jax.tree.leaves(moved.opt_state[1]), strict=True))  # fmt: skip


def test_a_loss_scale_inside_gathered_steps_falls():
    inner = optim.dynamic_loss_scale(optim.adam(SCHEDULE), initial_scale=64.0)
    trainer = _trainer(optim.MultiSteps(inner, 2))
    ts = trainer.init(KEY, X[:1])
    for _ in range(2):
        ts, found = jax.jit(trainer.skipping)(ts, (BAD, Y))
        assert float(found["skipped"]) == 1
    assert float(optim.loss_scale(ts.opt_state)) == 32


def test_a_mapped_population_skips_member_by_member():
    trainer = _trainer()
    many = jax.vmap(lambda key: trainer.init(key, X[:1]))(jax.random.split(KEY, 2))
    after, found = jax.jit(jax.vmap(trainer.skipping))(many, (jnp.stack([X, BAD]), jnp.stack([Y, Y])))
    assert found["skipped"].tolist() == [0, 1]
    moved = [(a != b).any(axis=tuple(range(1, a.ndim))) for a, b in zip(
        jax.tree.leaves(many.params), jax.tree.leaves(after.params), strict=True)]  # fmt: skip
    assert all(not bool(m[1]) for m in moved)
    assert any(bool(m[0]) for m in moved)
    assert after.step.tolist() == [1, 1]


def test_an_epoch_goes_on_after_a_skipped_step():
    trainer = _trainer(model=layers.dense(3))
    trainer = trainer._replace(step=trainer.skipping)
    ts = trainer.init(KEY, X[:1])
    ts, means = train.run_epoch(trainer, ts, (BAD, Y), batch_size=4)
    assert int(ts.step) == 3
    assert int(ts.opt_state[0].count) == 2
    assert all(np.isfinite(p).all() for p in jax.tree.leaves(ts.params))
    assert means["skipped"] > 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64])
@pytest.mark.parametrize("shape", [(), (3,), (5, 1), (1, 5), (40, 33), (2, 3, 4)], ids=str)
def test_any_number_anywhere_is_found(dtype, shape):
    rng = np.random.default_rng(1)
    test = jax.jit(is_finite)
    largest = jnp.full(shape, jnp.finfo(dtype).max, dtype)
    loss = jnp.float32(3.0)
    assert test(loss, {"w": largest, "other": jnp.ones((2, 2))})
    assert not test(jnp.float32(jnp.inf), {"w": largest})
    for value in (jnp.inf, -jnp.inf, jnp.nan):
        at = tuple(rng.integers(n) for n in shape)
        assert not test(loss, {"w": largest.at[at].set(value), "other": jnp.ones((2, 2))})


def test_what_was_infinite_before_does_not_count():
    """A plateau begins with an infinite best value, and a user's own matrix may hold one."""
    plateau = optim.reduce_on_plateau(monitor="val_loss")
    trainer = _trainer(optim.chain(optim.sgd(0.1), plateau), model=layers.dense(3))

    def init(key, x):
        ts = trainer.init(key, x)
        return ts._replace(state={"table": jnp.full((2, 2), jnp.inf)})

    def step(ts, batch):
        new, found = trainer.step(ts._replace(state={}), batch)
        return new._replace(state=ts.state), found

    own = train.skip_nonfinite(trainer._replace(init=init, step=step, skipping=None))
    skipping = jax.jit(own.skipping)
    ts = own.init(KEY, X[:1])
    assert float(skipping(ts, (X, Y))[1]["skipped"]) == 0
    assert float(skipping(ts, (BAD, Y))[1]["skipped"]) == 1


def test_bad_input():
    trainer = _trainer(metrics={"skipped": lambda p, y: p[:, 0]})
    ts = trainer.init(KEY, X[:1])
    for t in (trainer, _own(trainer)):
        with pytest.raises(ValueError, match="the metrics: the name 'skipped' is taken by steps that leave"):
            t.skipping(ts, (X, Y))
    silent = trainer._replace(step=lambda ts, batch: (ts, {"cost": 1.0}), skipping=None)
    with pytest.raises(ValueError, match=r"known by its loss, and the metrics are \['cost'\]"):
        train.skip_nonfinite(silent).skipping(ts, (X, Y))
