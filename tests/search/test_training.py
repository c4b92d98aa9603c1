"""A run that goes on epoch by epoch: equal to ``train.run``, and the same numbers wherever it is held up."""

from __future__ import annotations

import functools
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnkit import layers, losses, metrics, optim, search, train
from nnkit.search import member as member_module
from nnkit.search import segments as segments_module
from nnkit.search.segments import Segments

RNG = np.random.default_rng(0)
X = RNG.normal(size=(103, 4)).astype(np.float32)
Y = RNG.integers(0, 3, 103).astype(np.int32)
HELD_OUT = X[:37], Y[:37]
KEY = jax.random.key(0)
MODEL = layers.serial(layers.dropout(0.2), layers.dense(3))
# min_delta and atol of 10 are never reached: every epoch after the first is no better.
PLATEAU = optim.reduce_on_plateau(factor=0.5, patience=1, rtol=0.0, atol=10.0, monitor="val_loss")
RULE = train.early_stopping("val_loss", patience=2, min_delta=10.0, restore_best=True)
SPACE = search.as_space({"lr": search.log_uniform(1e-3, 1.0)})


def _make(hparams):
    optimizer = optim.chain(optim.sgd(hparams["lr"]), PLATEAU)
    return train.trainer(
        MODEL, losses.softmax_cross_entropy, optimizer, metrics={"accuracy": metrics.accuracy}
    )


def _plain(hparams):
    return train.trainer(layers.dense(3), losses.softmax_cross_entropy, optim.sgd(hparams["lr"]))


OPTIONS = {"batch_size": 16, "validation": HELD_OUT}  # six full batches and an uneven one
TRAINING = search.training(_make, (X, Y), 5, **OPTIONS)


def _same(a, b):
    def data(leaf):
        return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf

    jax.tree.map(lambda x, y: np.testing.assert_array_equal(data(x), data(y)), a, b)


@pytest.mark.slow
def test_called_with_plain_numbers_it_is_train_run_to_the_last_bit():
    training = search.training(_plain, (X[:32], Y[:32]), 3, batch_size=16)
    ts, history = training(KEY, {"lr": 0.1})
    ran, expected = train.run(_plain({"lr": 0.1}), KEY, (X[:32], Y[:32]), 3, batch_size=16)
    _same((ts.params, ts.step), (ran.params, ran.step))
    _same(history, expected)
    assert history["epoch"].tolist() == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("rule", [None, RULE], ids=["plain", "stopping"])
def test_so_it_is_with_all_that_a_run_can_have(rule):
    training = search.training(_make, (X, Y), 5, early_stopping=rule, **OPTIONS)
    ts, history = training(KEY, {"lr": 0.1})
    ran, expected = train.run(_make({"lr": 0.1}), KEY, (X, Y), 5, early_stopping=rule, **OPTIONS)
    _same((ts.params, ts.step, ts.opt_state), (ran.params, ran.step, ran.opt_state))
    _same(history, expected)
    assert history["step"].tolist() == ([7, 14, 21, 28, 35] if rule is None else [7, 14, 21, 21, 21])


@pytest.mark.slow
def test_mapped_it_is_train_run_to_rounding():
    rates = jnp.array([0.01, 0.1, 1.0])
    _, history = jax.jit(jax.vmap(lambda rate: TRAINING(KEY, {"lr": rate})))(rates)
    for i, rate in enumerate(rates):
        _, alone = train.run(_make({"lr": rate}), KEY, (X, Y), 5, **OPTIONS)
        for name, rows in alone.items():
            # Batched products of matrices sum in another order: 35 steps of rounding.
            np.testing.assert_allclose(history[name][i], rows, 1e-5, 1e-6, err_msg=name)


@functools.cache
def _engine():
    return search.Engine(TRAINING, SPACE, seeds=[0], members="exact", workers=2)


def _check_held_up(bounds):
    """The stages stop after the epochs in bounds; the whole run is what the engine records."""
    stages = _engine().segments({"lr": 0.1}).on(jax.devices()[0])
    whole = next(iter(_engine().run([{"lr": 0.1}]))).history
    member = stages.begin(KEY, {"lr": 0.1}, None)
    for until in (*bounds, 5):
        member, ended = stages.advance(member, {"lr": 0.1}, until)
        assert (int(member.had), bool(ended)) == (until, False)
    result, history = stages.close(member, {"lr": 0.1})
    assert sorted(history) == sorted(whole)
    for name, rows in history.items():
        np.testing.assert_array_equal(rows, whole[name][0])
    _same(result, _engine().retrain({"lr": 0.1}, 0)[0])


