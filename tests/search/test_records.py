"""Records of trials: what is told comes back to the bit, in few writes, and nothing counts twice."""

from __future__ import annotations

import json
import math

import jax.numpy as jnp
import numpy as np
import optuna
import pytest
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

from nnkit import search
from nnkit.search.engine import Finished
from nnkit.search.records import RECORD, configuration
from nnkit.search.workers import Lease

SPACE = {
    "lr": search.log_uniform(1e-5, 1.0),
    "sizes": search.choice([(32,), (64, 32)]),
    "optimizer": search.conditional({"sgd": {"momentum": search.uniform(0, 0.99)}, "adam": {}}),
}
FLAT = {"lr": 0.1, "sizes": (64, 32), "optimizer/kind": "sgd", "optimizer/sgd/momentum": 0.9}
NESTED = {"lr": 0.1, "sizes": (64, 32), "optimizer": {"kind": "sgd", "momentum": 0.9}}
ORIGIN = {"device": {"kind": "cpu"}, "versions": {"jax": "0.10"}, "git": {"revision": "abc", "dirty": False}}


def begun(**changes):
    return search.begin_study(SPACE, **{"metric": "val_loss", "seeds": (0, 1), **changes})


def finished(loss, *, stopped=None, **more):
    return Finished(0, {"val_loss": np.asarray(loss, "f"), **more}, seconds=0.5, stopped=stopped, how="exact")


def asked(study, flat=FLAT):
    study.optuna.enqueue_trial({path: study.space.dimensions[path].stored(v) for path, v in flat.items()})
    trial = study.optuna.ask()
    return trial, study.space.suggest(trial)


def told(study, loss, *, flat=FLAT, **more):
    trial, flat = asked(study, flat)
    return search.tell(study, trial, flat, finished(loss, **more), provenance=ORIGIN)


@pytest.fixture(params=["memory", "sqlite", "journal"])
def storage(request, tmp_path):
    return {"memory": None, "sqlite": tmp_path / "a.db", "journal": f"journal:{tmp_path}/a.log"}[
        request.param
    ]


def again(study, storage):
    """The study as another process sees it."""
    return search.Study(study.optuna, None, "") if storage is None else search.open_study(storage=storage)


def bits(array):
    return array.dtype, array.shape, array.tobytes()


def test_all_of_a_trial_comes_back(storage):
    study = begun(storage=storage)
    history = {
        "val_loss": np.array([[0.1, 1 / 3], [0.2, 1e-38]], "f"),
        "loss": np.array([[np.nan, np.inf], [-np.inf, -0.0]], "f"),
        "wide": np.array([[math.pi, 5e-324], [1.7976931348623157e308, 0.1]]),
        "half": np.asarray(jnp.array([[0.1, np.nan], [3.0, 0.2]], jnp.bfloat16)),
        "step": np.array([[5, 10], [5, 10]], np.int32),
        "done": np.array([True, False]),
        "parameters": np.array([1234, 1234]),
    }
    trial, flat = asked(study)
    one = search.tell(study, trial, flat, Finished(3, history, 0.1, None, "mapped"), provenance=ORIGIN)
    two = again(study, storage).trials[0]
    for found in (one, two):
        assert (found.number, found.state, found.hparams, found.params) == (0, "complete", NESTED, FLAT)
        assert (found.seeds, found.seconds, found.how, found.stopped) == ((0, 1), 0.1, "mapped", None)
        assert (found.device, found.versions, found.git) == tuple(ORIGIN.values())
        assert found.value == float(np.mean([np.float64(np.float32(1 / 3)), np.float64(np.float32(1e-38))]))
        assert {name: bits(a) for name, a in found.history.items()} == {
            n: bits(a) for n, a in history.items()
        }
        assert bits(found.values) == bits(history["val_loss"][:, -1].astype("d"))
        assert found.health == {
            "finite": False,
            "epochs": [2, 2],
            "nonfinite": {"loss": [1, 1], "half": [2, None]},
        }
        assert found.started <= found.ended
        assert found.finished


