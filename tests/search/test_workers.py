"""Many workers on one study: nothing lost, nothing doubled, whoever dies, sleeps or is not answered.

Each test is one order of events, on every kind of storage. What happens at random is ``python -m tests.search.kill``.
"""

from __future__ import annotations

import datetime
import itertools
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState, create_trial

from nnkit import search
from nnkit.search import locks as search_locks
from nnkit.search import patience, presence
from nnkit.search.beats import Watch
from nnkit.search.locks import MachineLock
from nnkit.search.patience import CALLS, PatientStorage, patient
from nnkit.search.workers import Lease, counted
from tests.search import kill, postgres

SPACE = search.as_space({"x": search.uniform(0, 1), "y": search.log_uniform(1e-5, 1)})
RUNNING, WAITING = TrialState.RUNNING, TrialState.WAITING


class Clock:
    """An observer's: it goes on when it is told to."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


class Worker(Lease):
    """One on another machine, that beats and looks when it is told to."""

    def __init__(self, study, clock=None):
        super().__init__(study, interval=10.0, grace=60.0)
        self.clock = Clock() if clock is None else clock
        self._beats._watch = Watch(20.0, self.clock)
        self.beat()

    def beat(self):
        self._beats._beat(ended=False)

    def look(self, seconds):
        """Looks every ten seconds."""
        for _ in range(int(seconds / 10)):
            self.clock.seconds += 10
            self._beats.look()

    def end(self):
        self.__exit__(None)


@pytest.fixture(scope="module")
def server():
    if postgres.why_not() is not None:
        pytest.skip(str(postgres.why_not()))
    with postgres.server() as running:
        yield running


numbers = itertools.count()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A SQLite file, for several studies: its tables take longer to make than a test takes."""
    return tmp_path_factory.mktemp("workers") / "a.db"


KINDS = [
    "memory",
    "journal",
    *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("sqlite", "postgresql")),
]


@pytest.fixture(params=KINDS)
def join(request, tmp_path):
    """A function that opens the study, as one process more does."""
    if request.param == "memory":
        spec = InMemoryStorage()
    elif request.param == "journal":
        spec = f"journal:{tmp_path}/a.log"
    elif request.param == "sqlite":
        spec = request.getfixturevalue("file")
    else:
        spec = request.getfixturevalue("server").url
    return opener(spec, f"study {next(numbers)}")


def opener(spec, name="a"):
    optuna.create_study(storage=search.open_storage(spec), study_name=name)

    def join():
        sampler = search.make_sampler("random", SPACE, seed=0)
        return optuna.load_study(storage=search.open_storage(spec), study_name=name, sampler=sampler)

    return join


def value(flat):
    return flat["x"] + flat["y"]


def tells(worker, trial, number=None):
    record = {"nnkit": {"worker": worker.id}}
    number = value(trial.params) if number is None else number
    return search.finish(worker.study, trial, number, worker=worker.id, attrs=record)


def asks(worker, target=4, batch=1):
    return worker.ask(target, batch, then=SPACE.suggest)


def states(study):
    return [trial.state.name for trial in study.trials]


def once(storage, name, *, before=None, after=None):
    """The next call of a storage's method has something happen before it or after it."""
    call = getattr(storage, name)

    def called(*args, **kwargs):
        vars(storage).pop(name)
        if before is not None:
            before()
        answer = call(*args, **kwargs)
        if after is not None:
            after()
        return answer

    setattr(storage, name, called)


# Who has which trial.


def test_trials_are_given_out_in_batches_up_to_the_target(join):
    worker, drawn = Worker(join()), []

    def then(trial):
        # The next one is not there for the sampler before this one has its parameters.
        drawn.append((trial.number, all(t.params for t in drawn_before(trial))))
        SPACE.suggest(trial)

    def drawn_before(trial):
        return [t for t in worker.study.get_trials() if t.number < trial.number]

    first = worker.ask(5, 3, then=then)
    assert [trial.number for trial in first] == [0, 1, 2]
    assert drawn == [(0, True), (1, True), (2, True)]
    second = worker.ask(5, 3, then=then)
    assert [trial.number for trial in second] == [3, 4]
    assert worker.ask(5, 3) == []
    assert not worker.finished(5)
    assert all(tells(worker, trial) for trial in (*first, *second))
    assert worker.finished(5)
    assert worker.ask(5, 3) == []
    assert [trial.number for trial in counted(worker.study)] == list(range(5))
    assert {trial.user_attrs["worker"] for trial in counted(worker.study)} == {worker.id}


