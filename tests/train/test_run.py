"""The run as one pure function: equal to fit, mapped, differentiated."""

from __future__ import annotations

import functools
import importlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnkit import data, layers, losses, metrics, optim, train, tree
from nnkit.train.stopping import begin

module = importlib.import_module("nnkit.train.run")  # train.run is the function

RNG = np.random.default_rng(0)
X = RNG.normal(size=(103, 4)).astype(np.float32)
Y = RNG.integers(0, 3, 103).astype(np.int32)
HELD_OUT = X[:37], Y[:37]
KEY = jax.random.key(0)
# No bias before batch normalisation: its gradient would be rounding, which Adam makes into steps.
MODEL = layers.serial(
    layers.dense(8, use_bias=False), layers.batch_norm(), layers.relu, layers.dropout(0.5), layers.dense(3)
)
# min_delta and atol of 10 are never reached: every epoch after the first is no better.
PLATEAU = optim.reduce_on_plateau(factor=0.5, patience=1, rtol=0.0, atol=10.0, monitor="val_loss")
RULE = train.early_stopping("val_loss", patience=2, min_delta=10.0)


def _trainer(optimizer=None, model=MODEL):
    optimizer = optimizer or optim.chain(optim.adam(1e-2), PLATEAU)
    return train.trainer(
        model, losses.softmax_cross_entropy, optimizer, metrics={"accuracy": metrics.accuracy}
    )


TRAINER = _trainer()
# For all that does not ask for much: it compiles in a tenth of the time.
SMALL_MODEL = layers.serial(layers.dropout(0.2), layers.dense(3))


def _small():
    return train.trainer(SMALL_MODEL, losses.softmax_cross_entropy, optim.chain(optim.sgd(0.1), PLATEAU))


SMALL = _small()
OPTIONS = {"batch_size": 16, "validation": HELD_OUT}


def _data(leaf):
    return jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def _same(a, b, rtol=0.0, atol=0.0):
    a, b = (tree.flatten(jax.tree.map(_data, t)) for t in (a, b))
    assert list(a) == list(b)
    for path, leaf in a.items():
        np.testing.assert_allclose(leaf, b[path], rtol, atol, err_msg=path)


def _same_history(rows, history, rtol=0.0):
    """fit's rows are float64, of which a compiled run has the float32."""
    names = [name for name in rows[0] if name != "seconds"]
    assert sorted(history) == sorted(names)
    for name in names:
        column = np.asarray([row[name] for row in rows]).astype(history[name].dtype)
        np.testing.assert_allclose(history[name][: len(rows)], column, rtol, err_msg=name)
        if name not in ("epoch", "step"):
            assert np.isnan(history[name][len(rows) :]).all()


def _check_equals_fit(trainer, epochs=5, **options):
    fitted, rows = train.fit(trainer, (X, Y), epochs=epochs, key=KEY, **options)
    ts, history = train.run(trainer, KEY, (X, Y), epochs, **options)
    _same(fitted, ts)
    _same_history(rows, history)
    return rows


def test_a_run_is_fit_to_the_last_bit():
    """103 examples in batches of 16: six full ones and an uneven last one; a plateau that cuts."""
    _check_equals_fit(TRAINER, **OPTIONS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 60},  # one full batch and an uneven one: loops of one step
        {"batch_size": 103},
        {"batch_size": 16, "drop_last": True, "shuffle": False},
    ],
    ids=["60", "103", "drop_last"],
)
def test_so_are_runs_of_few_batches(options):
    _check_equals_fit(TRAINER, epochs=3, validation=HELD_OUT, **options)


@functools.cache
def _fitted():
    return train.fit(SMALL, (X, Y), epochs=5, key=KEY, early_stopping=RULE, **OPTIONS)


@functools.cache
def _ran():
    return train.run(SMALL, KEY, (X, Y), 5, early_stopping=RULE, **OPTIONS)


def test_so_are_runs_that_stop_early():
    (fitted, rows), (ts, history) = _fitted(), _ran()
    _same(fitted, ts)
    _same_history(rows, history)
    assert len(rows) == 3


