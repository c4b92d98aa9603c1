"""The step by which a run became inf or NaN is found, and the same run with smaller updates."""

from __future__ import annotations

import importlib
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnkit import data, layers, losses, optim, train, tree
from nnkit.train import finite, guard
from nnkit.train.epochs import dispatch
from nnkit.train.feed import Chunk, Resident
from nnkit.types import Trainer

KEY = jax.random.key(0)
WIDTH, ROWS = 6, 40
DATA = np.abs(np.asarray(jax.random.normal(jax.random.key(2), (ROWS, WIDTH)))) + 0.5
linear = layers.dense(WIDTH, use_bias=False)
log = layers.stateless(jnp.log, name="log_")
root = layers.stateless(lambda x: jnp.sqrt(jnp.abs(x)), name="root_")
MODEL = layers.serial(body=layers.serial(linear, log), head=layers.dense(WIDTH))
TRAINER = train.trainer(MODEL, losses.mean_squared_error, optim.sgd(1e-4))


def _planted(value, *rows):
    return jnp.asarray(DATA).at[np.asarray(rows)].set(value), jnp.zeros((ROWS, WIDTH))


def _feed(arrays, size=6, **options):
    options = {"shuffle": True, "drop_last": False, "steps_per_call": 4} | options
    return Resident(arrays, size, **options)


def _start():
    """Parameters above 0, so that a logarithm is finite but for rows of zeros."""
    ts = TRAINER.init(KEY, DATA[:1])
    return ts._replace(params=jax.tree.map(jnp.abs, ts.params))


def _step_of(feed, row, ts, epoch=0):
    """The number of the step whose batch has the row, and the row's place in the batch."""
    at = epoch * feed.steps
    for chunk in feed.chunks(ts.key, epoch, 0):
        for i in range(chunk.steps):
            order = np.asarray(chunk.order)[chunk.offset + i * chunk.batch_size :][: chunk.batch_size]
            if row in order:
                return at, int(np.flatnonzero(order == row)[0])
            at += 1
    raise AssertionError(row)


def _check_the_step(row=17, value=0.0, kind="forward", path="body/log_0"):
    feed, ts = _feed(_planted(value, row)), _start()
    step, place = _step_of(feed, row, ts)
    error = guard.not_finite(TRAINER, ts, feed)
    report = error.report
    assert (error.step, error.epoch, report.step) == (step, 1, step)
    assert (report.kind, report.path, report.rows, report.examples) == (kind, path, (place,), (row,))
    return error


@pytest.mark.parametrize("row", [17, 3, 39])
def test_the_step_the_layer_and_the_example_of_a_run(row):
    error = _check_the_step(row)
    assert f"inf or NaN at step {error.step} of epoch 1" in str(error)
    assert f"examples {row} of the data" in str(error)
    assert "to try: an argument away from 0" in str(error)


def test_a_nan_in_the_data_of_a_run():
    error = _check_the_step(value=np.nan, kind="batch", path="batch/0")
    assert "np.isfinite(x) finds all that are like them" in str(error)


BadStep = guard.BadStep
MUTANTS = {
    "the last layer": ("history", "History.birth", lambda history: history.operations[-1]),
    "rows shifted": ("explain", "_positions", lambda x, axis: 1 + np.unique(np.nonzero(~np.isfinite(x))[axis])),
    "the step after": ("guard", "BadStep", lambda ts, *rest: BadStep(ts._replace(step=ts.step + 1), *rest)),
    "other rows of the data": ("guard", "take", lambda arrays, rows: jax.tree.map(lambda a: a[rows % 7], arrays)),
    "the chunk's first step": ("guard", "_step_by_step", lambda _, ts, chunk, __: BadStep(ts, _batch(chunk), None)),
}  # fmt: skip


def _batch(chunk):
    return jax.tree.map(lambda a: a[: chunk.batch_size], chunk.arrays)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_search_is_noticed(name, monkeypatch):
    module, what, wrong = MUTANTS[name]
    target = importlib.import_module(f"nnkit.train.{module}")
    *outer, attribute = what.split(".")
    for part in outer:
        target = getattr(target, part)
    monkeypatch.setattr(target, attribute, wrong)
    with pytest.raises(AssertionError):
        _check_the_step()


def test_a_run_is_taken_up_in_the_middle_of_an_epoch_and_looked_at_into_the_next():
    feed, ts = _feed(_planted(0.0, 17)), _start()
    first, _ = _step_of(feed, 17, ts)
    second, _ = _step_of(feed, 17, ts, epoch=1)
    ts = ts._replace(step=jnp.int32(first + 1), stopping=(jnp.ones(3),))
    error = guard.not_finite(TRAINER, ts, feed)
    assert (error.step, error.epoch) == (second, 2)
    assert error.report.examples == (17,)


