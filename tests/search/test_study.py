"""Studies: begun by one or by many at once, joined by those that want the same, and read."""

from __future__ import annotations

import math
import subprocess
import sys
import threading

import numpy as np
import optuna
import pytest
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

from nnkit import search
from nnkit.search import joining
from nnkit.search.engine import Finished
from nnkit.search.records import RECORD

SPACE = {"lr": search.log_uniform(1e-5, 1.0), "width": search.choice([32, 64])}
ASKED = {"metric": "val_loss", "seeds": (0, 1, 2)}
ORIGIN = {"device": {}, "versions": {}, "git": {}}


def told(study, value, **more):
    trial = study.optuna.ask()
    history = {"val_loss": np.full((len(study.seeds), 1), value)}
    result = Finished(0, history, seconds=1.0, stopped=None, how="exact")
    return search.tell(study, trial, study.space.suggest(trial), result, provenance=ORIGIN, **more)


def test_a_study_says_what_was_asked_of_it(tmp_path):
    search.begin_study(SPACE, **ASKED, at="best", sampler="tpe", run_dir=tmp_path / "run")
    study = search.open_study(tmp_path / "run")
    assert (tmp_path / "run" / "study.db").exists()
    assert (study.name, study.metric, study.mode, study.at) == ("search", "val_loss", "min", "best")
    assert (study.seeds, study.folds, study.axes, study.sampler) == ((0, 1, 2), None, 1, "tpe")
    assert study.folder == tmp_path / "run"
    assert study.space_spec == search.as_space(SPACE).spec()
    assert study.space == search.as_space(SPACE)
    assert repr(study) == f"Study('search', min of val_loss, in {tmp_path}/run/study.db)"


@pytest.mark.parametrize(("mode", "direction"), [("min", "MINIMIZE"), ("max", "MAXIMIZE")])
def test_optuna_knows_the_direction(mode, direction):
    assert search.begin_study(SPACE, **ASKED, mode=mode).optuna.direction.name == direction


def test_one_that_wants_the_same_joins():
    storage = InMemoryStorage()
    first = search.begin_study(SPACE, **ASKED, storage=storage)
    told(first, 1.0)
    second = search.begin_study(dict(SPACE), **ASKED, sampler="tpe", storage=storage)
    assert [trial.value for trial in second.trials] == [1.0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"space": {"lr": search.log_uniform(1e-3, 1.0), "width": SPACE["width"]}},
            "another space ('lr' is ",
        ),
        ({"space": {"lr": SPACE["lr"]}}, "another space ('width' is there and not here)"),
        ({"metric": "val_error"}, "another metric ('val_loss' there, 'val_error' here)"),
        ({"mode": "max"}, "another mode ('min' there, 'max' here)"),
        ({"at": "best"}, "another at ('last' there, 'best' here)"),
        ({"seeds": (0,)}, "another seeds ([0, 1, 2] there, [0] here)"),
        ({"folds": 5}, "another folds (None there, 5 here)"),
        ({"mode": "max", "folds": 5}, "another mode ('min' there, 'max' here) and another folds (None"),
    ],
)
def test_one_that_wants_something_else_is_told_what_differs(changes, said):
    storage = InMemoryStorage()
    search.begin_study(SPACE, **ASKED, storage=storage)
    with pytest.raises(ValueError, match="the study 'search' in InMemoryStorage has another ") as caught:
        search.begin_study(**{"space": SPACE, **ASKED, "storage": storage, **changes})
    assert said in str(caught.value)
    assert str(caught.value).endswith(": ask it the same, or begin another study with name= or run_dir=")
    other = search.begin_study(**{"space": SPACE, **ASKED, "storage": storage, "name": "b", **changes})
    assert other.trials == []


