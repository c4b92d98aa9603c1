"""A search from end to end: what it gives does not depend on how it was run, and what cannot be meant."""

from __future__ import annotations

import math
import os
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optuna
import pytest

from nnkit import search
from nnkit.search.engine import Engine

SPACE = {
    "lr": search.log_uniform(1e-4, 1.0),
    "kind": search.conditional({"plain": {}, "shifted": {"by": search.uniform(0, 1)}}),
}
ONE = {"lr": search.uniform(0, 1)}


def of(key):
    """A number that the seed decides; random ones take longer to compile than all else here."""
    return jax.random.key_data(key)[-1].astype(jnp.float32)


def train_fn(key, hparams):
    """A parabola of the logarithm."""
    where = jnp.log10(hparams["lr"]) + 2
    if hparams["kind"]["kind"] == "shifted":
        where = where + hparams["kind"]["by"]
    return {"loss": where**2 * jnp.ones(3), "val_loss": where**2 + 0.1 * of(key) + jnp.array([0.2, 0.0, 0.1])}


def one(key, hparams):
    return {"val_loss": hparams["lr"] * (1 + of(key))}


def told(study):
    """All that must not depend on how a search was run."""
    return [
        (
            t.number,
            t.state,
            t.params,
            t.value,
            t.repeat_of,
            {name: str(a.tolist()) for name, a in t.history.items()},
        )
        for t in study.trials
    ]


class Stop:
    """Does something after so many trials."""

    def __init__(self, after, act):
        self.after, self.act = after, act

    def __call__(self, event, view):
        self.after -= event == "trial"
        if event == "trial" and self.after == 0:
            self.act()


def interrupt(number):
    return lambda: os.kill(os.getpid(), number)


# ----- what a search gives


def test_a_search():
    study = search.sweep(train_fn, SPACE, trials=12, seeds=3)
    assert [t.number for t in study.trials] == list(range(12))
    assert {t.state for t in study.trials} == {"complete"}
    best = min(study.trials, key=lambda t: t.value)
    assert study.best.number == best.number
    assert best.history["val_loss"].shape == (3, 3)
    assert best.seeds == (0, 1, 2)
    assert best.value == pytest.approx(float(best.history["val_loss"][:, -1].astype(float).mean()), rel=1e-12)
    assert best.versions["jax"] == jax.__version__
    assert best.git
    assert best.device["backend"] == "cpu"
    assert best.seconds > 0
    assert best.how == "exact"
    assert best.health["finite"]


@pytest.mark.parametrize("sampler", ["random", "grid", "quasi-random"])
def test_nothing_depends_on_batches_or_workers(sampler):
    # Fails with flats zipped to the order in which trials finish, and with one random generator a process.
    found = [
        told(search.sweep(train_fn, SPACE, sampler=sampler, trials=9, batch=batch, workers=workers))
        for batch, workers in [(None, 2), (1, 1), (4, 3)]
    ]
    assert found[0] == found[1] == found[2]
    other = search.sweep(train_fn, SPACE, sampler=sampler, trials=9, sampler_seed=1)
    assert sampler == "grid" or told(other) != found[0]


def test_mapped_members_are_equal_to_rounding():
    exact, mapped = (search.sweep(train_fn, SPACE, trials=8, seeds=2, members=m) for m in ("exact", "mapped"))
    assert [t.params for t in exact.trials] == [t.params for t in mapped.trials]
    for a, b in zip(exact.trials, mapped.trials, strict=True):
        assert b.how == "mapped"
        # A handful of float32 operations on numbers up to 16, each rounded to 2^-24 relative.
        np.testing.assert_allclose(a.history["val_loss"], b.history["val_loss"], rtol=1e-6, atol=1e-5)


def test_all_trials_have_the_same_seeds():
    # Fails where the key is folded with the trial's number.
    def keyed(key, hparams):
        return {"val_loss": hparams["lr"], "bits": jax.random.key_data(key)[-1]}

    study = search.sweep(keyed, ONE, trials=5, seeds=[7, 3])
    for trial in study.trials:
        assert trial.history["bits"].tolist() == [7, 3]
        assert trial.seeds == (7, 3)