def test_what_waits_comes_first_and_is_not_mixed_with_new_ones(join):
    """An adaptive sampler is to draw new trials when it knows what became of those."""
    one, other = Worker(join()), Worker(join())
    given = asks(one, batch=2)
    params = [trial.params for trial in given]
    one.release(given)
    again = asks(other, batch=3)
    assert [(trial.number, trial.params) for trial in again] == list(enumerate(params))
    assert [trial.number for trial in asks(other, batch=3)] == [2, 3]


def test_two_who_ask_at_once_do_not_exceed_the_target(join):
    one, other = Worker(join()), Worker(join())
    got = []
    # When the one has seen that there is room for three, the other takes all of it.
    once(one._storage, "get_all_trials", after=lambda: got.extend(asks(other, target=3, batch=3)))
    assert asks(one, target=3, batch=3) == []
    assert [trial.number for trial in got] == [0, 1, 2]
    assert states(one.study) == ["RUNNING"] * 3 + ["WAITING"] * 3
    assert all(tells(other, trial) for trial in got)
    assert one.finished(3)
    assert asks(one, target=3) == []
    # For a larger target they are there.
    assert [trial.number for trial in asks(one, target=5, batch=4)] == [3, 4]


def test_many_who_ask_at_once_have_each_trial_once(file):
    study = opener(file, "many")
    got, barrier = [], threading.Barrier(4)

    def work():
        worker = Worker(study())
        barrier.wait()
        while given := asks(worker, target=20, batch=3):
            got.extend((trial.number, tells(worker, trial)) for trial in given)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == [(number, True) for number in range(20)]


def test_of_two_who_claim_a_waiting_trial_one_gets_it(join):
    one, other = Worker(join()), Worker(join())
    one.release(asks(one, batch=1))
    got = []
    once(one._storage, "set_trial_state_values", before=lambda: got.extend(asks(other)))
    assert [trial.number for trial in asks(one)] == [1]
    assert [trial.number for trial in got] == [0]
    assert not tells(one, got[0])
    assert tells(other, got[0])


def test_who_had_a_trial_before_claims_it_no_more_than_others(join):
    """Of a journal Optuna says yes to whoever claimed the same trial last."""
    one, other = Worker(join()), Worker(join())
    one.release(asks(one))
    (trial,) = asks(one)
    one.release([trial])
    inner: object = getattr(one._storage, "inner", one._storage)
    log = getattr(inner, "_backend", None)
    # In a journal the question is asked before the line is written, so there is a moment more.
    at, name = (log, "append_logs") if hasattr(log, "append_logs") else (inner, "set_trial_state_values")
    once(at, name, before=lambda: asks(other))
    assert [trial.number for trial in asks(one)] == [1]
    assert not tells(one, trial)


def test_a_claim_on_sqlite_is_made_in_one_piece(file):
    """The other one claims when the state is read and not yet written, over a connection of its own."""
    from sqlalchemy import event

    study = opener(file, "claim")
    one, other = Worker(study()), Worker(study())
    (trial,) = asks(one)
    one.release([trial])
    got, threads = [], []

    def read(connection, cursor, statement, *_):
        if statement.startswith("SELECT trials.state") and not threads:
            threads.append(threading.Thread(target=lambda: got.append(claims(other))))
            threads[0].start()
            threads[0].join(0.2)

    def claims(worker):
        return worker._storage.set_trial_state_values(trial._trial_id, RUNNING)

    event.listen(one._storage.inner._backend.engine, "after_cursor_execute", read)
    mine = claims(one)
    threads[0].join()
    assert sorted([mine, *got]) == [False, True]


