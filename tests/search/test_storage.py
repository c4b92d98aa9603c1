"""Where studies are kept: each kind opens, many open at once, and what cannot be opened says so in a line."""

from __future__ import annotations

import importlib.util
import sys
import threading

import optuna
import pytest
from optuna.storages import InMemoryStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from nnkit.search.storage import open_storage, quiet, shown
from tests.search import postgres


def backend(storage):
    while hasattr(storage, "inner") or hasattr(storage, "_backend"):
        storage = getattr(storage, "inner", None) or storage._backend
    return storage


def test_nothing_is_memory():
    assert isinstance(open_storage(), InMemoryStorage)


def test_a_storage_of_optunas_is_itself():
    storage = InMemoryStorage()
    assert open_storage(storage) is storage


@pytest.mark.parametrize("form", ["{}", "sqlite:///{}", "path", "journal:{}"])
def test_what_is_written_is_there_when_it_is_opened_again(tmp_path, form):
    path = tmp_path / "new" / "study.db"
    spec = path if form == "path" else form.format(path)
    study = optuna.create_study(storage=open_storage(spec), study_name="a")
    study.tell(study.ask(), 2.0)
    assert path.exists()
    again = optuna.load_study(storage=open_storage(spec), study_name="a")
    assert [trial.value for trial in again.trials] == [2.0]


def test_sqlite_writes_ahead_and_waits_for_others(tmp_path):
    storage = backend(open_storage(tmp_path / "study.db"))
    with storage.engine.connect() as connection:
        found = [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in SETTINGS]
    assert dict(zip(SETTINGS, found, strict=True)) == SETTINGS


SETTINGS = {"journal_mode": "wal", "synchronous": 1, "busy_timeout": 60_000}


