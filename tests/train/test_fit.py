from __future__ import annotations

import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnkit import data, layers, losses, metrics, optim, train, tree

RNG = np.random.default_rng(0)
X = RNG.normal(size=(103, 4)).astype(np.float32)
Y = RNG.integers(0, 3, 103).astype(np.int32)
KEY = jax.random.key(0)
# No bias before batch normalisation: its gradient would be rounding, which Adam makes into steps.
MODEL = layers.serial(
    layers.dense(8, use_bias=False), layers.batch_norm(), layers.relu, layers.dropout(0.5), layers.dense(3)
)
TRAINER = train.trainer(
    MODEL, losses.softmax_cross_entropy, optim.adam(1e-2), metrics={"accuracy": metrics.accuracy}
)


def _same(a, b, rtol=0.0, atol=0.0):
    for path, leaf in tree.flatten(jax.tree.map(_data, a)).items():
        np.testing.assert_allclose(leaf, tree.flatten(jax.tree.map(_data, b))[path], rtol, atol, err_msg=path)


def _data(leaf):
    return jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def _step_loop(trainer, epochs, batch_size):
    """What fit does, as anyone would write it with ``trainer.step`` alone."""
    ts = trainer.init(KEY, X[:1])
    step = jax.jit(trainer.step)
    for epoch in range(epochs):
        order = data.shuffled_indices(ts.key, epoch, len(X))
        for batch in data.batches((X, Y), batch_size, order=order):
            ts, _ = step(ts, batch)
    return ts


def test_compiled_epochs_equal_the_step_loop():
    """103 examples in batches of 16: six full ones and an uneven last one."""
    ts, history = train.fit(TRAINER, (X, Y), epochs=3, key=KEY, batch_size=16)
    assert int(ts.step) == 21 == history[-1]["step"]
    # The same arithmetic in two programs, which XLA fuses in different ways: equal to rounding.
    _same(ts, _step_loop(TRAINER, 3, 16), rtol=2e-5, atol=2e-6)


def test_the_length_of_a_chunk_changes_no_bit():
    runs = [
        train.fit(TRAINER, (X, Y), epochs=2, key=KEY, batch_size=16, steps_per_call=n)[0]
        for n in (1, 4, 6, 50)
    ]
    for other in runs[1:]:
        _same(runs[0], other)


def test_a_run_in_two_parts_is_the_run_in_one():
    whole, rows = train.fit(TRAINER, (X, Y), epochs=4, key=KEY, batch_size=16)
    half, first = train.fit(TRAINER, (X, Y), epochs=2, key=KEY, batch_size=16)
    resumed, second = train.fit(TRAINER, (X, Y), epochs=4, state=half, batch_size=16)
    _same(whole, resumed)
    assert [r["loss"] for r in rows] == [r["loss"] for r in first + second]
    assert [r["epoch"] for r in second] == [3, 4]
    np.asarray(half.params["dense_0"]["kernel"])  # the state that was passed in is still there


def test_a_run_goes_on_from_the_middle_of_an_epoch():
    ts = TRAINER.init(KEY, X[:1])
    order = data.shuffled_indices(ts.key, 0, len(X))
    step = jax.jit(TRAINER.step)
    for batch in list(data.batches((X, Y), 16, order=order))[:3]:
        ts, _ = step(ts, batch)
    rest, rows = train.fit(TRAINER, (X, Y), epochs=1, state=ts, batch_size=16)
    whole, _ = train.fit(TRAINER, (X, Y), epochs=1, key=KEY, batch_size=16)
    assert rows[0]["step"] == 7
    _same(rest, whole, rtol=2e-5, atol=2e-6)