@pytest.mark.slow
def test_so_are_runs_that_put_the_best_back():
    rule = RULE._replace(restore_best=True)
    _check_equals_fit(TRAINER, early_stopping=rule, **OPTIONS)


@pytest.mark.slow
def test_so_are_convolutions():
    model = layers.serial(
        layers.conv(4, (3, 3), use_bias=False), layers.relu, layers.flatten, layers.dense(3)
    )
    images = RNG.normal(size=(40, 6, 6, 1)).astype(np.float32)
    trainer = _trainer(optim.adam(1e-2), model)
    rule = train.early_stopping("loss", patience=5)
    kwargs = {"batch_size": 16, "early_stopping": rule}
    fitted, rows = train.fit(trainer, (images, Y[:40]), epochs=2, key=KEY, **kwargs)
    ts, history = train.run(trainer, KEY, (images, Y[:40]), 2, **kwargs)
    _same(fitted, ts)
    _same_history(rows, history)


@pytest.mark.slow
def test_a_run_is_the_step_loop():
    trainer = train.trainer(SMALL_MODEL, losses.softmax_cross_entropy, optim.adam(1e-2))
    ts = trainer.init(KEY, X[:1])
    step = jax.jit(trainer.step)
    for epoch in range(3):
        order = data.shuffled_indices(ts.key, epoch, len(X))
        for batch in data.batches((X, Y), 16, order=order):
            ts, _ = step(ts, batch)
    ran, _ = train.run(trainer, KEY, (X, Y), 3, batch_size=16)
    # The same arithmetic in two programs, which XLA fuses in different ways: as for fit in test_fit.
    _same(ran, ts, rtol=2e-5, atol=2e-6)


def test_within_another_program_it_is_the_same_to_rounding():
    inner = jax.jit(lambda key, x, y: train.run(SMALL, key, (x, y), 5, early_stopping=RULE, **OPTIONS))
    # The same arithmetic, which XLA fuses in another way.
    for part, alone in zip(inner(KEY, X, Y), _ran(), strict=True):
        _same(part, alone, rtol=2e-5, atol=2e-6)


# --- what must be found, if it were wrong -----------------------------------------------------------


def _check_against_fit(ran):
    ts, history = ran
    fitted, rows = _fitted()
    _same(fitted.params, ts.params)
    _same(fitted.stopping, ts.stopping)
    _same_history(rows, history)


MUTANTS = {
    "forgets report": ("report", lambda opt_state, row: opt_state),
    "shuffles by another key": (
        "shuffled_indices",
        lambda key, epoch, n: data.shuffled_indices(jax.random.fold_in(key, 0), epoch, n),
    ),
    "one order for all epochs": (
        "shuffled_indices",
        lambda key, epoch, n: data.shuffled_indices(key, 0 * epoch, n),
    ),
    "weighs the tail as a full batch": (
        "epoch_means",
        lambda found, sizes, real=module.epoch_means: real(found, np.full_like(sizes, sizes[0])),
    ),
    "counts patience off by one": (
        "update",
        lambda rule, *rest, real=module.update: real(rule._replace(patience=rule.patience + 1), *rest),
    ),
    "goes on after the stop": (
        "update",
        lambda *args, real=module.update: real(*args)._replace(stopped=jnp.bool_(False)),
    ),
    "starts from another key": (
        "first_state",
        lambda trainer, key, x: trainer.init(jax.random.fold_in(key, 0), x),
    ),
}


def test_the_mutants_are_measured_against_what_is_right():
    _check_against_fit(_ran())


@pytest.mark.parametrize(
    "mutant",
    [
        pytest.param(name, marks=pytest.mark.slow if name.startswith(("one order", "starts")) else ())
        for name in MUTANTS
    ],
)
def test_a_wrong_run_is_found(mutant, monkeypatch):
    monkeypatch.setattr(module, *MUTANTS[mutant])
    ran = train.run(_small(), KEY, (X, Y), 5, early_stopping=RULE, **OPTIONS)  # a trainer is compiled anew
    with pytest.raises(AssertionError):
        _check_against_fit(ran)


# --- mapped ------------------------------------------------------------------------------------------


