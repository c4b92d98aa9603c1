"""A storage that outlives a restart of its server, and whose claims are atomic on SQLite too."""

from __future__ import annotations

import errno
import functools
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from optuna.storages import BaseStorage, RDBStorage, get_storage

__all__ = ["CALLS", "PatientStorage", "patient"]


def patient(storage: BaseStorage, *, seconds: float = 60.0) -> BaseStorage:
    """``storage``, whose calls wait for a server that is away: each is tried again for some ``seconds``.

    What is tried again is what a lost connection, a restarting server, a deadlock or a busy file has ended;
    all other errors pass at once, those of the database in one line.

    A call whose answer was lost may have been done, and is then done twice: a
    trial that was created so has an owner who finds it (:class:`nnkit.search.Lease`), all others set something
    to what it was set to.

    On SQLite the calls that write take the lock of the file before they read. Optuna's own read first and lock
    later, so that two processes can both find a trial waiting and both start it: 3 of 100 trials with three
    processes that asked as fast as they could.

    Raises:
      ConnectionError: at a call, when the storage has not answered for so long.
      OSError: at a call, when it refuses: its disk is full, or it may only be read.

    >>> import optuna
    >>> storage = patient(optuna.storages.InMemoryStorage())
    >>> storage.get_all_studies()
    []
    """
    if isinstance(storage, PatientStorage):
        return storage
    inner = get_storage(storage)
    backend = getattr(inner, "_backend", None)
    if isinstance(backend, RDBStorage) and backend.engine.dialect.name == "sqlite":
        _lock_before_reading(backend.engine)
    return PatientStorage(inner, seconds)


def _patiently(name: str) -> Callable[..., Any]:
    writes = not name.startswith("get_")

    # updated=(): not the mark that it is abstract.
    @functools.wraps(getattr(BaseStorage, name), updated=())
    def call(self: PatientStorage, *args: Any, **kwargs: Any) -> Any:
        method = getattr(self.inner, name)
        began, pause = time.monotonic(), 0.05
        while True:
            _thread.writes = writes
            try:
                return method(*args, **kwargs)
            except Exception as error:
                if not _passes_by_itself(error):
                    if not _refuses(error):
                        raise
                    raise OSError(
                        f"the study's storage refuses: {_innermost(error)}; what was told before is kept"
                    ) from error
                waited = time.monotonic() - began
                if waited + pause > self.seconds:
                    raise ConnectionError(
                        f"the study's storage has not answered for {waited:.0f} s ({_innermost(error)}): what was "
                        "told before is kept; start again to go on when it is back"
                    ) from error
            finally:
                _thread.writes = False
            # Random, or workers that were cut off together would come back together.
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(1.5 * pause, 2.0)

    return call


CALLS = tuple(name for name in vars(BaseStorage) if name[0] != "_")
"""What a storage can be asked for."""

_Calls: Any = type("_Calls", (BaseStorage,), {name: _patiently(name) for name in CALLS})
_thread = threading.local()


class PatientStorage(_Calls):
    """What :func:`patient` returns: every call of a storage, made patiently on ``inner``."""

    def __init__(self, inner: BaseStorage, seconds: float):
        self.inner, self.seconds = inner, seconds

    def __reduce__(self) -> tuple[Any, ...]:
        # SQLite's engine is made anew where it is unpickled, and must be told again when to lock.
        return functools.partial(patient, seconds=self.seconds), (self.inner,)


def _lock_before_reading(engine: Any) -> None:
    from sqlalchemy import event

    @event.listens_for(engine, "connect")
    def leave_transactions_to_us(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # Python's sqlite3 would begin at the first write, after the reads.

    @event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE" if getattr(_thread, "writes", False) else "BEGIN")

    engine.dispose()  # Connections that were opened before begin as they did.


def _passes_by_itself(error: BaseException) -> bool:
    from sqlalchemy import exc

    for cause in _causes(error):
        if isinstance(cause, exc.DBAPIError):
            if cause.connection_invalidated:
                return True
            if isinstance(cause, exc.OperationalError | exc.InterfaceError):
                # SQLite says of a missing table, too, that it is operational.
                of_sqlite = type(cause.orig).__module__.startswith("sqlite3")
                return not of_sqlite or any(word in str(cause.orig) for word in ("locked", "busy"))
        if isinstance(cause, exc.TimeoutError | ConnectionError | TimeoutError):
            return True
        if isinstance(cause, OSError) and cause.errno in _OF_NETWORK_FILES:
            return True
    return False


_OF_NETWORK_FILES = {errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EINTR, errno.ENOLCK}


def _refuses(error: BaseException) -> bool:
    """Whether it is the database or the file that could not do it, and not that nobody should have asked."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy import exc

    return isinstance(error, StorageInternalError | exc.SQLAlchemyError | OSError)


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _innermost(error: BaseException) -> str:
    *_, last = _causes(error)
    text = str(last).strip()
    return text.splitlines()[0] if text else type(last).__name__
