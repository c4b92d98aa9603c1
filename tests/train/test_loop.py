"""``fit`` as a loop that is watched, stopped, saved and taken up again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnkit import data, layers, losses, metrics, optim, train, tree

RNG = np.random.default_rng(0)
X = RNG.normal(size=(103, 4)).astype(np.float32)
Y = RNG.integers(0, 3, 103).astype(np.int32)
KEY = jax.random.key(0)


def _model(width):
    hidden = layers.dense(width, use_bias=False)
    return layers.serial(hidden, layers.batch_norm(), layers.relu, layers.dropout(0.5), layers.dense(3))


MODEL = _model(8)
PLATEAU = optim.reduce_on_plateau(factor=0.5, patience=1, monitor="val_loss")
TRAINER = train.trainer(
    MODEL,
    losses.softmax_cross_entropy,
    optim.chain(optim.adam(1e-2), PLATEAU),
    metrics={"accuracy": metrics.accuracy},
)
RUN = {"key": KEY, "batch_size": 16, "validation": (X, Y)}  # 7 steps an epoch


def _fit(**arguments):
    return train.fit(TRAINER, (X, Y), **(RUN | arguments))


def _same(a, b):
    flat, other = tree.flatten(jax.tree.map(_data, a)), tree.flatten(jax.tree.map(_data, b))
    assert flat.keys() == other.keys()
    for path, leaf in flat.items():
        np.testing.assert_array_equal(leaf, other[path], err_msg=path)


def _data(leaf):
    return jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def _bare(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


WHOLE, ROWS = _fit(epochs=4)


def test_the_events_in_their_order_and_what_they_show():
    seen = []

    def watch(event, view):
        seen.append((event, view.step, view.epoch, len(view.history), sorted(view.metrics)))
        assert view.folder is None
        assert int(view.state.step) == view.step
        assert view.config == {"note": 1}

    _fit(epochs=2, callbacks=watch, steps_per_call=4, config={"note": 1})
    row = ["accuracy", "epoch", "loss", "seconds", "step", "val_accuracy", "val_loss"]
    bare = ["accuracy", "loss"]
    assert seen == [
        ("start", 0, 0, 0, []),
        ("chunk", 4, 0, 0, bare),
        ("chunk", 6, 0, 0, bare),
        ("chunk", 7, 1, 0, bare),
        ("epoch", 7, 1, 1, row),
        ("chunk", 11, 1, 1, bare),
        ("chunk", 13, 1, 1, bare),
        ("chunk", 14, 2, 1, bare),
        ("epoch", 14, 2, 2, row),
        ("end", 14, 2, 2, row),
    ]


def test_watching_changes_nothing():
    ts, rows = _fit(epochs=4, callbacks=[lambda event, view: None], steps_per_call=1)
    _same(ts, WHOLE)
    assert _bare(rows) == _bare(ROWS)


def test_a_chunks_metrics_are_the_means_of_its_steps():
    """Three chunks of 64, 32 and 7 examples make the epoch's mean."""
    found = []
    _, rows = _fit(
        epochs=1,
        steps_per_call=4,
        callbacks=lambda e, v: found.append(v.metrics["loss"]) if e == "chunk" else None,
    )
    np.testing.assert_allclose(np.dot(found, [64, 32, 7]) / 103, rows[0]["loss"], rtol=1e-6)


def test_what_a_callback_returns_is_in_the_row():
    _, rows = _fit(epochs=2, callbacks=lambda event, view: {"rate": 0.5 ** len(view.history)})
    assert [row["rate"] for row in rows] == [0.5, 0.25]


def test_a_callback_ends_the_run():
    reasons = []

    def watch(event, view):
        if view.step == 11:
            view.stop("enough")
        if event == "end":
            reasons.append(view.reason)

    ts, rows = _fit(epochs=4, callbacks=watch, steps_per_call=4)
    assert int(ts.step) == 11
    assert reasons == ["enough"]
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 7), (2, 11)]
    assert _bare(rows)[0] == _bare(ROWS)[0]


