"""Where a study is kept: in memory, in a SQLite file, in a journal file, or on a database server."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import random
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnkit.train.files import check_writable

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

__all__ = ["open_storage", "quiet", "require_optuna", "shown"]

_TIMEOUT = 60.0
"""Seconds for which a process waits for another one's write to a SQLite file; Optuna's 5 are too few for four."""


def open_storage(spec: Any = None) -> BaseStorage:
    """The Optuna storage that ``spec`` names, opened, with its tables made where it is new.

    =============================  ====================================================================
    ``spec``                       what it is
    =============================  ====================================================================
    None                           the memory of this process; gone at its end
    a path, "sqlite:///PATH"       a SQLite file, for the processes of one machine
    "journal:PATH"                 a journal, for a folder that several machines share
    "postgresql://USER@HOST/NAME"  a PostgreSQL server, for many machines
    an Optuna storage              itself
    =============================  ====================================================================

    SQLite runs with a write-ahead log and without a wait for the disk at every trial
    (``synchronous=NORMAL``): a killed process loses nothing, and a power failure at most the last trials. Any
    number of processes may open a new storage at the same moment. Calls wait for a server that is away for a
    minute: see :func:`nnkit.search.patience.patient`.

    Raises:
      ConnectionError: the server does not answer, or refuses; in one line, without the password.
      ValueError: the file is no SQLite database or no journal, or the address is of no kind above.
      OSError: the folder cannot be written in.
      ImportError: Optuna, or for PostgreSQL psycopg, is not installed.

    >>> type(search.open_storage()).__name__
    'InMemoryStorage'
    """
    optuna = require_optuna()
    if spec is None:
        return optuna.storages.InMemoryStorage()
    if isinstance(spec, optuna.storages.BaseStorage):
        return optuna.storages.get_storage(spec)
    if not isinstance(spec, str | os.PathLike):
        raise TypeError(
            f"storage must be a path, 'journal:PATH', 'postgresql://...' or an Optuna storage, got {spec!r}"
        )
    text = os.fspath(spec)
    if isinstance(spec, str) and text.startswith("journal:"):
        return _journal(text.removeprefix("journal:"))
    if isinstance(spec, str) and "://" in text and not text.startswith("sqlite"):
        return _server(text)
    return _sqlite(_path_of(text))


def require_optuna() -> Any:
    """The package optuna, or an ImportError that says how to get it."""
    try:
        import optuna
    except ImportError:
        raise ImportError("nnkit.search needs Optuna: pip install 'nnkit[search]'") from None
    return optuna


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps Optuna's notes about what is created off the screen; warnings and errors pass."""
    logging = require_optuna().logging
    before = logging.get_verbosity()
    logging.set_verbosity(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.set_verbosity(before)


def shown(spec: Any) -> str:
    """``spec`` as it may stand in a message: an address without its password."""
    if spec is None:
        return "memory"
    if not isinstance(spec, str | os.PathLike):
        return type(spec).__name__
    text = os.fspath(spec)
    if isinstance(spec, str) and "://" in text and not text.startswith("sqlite"):
        from sqlalchemy.engine import make_url
        from sqlalchemy.exc import ArgumentError

        with contextlib.suppress(ArgumentError, ValueError):
            return make_url(text).render_as_string(hide_password=True)
        return text.split("://")[0] + "://..."
    return text


def _path_of(text: str) -> Path:
    if "://" not in text:
        return Path(text)
    path = text.removeprefix("sqlite:///")
    if path == text or path in ("", ":memory:"):
        raise ValueError(
            f"storage={text!r} names no file: write 'sqlite:///runs/study.db', or pass None for memory"
        )
    return Path(path)


def _sqlite(path: Path) -> BaseStorage:
    _check_file(path, "a SQLite database", _is_sqlite)
    from nnkit.search.relational import Relational

    # SQLAlchemy's pool hands a connection to one thread at a time, so no thread need own it.
    engine: dict[str, Any] = {"creator": functools.partial(_connect, str(path))}
    try:
        return _created(lambda: Relational(f"sqlite:///{path}", engine))
    except Exception as error:
        if isinstance(error, RuntimeError | ImportError):
            raise  # Tables of another version of Optuna: its message says what to do.
        raise OSError(f"cannot use the SQLite file {str(path)!r}: {_first_line(error)}") from error


def _connect(path: str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=_TIMEOUT, check_same_thread=False)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")
    return connection


def _journal(text: str) -> BaseStorage:
    path = Path(text)
    if not text:
        raise ValueError("storage='journal:' names no file: write 'journal:runs/study.log'")
    _check_file(path, "a journal of Optuna's", _is_journal)
    from nnkit.search.journal import Journal, WholeLines
    from nnkit.search.locks import MachineLock
    from nnkit.search.patience import patient

    return patient(Journal(WholeLines(str(path), lock_obj=MachineLock(str(path)))))


def _server(text: str) -> BaseStorage:
    kind, rest = text.split("://", 1)
    if kind in ("postgresql", "postgres", "postgresql+psycopg"):
        if importlib.util.find_spec("psycopg") is None:
            raise ImportError("a study on PostgreSQL needs psycopg: pip install 'nnkit[postgresql]'")
        text = f"postgresql+psycopg://{rest}"
    elif kind.split("+")[0] != "postgresql":
        raise ValueError(
            f"storage={shown(text)!r} is of no kind that is known: pass a path, 'journal:PATH' or "
            "'postgresql://USER@HOST/NAME'"
        )
    from nnkit.search.relational import Relational

    # A connection that a restart of the server has cut is noticed before it is used.
    engine: dict[str, Any] = {"pool_pre_ping": True, "connect_args": {"connect_timeout": 10}}
    _check_server(text, engine)
    try:
        return _created(lambda: Relational(text, engine))
    except Exception as error:
        if isinstance(error, RuntimeError | ImportError):
            raise
        raise ConnectionError(f"cannot use the storage {shown(text)}: {_first_line(error)}") from error


def _check_server(text: str, engine: dict[str, Any]) -> None:
    from sqlalchemy import create_engine
    from sqlalchemy.exc import ArgumentError, SQLAlchemyError

    try:
        probe = create_engine(text, **engine)
    except (ArgumentError, ValueError):
        raise ValueError(
            f"storage={shown(text)!r} is no address: write 'postgresql://USER:PASSWORD@HOST:PORT/NAME'"
        ) from None
    except ImportError as error:
        raise ImportError(f"the storage {shown(text)} needs a package: {error}") from None
    try:
        probe.connect().close()
    except SQLAlchemyError as error:
        raise ConnectionError(
            f"cannot reach the storage {shown(text)}: {_first_line(error)}; is the server running, and are host, "
            "port, user, password and the database's name right?"
        ) from error
    finally:
        probe.dispose()


def _created(make: Any) -> BaseStorage:
    """``make()``, again where another process is making the tables at the same moment.

    Two that find no table both make it, and the second one's attempt fails; when it looks again they are there.
    """
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError

    from nnkit.search.patience import patient

    of_a_race = IntegrityError, OperationalError, ProgrammingError, StorageInternalError, AssertionError

    for attempt in range(_ATTEMPTS):
        try:
            with quiet():
                return patient(make())
        except of_a_race:
            if attempt == _ATTEMPTS - 1:
                raise
            time.sleep(random.uniform(0.02, 0.1) * (attempt + 1))
    raise AssertionError("not reached")


_ATTEMPTS = 12


def _check_file(path: Path, what: str, is_one: Any) -> None:
    if path.is_dir():
        raise IsADirectoryError(
            f"storage={str(path)!r} is a folder: name a file in it, or pass run_dir={str(path)!r}"
        )
    if path.exists() and not is_one(path):
        raise ValueError(f"the file {str(path)!r} is not {what}: choose another name, or move it away")
    check_writable(path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)


def _is_sqlite(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(16) in (b"", b"SQLite format 3\0")


def _is_journal(path: Path) -> bool:
    with open(path, "rb") as file:
        begin = file.read(len(_JOURNAL))
    # A writer that was killed may have left less than that; a user's own JSON would be cut off as a half line.
    return _JOURNAL.startswith(begin)


_JOURNAL = b'{"op_code":'
"""How each line of Optuna's journals begins."""


def _first_line(error: BaseException) -> str:
    """What went wrong, without SQLAlchemy's own words around it."""
    cause: Any = error
    while cause.__cause__ is not None or getattr(cause, "orig", None) is not None:
        cause = getattr(cause, "orig", None) or cause.__cause__
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return lines[0].rstrip(".;") if lines else type(cause).__name__