# Those who die.


def test_what_a_silent_worker_had_is_given_out_again_under_its_number(join):
    dead, other = Worker(join()), Worker(join())
    (trial,) = asks(dead)
    params = trial.params
    other.look(60)
    assert other.reclaim() == []
    other.look(20)
    assert other.reclaim() == [0]
    assert states(other.study) == ["WAITING"]
    (again,) = asks(other)
    assert (again.number, again.params) == (0, params)
    assert tells(other, again)
    assert other.reclaim() == []


def test_one_who_beats_keeps_what_it_has(join):
    one, other = Worker(join()), Worker(join())
    (trial,) = asks(one)
    for _ in range(30):
        one.beat()
        other.look(50)
        assert other.reclaim() == []
    assert tells(one, trial)


def test_one_who_beats_seldom_is_given_time(join):
    slow = Worker(join())
    slow._beats._interval = 100.0
    slow.beat()
    other = Worker(join())
    asks(slow)
    other.look(290)
    assert other.reclaim() == []
    other.look(30)
    assert other.reclaim() == [0]


def test_who_was_asleep_does_not_judge(join):
    """To a machine that wakes up after an hour, all the others seem to have been silent for an hour."""
    one, other = Worker(join()), Worker(join())
    asks(one)
    other.look(10)
    other.clock.seconds += 3600
    assert other.reclaim() == []
    one.beat()
    other.look(50)
    assert other.reclaim() == []


@pytest.mark.parametrize("days", [-1, 1])
def test_clocks_are_not_compared(join, monkeypatch, days):
    """A machine whose clock is wrong by a day neither loses what it has nor keeps what it had."""
    worker, other = Worker(join()), Worker(join())
    wrong = datetime.datetime.now() + datetime.timedelta(days)
    new = create_trial(state=RUNNING, user_attrs={"worker": worker.id})
    new.datetime_start = wrong
    real = time.time
    with monkeypatch.context() as there:
        there.setattr(time, "time", lambda: real() + 86400 * days)
        worker._storage.create_new_trial(worker._study_id, new)
        worker.beat()
    assert other.reclaim() == []
    other.look(50)
    assert other.reclaim() == []
    other.look(30)
    assert other.reclaim() == [0]


def test_a_trial_of_nobody_is_given_up_after_the_same_time(join):
    """Its owner died between two writes, or is no worker of ours that beats."""
    worker = Worker(join())
    for attrs in ({}, {"worker": "unheard of"}):
        new = create_trial(state=RUNNING, user_attrs=attrs)
        worker._storage.create_new_trial(worker._study_id, new)
    worker.look(60)
    assert worker.reclaim() == []
    worker.look(20)
    assert worker.reclaim() == [0, 1]


def test_a_trial_that_changes_hands_is_watched_anew(join):
    """Between claim and name a trial has no owner: not for the grace that has passed before."""
    one, other = Worker(join()), Worker(join())
    (trial,) = asks(one)
    other._storage.set_trial_user_attr(trial._trial_id, "worker", None)
    other.look(60)
    other._storage.set_trial_state_values(trial._trial_id, WAITING)
    other._storage.set_trial_state_values(trial._trial_id, RUNNING)
    other.look(30)
    assert other.reclaim() == []


def test_who_has_ended_is_not_waited_for(join):
    one, other = Worker(join()), Worker(join())
    asks(one)
    one._beats._beat(ended=True)
    assert other.reclaim() == [0]


def test_of_two_who_see_a_death_one_takes_the_trial_back(join):
    """The second one comes when a third has it already, which must not lose it."""
    dead, slow, quick, third = (Worker(join()) for _ in range(4))
    asks(dead)
    for worker in (slow, quick):
        worker.look(80)

    def meanwhile():
        assert quick.reclaim() == [0]
        got.extend(asks(third))

    got = []
    once(slow._storage, "get_trial", before=meanwhile)
    assert slow.reclaim() == []
    assert states(slow.study) == ["RUNNING"]
    assert tells(third, got[0])