@pytest.mark.parametrize("steps", [3, 7, 10, 14])
def test_max_steps_and_the_rest_of_the_run(steps):
    ts, rows = _fit(epochs=4, max_steps=steps)
    assert int(ts.step) == steps == rows[-1]["step"]
    assert rows[-1]["epoch"] == -(-steps // 7)
    rest, _ = train.fit(TRAINER, (X, Y), epochs=4, state=ts, batch_size=16, validation=(X, Y))
    _same(rest, WHOLE)
    only, _ = _fit(max_steps=steps)
    _same(only, ts)


def test_max_time_ends_with_the_dispatch_that_runs():
    began = time.monotonic()
    reasons = []
    ts, rows = _fit(
        epochs=10**6, max_time=0.5, callbacks=lambda e, v: reasons.append(v.reason) if e == "end" else None
    )
    assert 0.5 <= time.monotonic() - began < 30
    assert reasons == ["max_time"]
    assert rows[-1]["step"] == int(ts.step) > 0


def _losing(*values):
    """A trainer whose validation loss is values[epoch - 1], and whose only parameter counts steps."""

    def objective(params, state, batch, *, key, train):
        if train:
            return -params["w"], (state, {})
        return jnp.array(values, jnp.float32)[params["w"].astype(jnp.int32) - 1], (state, {})

    run = train.trainer(objective, optimizer=optim.sgd(1.0), init=lambda k, x: ({"w": jnp.zeros(())}, {}))
    x = np.ones((4, 1), np.float32)
    return lambda **arguments: train.fit(
        run, x, **({"epochs": len(values), "key": KEY, "batch_size": 4, "validation": x} | arguments)
    )


NAN = float("nan")


@pytest.mark.parametrize(
    ("values", "options", "epochs", "best"),
    [
        ((3, 2, 1, 2, 2, 2), {"patience": 2}, 5, 3),
        ((3, 2, 1, 2, 0, 1), {"patience": 2}, 6, 5),
        ((NAN, 2, NAN, 1, NAN, NAN, 0), {"patience": 2}, 6, 4),
        ((1, 2, 3, 4), {"patience": 0}, 2, 1),
        ((1, 2, 3, 2, 5, 5), {"patience": 2, "mode": "max"}, 6, 5),
        ((1, 0.9, 0.8, 0.7), {"patience": 2, "min_delta": 0.5}, 3, 1),
    ],
)
def test_early_stopping(values, options, epochs, best, tmp_path):
    """In one go, cut in two at every epoch, and taken up from checkpoints."""
    rule = train.early_stopping(restore_best=True, **options)
    fit = _losing(*values)
    ts, rows = fit(early_stopping=rule)
    assert len(rows) == epochs == int(ts.step)
    assert int(ts.stopping.best_epoch) == best
    assert float(ts.params["w"]) == best  # restored
    for cut in range(1, epochs):
        folder = tmp_path / str(cut)
        fit(early_stopping=rule, run_dir=folder, epochs=cut)
        again, history = fit(early_stopping=rule, run_dir=folder, resume=True)
        assert [row["epoch"] for row in history] == [row["epoch"] for row in rows]
        assert int(again.stopping.best_epoch) == best
        assert float(again.params["w"]) == best


@pytest.mark.parametrize("cut", [5, 7, 17])
def test_a_saved_run_goes_on_as_if_it_had_not_stopped(tmp_path, cut):
    """In the middle of an epoch too: parameters, optimizer, history and metrics.csv, to the last bit."""
    _fit(epochs=4, run_dir=tmp_path / "whole")
    _fit(epochs=4, run_dir=tmp_path / "cut", max_steps=cut, steps_per_call=3)
    ts, rows = _fit(epochs=4, run_dir=tmp_path / "cut", resume=True)
    _same(ts, WHOLE)
    assert _bare(rows) == _bare(ROWS)
    for name in ("metrics.csv",):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    lines = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]


def test_a_complete_run_is_resumed_to_itself_and_begins_where_there_is_none(tmp_path):
    first, _ = _fit(epochs=2, run_dir=tmp_path, resume=True)
    again, rows = _fit(epochs=2, run_dir=tmp_path, resume=True)
    _same(first, again)
    assert len(rows) == 2
    more, rows = _fit(epochs=4, run_dir=tmp_path, resume=True)
    _same(more, WHOLE)