def at_once(n, f):
    """What n threads return or raise that call f at the same moment."""
    barrier, found = threading.Barrier(n), [None] * n

    def one(i):
        barrier.wait()
        try:
            found[i] = f()
        except BaseException as error:
            found[i] = error

    threads = [threading.Thread(target=one, args=(i,)) for i in range(n)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    return found


@pytest.mark.parametrize("form", ["{}", "journal:{}"])
def test_many_open_a_new_storage_at_once(tmp_path, form):
    for i in range(3):
        found = at_once(4, lambda i=i: open_storage(form.format(tmp_path / f"{i}.db")).get_all_studies())
        assert found == [[]] * 4


@pytest.mark.parametrize("tail", [b'{"op_code":4,', b"{" + b"x" * 9000], ids=["short", "pages"])
def test_a_journal_goes_on_after_a_writer_that_was_killed_in_a_line(tmp_path, tail):
    path = tmp_path / "study.log"
    study = optuna.create_study(storage=open_storage(f"journal:{path}"), study_name="a")
    study.tell(study.ask(), 1.0)
    with open(path, "ab") as file:
        file.write(tail)
    study.tell(study.ask(), 2.0)
    again = optuna.load_study(storage=open_storage(f"journal:{path}"), study_name="a")
    assert [trial.value for trial in again.trials] == [1.0, 2.0]


def test_a_journal_is_optunas_own(tmp_path):
    path = str(tmp_path / "study.log")
    study = optuna.create_study(storage=open_storage(f"journal:{path}"), study_name="a")
    study.tell(study.ask(), 1.0)
    theirs = optuna.load_study(storage=JournalStorage(JournalFileBackend(path)), study_name="a")
    theirs.tell(theirs.ask(), 2.0)
    assert [trial.value for trial in study.trials] == [1.0, 2.0]


def test_a_journal_waits_for_the_disk_once_a_trial(tmp_path, monkeypatch):
    study = optuna.create_study(storage=open_storage(f"journal:{tmp_path}/study.log"))
    synced = []
    monkeypatch.setattr("nnkit.search.journal.os.fsync", synced.append)
    trial = study.ask()
    trial.suggest_float("x", 0, 1)
    trial.set_user_attr("a", 1)
    assert not synced
    study.tell(trial, 1.0)
    assert len(synced) == 1
    study.enqueue_trial({"x": 0.5})
    study.add_trial(optuna.trial.create_trial(state=TrialState.COMPLETE, value=1.0))
    assert len(synced) == 3


def test_creating_is_silent_and_leaves_the_verbosity(capfd):
    before = optuna.logging.get_verbosity()
    with quiet():
        optuna.create_study()
    assert optuna.logging.get_verbosity() == before
    assert capfd.readouterr().err == ""


def refused(spec, kind):
    with pytest.raises(kind) as caught:
        open_storage(spec)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_is_refused(tmp_path):
    assert refused(tmp_path, IsADirectoryError) == (
        f"storage='{tmp_path}' is a folder: name a file in it, or pass run_dir='{tmp_path}'"
    )


@pytest.mark.parametrize(
    ("form", "what"), [("{}", "a SQLite database"), ("journal:{}", "a journal of Optuna's")]
)
def test_another_file_is_refused_and_left_alone(tmp_path, form, what):
    path = tmp_path / "notes.txt"
    path.write_text("my notes, not to be lost")
    message = f"the file '{path}' is not {what}: choose another name, or move it away"
    assert refused(form.format(path), ValueError) == message
    assert path.read_text() == "my notes, not to be lost"


def test_a_broken_database_is_refused(tmp_path):
    path = tmp_path / "study.db"
    path.write_bytes(b"SQLite format 3\0" + b"\xff" * 5000)
    assert refused(path, OSError).startswith(f"cannot use the SQLite file '{path}': ")


def test_a_folder_that_cannot_be_written_in_is_refused():
    message = "cannot write in '/dev/null/runs': '/dev/null' is not a folder; choose another folder"
    assert refused("/dev/null/runs/study.db", OSError) == message
    assert refused("journal:/dev/null/runs/study.log", OSError) == message


def test_a_server_that_does_not_answer_is_named_without_its_password():
    message = refused("postgresql://anna:secret@127.0.0.1:1/studies", ConnectionError)
    assert message.startswith("cannot reach the storage postgresql+psycopg://anna:***@127.0.0.1:1/studies: ")
    assert "refused" in message
    assert message.endswith(
        "; is the server running, and are host, port, user, password and the database's name right?"
    )
    assert "secret" not in message


@pytest.mark.parametrize("spec", ["redis://host/0", "ftp://anna:secret@host"])
def test_an_address_of_another_kind_is_refused(spec):
    message = refused(spec, ValueError)
    assert (
        "is of no kind that is known: pass a path, 'journal:PATH' or 'postgresql://USER@HOST/NAME'" in message
    )
    assert "secret" not in message


@pytest.mark.parametrize("spec", ["sqlite://", "sqlite:///", "sqlite:///:memory:"])
def test_an_address_without_a_file_is_refused(spec):
    assert "names no file: write 'sqlite:///runs/study.db', or pass None for memory" in refused(
        spec, ValueError
    )
    assert "names no file: write 'journal:runs/study.log'" in refused("journal:", ValueError)


def test_an_address_that_is_none_is_refused():
    assert "is no address: write 'postgresql://USER:PASSWORD@HOST:PORT/NAME'" in refused(
        "postgresql://host:port/x", ValueError
    )


def test_another_type_is_refused():
    message = "storage must be a path, 'journal:PATH', 'postgresql://...' or an Optuna storage, got 3"
    assert refused(3, TypeError) == message


def test_missing_packages_are_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "psycopg" else find(name))
    message = "a study on PostgreSQL needs psycopg: pip install 'nnkit[postgresql]'"
    assert refused("postgresql://host/name", ImportError) == message
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert refused(None, ImportError) == "nnkit.search needs Optuna: pip install 'nnkit[search]'"


def test_what_is_shown_has_no_password(tmp_path):
    assert shown(None) == "memory"
    assert shown(tmp_path) == str(tmp_path)
    assert shown("postgresql://anna:secret@host/name") == "postgresql://anna:***@host/name"
    assert "secret" not in shown("postgresql://anna:secret@host:port/name")
    assert shown(InMemoryStorage()) == "InMemoryStorage"


@pytest.mark.slow
@pytest.mark.skipif(postgres.why_not() is not None, reason=str(postgres.why_not()))
def test_many_open_a_new_database_of_a_server_at_once():
    import psycopg

    with postgres.server() as running:
        for i in range(5):
            with psycopg.connect(running.url, autocommit=True) as connection:
                connection.execute(f"CREATE DATABASE new{i}")
            url = running.url.replace("/postgres?", f"/new{i}?")
            assert at_once(4, lambda url=url: open_storage(url).get_all_studies()) == [[]] * 4


@pytest.mark.parametrize("text", ['{"results": [1, 2, 3]}', '{"results": 1}\n', "[]"])
def test_a_file_that_is_no_journal_is_left_alone(tmp_path, text):
    # Failed where every file that begins with a brace was taken for a journal: its end was cut off as a half line.
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="is not a journal"):
        open_storage(f"journal:{path}")
    assert path.read_text() == text