SCRIPT = """
import jax, numpy as np, hashlib
from nnkit import layers, losses, optim, train, tree
rng = np.random.default_rng(0)
x, y = rng.normal(size=(103, 4)).astype(np.float32), rng.integers(0, 3, 103).astype(np.int32)
model = layers.serial(layers.dense(8), layers.batch_norm(), layers.relu, layers.dropout(0.5), layers.dense(3))
trainer = train.trainer(model, losses.softmax_cross_entropy, optim.adam(1e-2))
ts, _ = train.fit(trainer, (x, y), epochs=3, key=jax.random.key(0), batch_size=16)
leaves = jax.tree.leaves((ts.params, ts.state, ts.opt_state))
print(hashlib.sha256(b"".join(np.asarray(a).tobytes() for a in leaves)).hexdigest())
"""


def test_a_second_process_gives_the_same_bits():
    first, second = (
        subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True).stdout
        for _ in "ab"
    )
    assert len(first.strip()) == 64
    assert first == second


def test_the_order_of_examples_is_a_function_of_seed_and_epoch():
    """Recorded by a model that remembers the sum of i * example number over the steps."""

    def objective(params, state, batch, *, key, train):
        return jnp.sum(params["w"]) * 0, ({"seen": state["seen"] * 7 % 10007 + batch[0]}, {})

    def orders(seed, shuffle=True):
        trainer = train.trainer(
            objective,
            init=lambda k, x: ({"w": jnp.zeros(1)}, {"seen": jnp.zeros(())}),
            optimizer=optim.sgd(0.0),
        )
        numbers = np.arange(40, dtype=np.float32)
        seen = []
        train.fit(
            trainer, numbers, epochs=2, key=jax.random.key(seed), batch_size=1, shuffle=shuffle,
            callbacks=lambda e, v: seen.append(float(v.state.state["seen"])) if e == "epoch" else None,
        )  # fmt: skip
        return seen

    assert orders(0) == orders(0)
    assert orders(0) != orders(1)
    hashes = [0.0]
    for _ in range(2):
        h = hashes[-1]
        for i in range(40):
            h = h * 7 % 10007 + i
        hashes.append(h)
    assert orders(0, shuffle=False) == hashes[1:]


def test_every_example_is_seen_once_an_epoch_and_drop_last_leaves_the_rest():
    def objective(params, state, batch, *, key, train):
        return jnp.sum(params["w"]) * 0, ({"n": state["n"].at[batch].add(1)}, {})

    trainer = train.trainer(
        objective,
        init=lambda k, x: ({"w": jnp.zeros(1)}, {"n": jnp.zeros(50, jnp.int32)}),
        optimizer=optim.sgd(0.0),
    )
    ts, _ = train.fit(trainer, np.arange(50, dtype=np.int32), epochs=3, key=KEY, batch_size=8)
    np.testing.assert_array_equal(ts.state["n"], 3)
    ts, _ = train.fit(trainer, np.arange(50, dtype=np.int32), epochs=3, key=KEY, batch_size=8, drop_last=True)
    assert int(ts.state["n"].sum()) == 3 * 48


def test_training_metrics_are_means_over_examples():
    """A loss that is the example itself: the uneven last batch must weigh less than the others."""

    def objective(params, state, batch, *, key, train):
        return batch.mean() + 0 * jnp.sum(params["w"]), (state, {})

    trainer = train.trainer(objective, init=lambda k, x: ({"w": jnp.zeros(1)}, {}), optimizer=optim.sgd(0.0))
    numbers = np.arange(10, dtype=np.float32) ** 2
    _, rows = train.fit(trainer, numbers, epochs=1, key=KEY, batch_size=4, validation=numbers)
    assert rows[0]["loss"] == pytest.approx(numbers.mean(), rel=1e-6)
    assert rows[0]["val_loss"] == pytest.approx(numbers.mean(), rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 7, 50, 103, 1000])
def test_evaluation_of_a_data_set_is_exact_for_any_batch_size(batch_size):
    ts = TRAINER.init(KEY, X[:1])
    found = train.evaluate(TRAINER, ts, (X, Y), batch_size=batch_size)
    whole = TRAINER.evaluate(ts, (jnp.asarray(X), jnp.asarray(Y)))
    assert found["accuracy"] == pytest.approx(float(whole["accuracy"]), abs=1e-6)
    assert found["loss"] == pytest.approx(float(whole["loss"]), rel=1e-5)
    logits = train.predict(MODEL, ts.params, ts.state, X, batch_size=batch_size)
    expected, _ = MODEL.apply(ts.params, ts.state, jnp.asarray(X), train=False)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)