def test_a_record_is_json_that_every_reader_knows():
    study = begun()
    told(study, [[np.nan, 0.1], [np.inf, 0.2]])
    record = study.optuna.trials[0].user_attrs[RECORD]
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["history"]["val_loss"]["values"][0][0] == "nan"


class Counting(InMemoryStorage):
    """How often a trial is written and read."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __getattribute__(self, name):
        if name.startswith(("set_trial", "get_trial", "get_all_trials")):
            object.__getattribute__(self, "calls").append(name)
        return super().__getattribute__(name)


def test_a_trial_is_told_in_two_writes():
    storage = Counting()
    study = begun(storage=storage)
    trial, flat = asked(study)
    storage.calls.clear()
    search.tell(study, trial, flat, finished([[0.1], [0.2]]), provenance=ORIGIN)
    assert storage.calls == ["set_trial_user_attr", "set_trial_state_values"]


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_trial_that_diverged_is_marked_and_never_best(mode, bad):
    study = begun(mode=mode)
    worst = math.inf if mode == "min" else -math.inf
    trial = told(study, [[0.5, 0.4], [0.5, bad]])
    assert (trial.state, trial.value) == ("diverged", worst)
    assert study.optuna.trials[0].state == TrialState.COMPLETE
    assert study.optuna.trials[0].value == worst
    with pytest.raises(ValueError, match="no trial with a finite val_loss yet: 1 diverged"):
        _ = study.best
    best = told(study, [[9.0], [9.0]] if mode == "min" else [[-9.0], [-9.0]])
    assert study.best.number == best.number
    assert [t.state for t in study.trials] == ["diverged", "complete"]


@pytest.mark.parametrize("at", ["last", "best"])
def test_a_trial_that_was_pruned_keeps_its_value_and_is_never_best(storage, at):
    study = begun(at=at, storage=storage)
    step = np.array([[5, 10, 10], [5, 10, 10]], "i")
    trial = told(study, [[0.5, 0.7, np.nan], [0.5, 0.7, np.nan]], step=step, stopped=2)
    expected = float(np.float32(0.7 if at == "last" else 0.5))
    assert (trial.state, trial.stopped, trial.value) == ("pruned", 2, expected)
    assert trial.health == {"finite": True, "epochs": [2, 2], "nonfinite": {}}
    frozen = study.optuna.trials[0]
    assert (frozen.state, frozen.value, frozen.intermediate_values) == (
        TrialState.PRUNED,
        expected,
        {2: expected},
    )
    assert again(study, storage).trials[0].value == expected
    assert study.top(3) == []


@pytest.mark.parametrize("at", ["last", "best"])
def test_one_that_a_pruner_stopped_because_it_diverged_has_diverged(at):
    trial = told(begun(at=at), [[0.5, np.nan, np.nan], [0.5, 0.4, np.nan]], stopped=2)
    assert (trial.state, trial.value, trial.stopped) == ("diverged", math.inf, 2)


STEPS = np.array([[5, 10, 10], [5, 10, 15]])


@pytest.mark.parametrize(
    ("history", "options", "expected"),
    [
        ({"loss": [[3.0, 2.0], [1.0, 4.0]]}, {}, [2.0, 4.0]),
        ({"loss": [[3.0, 2.0], [1.0, 4.0]]}, {"at": "best"}, [2.0, 1.0]),
        ({"loss": [[3.0, 2.0], [1.0, 4.0]]}, {"at": "best", "mode": "max"}, [3.0, 4.0]),
        ({"loss": [3.0, 2.0]}, {}, [3.0, 2.0]),
        ({"loss": [[3.0, 2.0, np.nan], [1.0, 4.0, 5.0]], "step": STEPS}, {}, [2.0, 5.0]),
        ({"loss": [[3.0, 2.0, np.nan], [1.0, 4.0, np.nan]], "step": STEPS}, {}, [2.0, np.nan]),
        ({"loss": [[3.0, 2.0, np.nan], [1.0, 4.0, 5.0]]}, {}, [np.nan, 5.0]),
        ({"loss": [[3.0, np.nan], [np.nan, np.nan]]}, {"at": "best"}, [3.0, np.nan]),
        ({"loss": [[3.0, -np.inf], [1.0, 2.0]]}, {"at": "best"}, [3.0, 1.0]),
        ({"loss": [[3.0, 2.0, 1.0], [1.0, 4.0, 5.0]]}, {"stopped": 2}, [2.0, 4.0]),
        ({"loss": [[3.0, 2.0, 1.0], [1.0, 4.0, 5.0]]}, {"stopped": 2, "at": "best"}, [2.0, 1.0]),
        ({"loss": [[3.0, 2.0, 1.0]], "step": np.zeros((1, 3))}, {}, [np.nan]),
        ({"loss": [[[3.0, 2.0], [1.0, 4.0]]]}, {"axes": 2}, [[2.0, 4.0]]),
        ({"loss": [[3.0, 2.0], [1.0, 4.0]]}, {"axes": 2}, [[3.0, 2.0], [1.0, 4.0]]),
    ],
    ids=str,
)
def test_the_score_is_that_of_the_epoch(history, options, expected):
    found = search.score({name: np.asarray(a) for name, a in history.items()}, "loss", **options)
    np.testing.assert_array_equal(found, expected, strict=True)


def test_a_metric_that_is_not_there_is_named():
    with pytest.raises(
        ValueError, match=r"unknown metric 'val_los'; did you mean 'val_loss'\? Known: val_loss"
    ):
        search.score({"val_loss": np.zeros((1, 2))}, "val_los")
    message = (
        r"the metric 'loss' has shape \(1, 2, 3\): a member's metric is a number, or one number an epoch"
    )
    with pytest.raises(ValueError, match=message):
        search.score({"loss": np.zeros((1, 2, 3))}, "loss")


def test_folds_are_averaged_with_the_seeds():
    study = begun(folds=3)
    loss = np.arange(12.0).reshape(2, 3, 2)
    trial = told(study, loss)
    assert trial.value == loss[..., -1].mean()
    assert trial.values.shape == (2, 3)
    assert trial.health["epochs"] == [[2, 2, 2], [2, 2, 2]]


def test_a_configuration_that_was_trained_is_known(storage):
    study = begun(storage=storage)
    assert search.known(study, FLAT) is None
    first = told(study, [[0.25], [0.5]])
    told(study, [[0.3], [0.3]], flat={**FLAT, "lr": 0.2})
    found = search.known(again(study, storage), FLAT)
    assert (found.number, found.value) == (first.number, 0.375)
    trial, flat = asked(study)
    copy = search.tell_repeat(study, trial, flat, found)
    for seen in (copy, again(study, storage).trials[2]):
        assert (seen.number, seen.repeat_of, seen.value, seen.seconds, seen.state) == (
            2,
            0,
            0.375,
            0.0,
            "complete",
        )
        assert bits(seen.history["val_loss"]) == bits(first.history["val_loss"])
        assert seen.git == ORIGIN["git"]
    assert search.known(again(study, storage), FLAT).number == 0
    assert [t.number for t in again(study, storage).top(3)] == [1, 0]


def test_what_was_pruned_or_failed_is_not_known_and_what_diverged_is():
    study = begun()
    told(study, [[0.5, 0.5], [0.5, 0.5]], stopped=1)
    trial, _ = asked(study)
    study.optuna.tell(trial, state=TrialState.FAIL)
    assert search.known(study, FLAT) is None
    told(study, [[np.nan], [0.5]])
    trial, flat = asked(study)
    copy = search.tell_repeat(study, trial, flat, search.known(study, FLAT))
    assert (copy.state, copy.value, copy.repeat_of) == ("diverged", math.inf, 2)


def test_known_asks_the_storage_only_where_it_should():
    storage = Counting()
    study = begun(storage=storage)
    search.known(study, FLAT)
    storage.calls.clear()
    assert search.known(study, FLAT, refresh=False) is None
    assert storage.calls == []


def test_a_configuration_distinguishes_types():
    texts = {configuration({"a": value}) for value in (1, 1.0, True, "1", None, (1,), "None")}
    assert len(texts) == 7
    assert configuration({"a": 1, "b": 2}) == configuration({"b": 2, "a": 1})


def test_a_trial_that_another_worker_has_is_not_told(tmp_path):
    study = begun(storage=tmp_path / "a.db")
    with Lease(study.optuna) as slow, Lease(study.optuna) as other:
        (trial,) = slow.ask(1, batch=1)
        flat = study.space.suggest(trial)
        slow.release([trial])
        (taken,) = other.ask(1, batch=1)
        late = search.tell(study, trial, flat, finished([[1.0], [1.0]]), provenance=ORIGIN, worker=slow.id)
        assert late is None
        assert RECORD not in study.optuna.trials[0].user_attrs
        mine = search.tell(study, taken, flat, finished([[2.0], [2.0]]), provenance=ORIGIN, worker=other.id)
        assert mine.value == 2.0
        late = search.tell(study, trial, flat, finished([[1.0], [1.0]]), provenance=ORIGIN, worker=slow.id)
        assert late is None
    assert [(t.value, t.worker) for t in again(study, tmp_path / "a.db").trials] == [(2.0, other.id)]


def test_a_trial_that_was_given_up_and_waits_is_told_all_the_same():
    study = begun()
    with Lease(study.optuna) as lease:
        (trial,) = lease.ask(1, batch=1)
        flat = study.space.suggest(trial)
        lease.release([trial])
        late = search.tell(study, trial, flat, finished([[1.0], [1.0]]), provenance=ORIGIN, worker=lease.id)
    assert late.value == 1.0
    assert study.optuna.trials[0].state == TrialState.COMPLETE


class Forgetful(InMemoryStorage):
    """Does what it is asked, and loses the answer: the caller asks again."""

    def set_trial_state_values(self, trial_id, state, values=None):
        super().set_trial_state_values(trial_id, state, values)
        return super().set_trial_state_values(trial_id, state, values)


def test_an_answer_that_was_lost_does_not_make_a_trial_somebody_elses():
    study = begun(storage=Forgetful())
    assert told(study, [[1.0], [2.0]]).value == 1.5


def test_a_trial_is_told_once():
    study = begun()
    trial = study.optuna.ask()
    assert search.finish(study.optuna, trial, 0.5)
    assert search.finish(study.optuna, trial, 0.5)
    assert not search.finish(study.optuna, trial, 0.4)
    assert not search.finish(study.optuna, trial, 0.5, pruned_at=1)
    with pytest.raises(
        ValueError, match="trial 0 cannot be told the value nan: tell inf for one that diverged"
    ):
        search.finish(study.optuna, trial, math.nan)
    assert study.optuna.trials[0].value == 0.5


def test_the_record_of_a_trial_that_was_not_told_does_not_count():
    study = begun()
    trial, flat = asked(study)
    told(study, [[1.0], [2.0]])
    trial.set_user_attr(RECORD, study.optuna.trials[1].user_attrs[RECORD])
    found = study.trials[0]
    assert (found.state, found.values, found.params) == ("running", None, flat)


def test_a_sampler_that_looks_at_finished_trials_is_shown_them():
    class Sampler(optuna.samplers.RandomSampler):
        def after_trial(self, study, trial, state, values):
            seen.append((trial.number, trial.params["lr"], state, values))

    seen: list[object] = []
    study = begun()
    study.optuna.sampler = Sampler(seed=0)
    told(study, [[1.0], [2.0]])
    assert seen == [(0, 0.1, TrialState.COMPLETE, [1.5])]


def test_optunas_grid_ends_without_an_error():
    study = search.begin_study({"n": search.integer(1, 2)}, metric="val_loss")
    study.optuna.sampler = optuna.samplers.GridSampler({"n": [1, 2]}, seed=0)
    for _ in range(2):
        trial = study.optuna.ask()
        search.tell(study, trial, study.space.suggest(trial), finished([[1.0]]), provenance=ORIGIN)
    assert sorted(t.params["n"] for t in study.trials if t.state == "complete") == [1, 2]