def test_a_trial_that_waits_has_no_owner(join):
    """Were it there with the dead one's name, the next one's claim would be taken for the dead one's."""
    dead, other = Worker(join()), Worker(join())
    asks(dead)
    other.look(80)
    seen = []

    def look():
        (trial,) = other.study.get_trials()
        seen.append((trial.state.name, trial.user_attrs["worker"]))

    once(other._storage, "set_trial_state_values", before=look)
    other.reclaim()
    assert seen == [("RUNNING", None)]


# Those who were only slow.


def test_one_who_was_given_up_tells_what_nobody_has_begun_anew(join):
    slow, other = Worker(join()), Worker(join())
    (trial,) = asks(slow)
    other.look(80)
    assert other.reclaim() == [0]
    assert tells(slow, trial)
    assert asks(other, target=1) == []
    assert other.finished(1)


def test_one_who_was_given_up_is_refused_where_another_one_has_begun_anew(join):
    slow, other = Worker(join()), Worker(join())
    (trial,) = asks(slow)
    other.look(80)
    other.reclaim()
    (again,) = asks(other)
    assert not tells(slow, trial, 5.0)
    assert "nnkit" not in other.study.trials[0].user_attrs
    assert tells(other, again)
    assert not tells(slow, trial, 5.0)
    assert not tells(slow, trial)
    found = other.study.trials[0]
    assert (found.value, found.user_attrs["nnkit"]["worker"]) == (value(found.params), other.id)


def test_one_who_tells_while_it_is_given_up_is_believed(join):
    slow, other = Worker(join()), Worker(join())
    (trial,) = asks(slow)
    other.look(80)
    once(other._storage, "set_trial_user_attr", before=lambda: told.append(tells(slow, trial)))
    told = []
    assert other.reclaim() == []
    assert told == [True]
    assert states(other.study) == ["COMPLETE"]


def test_one_who_comes_back_goes_on(join):
    slow, other = Worker(join()), Worker(join())
    asks(slow)
    other.look(80)
    assert other.reclaim() == [0]
    slow.beat()
    (again,) = asks(slow)
    slow.beat()
    assert other.reclaim() == []
    assert tells(slow, again)


# Those who end.


def test_what_was_not_told_is_given_back_at_the_end(join):
    study = join()
    with Lease(study) as lease:
        first, second = asks(lease, batch=2)
        assert tells(lease, first)
    assert states(study) == ["COMPLETE", "WAITING"]
    assert study.user_attrs[f"worker:{lease.id}"]["ended"]

    def fails(lease):
        asks(lease)
        raise Death

    with pytest.raises(Death), Lease(study) as lease:
        fails(lease)
    assert states(study) == ["COMPLETE", "WAITING"]
    assert second.params == study.trials[1].params


def test_an_error_is_not_hidden_by_a_storage_that_is_gone():
    study = opener(InMemoryStorage())()

    def gone(*_, **__):
        raise OSError("gone")

    def fails(lease):
        lease._storage.get_all_trials = gone
        raise Death

    with pytest.raises(Death), Lease(study) as lease:
        fails(lease)
    with pytest.raises(OSError, match="gone"), Lease(study):
        pass


def test_beats_go_on_by_themselves_and_survive_an_error(monkeypatch):
    study = opener(InMemoryStorage())()
    failed = threading.Event()
    with Lease(study, interval=0.01, grace=0.03) as lease:
        first = study.user_attrs[f"worker:{lease.id}"]["beat"]
        once(study._storage, "set_study_user_attr", before=failed.set)
        assert failed.wait(20)
        monkeypatch.setattr(study._storage, "set_study_user_attr", fails_once(study._storage, lease))
        deadline = time.monotonic() + 20
        while study.user_attrs[f"worker:{lease.id}"]["beat"] < first + 4:
            assert time.monotonic() < deadline
            time.sleep(0.005)


def fails_once(storage, lease):
    call, failed = storage.set_study_user_attr, []

    def fails(*args):
        if not failed:
            failed.append(lease)
            raise OSError("once")
        return call(*args)

    return fails