def _swept(rate, decay, dropout, patience, key):
    model = layers.serial(layers.dense(8), layers.relu, layers.dropout(dropout), layers.dense(3))
    trainer = _trainer(optim.chain(optim.adamw(rate, weight_decay=decay), PLATEAU), model)
    rule = train.early_stopping("val_loss", patience=patience, min_delta=10.0, restore_best=True)
    return train.run(trainer, key, (X, Y), 4, early_stopping=rule, **OPTIONS)


@pytest.mark.slow
def test_a_mapped_sweep_is_a_loop_of_runs():
    """Over keys, rates, decays, dropout rates and patiences at once; patiences of 1, 2, 3 stop at 2, 3, 4."""
    grid = (
        jnp.array([1e-3, 1e-2, 3e-2]),
        jnp.array([0.0, 1e-3, 1e-2]),
        jnp.array([0.0, 0.2, 0.5]),
        jnp.array([1, 2, 3]),
        jax.random.split(KEY, 3),
    )
    ts, history = jax.jit(jax.vmap(_swept))(*grid)
    assert history["step"].tolist() == [[7, 14, 14, 14], [7, 14, 21, 21], [7, 14, 21, 28]]
    assert np.isnan(history["loss"]).sum(axis=1).tolist() == [2, 1, 0]
    assert ts.stopping.stopped.tolist() == [True] * 3
    one = jax.jit(_swept)
    for i in range(3):
        alone, row = one(*(values[i] for values in grid))
        # Batched products of matrices sum in another order; 28 steps of Adam from there.
        _same(jax.tree.map(lambda a, i=i: a[i], (ts.params, history)), (alone.params, row), 1e-4, 1e-5)


def test_mapped_rates_are_a_loop_of_runs():
    def final(rate):
        trainer = train.trainer(SMALL_MODEL, losses.softmax_cross_entropy, optim.sgd(rate))
        ts, history = train.run(trainer, KEY, (X, Y), 2, batch_size=16)
        return ts.params, history

    rates = jnp.array([0.01, 0.1, 1.0])
    mapped, one = jax.jit(jax.vmap(final))(rates), jax.jit(final)
    for i, rate in enumerate(rates):
        # Batched products of matrices sum in another order: 14 steps of rounding.
        _same(jax.tree.map(lambda a, i=i: a[i], mapped), one(rate), 1e-5, 1e-6)


def test_patience_may_be_traced_in_a_jitted_run():
    rule = functools.partial(train.early_stopping, "val_loss", min_delta=10.0)

    @jax.jit
    def stopped(patience):
        ts, _ = train.run(SMALL, KEY, (X, Y), 5, early_stopping=rule(patience=patience), **OPTIONS)
        return ts.stopping.epoch

    assert [int(stopped(p)) for p in (0, 1, 2, 3)] == [2, 2, 3, 4]


@pytest.mark.slow
def test_the_best_epoch_is_the_one_that_the_rule_finds_in_fits_history():
    noisy = _trainer(optim.adam(0.1))
    rule = train.early_stopping("val_loss", patience=2, restore_best=True)
    ts, history = train.run(noisy, KEY, (X, Y), 12, early_stopping=rule, **OPTIONS)
    _, rows = train.fit(noisy, (X, Y), epochs=12, key=KEY, **OPTIONS)
    best, wait, last = 0, 0, len(rows)
    for epoch, row in enumerate(rows):
        wait = 0 if epoch == 0 or row["val_loss"] < rows[best]["val_loss"] else wait + 1
        best = epoch if wait == 0 else best
        if wait == 2:
            last = epoch + 1
            break
    assert 1 < last < 12  # the sequence is one that tells
    assert (int(ts.stopping.best_epoch), int(ts.stopping.epoch)) == (best + 1, last)
    # The parameters are that epoch's, whose validation loss is computed once more.
    again = train.evaluate(noisy, ts, HELD_OUT)["loss"]
    assert np.float32(again) == history["val_loss"][best] == np.float32(rows[best]["val_loss"])


# --- differentiated ------------------------------------------------------------------------------------