def test_a_configuration_is_trained_once(monkeypatch):
    trained = []

    def run(self, flats, original=Engine.run):
        trained.extend(flats)
        return original(self, flats)

    monkeypatch.setattr(Engine, "run", run)
    space = {"width": search.choice([1, 2, 3])}
    study = search.sweep(
        lambda key, hparams: {"val_loss": jnp.float32(hparams.width)}, space, trials=9, batch=4
    )
    assert sorted(flat["width"] for flat in trained) == [1, 2, 3]
    assert len(study.trials) == 9
    first = {}
    for trial in study.trials:
        number = first.setdefault(trial.params["width"], trial.number)
        assert trial.repeat_of == (None if number == trial.number else number)
        assert trial.value == trial.params["width"]
        assert trial.history["val_loss"].shape == (1,)


def test_nan_is_diverged_and_never_best():
    def risky(key, hparams):
        return {"val_loss": jnp.where(hparams["lr"] > 0.5, jnp.nan, -hparams["lr"]) * jnp.ones(2)}

    study = search.sweep(risky, ONE, sampler="grid", trials=5)
    assert [t.state for t in study.trials] == [
        "diverged" if t.params["lr"] > 0.5 else "complete" for t in study.trials
    ]
    assert study.best.params["lr"] == 0.5
    high = search.sweep(risky, ONE, sampler="tpe", trials=12, mode="max")
    assert math.isfinite(high.best.value)
    assert "diverged" in {t.state for t in high.trials}
    with pytest.raises(ValueError, match="no trial with a finite val_loss yet: 2 diverged"):
        _ = search.sweep(lambda key, hparams: {"val_loss": hparams.lr / 0}, ONE, trials=2).best


def test_the_best_epoch_or_the_last():
    last, best = (search.sweep(train_fn, SPACE, trials=3, at=at) for at in ("last", "best"))
    for a, b in zip(last.trials, best.trials, strict=True):
        assert b.value == pytest.approx(a.value - 0.1, rel=1e-6, abs=1e-6)  # float32


def test_static_values_shape_arrays_and_each_group_is_its_solo_run():
    space = {
        "width": search.integer(2, 4, step=2),
        "depth": search.choice([(3,), (4, 2)]),
        "lr": search.uniform(1, 2),
    }

    def shaped(key, *, width, depth, lr):
        x = jnp.linspace(0, 1, 5) + of(key)
        for n in (*depth, width):
            x = jnp.tanh(lr * jnp.ones((n, len(x))) @ x - 1)
        return x, {"val_loss": x.sum()}

    study = search.sweep(shaped, space, sampler="grid", trials=4, seeds=2)
    assert len({(t.params["width"], t.params["depth"]) for t in study.trials}) == 4
    for trial in study.trials:
        given = search.as_space(space).hparams(*search.as_space(space).split(trial.params))
        solo = jax.jit(lambda key, given=given: shaped(key, **given))
        for row, seed in enumerate(study.seeds):
            x, history = solo(jax.random.key(seed))
            # Two roundings of float32 in each of some ten operations on numbers up to 6.
            np.testing.assert_allclose(
                trial.history["val_loss"][row], history["val_loss"], rtol=3e-6, atol=3e-6
            )
            result, history = search.retrain(study, shaped, trial.number, seed)
            assert result.shape == x.shape == (trial.params["width"],)
            assert history["val_loss"].tobytes() == trial.history["val_loss"][row].tobytes()


def test_folds_are_members_too():
    def folded(key, hparams, *, fold):
        return {"val_loss": hparams["lr"] + fold.astype(jnp.float32)}

    study = search.sweep(folded, ONE, trials=3, seeds=2, folds=3)
    assert study.best.values.shape == (2, 3)
    assert study.best.value == pytest.approx(study.best.params["lr"] + 1, rel=1e-6)
    _, history = search.retrain(study, folded, fold=2)
    assert history["val_loss"] == study.best.history["val_loss"][0, 2]


@pytest.mark.parametrize(
    "sampler",
    [
        "tpe",
        "coarse-to-fine",
        optuna.samplers.RandomSampler(seed=0),
        lambda seed: optuna.samplers.RandomSampler(seed=seed),
    ],
    ids=["tpe", "coarse-to-fine", "instance", "function"],
)
def test_other_samplers(sampler):
    study = search.sweep(one, ONE, sampler=sampler, trials=10)
    assert len({t.params["lr"] for t in study.trials}) == 10
    assert isinstance(study.sampler, str)
    assert "0x" not in study.sampler


# ----- pruning


CURVES = search.Training(
    start=lambda key, hparams: 0 * of(key),
    epoch=lambda x, hparams, number: (x, {"val_loss": hparams["lr"] + x}),
    epochs=9,
)