def test_an_uneven_last_batch():
    clean, ts = _feed(_planted(0.0, 0)), _start()
    *_, last = clean.chunks(ts.key, 0, 0)
    row = int(last.order[last.offset + 2])
    assert last.batch_size == 4
    error = guard.not_finite(TRAINER, ts, _feed(_planted(0.0, row)))
    assert (error.step, error.report.rows, error.report.examples) == (6, (2,), (row,))


def test_batches_that_come_as_they_lie():
    """As a stream gives them: their rows have no numbers in the data."""
    x, y = _planted(0.0, 17)
    chunks = [Chunk((x, y), None, 0, 6, 6, 6)]
    found = train.find_step(TRAINER, _start(), chunks)
    assert int(found.ts.step) == 2
    assert found.examples is None
    np.testing.assert_array_equal(found.batch[0], x[12:18])


def test_the_state_before_the_step_is_the_runs_to_the_last_bit():
    feed, ts = _feed(_planted(0.0, 17), steps_per_call=100), _start()
    found = train.find_step(TRAINER, ts, feed.chunks(ts.key, 0, 0))
    (chunk, *_), step = list(feed.chunks(ts.key, 0, 0)), int(found.ts.step)
    assert 1 < step < chunk.steps
    whole, _, is_finite = dispatch(TRAINER, jax.tree.map(jnp.copy, ts), chunk._replace(steps=step))
    assert bool(is_finite)
    for path, leaf in tree.flatten(whole.params).items():
        np.testing.assert_array_equal(leaf, tree.flatten(found.ts.params)[path])


def test_a_gradient_is_found_at_its_own_step_and_not_at_the_next_ones_loss():
    model = layers.serial(linear, root, layers.dense(WIDTH))
    trainer = train.trainer(model, losses.mean_squared_error, optim.sgd(1e-4))
    feed, ts = _feed(_planted(0.0, 17)), trainer.init(KEY, DATA[:1])
    step, place = _step_of(feed, 17, ts)
    error = guard.not_finite(trainer, ts, feed)
    report = error.report
    assert (report.step, report.kind, report.path, report.rows) == (step, "gradient", "root_0", (place,))
    assert report.leaves == ("dense_0/kernel",)
    assert "an argument away from where the derivative is infinite" in str(error)


def test_a_run_that_stays_finite_is_said_to():
    error = guard.not_finite(TRAINER, _start(), _feed(_planted(1.0, 17)), until=9)
    assert (error.step, error.epoch, error.report) == (9, 2, None)
    assert "inf or NaN at step 9 of epoch 2; trained again from step 0, the run stays finite" in str(error)
    assert "a smaller learning rate" in str(error)


def test_what_is_behind_the_end_is_not_looked_at():
    feed, ts = _feed(_planted(0.0, 17)), _start()
    step, _ = _step_of(feed, 17, ts)
    assert guard.not_finite(TRAINER, ts, feed, until=step).report is None
    assert guard.not_finite(TRAINER, ts, feed, until=step + 1).step == step


def test_an_error_of_the_explanation_does_not_hide_the_runs(monkeypatch):
    def fails(*args, **options):
        raise MemoryError("no room")

    monkeypatch.setattr(guard, "explain", fails)
    feed, ts = _feed(_planted(0.0, 17)), _start()
    error = guard.not_finite(TRAINER, ts, feed)
    assert error.step == _step_of(feed, 17, ts)[0]
    assert "the step could not be taken uncompiled: MemoryError: no room" in str(error)


def test_the_error_travels_between_processes():
    error = _check_the_step()
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert again.report == error.report
    assert isinstance(again, FloatingPointError)


def test_fit_ends_with_the_step_and_the_layer():
    feed = _feed(_planted(0.0, 17))
    ts = _start()
    step, place = _step_of(feed, 17, ts)
    with pytest.raises(train.NotFiniteError) as caught:
        train.fit(TRAINER, _planted(0.0, 17), epochs=2, state=ts, batch_size=6, progress=False)
    report = caught.value.report
    assert (report.step, report.path, report.rows, report.examples) == (step, "body/log_0", (place,), (17,))


# ---- what counts as finite ----


def test_fit_on_a_stream_names_a_label_out_of_range():
    """The first batch alone is checked before a run."""
    trainer = train.trainer(layers.dense(2), losses.softmax_cross_entropy, optim.sgd(0.1))
    labels = np.zeros(ROWS, np.int32)
    labels[17] = 7
    with pytest.raises(train.NotFiniteError, match=r"label targets\[1\] is 7 \(1 of 8") as caught:
        train.fit(trainer, data.stream((DATA, labels), 8, shuffle=False), epochs=1, key=KEY)
    report = caught.value.report
    assert (caught.value.step, report.kind, report.rows) == (2, "batch", (1,))