def test_a_worker_must_be_allowed_to_miss_a_beat():
    study = opener(InMemoryStorage())()
    message = (
        "Lease needs interval > 0 and grace >= 3 * interval, got interval=10 and grace=29: a worker may miss a beat or "
        "two before it is taken for dead"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Lease(study, interval=10, grace=29)
    for interval, grace in ((0, 60), (float("nan"), 60), (10, float("inf"))):
        with pytest.raises(ValueError, match="Lease needs interval > 0"):
            Lease(study, interval=interval, grace=grace)


# Whether somebody lives, by one observer's clock.


def test_seconds_of_silence_are_those_that_were_seen():
    clock = Clock()
    watch = Watch(20.0, clock)
    watch.look({"a": 1, "b": 1})
    assert watch.unchanged("a") == 0
    for number in (1, 2, 3):
        clock.seconds += 15
        watch.look({"a": 1, "b": number})
    assert (watch.unchanged("a"), watch.unchanged("b")) == (45, 0)
    clock.seconds += 3600
    watch.look({"a": 1})
    assert (watch.unchanged("a"), watch.unchanged("b")) == (65, 0)
    watch.look({"a": 0, "b": 3})  # a sign may also go back: the machine was restored from a copy
    assert (watch.unchanged("a"), watch.unchanged("b"), watch.unchanged("c")) == (0, 0, 0)


# Answers that are lost, and deaths, at every call of the storage.


class Death(BaseException):
    pass


def disturbed(storage, at, what, *, after=True):
    """``storage``, whose ``at``-th call ends in ``what`` before or after it is done."""
    inner, made = patient(storage), itertools.count()

    def disturb(call):
        def called(*args, **kwargs):
            now = next(made) == at
            if now and not after:
                raise what
            answer = call(*args, **kwargs)
            if now:
                raise what
            return answer

        return called

    found = PatientStorage(inner, 60.0)
    for name in CALLS:
        setattr(found, name, disturb(getattr(found, name)))
    return found, made


def works(study, clock, target=4):
    """How many trials a worker is told that they count."""
    worker, told = Worker(study, clock), 0
    for _ in range(20):
        if worker.finished(target):
            worker.end()
            return told
        worker.reclaim()
        given = asks(worker, target, batch=3)
        told += sum(tells(worker, trial) for trial in given)
        if not given:
            worker.look(80)
    raise AssertionError(states(study))


def alone():
    study = opener(InMemoryStorage())()
    works(study, Clock())
    return [(trial.number, trial.params, trial.value) for trial in study.trials]


def begun(storage):
    """A study in which a trial waits."""
    optuna.create_study(storage=storage, study_name="a")
    worker = Worker(loaded(storage))
    worker.release(asks(worker))
    return storage


def loaded(storage):
    sampler = search.make_sampler("random", SPACE, seed=0)
    return optuna.load_study(storage=storage, study_name="a", sampler=sampler)


def test_any_answer_may_be_lost(monkeypatch):
    """The server has done what it was asked, and went down before it could say so."""
    monkeypatch.setattr(patience.time, "sleep", lambda _: None)
    expected = alone()
    for at in itertools.count(1):
        storage = begun(InMemoryStorage())
        lossy, made = disturbed(storage, at, ConnectionError("lost"))
        study = loaded(PatientStorage(lossy, 60.0))
        assert works(study, Clock()) == 4, at
        within = [t for t in study.trials if t.number < 4]
        assert [(t.number, t.params, t.value) for t in within] == expected, at
        assert {t.state for t in study.trials[4:]} <= {WAITING}, at
        if next(made) <= at:
            break
    assert at > 40


@pytest.mark.parametrize("after", [False, True])
def test_a_worker_may_die_at_any_call(after):
    expected = alone()
    for at in itertools.count(1):
        storage = begun(InMemoryStorage())
        deadly, made = disturbed(storage, at, Death(), after=after)
        try:
            works(loaded(deadly), Clock())
        except Death:
            pass
        else:
            if next(made) <= at:
                break
        study = loaded(storage)
        works(study, Clock())
        assert [(t.number, t.params, t.value) for t in study.trials] == expected, at
        assert set(states(study)) == {"COMPLETE"}, at
    assert at > 40


# Patience.


class Server:
    """One that fails so many times with an error."""

    def __init__(self, error, times):
        self.error, self.times, self.inner = error, times, InMemoryStorage()

    def get_all_studies(self):
        if self.times > 0:
            self.times -= 1
            raise self.error
        return []


def impatient(server, seconds=60.0):
    return PatientStorage(server, seconds)


def of_database(kind, text, module="psycopg.errors"):
    from sqlalchemy import exc

    cause = type("Cause", (Exception,), {"__module__": module})(text)
    error = getattr(exc, kind)("SELECT 1", {}, cause)
    error.__cause__ = cause
    return error


def test_a_server_that_is_away_is_waited_for(monkeypatch):
    slept = []
    monkeypatch.setattr(patience.time, "sleep", slept.append)
    for error in (
        of_database("OperationalError", "the database system is shutting down"),
        of_database("InterfaceError", "the connection is closed"),
        of_database("OperationalError", "database is locked", "sqlite3"),
        ConnectionResetError(),
        OSError(116, "Stale file handle"),
    ):
        assert impatient(Server(error, 5)).get_all_studies() == []
    assert len(slept) == 25
    assert 0 < min(slept) < max(slept) <= 2


def test_a_server_that_stays_away_is_given_up_in_one_line():
    error = of_database("OperationalError", "connection refused\nis the server running?")
    with pytest.raises(ConnectionError) as caught:
        impatient(Server(error, 10**6), seconds=0.1).get_all_studies()
    assert str(caught.value) == (
        "the study's storage has not answered for 0 s (connection refused): what was told before is kept; start again "
        "to go on when it is back"
    )


def test_other_errors_pass_at_once():
    for error in (KeyError("no such study"), UpdateFinishedTrialError("finished"), Death()):
        with pytest.raises(type(error)) as caught:
            impatient(Server(error, 1)).get_all_studies()
        assert caught.value is error


def refusal(why):
    return f"^the study's storage refuses: {re.escape(why)}; what was told before is kept$"


def test_a_storage_that_refuses_says_so_in_one_line(file):
    """A full disk and a file that may only be read; and the trial is told where there is room again."""
    study = opener(file, "refusing")()
    worker = Worker(study)
    (trial,) = asks(worker)
    engine = study._storage.inner._backend.engine

    def setting(text):
        with engine.connect() as connection:
            connection.exec_driver_sql(f"PRAGMA {text}")

    setting("query_only = 1")
    with pytest.raises(OSError, match=refusal("attempt to write a readonly database")):
        tells(worker, trial)
    setting("query_only = 0")
    setting("max_page_count = 1")
    with pytest.raises(OSError, match=refusal("database or disk is full")):
        search.finish(study, trial, 1.0, worker=worker.id, attrs={"long": "x" * 10**5})
    setting("max_page_count = 100000")
    assert states(study) == ["RUNNING"]
    assert tells(worker, trial)


def test_a_journal_that_cannot_be_written_says_so_in_one_line(tmp_path):
    study = opener(f"journal:{tmp_path}/a.log")()
    worker = Worker(study)
    (trial,) = asks(worker)
    log = study._storage.inner._backend

    def full():
        raise OSError(28, "No space left on device")

    once(log, "append_logs", before=full)
    with pytest.raises(
        OSError, match=r"^the study's storage refuses: \[Errno 28\] No space left on device; what"
    ):
        tells(worker, trial)
    assert tells(worker, trial)


def test_patience_is_not_doubled():
    storage = InMemoryStorage()
    assert patient(patient(storage)).inner is storage


# Death that is seen at once, on the same machine.

HOLDS = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("presence", sys.argv[1])
presence = importlib.util.module_from_spec(spec)
spec.loader.exec_module(presence)
held = presence.Presence(sys.argv[2])
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Another folder for temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


@pytest.mark.skipif(presence.this_machine() is None, reason="this kernel has no name for its run")
def test_a_killed_process_is_seen_at_once(folder):
    """By its lock: this process's number is in the dead one's beat, as if the kernel had used it again."""
    study = opener(InMemoryStorage())()
    dead, other = Worker(study), Worker(study)
    asks(dead)
    arguments = [sys.executable, "-c", HOLDS, presence.__file__, dead.id]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        assert other.reclaim() == []
        os.kill(process.pid, signal.SIGSTOP)
        assert other.reclaim() == []  # stopped is not dead
        process.kill()
    assert other.reclaim() == [0]


def test_of_other_machines_nothing_is_concluded(folder, monkeypatch):
    here = presence.this_machine()
    held = presence.Presence("a")
    assert not presence.is_gone("a", here)
    (folder / "nnkit-dead.lock").touch()  # a file whose process is gone
    assert presence.is_gone("dead", here)
    assert not presence.is_gone("dead", "another machine")
    assert not presence.is_gone("dead", None)
    assert not presence.is_gone("of another container", here)
    held.close()
    assert not (folder / "nnkit-a.lock").exists()
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "no such folder"))
    presence.Presence("b").close()
    assert not presence.is_gone("b", here)


