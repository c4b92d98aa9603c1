"""The lock of a journal file, which a killed worker does not keep from the others of its machine."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from optuna.storages.journal import JournalFileOpenLock

from nnkit.search.presence import this_machine

try:
    import fcntl
except ImportError:  # Windows: Optuna's lock alone.
    fcntl = None

__all__ = ["MachineLock"]


class MachineLock(JournalFileOpenLock):
    """Optuna's lock between machines, inside one of the kernel's between the processes of this machine.

    Optuna's is a file that is there or not, which works on every network file system; but one whose owner was
    killed is there for 30 seconds, until the others take it for forgotten. Here it has the machine's name in
    it: whoever holds the kernel's lock, which goes with its process, knows that no living process of this
    machine holds the other one, and takes it away at once.
    """

    def __init__(self, path: str):
        super().__init__(path)
        self._guard_file, self._guard = f"{path}.guard", -1

    def acquire(self) -> bool:
        self._guard = self._enter()
        try:
            if self._guard >= 0 and self._is_of_this_machine():
                super().release()
            super().acquire()
            with open(self._lock_file, "w") as file:
                file.write(this_machine() or "")
        except BaseException:
            self._leave()
            raise
        return True

    def release(self) -> None:
        # Gone where another machine has waited for 30 seconds: what was to be written is.
        with contextlib.suppress(RuntimeError):
            super().release()
        self._leave()

    def _enter(self) -> int:
        if fcntl is None or this_machine() is None:
            return -1
        guard = os.open(self._guard_file, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            fcntl.flock(guard, fcntl.LOCK_EX)
        except OSError:
            os.close(guard)  # A file system without such locks.
            return -1
        except BaseException:
            os.close(guard)
            raise
        return guard

    def _leave(self) -> None:
        if self._guard >= 0:
            os.close(self._guard)
        self._guard = -1

    def _is_of_this_machine(self) -> bool:
        try:
            return Path(self._lock_file).read_text() == this_machine()
        except OSError:
            return False
