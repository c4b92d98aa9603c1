"""The cheap storage is Optuna's: the same tables, the same answers, and Optuna's own tests."""

from __future__ import annotations

import gc
import pickle
import time

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from optuna.testing.pytest_storages import StorageTestCase
from optuna.trial import TrialState

from nnkit.search import open_storage
from nnkit.search.relational import Relational
from tests.search import postgres


def fields(trial):
    """All of a trial, with NaN equal to itself."""
    return {name: repr(value) for name, value in vars(trial).items()}


def fill(storage):
    """A study with something in every table."""
    study_id = storage.create_new_study([StudyDirection.MINIMIZE], "a")
    study = optuna.load_study(study_name="a", storage=storage)
    for value in (1.0, float("inf"), float("-inf"), 1 / 3):
        trial = study.ask()
        trial.suggest_float("x", 1e-5, 1.0, log=True)
        trial.suggest_categorical("kind", ["a", None, 3])
        trial.set_user_attr("note", {"text": "é", "list": [1, None]})
        trial.set_user_attr("note", {"again": True})
        storage.set_trial_system_attr(trial._trial_id, "inner", 1)
        trial.report(float("nan"), 3)
        trial.report(0.5, 1)
        study.tell(trial, value)
    study.ask()
    study.enqueue_trial({"x": 0.5})
    template = optuna.create_trial(state=TrialState.RUNNING, user_attrs={"worker": "w"})
    storage.create_new_trial(study_id, template)
    storage.create_new_trial(study_id, optuna.create_trial(value=2.0))
    return study


@pytest.fixture
def far_from_greenwich(monkeypatch):
    """The tables have UTC, and trials local time."""
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize("writer", ["ours", "theirs"])
def test_optuna_reads_what_we_write_and_we_what_it_writes(tmp_path, writer, far_from_greenwich):
    ours = open_storage(tmp_path / "a.db")
    theirs = RDBStorage(f"sqlite:///{tmp_path}/a.db")
    study = fill(ours if writer == "ours" else theirs)
    backend = ours.inner._backend
    assert isinstance(backend, Relational)
    found = theirs.get_all_trials(study._study_id)
    assert [trial.number for trial in found] == list(range(8))
    for trial in found:
        assert fields(backend.get_trial(trial._trial_id)) == fields(trial)
    theirs.remove_session()
    theirs.engine.dispose()


def test_the_second_value_of_a_parameter_does_not_count(tmp_path):
    storage = open_storage(tmp_path / "a.db")
    study_id = storage.create_new_study([StudyDirection.MINIMIZE], "a")
    distribution = FloatDistribution(0, 1)
    for _ in range(2):
        trial_id = storage.create_new_trial(study_id)
        storage.set_trial_param(trial_id, "x", 0.25, distribution)
    storage.set_trial_param(trial_id, "x", 0.5, distribution)
    assert storage.get_trial(trial_id).params == {"x": 0.25}
    with pytest.raises(ValueError, match="Cannot set different distribution kind"):
        storage.set_trial_param(trial_id, "x", 0.0, CategoricalDistribution(["a"]))


def test_a_finished_trial_is_not_changed(tmp_path):
    storage = open_storage(tmp_path / "a.db")
    study_id = storage.create_new_study([StudyDirection.MINIMIZE], "a")
    trial_id = storage.create_new_trial(study_id)
    assert not storage.set_trial_state_values(trial_id, TrialState.RUNNING)
    assert storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [1.0])
    for change in (
        lambda: storage.set_trial_state_values(trial_id, TrialState.FAIL),
        lambda: storage.set_trial_user_attr(trial_id, "a", 1),
        lambda: storage.set_trial_param(trial_id, "x", 0.5, FloatDistribution(0, 1)),
    ):
        with pytest.raises(UpdateFinishedTrialError):
            change()
    with pytest.raises(KeyError):
        storage.set_trial_user_attr(99, "a", 1)
    with pytest.raises(KeyError):
        storage.get_trial(99)
    with pytest.raises(KeyError):
        storage.create_new_trial(99)
    assert storage.get_trial(trial_id).values == [1.0]


def test_it_can_be_sent_to_another_process(tmp_path):
    storage = open_storage(tmp_path / "a.db")
    study = fill(storage)
    again = pickle.loads(pickle.dumps(storage))
    assert len(again.get_all_trials(study._study_id)) == 8
    trial = again.get_trial(again.create_new_trial(study._study_id))
    assert trial.number == 8


def test_connections_are_closed_with_the_storage(tmp_path):
    storage = open_storage(tmp_path / "a.db")
    storage.get_all_studies()
    pool = storage.inner._backend.engine.pool
    assert pool.checkedin() == 1
    # Disposing of an engine replaces its pool: this one is emptied.
    del storage
    gc.collect()
    assert pool.checkedin() == 0


@pytest.fixture(scope="module")
def running():
    with postgres.server() as server:
        yield server


@pytest.fixture(params=["sqlite", "journal", "postgresql"])
def storage(request, tmp_path):
    if request.param != "postgresql":
        return open_storage(
            {"sqlite": f"{tmp_path}/a.db", "journal": f"journal:{tmp_path}/a.log"}[request.param]
        )
    if postgres.why_not() is not None:
        pytest.skip(str(postgres.why_not()))
    import psycopg

    server = request.getfixturevalue("running")
    name = f"test{abs(hash(request.node.nodeid))}"
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return open_storage(server.url.replace("/postgres?", f"/{name}?"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
class TestAsOptunaDoes(StorageTestCase):
    """Optuna's tests of every storage."""