def test_a_run_folder_is_not_run_over(tmp_path):
    _fit(epochs=1, run_dir=tmp_path)
    with pytest.raises(FileExistsError, match="has a run in it: pass resume=True"):
        _fit(epochs=2, run_dir=tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 20}, r"another batch size \(batch_size 16, now 20\)"),
        ({"key": jax.random.key(1)}, "another key"),
        ({"shuffle": False}, "another setting of shuffle"),
        ({"data": (X[::-1], Y)}, "other training data"),
        ({"epochs": 1}, r"fit\(epochs=1\) has nothing to do: the saved run has taken 14 steps"),
        ({"early_stopping": train.early_stopping()}, "another rule of early stopping"),
        ({"guard": "skip"}, "another guard"),
        ({"validation": (X, (Y + 1) % 3)}, "other validation data"),
        ({"key": jax.random.key(0, impl="rbg")}, "another key"),
        ({"trainer": (MODEL, optim.chain(optim.adam(jnp.float32(2e-2)), PLATEAU))}, "another program"),
        ({"trainer": (MODEL, optim.adam(2e-2))}, "'opt_state/.*(unexpected|missing)"),
        (
            {"trainer": (MODEL, optim.chain(optim.adam(2e-2), PLATEAU))},
            "its training step was another program",
        ),
        (
            {"trainer": (_model(9), optim.chain(optim.adam(1e-2), PLATEAU))},
            "'params/dense_0/kernel' is float32\\[4, 8\\] and should be float32\\[4, 9\\]",
        ),
    ],
)
def test_resuming_another_run_is_refused(tmp_path, change, message):
    _fit(epochs=2, run_dir=tmp_path)
    change = {"epochs": 4} | change
    model = change.pop("trainer", None)
    run = TRAINER
    if model is not None:
        run = train.trainer(
            model[0], losses.softmax_cross_entropy, model[1], metrics={"accuracy": metrics.accuracy}
        )
    with pytest.raises(ValueError, match=message):
        train.fit(run, change.pop("data", (X, Y)), **(RUN | change), run_dir=tmp_path, resume=True)


def test_a_change_that_is_meant(tmp_path):
    _fit(epochs=2, run_dir=tmp_path)
    other = train.trainer(
        MODEL,
        losses.softmax_cross_entropy,
        optim.chain(optim.adam(1e-3), PLATEAU),
        metrics={"accuracy": metrics.accuracy},
    )
    ts, rows = train.fit(other, (X, Y), **RUN, epochs=3, run_dir=tmp_path, resume="anyway")
    assert int(ts.step) == 21
    assert len(rows) == 3


@pytest.mark.parametrize("event", ["chunk", "epoch", "checkpoint"])
@pytest.mark.parametrize("at", [14, 28])
def test_a_callback_that_raises_leaves_a_saved_run(tmp_path, event, at):
    """Wherever it raises: after the epoch's last step and before its row, after the row, in the last epoch."""

    def fail(now, view):
        if now == event and view.step == at:
            raise RuntimeError("no more paper")

    rule = train.early_stopping(patience=9, restore_best=True)
    arguments = {"epochs": 4, "early_stopping": rule}
    whole, rows = _fit(**arguments)
    with pytest.raises(RuntimeError, match="no more paper") as caught:
        _fit(**arguments, run_dir=tmp_path, callbacks=fail, checkpoint_every=7)
    notes = " ".join(caught.value.__notes__)
    assert f"raised by the callback 'fail' at {event!r}" in notes
    assert f"saved at step {at}: go on with fit" in notes
    ts, found = _fit(**arguments, run_dir=tmp_path, resume=True)
    _same(ts, whole)
    assert _bare(found) == _bare(rows)
    assert [row["epoch"] for row in train.read_records(tmp_path)] == [1, 2, 3, 4]
    assert [row["epoch"] for row in train.read_metrics(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (0.5, TypeError, "'give' returned a float at 'epoch': return a dict of numbers, or None"),
        ({"note": "hi"}, TypeError, "'give' returned note='hi': a row has one number under each name"),
        ({"a": np.ones(3)}, TypeError, "one number under each name"),
        ({"step": 0}, ValueError, "'give' returned 'step', which the row has already"),
        ({"loss": 0}, ValueError, "'loss', which the row has already"),
        ({3: 0}, ValueError, "returned 3 as the name of a metric"),
    ],
)
def test_what_a_row_cannot_hold_is_said_with_the_callbacks_name(tmp_path, returned, error, message):
    def give(event, view):
        return returned

    with pytest.raises(error, match=message):
        _fit(epochs=2, run_dir=tmp_path, callbacks=give)
    ts, _ = _fit(epochs=4, run_dir=tmp_path, resume=True)
    _same(ts, WHOLE)