def _quadratic(rate, weight=None, *, remat=False, rule=None):
    """The validation loss after three epochs of smooth training with uneven last batches, in float64."""
    x = jnp.linspace(-1, 1, 22)[:, None]
    model = layers.serial(layers.dense(3), layers.tanh, layers.dense(1))
    trainer = train.trainer(model, losses.mean_squared_error, optim.sgd(rate, momentum=0.9))
    state = trainer.init(jax.random.key(1), x[:1])
    if weight is not None:
        params = dict(state.params)
        params["dense_0"] = params["dense_0"] | {"bias": params["dense_0"]["bias"] + weight}
        state = state._replace(params=params)
    held_out = x + 0.01, jnp.sin(3 * x)
    _, history = train.run(
        trainer,
        None,
        (x, jnp.sin(3 * x)),
        3,
        state=state,
        batch_size=8,
        validation=held_out,
        early_stopping=rule,
        remat=remat,
    )
    return jnp.nanmin(history["val_loss"]) if rule is not None else history["val_loss"][-1]


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def _finite_difference(f, at, h=1e-5):
    return (f(at + h) - f(at - h)) / (2 * h)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"remat": True}, marks=pytest.mark.slow),
        pytest.param({"rule": train.early_stopping("val_loss", patience=1)}, marks=pytest.mark.slow),
    ],
    ids=["plain", "remat", "early_stopping"],
)
def test_the_derivative_by_a_learning_rate_is_the_finite_difference(options):
    f = functools.partial(_quadratic, **options)
    value, reverse = jax.jit(jax.value_and_grad(f))(0.05)
    _, forward = jax.jit(lambda rate: jax.jvp(f, (rate,), (1.0,)))(0.05)
    compiled = jax.jit(f)
    expected = _finite_difference(compiled, 0.05)
    assert abs(expected) > 1e-3
    # A central difference is off by h²·f'''/6 and by rounding, 1e-16/h: about 1e-10 each.
    np.testing.assert_allclose([reverse, forward], expected, rtol=1e-6)
    np.testing.assert_allclose(value, compiled(0.05), rtol=1e-12)


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
def test_the_derivative_by_an_initial_value_is_the_finite_difference():
    f = functools.partial(_quadratic, 0.05)
    reverse = jax.grad(f)(0.1)  # not jitted
    assert abs(reverse) > 1e-3
    np.testing.assert_allclose(reverse, _finite_difference(jax.jit(f), 0.1), rtol=1e-6)


# --- going on ----------------------------------------------------------------------------------------


def test_it_goes_on_from_a_state():
    whole, history = _ran()
    first, _ = train.run(SMALL, KEY, (X, Y), 1, early_stopping=RULE, **OPTIONS)
    rest, rows = train.run(SMALL, None, (X, Y), 5, state=first, early_stopping=RULE, **OPTIONS)
    _same(whole, rest)
    assert np.isnan(rows["loss"]).tolist() == [True, False, False, True, True]
    assert rows["step"].tolist() == history["step"].tolist() == [7, 14, 21, 21, 21]
    assert rows["epoch"].tolist() == [1, 2, 3, 4, 5]
    _same({n: a[1:] for n, a in rows.items()}, {n: a[1:] for n, a in history.items()})
    np.asarray(first.params["dense_0"]["kernel"])  # the state that was passed in is still there


@pytest.mark.slow
def test_it_goes_on_from_the_middle_of_an_epoch():
    ts = SMALL.init(KEY, X[:1])
    order = data.shuffled_indices(ts.key, 0, len(X))
    step = jax.jit(SMALL.step)
    for batch in list(data.batches((X, Y), 16, order=order))[:3]:
        ts, _ = step(ts, batch)
    ran, history = train.run(SMALL, None, (X, Y), 2, state=ts, **OPTIONS)
    fitted, rows = train.fit(SMALL, (X, Y), epochs=2, state=ts, **OPTIONS)
    _same(ran, fitted)
    _same_history(rows, history)


@pytest.mark.slow
def test_a_traced_state_goes_on_from_an_epochs_beginning_and_from_nowhere_else():
    half, _ = train.run(SMALL, KEY, (X, Y), 1, **OPTIONS)
    go_on = jax.jit(lambda ts: train.run(SMALL, None, (X, Y), 3, state=ts, **OPTIONS))
    ts, history = go_on(half)
    whole, rows = train.run(SMALL, KEY, (X, Y), 3, **OPTIONS)
    _same(ts, whole, rtol=2e-5, atol=2e-6)
    assert np.isnan(history["loss"]).tolist() == [True, False, False]
    assert history["step"].tolist() == rows["step"].tolist()
    odd, nothing = go_on(half._replace(step=jnp.int32(9)))
    assert np.isnan(nothing["loss"]).all()
    _same(odd.params, half.params)