@pytest.mark.parametrize("bounds", [(), (1, 2, 3, 4), (3,), (2, 2)], ids=str)
def test_wherever_it_is_held_up_its_numbers_are_the_same(bounds):
    _check_held_up(bounds)


def test_a_survivor_has_the_bits_of_its_solo_run():
    flats = [{"lr": float(rate)} for rate in np.geomspace(1e-3, 1, 9)]
    pruner = search.successive_halving()
    trials = search.run_pruned(_engine(), TRAINING, flats, pruner, metric="val_loss")
    survivor = next(trial for trial in trials if trial.stopped is None)
    _, alone = _engine().retrain(flats[survivor.index], 0)
    for name, rows in alone.items():
        np.testing.assert_array_equal(survivor.history[name][0], rows)


WRONG = {
    "begins each segment at epoch 0": (
        "one_epoch",
        lambda training, member, hparams, real=member_module.one_epoch: real(
            training, member._replace(had=0 * member.had), hparams
        )._replace(had=member.had + 1),
    ),
    "goes an epoch too far": (
        "advance",
        lambda training, member, hparams, until, real=member_module.advance: real(
            training, member, hparams, until + 1
        ),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_segment_is_found(name, monkeypatch):
    _check_held_up((3,))  # compiles what is right
    where = segments_module if WRONG[name][0] == "advance" else member_module
    monkeypatch.setattr(where, *WRONG[name])
    segments = Segments(TRAINING, SPACE, (), {"lr": 0.1})
    monkeypatch.setattr(_engine(), "segments", lambda flat: segments)
    with pytest.raises(AssertionError):
        _check_held_up((3,))


@pytest.mark.slow
def test_early_stopping_may_be_a_function_of_the_hyper_parameters():
    """Patiences of 1 and 3; what is remembered of the best epoch is put back."""
    training = search.training(
        lambda hparams: _make({"lr": 0.1}),
        (X, Y),
        5,
        early_stopping=lambda hparams: RULE._replace(patience=hparams["patience"]),
        **OPTIONS,
    )
    space = {"patience": search.integer(1, 3, static=False)}
    engine = search.Engine(training, space, seeds=[0], members="exact", workers=1)
    flats = [{"patience": 1}, {"patience": 3}]
    short, long = sorted(search.run_pruned(engine, training, flats, search.median(warmup=2), metric="loss"))
    assert np.isfinite(short.history["loss"]).tolist() == [[True, True, False, False, False]]
    assert np.isfinite(long.history["loss"]).sum() == 4
    assert (short.stopped, long.stopped) == (None, None)
    ts, _ = engine.retrain(flats[0], 0)
    np.testing.assert_array_equal(ts.params["dense_0"]["kernel"], ts.stopping.params["dense_0"]["kernel"])


def test_the_size_of_a_batch_may_be_a_function_of_the_hyper_parameters():
    training = search.training(_plain, (X, Y), 2, batch_size=lambda hparams: hparams["batch_size"])
    like = jax.eval_shape(lambda rate: training(KEY, {"lr": rate, "batch_size": 50})[1], 0.1)
    assert like["loss"].shape == (2,)
    with pytest.raises(TypeError, match=r"batch_size=...\) gave a traced value.*make it static in the space"):
        jax.eval_shape(lambda size: training(KEY, {"lr": 0.1, "batch_size": size}), 50)


@pytest.mark.slow
def test_data_may_depend_on_the_fold():
    def parts(fold):
        return (jnp.roll(X, fold, axis=0), jnp.roll(Y, fold)), HELD_OUT

    training = search.training(_plain, parts, 1, batch_size=103, shuffle=False)
    engine = search.Engine(training, SPACE, seeds=[0], folds=2, members="exact", workers=1)
    (found,) = engine.run([{"lr": 0.1}])
    for fold in range(2):
        data, held_out = parts(fold)
        ran = train.run(_plain({"lr": 0.1}), KEY, data, 1, batch_size=103, validation=held_out, shuffle=False)
        # A rate that is traced, where this one is a constant.
        np.testing.assert_allclose(found.history["val_loss"][0, fold], ran[1]["val_loss"], 1e-6)


def test_folds_and_data_must_agree():
    with pytest.raises(
        TypeError, match=r"data that are the same for all folds: pass a function, search.training"
    ):
        TRAINING.start(KEY, {"lr": 0.1}, fold=0)
    with pytest.raises(TypeError, match=r"a function of the fold, and no fold: pass sweep\(..., folds=5\)"):
        search.training(_make, lambda fold: ((X, Y), HELD_OUT), 1)(KEY, {"lr": 0.1})
    with pytest.raises(TypeError, match=r"have that return \(training data, validation data\)"):
        search.training(_make, lambda fold: ((X, Y), HELD_OUT), 1, validation=HELD_OUT)


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (
            lambda: search.training(_make({"lr": 0.1}), (X, Y), 1),
            TypeError,
            "needs a function that makes the trainer",
        ),
        (
            lambda: search.training(_make, (X, Y), 0),
            ValueError,
            r"search.training\(epochs=...\) must be a whole",
        ),
        (lambda: search.training(_make, (X, Y[:5]), 1), ValueError, "103"),
        (
            lambda: search.training(lambda hparams: MODEL, (X, Y), 1)(KEY, {}),
            TypeError,
            r"make\(hparams\) returned Layer: it must return a trainer",
        ),
        (
            lambda: search.training(_make, (X, Y), 1, batch_size=200)(KEY, {"lr": 0.1}),
            ValueError,
            "batch_size",
        ),
    ],
    ids=["trainer", "epochs", "data", "layer", "batch size"],
)
def test_what_cannot_be_meant_is_refused(make, kind, text):
    with pytest.raises(kind, match=text):
        make()