def test_a_state_that_early_stopping_ended_is_not_gone_on_with_silently():
    rule = train.early_stopping(patience=1)
    ts, rows = _losing(1, 2, 3)(early_stopping=rule)
    assert len(rows) == 2
    with pytest.raises(ValueError, match=r"early stopping ended the run .* state._replace\(stopping=\(\)\)"):
        _losing(1, 2, 3)(early_stopping=train.early_stopping(patience=9), state=ts, key=None)


def test_a_signal_at_the_very_end_is_not_lost(tmp_path):
    def kill(event, view):
        if event == "checkpoint":
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as caught:
        _fit(epochs=1, run_dir=tmp_path, callbacks=kill)
    assert caught.value.code == 143
    _, rows = _fit(epochs=1, run_dir=tmp_path, resume=True)
    assert len(rows) == 1


def test_a_disk_that_fails_does_not_hide_what_ended_the_run(tmp_path, monkeypatch):
    def full(*_):
        time.sleep(0.3)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nnkit.train.checkpoint_files.write", full)
    with pytest.raises(train.NotFiniteError) as caught:
        _exploding(13)(run_dir=tmp_path, checkpoint_every=12, steps_per_call=1)
    assert "No space left" in " ".join(caught.value.__notes__)


def test_a_config_that_config_json_takes_is_taken_by_checkpoints(tmp_path):
    _fit(epochs=1, run_dir=tmp_path, config={("a", "b"): 1, "path": tmp_path})
    assert train.read_config(tmp_path)["config"] == {"('a', 'b')": 1, "path": str(tmp_path)}


def test_checkpoints_as_asked(tmp_path):
    """At the first end of a dispatch that is at or behind a multiple of 5; the two last are kept."""
    steps = []
    _fit(
        epochs=2,
        run_dir=tmp_path,
        checkpoint_every=5,
        steps_per_call=2,
        keep_last=2,
        callbacks=lambda e, v: steps.append(v.step) if e == "checkpoint" else None,
    )
    assert steps == [6, 11, 14]
    kept = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step_000000011", "step_000000014"]


def test_the_best_checkpoint_stays(tmp_path):
    _losing(3, 1, 2, 2, 2)(run_dir=tmp_path, keep_last=1, keep_best=1)
    kept = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step_000000002", "step_000000005"]
    _losing(4, 1, 2, 3, 3)(run_dir=tmp_path / "two", keep_last=1, keep_best=2)
    kept = sorted(p.name for p in (tmp_path / "two/checkpoints").iterdir())
    assert kept == ["step_000000002", "step_000000003", "step_000000005"]
    with pytest.raises(ValueError, match=r"fit\(keep_best=1\) needs validation"):
        _losing(1)(validation=None, run_dir=tmp_path / "b", keep_best=1)