def test_a_lease_that_cannot_begin_leaves_nothing_behind(folder):
    study = opener(InMemoryStorage())()

    def gone(*_):
        raise OSError("gone")

    study._storage.set_study_user_attr = gone
    with pytest.raises(OSError, match="gone"):
        Lease(study).__enter__()
    assert list(folder.iterdir()) == []


# The lock of a journal.


@pytest.fixture
def locks(tmp_path):
    """Two of one journal, whose patience is short."""
    found = [MachineLock(str(tmp_path / "a.log")) for _ in range(2)]
    for lock in found:
        lock.grace_period = 0.2
    return found


def seconds_to_acquire(lock):
    began, thread = time.monotonic(), threading.Thread(target=lock.acquire, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "it waits for ever"
    return time.monotonic() - began


def test_a_journal_is_written_by_one_at_a_time(locks):
    one, other = locks
    one.acquire()
    thread = threading.Thread(target=other.acquire)
    thread.start()
    thread.join(0.1)
    assert thread.is_alive()
    one.release()
    thread.join(20)
    assert not thread.is_alive()
    other.release()
    assert seconds_to_acquire(one) < 0.1


def test_a_killed_holder_of_this_machine_is_not_waited_for(locks):
    one, other = locks
    one.acquire()
    one._leave()  # what the kernel does at its death
    other.grace_period = 5
    assert seconds_to_acquire(other) < 2


def test_a_holder_of_another_machine_is_waited_for(locks, monkeypatch):
    one, other = locks
    monkeypatch.setattr(search_locks, "this_machine", lambda: "another machine")
    one.acquire()
    one._leave()
    monkeypatch.undo()
    assert 0.2 < seconds_to_acquire(other) < 20


def test_a_stopped_holder_is_waited_for_once_and_takes_nothing_from_others(locks):
    stopped, other = locks
    stopped.acquire()
    assert 0.4 < seconds_to_acquire(other) < 20
    stopped.release()  # it goes on: the lock is the other one's by now
    assert os.path.exists(other._lock_file)
    other.release()
    assert seconds_to_acquire(stopped) < 0.1
    stopped.release()
    assert not os.path.exists(other._lock_file)


# A server: PostgreSQL, from its own programs (``apt-get install postgresql`` or its like; tests/search/postgres.py
# says where they are looked for).

needs_postgres = pytest.mark.skipif(postgres.why_not() is not None, reason=str(postgres.why_not()))


@pytest.fixture
def database(server):
    """A study, and a connection that is not of nnkit."""
    import psycopg

    study = opener(server.url, f"study {next(numbers)}")
    with psycopg.connect(server.url) as connection:
        yield study, connection


def while_others_write(connection, statement, call):
    """What ``call`` gives or raises, begun after the statement was made and before it is committed."""
    connection.execute(statement)
    found = []

    def calls():
        try:
            found.append(call())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=calls)
    thread.start()
    thread.join(0.5)
    assert thread.is_alive(), f"it did not wait: {found}"
    connection.commit()
    thread.join(20)
    return found[0]