@pytest.mark.parametrize(
    ("epoch", "kind", "text"),
    [
        (
            lambda x, h, n: (x, jnp.float32(1)),
            TypeError,
            r"must return \(carry, row\) with a dict of scalars as row",
        ),
        (
            lambda x, h, n: (x, {"loss": jnp.ones(3)}),
            ValueError,
            r"row has 'loss' of shape \(3,\): return its mean",
        ),
        (lambda x, h, n: ((x, x), {"loss": x}), TypeError, "the carry in the structure that start gave it"),
        (
            lambda x, h, n: (jnp.ones(2), {"loss": x}),
            TypeError,
            r"was float32\[\] and became float32\[2\]",
        ),
    ],
    ids=["row", "mean", "structure", "shape"],
)
def test_a_training_of_ones_own_is_checked(epoch, kind, text):
    with pytest.raises(kind, match=text):
        search.Training(lambda key, hparams: jax.random.uniform(key), epoch, 2)(KEY, {})


@pytest.mark.slow
def test_a_mapped_cohort_is_shared_out_over_devices():
    """Seven trials on two devices, of which one has a place that no trial fills; in a process with two."""
    subprocess.run([sys.executable, "-c", textwrap.dedent(ON_TWO_DEVICES)], check=True, timeout=120)


ON_TWO_DEVICES = """
    import os

    os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    import jax, jax.numpy as jnp, numpy as np
    from nnkit import search

    def epoch(x, hparams, number):
        return x, {"loss": x + hparams["b"] * number.astype(jnp.float32)}

    def start(key, hparams):
        return hparams["a"] + jax.random.uniform(key) + (0.3 if hparams["kind"] == "x" else 0.0)

    training = search.Training(start, epoch, 9)
    space = {"a": search.uniform(0, 1), "b": search.uniform(-0.1, 0.1), "kind": search.choice(["x", "y"])}
    rng = np.random.default_rng(0)
    flats = [
        {"a": float(rng.uniform()), "b": float(rng.uniform(-0.1, 0.1)), "kind": "xy"[i % 3 == 0]} for i in range(7)
    ]
    found = []
    for devices in (jax.devices()[:1], jax.devices()):
        engine = search.Engine(training, space, seeds=[0, 1], members="mapped", devices=devices)
        for rule in (search.successive_halving(), search.median(warmup=2)):
            trials = search.run_pruned(engine, training, flats, rule, metric="loss")
            found.append(sorted(trials, key=lambda trial: trial.index))
    for one, two in zip(found[:2], found[2:], strict=True):
        assert [t.stopped for t in one] == [t.stopped for t in two]
        assert len({t.stopped for t in one}) > 1
        for a, b in zip(one, two, strict=True):
            np.testing.assert_array_equal(a.history["loss"], b.history["loss"])
"""


def test_one_that_ends_by_itself_is_judged_by_its_last_epoch_without_steps_too():
    # Failed where its value was that of an epoch after the end.
    def epoch(carry, hparams, number):
        x, had = carry
        return (x * hparams["lr"], had + 1), {"val_loss": x}

    training = search.Training(
        lambda key, hparams: (jnp.float32(1), jnp.int32(0)), epoch, 6, ended=lambda carry: carry[1] >= 3
    )
    study = search.sweep(training, {"lr": search.uniform(0.1, 0.5)}, trials=3)
    for trial in study.trials:
        assert (trial.state, trial.value) == ("complete", pytest.approx(trial.params["lr"] ** 2))
        assert trial.health["epochs"] == [3]
