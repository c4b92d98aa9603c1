"""Members of a search are what they are alone: to the bit in exact mode, to rounding where they are mapped."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnkit import data, layers, losses, models, optim, search, train
from nnkit.train.epochs import compiler_options

SPACE = search.as_space(
    {"lr": search.log_uniform(1e-4, 1e-1), "decay": search.choice([0.0, 0.1], static=False)}
)
KEY = jax.random.key(7)
X = jax.random.normal(KEY, (48, 5))
Y = jnp.argmax(X[:, :3], axis=1)


def small(key, hparams):
    """Dropout and batch norm, so that keys and state have a part in the numbers."""
    model = layers.serial(
        layers.dense(8, use_bias=False),
        layers.batch_norm(),
        layers.relu,
        layers.dropout(0.3),
        layers.dense(3),
    )
    trainer = train.trainer(
        model, losses.softmax_cross_entropy, optim.adamw(hparams["lr"], weight_decay=hparams["decay"])
    )
    return train.run(trainer, key, (X[:32], Y[:32]), epochs=2, batch_size=8, validation=(X[32:], Y[32:]))


def flats(n):
    """Rates, each with both decays."""
    rates = SPACE.dimensions["lr"].grid(n // 2)
    return [{"lr": float(rate), "decay": decay} for rate in rates for decay in (0.0, 0.1)]


def found(engine, trials):
    """The histories in the order of the trials, as bytes."""
    finished = sorted(engine.run(trials), key=lambda f: f.index)
    return [{name: a.tobytes() for name, a in f.history.items()} for f in finished]


@pytest.fixture(scope="module")
def engine():
    return search.Engine(small, SPACE, seeds=[0, 5], workers=2)


@pytest.fixture(scope="module")
def alone(engine):
    """Each member from a program of its user's own: train.run under jit, as one thread calls it."""
    solo = jax.jit(
        lambda key, lr, decay: small(key, {"lr": lr, "decay": decay})[1],
        compiler_options=compiler_options("cpu"),
    )
    return [
        [jax.device_get(solo(jax.random.key(seed), flat["lr"], flat["decay"])) for seed in engine.seeds]
        for flat in flats(32)
    ]


def test_each_of_64_members_is_its_solo_run_bit_for_bit(engine, alone):
    # Fails with members mapped, and where seeds or trials are taken from another row.
    trials = flats(32)
    finished = sorted(engine.run(trials), key=lambda f: f.index)
    assert len(finished) * len(engine.seeds) == 64
    for f, rows in zip(finished, alone, strict=True):
        for row, history in enumerate(rows):
            assert f.history.keys() == history.keys()
            for name, column in history.items():
                assert f.history[name][row].tobytes() == np.asarray(column).tobytes(), (f.index, row, name)
    assert len({f.history["val_loss"].tobytes() for f in finished}) == 32


def test_nothing_depends_on_threads_batches_or_order(engine):
    trials = flats(8)
    whole = found(engine, trials)
    assert found(engine, trials[::-1]) == whole[::-1]
    assert [found(engine, [trial])[0] for trial in trials] == whole
    for workers in (1, 4):
        engine_too = search.Engine(small, SPACE, seeds=[0, 5], workers=workers)
        assert found(engine_too, trials) == whole


def test_a_member_trained_again_is_the_recorded_one(engine):
    trials = flats(4)
    finished = sorted(engine.run(trials), key=lambda f: f.index)
    ts, history = engine.retrain(trials[2], 5)
    for name, column in history.items():
        assert column.tobytes() == finished[2].history[name][1].tobytes()
    assert int(ts.step) == 8


def test_mapped_members_are_equal_to_rounding(alone):
    """Sums in another order: each of 8 steps adds roundings of some ten operations, 2^-24 relative each.

    8 * 10 * 6e-8 is 5e-6, on losses near 1; Adam divides by the gradient's size, and so adds the rounding of small
    gradients times the rate: at 1e-3 and below that is less. There must be no bias before the batch norm: its
    gradient is nothing but rounding, and Adam makes a whole step of it (1.1e-4 was seen with one).
    """
    engine = search.Engine(small, SPACE, seeds=[0, 5], members="mapped")
    finished = sorted(engine.run(flats(32)), key=lambda f: f.index)
    for f, flat, rows in zip(finished, flats(32), alone, strict=True):
        assert f.how == "mapped"
        if flat["lr"] <= 1e-3:
            for row, history in enumerate(rows):
                np.testing.assert_allclose(f.history["val_loss"][row], history["val_loss"], rtol=0, atol=5e-6)


def test_groups_share_a_program_and_others_have_their_own():
    traced = []

    def shaped(key, *, width, lr):
        traced.append(width)
        return {"val_loss": lr * jnp.ones(width).sum()}

    space = {"width": search.integer(1, 3), "lr": search.uniform(0, 1)}
    engine = search.Engine(shaped, space, seeds=[0])
    trials = [{"width": w, "lr": lr} for w in (1, 3) for lr in (0.25, 0.5, 0.75)]
    values = [f.history["val_loss"][0] for f in sorted(engine.run(trials), key=lambda f: f.index)]
    assert values == [0.25, 0.5, 0.75, 0.75, 1.5, 2.25]
    assert sorted(set(traced)) == [1, 3]
    before = len(traced)
    list(engine.run(trials))
    assert len(traced) == before  # nothing is traced or compiled anew