@pytest.mark.parametrize("form", ["{}/study.db", "journal:{}/study.log"])
def test_many_begin_one_study_at_once(tmp_path, form):
    storage, barrier, found = form.format(tmp_path), threading.Barrier(4), []

    def one():
        barrier.wait()
        try:
            found.append(search.begin_study(SPACE, **ASKED, storage=storage).space_spec)
        except BaseException as error:
            found.append(error)

    threads = [threading.Thread(target=one) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert found == [search.as_space(SPACE).spec()] * 4
    assert len(search.open_storage(storage).get_all_studies()) == 1


BEGIN = """
import sys
from nnkit import search
space = {"lr": search.log_uniform(1e-5, 1.0)}
sys.stdin.read(1)
print(search.begin_study(space, metric="val_loss", storage=sys.argv[1]).name)
"""


@pytest.mark.slow
def test_many_processes_begin_one_study_at_once(tmp_path):
    for i in range(3):
        command = [sys.executable, "-c", BEGIN, str(tmp_path / f"{i}.db")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes = [subprocess.Popen(command, **pipes) for _ in range(4)]
        outputs = [process.communicate("x") for process in processes]
        assert [out for out, _ in outputs] == ["search\n"] * 4, outputs


def test_one_that_comes_before_the_maker_has_said_what_for_waits():
    storage = InMemoryStorage()
    assert joining.make(storage, "search", "min")
    maker = threading.Timer(0.3, lambda: search.begin_study(SPACE, **ASKED, mode="min", storage=storage))
    record = search.begin_study(SPACE, **ASKED).optuna.user_attrs[RECORD]
    maker.function = lambda: storage.set_study_user_attr(0, RECORD, {**record, "metric": "val_error"})
    maker.start()
    with pytest.raises(ValueError, match="another metric"):
        search.begin_study(SPACE, **ASKED, storage=storage)
    maker.join()


def test_one_whose_maker_has_died_says_itself_what_for(monkeypatch):
    monkeypatch.setattr(joining, "_PATIENCE", 0.1)
    storage = InMemoryStorage()
    joining.make(storage, "search", "min")
    assert search.begin_study(SPACE, **ASKED, storage=storage).metric == "val_loss"


def test_a_study_that_is_not_ours_is_left_alone(tmp_path):
    path = tmp_path / "a.db"
    theirs = optuna.create_study(storage=search.open_storage(path), study_name="search")
    theirs.tell(theirs.ask(), 1.0)
    message = f"the study 'search' in {path} was not made by nnkit.search: pass another name="
    with pytest.raises(ValueError, match=message):
        search.begin_study(SPACE, **ASKED, storage=path)
    with pytest.raises(ValueError, match=f"the study 'search' in {path} was not made by nnkit.search"):
        search.open_study(storage=path)
    assert theirs.user_attrs == {}


def test_what_cannot_be_meant_is_refused():
    with pytest.raises(ValueError, match="unknown mode 'minimum'; did you mean 'min'"):
        search.begin_study(SPACE, **ASKED, mode="minimum")
    with pytest.raises(ValueError, match="unknown at 'lst'; did you mean 'last'"):
        search.begin_study(SPACE, **ASKED, at="lst")


def test_what_is_not_there_is_not_made_by_opening_it(tmp_path):
    for spec in (tmp_path / "a.db", f"sqlite:///{tmp_path}/a.db", f"journal:{tmp_path}/a.db"):
        message = f"there is no study in '{tmp_path}/a.db': no such file; was the search begun elsewhere?"
        with pytest.raises(FileNotFoundError, match=message):
            search.open_study(storage=spec)
    with pytest.raises(FileNotFoundError, match="no such file"):
        search.open_study(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TypeError, match="open_study needs to know where: pass the run folder, or storage="):
        search.open_study()


def test_a_study_is_found_by_its_name():
    storage = InMemoryStorage()
    with pytest.raises(
        ValueError, match="there is no study in InMemoryStorage: nothing has been begun there"
    ):
        search.open_study(storage=storage)
    search.begin_study(SPACE, **ASKED, storage=storage, name="wide")
    assert search.open_study(storage=storage).name == "wide"
    search.begin_study(SPACE, **ASKED, storage=storage, name="deep")
    with pytest.raises(ValueError, match="2 studies in InMemoryStorage: pass name=, one of deep, wide"):
        search.open_study(storage=storage)
    with pytest.raises(ValueError, match="unknown study 'wid'; did you mean 'wide'"):
        search.open_study(storage=storage, name="wid")


@pytest.mark.parametrize(("mode", "order"), [("min", [3, 1, 4, 0]), ("max", [0, 1, 4, 3])])
def test_the_best_are_complete_and_in_order(mode, order):
    study = search.begin_study(SPACE, **ASKED, mode=mode)
    for value in (3.0, 2.0, math.nan, 1.0, 2.0):
        told(study, value)
    study.optuna.ask()
    assert [trial.number for trial in study.top(9)] == order
    assert [trial.number for trial in study.top(2)] == order[:2]
    assert study.best.number == order[0]


def test_without_a_finite_trial_there_is_no_best():
    study = search.begin_study(SPACE, **ASKED)
    with pytest.raises(
        ValueError, match="the study 'search' has no trial with a finite val_loss yet: no trials"
    ):
        _ = study.best
    told(study, math.nan)
    study.optuna.ask()
    with pytest.raises(ValueError, match="yet: 1 diverged, 1 running"):
        _ = study.best


def test_trials_that_have_not_ended_are_there():
    study = search.begin_study(SPACE, **ASKED)
    running = study.optuna.ask()
    flat = study.space.suggest(running)
    begun = study.optuna.ask()
    begun.suggest_float("lr", 1e-5, 1.0, log=True)
    failed = study.optuna.ask()
    study.optuna.tell(failed, state=TrialState.FAIL)
    study.optuna.enqueue_trial({"lr": 0.5, "width": 32})
    trials = study.trials
    assert [trial.state for trial in trials] == ["running", "running", "failed", "waiting"]
    assert [trial.finished for trial in trials] == [False, False, True, False]
    assert (trials[0].hparams, trials[0].params, trials[0].history, trials[0].values) == (
        flat,
        flat,
        {},
        None,
    )
    assert (list(trials[1].params), trials[1].hparams) == (["lr"], {})
    assert trials[3].hparams == {"lr": 0.5, "width": 32}


def test_a_study_follows_what_others_do(tmp_path):
    mine = search.begin_study(SPACE, **ASKED, storage=tmp_path / "a.db")
    others = search.open_study(storage=tmp_path / "a.db")
    told(others, 2.0)
    assert mine.best.value == 2.0
    told(others, 1.0)
    assert mine.best.value == 1.0
    assert [trial.number for trial in mine.trials] == [0, 1]


def test_the_latest_test_of_a_trial_is_in_it():
    study = search.begin_study(SPACE, **ASKED)
    told(study, 2.0)
    told(study, 1.0)
    for name, when, value in (("test:b", "2026-01-02", 0.2), ("test:a", "2026-01-01", 0.1)):
        study.optuna.set_user_attr(name, {"trial": 1, "numbers": {"error": value}, "when": when})
    assert [trial.tested for trial in study.trials] == [None, {"error": 0.2}]
    assert study.best.tested == {"error": 0.2}