def test_a_dataset_is_taken_as_it_is():
    splits = data.standardize(data.split(data.load("digits").train, (0.6, 0.2, 0.2)))
    model = layers.serial(layers.flatten, layers.dense(10))
    trainer = train.trainer(model, losses.softmax_cross_entropy, optim.adam(1e-2))
    _, rows = train.fit(trainer, splits.train, epochs=2, key=KEY, validation=splits.validation)
    assert rows[1]["val_loss"] < rows[0]["val_loss"]


def test_the_bar_shows_loss_and_validation(capsys):
    train.fit(TRAINER, (X, Y), epochs=2, key=KEY, batch_size=16, validation=(X, Y), progress=True)
    shown = "".join(capsys.readouterr())
    assert "epoch 2/2" in shown
    assert " loss 1." in shown or " loss 0." in shown
    assert "val_accuracy 0." in shown
    assert "examples/s" in shown
    assert "…" not in shown  # it fits a terminal of 80 columns


def test_it_is_quiet_where_there_is_no_terminal(capsys):
    train.fit(TRAINER, (X, Y), epochs=1, key=KEY)
    assert capsys.readouterr() == ("", "")


def test_a_bar_without_rich_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with pytest.raises(ImportError, match=r"a progress bar needs rich: pip install nnkit\[experiments\]"):
        train.fit(TRAINER, (X, Y), epochs=1, key=KEY, progress=True)


def _fit(x=X, y=Y, trainer=TRAINER, **options):
    return train.fit(trainer, (x, y), **{"epochs": 1, "key": KEY, **options})


def _with(label):
    """The labels with a sixth one that is out of range."""
    return np.where(np.arange(103) == 5, label, Y).astype(np.int32)


def _reporting(found):
    """A trainer whose objective reports what it is told to."""
    return train.trainer(
        lambda params, state, batch, *, key, train: (jnp.sum(params["w"]), (state, found)),
        init=lambda key, x: ({"w": jnp.zeros(1)}, {}),
        optimizer=optim.sgd(0.1),
    )