@pytest.mark.slow
@needs_postgres
def test_a_record_is_not_written_while_another_worker_tells(database):
    """Or it would stand beside the value that the other one told."""
    study, connection = database
    worker = Worker(study())
    (trial,) = asks(worker)
    trial_id = trial._trial_id
    worker._storage.set_trial_user_attr(trial_id, "nnkit", "first")
    found = while_others_write(
        connection,
        f"UPDATE trials SET state = 'COMPLETE' WHERE trial_id = {trial_id}",
        lambda: worker._storage.set_trial_user_attr(trial_id, "nnkit", "second"),
    )
    assert isinstance(found, UpdateFinishedTrialError)
    assert study().trials[0].user_attrs["nnkit"] == "first"


@pytest.mark.slow
@needs_postgres
def test_a_parameter_is_not_written_while_another_worker_tells(database):
    study, connection = database
    worker = Worker(study())
    asks(worker)
    (trial,) = worker.ask(4, 1)
    found = while_others_write(
        connection,
        f"UPDATE trials SET state = 'COMPLETE' WHERE trial_id = {trial._trial_id}",
        lambda: worker._storage.set_trial_param(trial._trial_id, "x", 0.5, FloatDistribution(0, 1)),
    )
    assert isinstance(found, UpdateFinishedTrialError)
    assert study().trials[1].params == {}