SCRIPT = """
import sys, time, jax, numpy as np
from nnkit import layers, losses, optim, train
x = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
trainer = train.trainer(layers.dense(1), losses.mean_squared_error, optim.adam(1e-3))
def tell(event, view):
    if event == "epoch":
        print(view.step, flush=True)
        time.sleep(0.01)
ts, rows = train.fit(trainer, (x, x[:, :1]), epochs=int(sys.argv[2]), key=jax.random.key(0), batch_size=8,
                     run_dir=sys.argv[1], resume=True, callbacks=tell)
print("done", np.asarray(ts.params["kernel"]).tobytes().hex())
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT)])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, number, status):
    def start(folder, epochs):
        return subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path / folder), str(epochs)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A shell's background jobs ignore Ctrl-C, and their children with them.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    process = start("run", 10**6)
    assert process.stdout is not None
    for _ in range(3):
        assert process.stdout.readline()
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (status, 128 + signal.SIGINT if number == signal.SIGINT else status), errors
    assert f"{signal.Signals(number).name}: the run is saved at step" in errors
    assert "resume=True)" in errors
    step = int(errors.split("saved at step ")[1].split(";")[0])
    epochs = step // 8 + 3
    resumed, _ = start("run", epochs).communicate(timeout=60)
    whole, _ = start("whole", epochs).communicate(timeout=60)
    assert resumed.splitlines()[-1] == whole.splitlines()[-1]
    csv = [(tmp_path / name / "metrics.csv").read_bytes() for name in ("run", "whole")]
    assert csv[0] == csv[1]


def test_signals_are_left_alone_without_a_folder_and_put_back_with_one(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    inside = []
    _fit(epochs=1, callbacks=lambda e, v: inside.append(signal.getsignal(signal.SIGTERM)))
    assert set(inside) == {before}
    inside.clear()
    _fit(epochs=1, run_dir=tmp_path, callbacks=lambda e, v: inside.append(signal.getsignal(signal.SIGTERM)))
    assert before not in inside
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_run_in_another_thread(tmp_path):
    found = []
    thread = threading.Thread(target=lambda: found.append(_fit(epochs=4, run_dir=tmp_path)[0]))
    thread.start()
    thread.join()
    _same(found[0], WHOLE)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, TypeError, "needs to know when to end: pass epochs=... or max_steps=..."),
        ({"max_steps": 0}, ValueError, r"fit\(max_steps=...\) must be a whole number of at least 1, got 0"),
        ({"epochs": 1, "max_time": -1}, ValueError, "must be a positive number of seconds, got -1"),
        ({"epochs": 1, "max_time": NAN}, ValueError, "must be a positive number of seconds, got nan"),
        ({"epochs": 1, "guard": "explian"}, ValueError, "explain"),
        (
            {"epochs": 1, "callbacks": [3]},
            TypeError,
            "must be functions of .event, view., got int among them",
        ),
        ({"epochs": 1, "callbacks": 3}, TypeError, "must be functions of .event, view., got int"),
        (
            {"epochs": 1, "early_stopping": train.early_stopping("val_acuracy", mode="max")},
            ValueError,
            "early_stopping monitors 'val_acuracy', which the run does not compute",
        ),
        ({"epochs": 1, "resume": "yes"}, ValueError, "resume must be True, False or 'anyway', got 'yes'"),
        ({"epochs": 1, "resume": True}, ValueError, r"fit\(resume=True\) needs run_dir=..., the folder"),
        ({"epochs": 1, "keep_best": 1}, ValueError, r"fit\(keep_best=1\) needs run_dir"),
        ({"epochs": 1, "checkpoint_every": 5}, ValueError, r"fit\(checkpoint_every=5\) needs run_dir"),
        ({"epochs": 1, "keep_last": 0}, ValueError, r"fit\(keep_last=...\) must be a whole number"),
        ({"epochs": 1, "early_stopping": "val_loss"}, TypeError, "takes a rule and got 'val_loss'"),
    ],
)
def test_what_cannot_be_meant_is_said_before_the_start(tmp_path, arguments, error, message):
    seen = []
    if arguments.get("resume") == "yes":
        arguments = arguments | {"run_dir": tmp_path / "run"}
    with pytest.raises(error, match=message):
        _fit(**({"callbacks": lambda e, v: seen.append(e)} | arguments))
    assert not seen
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written_is_said_before_the_start():
    with pytest.raises(NotADirectoryError, match="cannot write in"):
        _fit(epochs=1, run_dir=os.devnull + "/run")


@pytest.mark.parametrize("steps_per_call", [1, 4, 100])
def test_a_source_gives_what_the_arrays_give(tmp_path, steps_per_call):
    """Streamed, cut in the middle of an epoch and resumed: the same bits."""
    source = data.stream((X, Y), 16)
    arguments = {"key": KEY, "validation": (X, Y), "run_dir": tmp_path, "steps_per_call": steps_per_call}
    train.fit(TRAINER, source, epochs=4, max_steps=10, **arguments)
    ts, rows = train.fit(TRAINER, source, epochs=4, resume=True, **arguments)
    _same(ts, WHOLE)
    assert _bare(rows) == _bare(ROWS)


def test_validation_on_a_source():
    """Its batches of 50 are added up otherwise than the arrays', so the sums agree to rounding."""
    held_out = data.stream((X, Y), 50, shuffle=False)
    _, rows = _fit(epochs=1, validation=held_out)
    for name in ("val_loss", "val_accuracy"):
        np.testing.assert_allclose(rows[0][name], ROWS[0][name], rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 8}, r"the source's batches have 16 examples and fit got batch_size=8"),
        ({"shuffle": False}, "a source decides on its order itself"),
        ({"drop_last": True}, "a source decides on its order itself"),
    ],
)
def test_a_source_has_its_own_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        train.fit(TRAINER, data.stream((X, Y), 16), epochs=1, key=KEY, **arguments)