def test_what_a_chunk_is_judged_by():
    ts = train.trainer(layers.batch_norm(), losses.mean_squared_error, optim.adam(0.1)).init(KEY, DATA[:1])
    good = {"loss": jnp.array([1.0, 2.0, 0.0])}
    spoil = lambda part: jax.tree.map(lambda x: x * jnp.asarray(jnp.nan, x.dtype), part)
    assert bool(train.chunk_is_finite(ts, good))
    assert not bool(train.chunk_is_finite(ts, {"loss": jnp.array([1.0, jnp.inf, 0.0])}))
    assert not bool(train.chunk_is_finite(ts._replace(params=spoil(ts.params)), good))
    assert not bool(train.chunk_is_finite(ts._replace(state=spoil(ts.state)), good))
    assert bool(train.chunk_is_finite(ts._replace(state={"key": KEY, "n": jnp.int32(1)}), good))


def test_losses_do_not_count_where_their_updates_are_dropped():
    losses_ = {"loss": jnp.array([1.0, jnp.nan])}
    ts = _start()
    assert not bool(train.chunk_is_finite(ts, losses_))
    assert bool(train.chunk_is_finite(ts, losses_ | {"skipped": jnp.array([0.0, 1.0])}))
    for optimizer in (optim.apply_if_finite(optim.sgd(0.1), 5), optim.dynamic_loss_scale(optim.sgd(0.1))):
        tolerant = ts._replace(opt_state=optimizer.init(ts.params))
        assert bool(train.chunk_is_finite(tolerant, losses_))
        broken = tolerant._replace(params=jax.tree.map(lambda p: p + jnp.inf, ts.params))
        assert not bool(train.chunk_is_finite(broken, losses_))


# ---- smaller updates ----


def _check_scaled():
    arrays = _planted(1.0, 17)
    batch = jax.tree.map(lambda a: a[:6], arrays)
    trainer = train.trainer(MODEL, losses.mean_squared_error, optim.adam(0.1))
    ts = trainer.init(KEY, DATA[:1])._replace(params=_start().params)
    plain = jax.jit(trainer.step)(ts, batch)[0]
    traces = 0

    @jax.jit
    def step(ts, batch, scale):
        nonlocal traces
        traces += 1
        return train.scaled(trainer, scale).step(ts, batch)

    same, quarter = (step(ts, batch, scale)[0] for scale in (1.0, 0.25))
    assert traces == 1
    for path, old in tree.flatten(ts.params).items():
        new = tree.flatten(plain.params)[path]
        np.testing.assert_array_equal(tree.flatten(same.params)[path], new)
        # One rounding each of the difference, the product and the sum, of numbers below 2.
        np.testing.assert_allclose(
            tree.flatten(quarter.params)[path], old + (new - old) / 4, rtol=0, atol=4e-7
        )
    for path, leaf in tree.flatten(plain.opt_state).items():
        np.testing.assert_array_equal(leaf, tree.flatten(quarter.opt_state)[path])
    assert int(quarter.step) == 1


def test_updates_are_scaled_whatever_the_optimizer():
    _check_scaled()


WRONG = {
    "rounded at 1": lambda old, new, scale: old + (new - old) * scale,
    "the parameters scaled": lambda old, new, scale: jnp.where(scale == 1, new, new * scale),
    "not scaled": lambda old, new, scale: new,
    "what is left": lambda old, new, scale: jnp.where(scale == 1, new, new - scale * (new - old)),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_scaling_is_noticed(name, monkeypatch):
    monkeypatch.setattr(finite, "_between", WRONG[name])
    with pytest.raises(AssertionError):
        _check_scaled()


def test_scaling_leaves_what_has_no_updates():
    def step(ts, batch):
        return ts._replace(params={"w": ts.params["w"] + 1, "n": ts.params["n"] + 1}), {}

    own = Trainer(init=None, step=step, evaluate=len, skipping=step)
    ts = TRAINER.init(KEY, DATA[:1])._replace(params={"w": jnp.bfloat16(1), "n": jnp.int32(1)})
    half = train.scaled(own, 0.5)
    for function in (half.step, half.skipping):
        new, _ = function(ts, ())
        assert (float(new.params["w"]), int(new.params["n"])) == (1.5, 2)
        assert new.params["w"].dtype == jnp.bfloat16
    assert half.evaluate is len
    assert train.scaled(own._replace(skipping=None), 0.5).skipping is None
    for scale in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"scaled\(scale=...\) must be a finite number above 0, got"):
            train.scaled(own, scale)