def test_pruned_trials_are_recorded_as_such():
    rule = search.successive_halving(first=1, factor=3)
    study = search.sweep(CURVES, ONE, trials=9, pruner=rule)
    left = sorted(study.trials, key=lambda t: t.params["lr"])
    assert [t.stopped for t in left] == [None, 3, 3] + [1] * 6
    assert [t.state for t in left] == ["complete"] + ["pruned"] * 8
    assert study.best.number == left[0].number


def test_a_cohort_is_told_as_a_whole(tmp_path):
    # Fails where trials are told as they are stopped: what is left of a cohort is judged among itself later.
    rule = search.successive_halving(first=1, factor=3)
    settings = {"trials": 18, "batch": 6, "pruner": rule}
    expected = told(search.sweep(CURVES, ONE, **settings))
    with pytest.raises(KeyboardInterrupt):
        search.sweep(CURVES, ONE, run_dir=tmp_path, callbacks=Stop(8, interrupt(signal.SIGINT)), **settings)
    assert sum(t.finished for t in search.open_study(tmp_path).trials) == 12
    assert told(search.sweep(CURVES, ONE, run_dir=tmp_path, **settings)) == expected


# ----- interruptions


@pytest.mark.parametrize("sampler", ["random", "tpe", "coarse-to-fine"])
def test_interrupted_and_resumed_is_uninterrupted(tmp_path, sampler):
    # Fails where what was running is dropped and drawn anew under other numbers.
    settings = {"sampler": sampler, "trials": 14, "batch": 6}
    expected = told(search.sweep(one, ONE, **settings))
    for after in (3, 5):
        with pytest.raises(KeyboardInterrupt, match=r"of 14 trials, which are kept in .*: call sweep again"):
            search.sweep(
                one, ONE, run_dir=tmp_path, callbacks=Stop(after, interrupt(signal.SIGINT)), **settings
            )
    states = [t.state for t in search.open_study(tmp_path).trials]
    assert states.count("complete") == 8
    assert states.count("running") == 0
    assert told(search.sweep(one, ONE, run_dir=tmp_path, **settings)) == expected


def test_sigterm_ends_the_process_as_it_should(tmp_path):
    with pytest.raises(SystemExit) as ended:
        search.sweep(
            one, ONE, trials=9, batch=4, run_dir=tmp_path, callbacks=Stop(2, interrupt(signal.SIGTERM))
        )
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert sum(t.state == "complete" for t in search.open_study(tmp_path).trials) == 2


def test_ctrl_c_does_not_wait_for_a_trial(monkeypatch):
    # Fails where the signal is only noted. A program with a callback cannot be left before it is done.
    monkeypatch.setattr("nnkit.search.pool._PATIENCE", 0.2)

    def slow(key, hparams):
        seconds = jnp.where(hparams["lr"] > 0.5, 4.0, 0.0)
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        return {
            "val_loss": jax.pure_callback(lambda s: (time.sleep(float(s)), np.float32(s))[1], shape, seconds)
        }

    def later(event, view):
        if event == "trial":  # the first is there at once, and the next is waited for
            threading.Timer(0.3, interrupt(signal.SIGINT)).start()

    began = time.monotonic()
    with pytest.raises(
        KeyboardInterrupt, match="stopped with 1 of 2 trials, which were in memory alone: pass run_dir="
    ):
        search.sweep(slow, ONE, sampler="grid", trials=2, workers=1, callbacks=later)
    assert time.monotonic() - began < 3


def test_an_error_of_a_callback_ends_the_training():
    # Fails where the engine's iterator is left open: threads would go on with the batch.
    trained = []

    def counting(key, hparams):
        def count(lr):
            time.sleep(0.01)
            trained.append(lr)
            return np.float32(lr)

        shape = jax.ShapeDtypeStruct((), jnp.float32)
        return {"val_loss": jax.pure_callback(count, shape, hparams["lr"])}

    def fail():
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine") as held:
        search.sweep(counting, ONE, trials=40, workers=2, callbacks=Stop(2, fail))
    assert held.tb is not None  # it keeps what was left as it was
    began = len(trained)
    time.sleep(0.2)
    assert len(trained) <= began + 2