def test_a_source_that_ends_early_leaves_a_saved_run(tmp_path):
    def make(epoch):
        order = np.arange(96) if epoch == 0 else np.arange(40)
        return data.batches((X, Y), 16, order=order)

    run = train.trainer(MODEL, losses.softmax_cross_entropy, optim.adam(1e-2))
    source = data.from_iterator(make, steps=6)
    with pytest.raises(ValueError, match=r"shape|ended early") as caught:
        train.fit(run, source, epochs=3, key=KEY, run_dir=tmp_path)
    assert "the run is saved at step" in " ".join(caught.value.__notes__)
    whole = data.from_iterator(lambda epoch: data.batches((X, Y), 16, order=np.arange(96)), steps=6)
    ts, rows = train.fit(run, whole, epochs=3, key=KEY, run_dir=tmp_path, resume=True)
    assert int(ts.step) == 18
    assert [row["epoch"] for row in rows] == [1, 2, 3]


def _exploding(at):
    """Its loss is NaN at the step of that number, once the parameter says so."""

    def objective(params, state, batch, *, key, train):
        bad = (params["w"] >= at) & train
        return jnp.where(bad, jnp.nan, -1.0) * params["w"], (state, {})

    run = train.trainer(objective, optimizer=optim.sgd(1.0), init=lambda k, x: ({"w": jnp.zeros(())}, {}))
    x = np.ones((40, 1), np.float32)
    return lambda **arguments: train.fit(run, x, **({"epochs": 2, "key": KEY, "batch_size": 4} | arguments))


def test_the_default_guard_ends_the_run_at_the_step(tmp_path):
    with pytest.raises(train.NotFiniteError, match="at step 13 of epoch 2") as caught:
        _exploding(13)(run_dir=tmp_path, checkpoint_every=4, steps_per_call=3)
    assert caught.value.step == 13
    with pytest.raises(train.NotFiniteError, match="at step 13"):
        _exploding(13)(run_dir=tmp_path, resume=True)


def test_no_guard_looks_away():
    ts, rows = _exploding(13)(guard=None)
    assert int(ts.step) == 20
    assert np.isnan(rows[-1]["loss"])


def test_bad_steps_are_skipped_and_counted():
    """At w = 13 every step is bad: w stays, the steps are counted, and the means are of the others."""
    ts, rows = _exploding(13)(guard="skip")
    assert float(ts.params["w"]) == 13
    assert int(ts.step) == 20
    assert [row["skipped"] for row in rows] == [0, 7]
    np.testing.assert_allclose(rows[1]["loss"], -11)  # of w = 10, 11, 12


def test_rolling_back_halves_the_rate_and_ends_after_five_times(tmp_path):
    with pytest.warns(UserWarning, match="with 0.5 of the rate"):
        ts, rows = _exploding(15)(guard="roll_back", steps_per_call=3, run_dir=tmp_path)
    # From the second epoch's beginning, where w is 10, ten steps with half the rate.
    assert float(ts.params["w"]) == 15
    assert [row["step"] for row in rows] == [10, 20]
    with pytest.warns(UserWarning, match="of the rate"), pytest.raises(train.NotFiniteError):
        _exploding(0)(guard="roll_back")