BAD_X = X.copy()
BAD_X[3, 1] = np.nan


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: _fit(y=_with(3)), ValueError, r"label targets\[5\] is 3 .* and 3 classes have labels 0..2: renum"),
        (lambda: _fit(y=_with(-1)), ValueError, r"softmax_cross_entropy: label targets\[5\] is -1 "),
        (lambda: _fit(y=Y.astype(np.float32)), TypeError, "float32"),
        (lambda: _fit(x=BAD_X), ValueError, r"(?i)nan"),
        (lambda: _fit(x=X[:50]), ValueError, r"50.*103"),
        (lambda: _fit(x=X[:0], y=Y[:0]), ValueError, "empty|no examples"),
        (lambda: _fit(batch_size=104), ValueError, r"104.*103"),
        (lambda: _fit(batch_size=0), ValueError, r"batch_size"),
        (lambda: _fit(epochs=0), ValueError, r"fit\(epochs=...\) must be a whole number of at least 1, got 0"),
        (lambda: _fit(key=None), TypeError, r"fit needs a key: pass fit\(..., key=jax.random.key\(0\)\)"),
        (lambda: _fit(key=0), TypeError, "fit got the number 0 for a key"),
        (lambda: _fit(key=jax.random.PRNGKey(0)), TypeError, "fit got an old-style uint32 key"),
        (lambda: _fit(state=TRAINER.init(KEY, X[:1])), TypeError, r"fit got both a key and state="),
        (
            lambda: _fit(key=None, state=TRAINER.init(KEY, X[:1])._replace(step=jnp.int32(4))),
            ValueError,
            r"fit\(epochs=1\) has nothing to do: the state has taken 4 steps, which are 2 epochs",
        ),
        (
            lambda: _fit(key=None, state=TRAINER.init(KEY, X[:1, :3])),
            ValueError,
            r"dense_0 has a kernel of shape \(3, 8\) and needs \(4, 8\): its input has shape \(1, 4\)",
        ),
        (lambda: _fit(validation=(X, Y + 1)), ValueError, r"label targets\[\d+\] is 3 "),
        (
            lambda: _fit(
                y=_with(3),
                trainer=train.trainer(MODEL, lambda p, y: losses.softmax_cross_entropy(p, y), optim.sgd(0.1)),
            ),
            ValueError,
            r"label targets\[5\] is 3 ",
        ),
        (lambda: _fit(batch_size=17), ValueError, r"one value per channel, whose variance is 0"),
        (
            lambda: train.fit(TRAINER, data.load("digits"), epochs=1, key=KEY),
            TypeError,
            "the training data are all the splits of a data set: pass one of them, splits.train",
        ),
        (lambda: _fit(key=None, state={"w": X}), TypeError, r"fit\(state=...\) takes a TrainState and got dict"),
        (lambda: _fit(trainer=_reporting({"v": jnp.ones(3)})), ValueError, r"the metric 'v' has shape \(3,\)"),
        (lambda: _fit(trainer=_reporting({"step": jnp.ones(())})), ValueError, r"the metrics \['step'\] have names"),
        (
            lambda: train.fit(
                train.trainer(layers.dense(1), losses.mean_squared_error, optim.sgd(0.1)),
                (X, X[:, 0]), epochs=1, key=KEY,
            ),
            ValueError,
            r"\(103, 1\).*\(103,\)",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_anything_is_computed(call, error, message, monkeypatch):
    computed = []
    monkeypatch.setattr("nnkit.train.loop.dispatch", lambda *a, **k: computed.append(1))
    with pytest.raises(error, match=message):
        call()
    assert not computed


def test_unscaled_images_are_warned_of():
    images = RNG.integers(0, 256, (103, 4)).astype(np.float32)
    with pytest.warns(UserWarning, match="standardize"):
        _fit(x=images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _fit()


def test_an_uneven_last_batch_of_one_is_named_with_its_cure():
    with pytest.raises(ValueError, match="one value per channel") as info:
        _fit(batch_size=17)
    assert any(
        "the last batch of each epoch, which has 1 of 17 examples: pass drop_last" in n
        for n in info.value.__notes__
    )
    _fit(batch_size=17, drop_last=True)


def test_a_second_run_compiles_nothing_anew():
    _fit(batch_size=16, validation=(X, Y))
    with jax.log_compiles(), warnings.catch_warnings(record=True):
        import logging

        records: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: records.append(record.getMessage())
        logger = logging.getLogger("jax")
        logger.addHandler(handler)
        try:
            _fit(batch_size=16, validation=(X, Y))
        finally:
            logger.removeHandler(handler)
    assert not [
        text for text in records if text.startswith("Compiling") or "Finished XLA compilation" in text
    ]


def test_lists_and_whole_numbers_of_numpy_are_welcome():
    ts, _ = train.fit(TRAINER, [X, Y], epochs=np.int64(1), key=KEY)
    assert int(ts.step) == 2


def test_evaluation_draws_for_each_batch_and_adds_up_in_float32():
    def objective(params, state, batch, *, key, train):
        return jax.random.normal(key, ()) + 0 * jnp.sum(params["w"]), (
            state,
            {"half": batch[0]},
        )

    trainer = train.trainer(objective, init=lambda k, x: ({"w": jnp.zeros(1)}, {}), optimizer=optim.sgd(0.0))
    ones = np.ones(60_000, np.float16)
    ts = trainer.init(KEY, ones[:1])
    one = train.evaluate(trainer, ts, ones, batch_size=60_000)
    many = train.evaluate(trainer, ts, ones, batch_size=100)
    assert abs(many["loss"]) < 0.2  # 600 draws, spread 0.04; one draw shared by all has spread 1
    assert one["half"] == many["half"] == 1.0


@pytest.mark.parametrize("batch_size", [0, -5, 2.5])
def test_evaluation_and_prediction_check_their_batch_size(batch_size):
    ts = TRAINER.init(KEY, X[:1])
    for call in (
        lambda: train.evaluate(TRAINER, ts, (X, Y), batch_size=batch_size),
        lambda: train.predict(MODEL, ts.params, ts.state, X, batch_size=batch_size),
    ):
        with pytest.raises((ValueError, TypeError), match="batch_size"):
            call()


def test_evaluation_refuses_labels_out_of_range():
    ts = TRAINER.init(KEY, X[:1])
    with pytest.raises(ValueError, match=r"label targets\[\d+\] is 3 "):
        train.evaluate(TRAINER, ts, (X, Y + 1))


def test_a_plateau_hears_of_each_epoch():
    """The rate halves after an epoch without progress, and the resumed run goes on with it."""
    plateau = optim.reduce_on_plateau(factor=0.5, patience=1, rtol=0.0, monitor="val_loss")
    run = train.trainer(layers.dense(1), losses.mean_squared_error, optim.chain(optim.sgd(0.0), plateau))
    x = np.ones((8, 1), np.float32)
    rates = []
    ts, _ = train.fit(
        run,
        (x, x),
        epochs=4,
        key=jax.random.key(0),
        batch_size=4,
        validation=(x, x),
        callbacks=lambda e, v: rates.append(float(v.state.opt_state[1].scale)) if e == "epoch" else None,
    )
    assert rates == [1.0, 0.5, 0.25, 0.125]
    ts, _ = train.fit(run, (x, x), epochs=5, state=ts, batch_size=4, validation=(x, x))
    assert float(ts.opt_state[1].scale) == 0.0625


def test_a_monitored_metric_that_is_not_there_is_said_before_the_start():
    plateau = optim.reduce_on_plateau(monitor="val_loss")
    run = train.trainer(layers.dense(1), losses.mean_squared_error, optim.chain(optim.sgd(0.1), plateau))
    x = np.ones((8, 1), np.float32)
    seen = []
    with pytest.raises(ValueError, match="monitors 'val_loss', which report did not get: the metrics are"):
        train.fit(
            run,
            (x, x),
            epochs=1,
            key=jax.random.key(0),
            batch_size=4,
            callbacks=lambda *_: seen.append(1),
        )
    assert not seen


def test_the_optimizer_gets_the_loss_and_how_to_compute_it():
    """A plateau on the training loss, and optax's line search, which evaluates it again."""
    import optax

    x = np.linspace(-1, 1, 32, dtype=np.float32)[:, None]
    for optimizer in (
        optim.chain(optim.sgd(0.1), optim.reduce_on_plateau(patience=3)),
        optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=3)),
        optax.lbfgs(),
    ):
        run = train.trainer(layers.dense(1), losses.mean_squared_error, optimizer)
        with jax.numpy_dtype_promotion("standard"):
            _, history = train.fit(run, (x, 2 * x), epochs=20, key=jax.random.key(0), batch_size=32)
        assert history[-1]["loss"] < 0.5 * history[0]["loss"]


def test_an_evaluation_that_needs_several_examples():
    def objective(params, state, batch, *, key, train):
        if batch.shape[0] < 2:
            raise ValueError("needs pairs")
        return jnp.mean((params["w"] * batch) ** 2), (state, {})

    run = train.trainer(objective, optimizer=optim.sgd(0.1), init=lambda key, x: ({"w": jnp.ones(())}, {}))
    x = np.ones((8, 1), np.float32)
    _, history = train.fit(run, x, epochs=1, key=jax.random.key(0), batch_size=4, validation=x)
    assert "val_loss" in history[0]