def test_an_error_of_a_callback_releases_what_was_begun(tmp_path):
    def fail():
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        search.sweep(one, ONE, trials=5, run_dir=tmp_path, callbacks=Stop(2, fail))
    states = [t.state for t in search.open_study(tmp_path).trials]
    assert states.count("complete") == 2
    assert "running" not in states


def test_it_goes_on_to_more_trials_and_not_beyond(tmp_path):
    search.sweep(one, ONE, trials=3, run_dir=tmp_path)
    events = []
    study = search.sweep(
        one, ONE, trials=5, run_dir=tmp_path, callbacks=lambda event, view: events.append(event)
    )
    assert events == ["start", "batch", "trial", "trial", "end"]
    assert told(study) == told(search.sweep(one, ONE, trials=5))
    events.clear()
    again = search.sweep(
        one, ONE, trials=4, run_dir=tmp_path, callbacks=lambda event, view: events.append(event)
    )
    assert events == ["start", "end"]
    assert len(again.trials) == 5


def test_time_that_is_up():
    def wait(event, view):
        time.sleep(0.05)

    began = time.monotonic()
    study = search.sweep(one, ONE, trials=10_000, batch=5, max_time=0.4, callbacks=wait)
    done = [t for t in study.trials if t.state == "complete"]
    assert 0 < len(done) < 20
    assert time.monotonic() - began < 5
    assert all(t.state in ("complete", "waiting") for t in study.trials)


def test_two_workers_share_a_study():
    storage = optuna.storages.InMemoryStorage()
    search.begin_study(ONE, metric="val_loss", storage=storage)
    run = lambda: search.sweep(one, ONE, trials=40, batch=3, workers=1, storage=storage)
    others = [threading.Thread(target=run) for _ in range(2)]
    for thread in others:
        thread.start()
    for thread in others:
        thread.join()
    study = search.open_study(storage=storage)
    assert told(study) == told(search.sweep(one, ONE, trials=40))
    assert len({t.worker for t in study.trials}) == 2


# ----- what is seen meanwhile


def test_callbacks_see_the_search():
    seen = []
    study = search.sweep(
        one, ONE, trials=5, batch=2, callbacks=[lambda event, view: seen.append((event, view))]
    )
    assert [event for event, _ in seen] == [
        "start",
        *["batch", "trial", "trial"] * 2,
        "batch",
        "trial",
        "end",
    ]
    trials = [view for event, view in seen if event == "trial"]
    assert [view.done for view in trials] == [1, 2, 3, 4, 5]
    assert [view.running for view in trials] == [1, 0, 1, 0, 0]
    assert {view.trial.number for view in trials} == set(range(5))
    start, end = seen[0][1], seen[-1][1]
    assert start.trial is None
    assert start.target == 5
    assert start.done == 0
    assert start.study.name == study.name
    assert "exact" in start.choice
    assert 0 <= start.seconds <= end.seconds


def test_a_line_is_shown_where_it_is_wished_for(capsys):
    search.sweep(one, ONE, trials=3)
    assert capsys.readouterr().err == ""
    study = search.sweep(one, ONE, trials=3, progress=True)
    shown = capsys.readouterr().err
    assert shown.startswith("exact (a default for CPUs")
    assert f"trial 3/3, best val_loss {study.best.value:.4g} (trial {study.best.number})" in shown
    assert "at the lower end" not in shown
    search.sweep(one, ONE, sampler="grid", trials=3, progress=True)
    assert (
        str(search.boundary_warnings(search.sweep(one, ONE, sampler="grid", trials=3))[0])
        in capsys.readouterr().err
    )


# ----- retraining


def test_retrained_is_recorded():
    def with_result(key, hparams):
        return {"w": hparams["lr"] * jnp.ones(2)}, {"val_loss": hparams["lr"] * (jnp.arange(3.0) + of(key))}

    study = search.sweep(with_result, ONE, trials=4, seeds=[5, 6])
    params, history = search.retrain(study, with_result)
    assert params["w"].shape == (2,)
    assert float(params["w"][0]) == np.float32(study.best.params["lr"])
    assert history["val_loss"].tobytes() == study.best.history["val_loss"][0].tobytes()
    _, history = search.retrain(study, with_result, number=2, seed=6)
    assert history["val_loss"].tobytes() == study.trials[2].history["val_loss"][1].tobytes()
    _, history = search.retrain(study, with_result, number=2, seed=9)
    assert history["val_loss"].tobytes() != study.trials[2].history["val_loss"][1].tobytes()
    assert search.retrain(study, one)[0] is None  # another function is another program
    with pytest.raises(ValueError, match="has no trial 9: it has 4, from 0 on"):
        search.retrain(study, with_result, number=9)