def test_a_stopped_state_stays():
    ts, _ = _ran()
    again, history = train.run(SMALL, None, (X, Y), 5, state=ts, early_stopping=RULE, **OPTIONS)
    _same(ts, again)
    assert np.isnan(history["loss"]).all()
    assert begin(None, ts).stopping == ()


@pytest.mark.slow
def test_no_key_is_used_twice():
    with jax.debug_key_reuse(True):
        train.run(_small(), KEY, (X, Y), 2, early_stopping=RULE, **OPTIONS)


@pytest.mark.slow
def test_a_skipping_step_counts_its_skips():
    trainer = train.trainer(SMALL_MODEL, losses.softmax_cross_entropy, optim.adam(1e-2))
    skipping = trainer._replace(step=trainer.skipping)
    ts, history = train.run(skipping, KEY, (X, Y), 2, batch_size=16)
    fitted, rows = train.fit(trainer, (X, Y), epochs=2, key=KEY, batch_size=16, guard="skip")
    assert history["skipped"].tolist() == [0, 0]
    _same(ts, fitted)
    _same_history(rows, history)


# --- bad input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"key": None}, TypeError, "run needs a key: pass run"),
        ({"key": 3}, TypeError, "run got the number 3 for a key"),
        ({"epochs": 0}, ValueError, r"run\(epochs=\.\.\.\) must be a whole number of at least 1, got 0"),
        ({"batch_size": 200}, ValueError, "batch_size is 200 and there are 103 examples"),
        ({"data": (X, Y + 3)}, ValueError, "label targets"),
        ({"data": (X[:50], Y)}, ValueError, "has 50 examples and .* has 103"),
        ({"validation": (X * np.nan, Y)}, ValueError, "the validation data.* holds NaN"),
        ({"state": 3, "key": None}, TypeError, r"run\(state=\.\.\.\) takes a TrainState and got int"),
        ({"state": "ts"}, TypeError, "run got both a key and state="),
        ({"early_stopping": "val_loss"}, TypeError, r"takes a rule and got 'val_loss': pass train\.early"),
        (
            {"early_stopping": train.early_stopping("val_f1")},
            ValueError,
            "early_stopping monitors 'val_f1', which the run does not compute",
        ),
        ({"validation": None}, ValueError, "monitors 'val_loss', which report did not get"),
        (
            {"data": data.stream((X, Y), batch_size=16)},
            TypeError,
            "run takes the training data as arrays and",
        ),
    ],
)
def test_errors(change, error, text):
    given = {"key": KEY, "data": (X, Y), "epochs": 2, "early_stopping": RULE, **OPTIONS} | change
    with pytest.raises(error, match=text):
        train.run(SMALL, given.pop("key"), given.pop("data"), given.pop("epochs"), **given)


def test_nothing_left_to_do():
    ts = SMALL.init(KEY, X[:1])._replace(step=jnp.int32(14))
    with pytest.raises(
        ValueError, match=r"run\(epochs=2\) has nothing to do: .* 14 steps, which are 2 epochs"
    ):
        train.run(SMALL, None, (X, Y), 2, state=ts, **OPTIONS)


def test_a_rule_that_keeps_something_else():
    ts, _ = _ran()
    keeps = RULE._replace(restore_best=True)
    with pytest.raises(
        ValueError, match=r"restore_best=True\) got the state of a run with restore_best=False"
    ):
        train.run(SMALL, None, (X, Y), 5, state=ts, early_stopping=keeps, **OPTIONS)


def test_values_that_are_traced_are_not_looked_at_and_others_are():
    def final(labels):
        return train.run(SMALL, KEY, (X, labels), 1, **OPTIONS)[1]["loss"]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.eval_shape(final, Y + 3)
    with pytest.raises(ValueError, match="label targets"):
        jax.eval_shape(lambda: final(Y + 3))