def test_folds_are_members(engine):
    def folded(key, hparams, *, fold):
        return {"val_loss": hparams["lr"] + fold.astype(jnp.float32)}

    space = {"lr": search.uniform(0, 1)}
    for members in ("exact", "mapped"):
        e = search.Engine(folded, space, seeds=[0, 1], folds=3, members=members)
        (f,) = e.run([{"lr": 0.5}])
        assert f.history["val_loss"].tolist() == [[0.5, 1.5, 2.5]] * 2
        assert e.retrain({"lr": 0.5}, 0, 2)[1]["val_loss"] == 2.5
        with pytest.raises(ValueError, match="must be a fold from 0 to 2, got None"):
            e.retrain({"lr": 0.5}, 0)
    with pytest.raises(ValueError, match="got fold=1, and the search has no folds: leave it out"):
        engine.retrain(flats(2)[0], 0, 1)


# ----- what the training function may not be


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (lambda key, hparams: {"val_loss": jnp.ones(hparams["n"]).sum() * hparams["lr"]}, "'n'.*static=True"),
        (
            lambda key, hparams: {"val_loss": hparams["n"] if hparams["lr"] > 0.5 else 0.0},
            "'lr' is traced, and train_fn needs its value: Python decides by it",
        ),
        (lambda key, hparams: {"val_loss": hparams["lr"]}, "'n'"),
        (lambda key, hparams: {"val_loss": hparams["lr"] * hparams["n"] * hparams["m"]}, "'m'"),
        (lambda key, hparams: hparams["lr"] * hparams["n"], "returned .* and no history"),
        (lambda key, hparams: {"loss": hparams["lr"] * hparams["n"]}, "val_loss"),
        (lambda key, *, lr: {"val_loss": lr}, "'n'"),
    ],
    ids=["shape", "if", "unread", "missing", "no history", "metric", "signature"],
)
def test_what_cannot_work_is_said_before_anything_runs(f, message):
    space = {"lr": search.uniform(0, 1), "n": search.integer(1, 3, static=False)}
    with pytest.raises((ValueError, TypeError, KeyError), match=message):
        search.Engine(f, space, seeds=[0]).check("val_loss")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": []}, "seeds"),
        ({"seeds": [0, 0]}, "seeds"),
        ({"seeds": [0], "members": "both"}, "members"),
        ({"seeds": [0], "workers": 0}, "workers"),
        ({"seeds": [0], "folds": 1}, "folds"),
        ({"seeds": [0], "devices": []}, "devices"),
    ],
    ids=str,
)
def test_arguments_that_cannot_be_meant(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        search.Engine(small, SPACE, **options)


# ----- devices

SHARDED = """
import jax, numpy as np
from nnkit import search
from tests.search.test_engine import SPACE, flats, found, small
assert len(jax.devices()) == 8
one = found(search.Engine(small, SPACE, seeds=[0], devices=jax.devices()[:1]), flats(6))
assert found(search.Engine(small, SPACE, seeds=[0], devices=jax.devices()), flats(6)) == one
engine = search.Engine(small, SPACE, seeds=[0], devices=jax.devices(), members="mapped")
mapped = sorted(engine.run(flats(6)), key=lambda f: f.index)
alone = sorted(search.Engine(small, SPACE, seeds=[0], members="mapped").run(flats(6)), key=lambda f: f.index)
for a, b in zip(mapped, alone, strict=True):
    np.testing.assert_allclose(a.history["val_loss"], b.history["val_loss"], rtol=0, atol=0.02)
print("same")
"""


@pytest.mark.slow
def test_members_are_shared_out_over_8_devices():
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", SHARDED],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.stdout == "same\n", done.stderr[-2000:]


@pytest.mark.slow
def test_64_trials_on_the_digits_are_their_solo_runs():
    images, held_out, _ = data.standardize(data.split(data.load("digits").train, (0.8, 0.1, 0.1), seed=0))

    def digits(key, hparams):
        trainer = train.trainer(
            models.mlp(10, hidden=(64,)),
            losses.softmax_cross_entropy,
            optim.adamw(hparams["lr"], weight_decay=hparams["decay"]),
        )
        return train.run(trainer, key, images, epochs=4, batch_size=64, validation=held_out)

    engine = search.Engine(digits, SPACE, seeds=[0])
    solo = jax.jit(
        lambda key, lr, decay: digits(key, {"lr": lr, "decay": decay})[1],
        compiler_options=compiler_options("cpu"),
    )
    trials = flats(64)
    for f in engine.run(trials):
        flat = trials[f.index]
        history = jax.device_get(solo(jax.random.key(0), flat["lr"], flat["decay"]))
        for name, column in history.items():
            assert f.history[name][0].tobytes() == np.asarray(column).tobytes(), (f.index, name)