# ----- what cannot be meant


def sized(key, hparams):
    return {"val_loss": jnp.ones(hparams["n"]).sum()}


def branches(key, hparams):
    return {"val_loss": 1.0 if hparams["lr"] > 0.5 else 2.0}


@pytest.mark.parametrize(
    ("f", "changes", "text"),
    [
        (
            lambda key, *, rate: {"val_loss": rate},
            {},
            "the space has 'lr', which the training function does not take",
        ),
        (
            lambda key, hparams: {"val_loss": 1.0},
            {},
            "the space has 'lr', which train_fn does not read: use hparams",
        ),
        (lambda key, hparams: {"val_loss": hparams.rate}, {}, "unknown hyper-parameter 'rate'"),
        (
            sized,
            {"space": {"n": search.integer(1, 5, static=False)}},
            "'n' is traced, and train_fn needs its value",
        ),
        (branches, {}, "'lr' is traced, and train_fn needs its value: Python decides by it"),
        (
            lambda key, hparams: {"loss": hparams.lr},
            {},
            "history has no 'val_loss': unknown metric 'val_loss'; did",
        ),
        (lambda key, hparams: hparams.lr, {}, "train_fn returned .* no history: return a dict of metrics"),
        (one, {"space": {"lr": 0.1}}, "the space has 0.1 at 'lr'"),
        (one, {"sampler": "rnadom"}, "unknown sampler 'rnadom'; did you mean 'random'"),
        (one, {"trials": 0}, r"sweep\(trials=...\) must be a whole number of at least 1, got 0"),
        (one, {"trials": 2.5}, r"sweep\(trials=...\) must be a whole number of at least 1, got 2.5"),
        (one, {"batch": True}, r"sweep\(batch=...\) must be a whole number of at least 1, got True"),
        (one, {"seeds": 0}, r"sweep\(seeds=...\) must be at least 1, got 0"),
        (one, {"seeds": [1, 1]}, "seeds has 1 twice"),
        (one, {"metric": "test_loss"}, "choosing by the test set makes it a validation set"),
        (one, {"mode": "minimum"}, "unknown mode 'minimum'"),
        (one, {"at": "first"}, "unknown at 'first'"),
        (one, {"members": "fast"}, "unknown members 'fast'"),
        (one, {"max_time": -1}, r"sweep\(max_time=...\) must be seconds above 0, got -1"),
        (one, {"callbacks": [3]}, r"must be functions of \(event, view\), got 3"),
        (
            one,
            {"pruner": search.median()},
            "with a pruner a training must be one that can be left between two epochs",
        ),
        (
            one,
            {"pruner": "median"},
            r"sweep\(pruner=...\) must be search.successive_halving\(\) or search.median",
        ),
        (one, {"folds": 3}, r"write train_fn\(key, hparams, \*, fold\)"),
    ],
)
def test_what_cannot_be_meant_is_said_before_anything_is_begun(tmp_path, f, changes, text):
    settings = {"space": ONE, "trials": 2, "run_dir": tmp_path / "run", **changes}
    with pytest.raises((ValueError, TypeError, KeyError), match=text):
        search.sweep(f, **settings)
    assert not (tmp_path / "run").exists()


def test_a_study_that_was_asked_something_else(tmp_path):
    search.sweep(one, ONE, trials=2, run_dir=tmp_path)
    for changes, text in [
        (
            {"space": {"lr": search.uniform(0, 2)}},
            r"another space \('lr' is uniform\(0.0, 1.0\) there and uniform",
        ),
        ({"seeds": 2}, r"another seeds \(\[0\] there, \[0, 1\] here\)"),
        ({"mode": "max"}, "another mode"),
    ]:
        with pytest.raises(ValueError, match=text):
            search.sweep(one, **{"space": ONE, "trials": 4, "run_dir": tmp_path, **changes})
    assert len(search.open_study(tmp_path).trials) == 2


def test_a_storage_that_cannot_be_reached(tmp_path):
    with pytest.raises(ConnectionError, match=r"cannot reach the storage postgresql.*is the server running"):
        search.sweep(one, ONE, trials=2, storage="postgresql://nobody@127.0.0.1:1/none")
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match="file"):
        search.sweep(one, ONE, trials=2, run_dir=tmp_path / "file" / "run")