@pytest.mark.slow
@needs_postgres
def test_a_trial_is_not_claimed_while_another_worker_claims_it(database):
    study, connection = database
    worker = Worker(study())
    (trial,) = asks(worker)
    worker.release([trial])
    found = while_others_write(
        connection,
        f"UPDATE trials SET state = 'RUNNING' WHERE trial_id = {trial._trial_id}",
        lambda: worker._storage.set_trial_state_values(trial._trial_id, RUNNING),
    )
    assert found is False


@pytest.mark.slow
@needs_postgres
def test_two_trials_that_are_made_at_once_have_two_numbers(database):
    study, connection = database
    worker = Worker(study())
    asks(worker)
    asked = worker._study_id
    found = while_others_write(
        connection,
        f"INSERT INTO trials (study_id, number, state) VALUES ({asked}, 1, 'WAITING')",
        lambda: worker._storage.create_new_trial(asked),
    )
    assert [trial.number for trial in study().trials if trial._trial_id == found] == [2]


@pytest.mark.slow
@needs_postgres
@pytest.mark.parametrize("immediate", [False, True])
def test_a_study_goes_on_when_its_server_comes_back(tmp_path, immediate):
    """A restart while trials run, between two calls; ``immediate`` is a kill, with recovery."""
    expected = alone()
    with postgres.server() as running:
        study = opener(running.url)()
        restarted = threading.Timer(0.5, running.start)
        with Lease(study, interval=0.1, grace=1.0) as lease:
            told = 0
            while not lease.finished(4):
                lease.reclaim()
                given = asks(lease, batch=2)
                if not told:
                    running.stop(immediate=immediate)
                    restarted.start()
                told += sum(tells(lease, trial) for trial in given)
        restarted.join()
        assert told == 4
        assert [(t.number, t.params, t.value) for t in study.trials] == expected
        assert study.user_attrs[f"worker:{lease.id}"]["ended"]


# At random.


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite", "journal", pytest.param("postgresql", marks=needs_postgres)])
def test_workers_are_killed_at_random(kind):
    seen = kill.run(kind, trials=60)
    assert seen.wrong == []
    assert seen.numbers["told"] == 60
    assert seen.numbers["killed from outside"] > 3


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["claim", "enqueue"])
def test_a_fault_is_found_out(wrong):
    """Those that chance alone meets often enough; for the others the tests above have the order of events."""
    assert kill.run("sqlite", wrong=wrong).wrong != []


@pytest.mark.slow
def test_sweeps_are_killed_at_random():
    """Each worker compiles, so they are few."""
    assert kill.run("sqlite", sweep=True, workers=2, trials=40, every=10.0, itself=0.0).wrong == []
