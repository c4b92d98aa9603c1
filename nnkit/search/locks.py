"""The lock of a journal file, which a worker that was killed or stopped does not keep from the others."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
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
    machine holds the other one, and takes it away at once. A process that is stopped while it holds the kernel's
    lock keeps the others waiting for a minute (twice ``grace_period``), once.
    """

    def __init__(self, path: str):
        super().__init__(path)
        self._guard_file, self._guard = f"{path}.guard", -1
        self._mine = ""

    def acquire(self) -> bool:
        self._guard = self._enter()
        try:
            if self._guard >= 0 and self._read().split()[:1] == [this_machine()]:
                with contextlib.suppress(RuntimeError):
                    super().release()
            super().acquire()
            mine = f"{this_machine() or '-'} {secrets.token_hex(8)}"
            # Not made anew: it is gone where another machine has already waited for too long.
            with contextlib.suppress(FileNotFoundError), open(self._lock_file, "r+") as file:
                file.write(mine)
            self._mine = mine
        except BaseException:
            self._leave()
            raise
        return True

    def release(self) -> None:
        if not self._mine:
            super().release()  # By Optuna's acquire, which takes away what has been forgotten.
            return
        mine, self._mine = self._mine, ""
        # One that others have taken away, and have themselves by now, is not given back in their name.
        if self._read() == mine:
            with contextlib.suppress(RuntimeError):
                super().release()
        self._leave()

    def _enter(self) -> int:
        """The kernel's lock of the guard file; -1 where there are none."""
        if fcntl is None or this_machine() is None:
            return -1
        seen, since, pause = None, time.monotonic(), 0.0005
        while True:
            guard = os.open(self._guard_file, os.O_CREAT | os.O_RDWR, 0o666)
            try:
                fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_guard(guard):
                    return guard
                os.close(guard)  # Given up by others between the opening and the lock.
                continue
            except BlockingIOError:
                sign = os.fstat(guard).st_ino, self._read()
                os.close(guard)
            except OSError:
                os.close(guard)  # A file system without such locks.
                return -1
            except BaseException:
                os.close(guard)
                raise
            if sign != seen:  # Those who hold it come and go.
                seen, since = sign, time.monotonic()
            # Twice: one that waits for another machine's lock is not stopped.
            if self.grace_period is not None and time.monotonic() - since > 2 * self.grace_period:
                Path(self._guard_file).unlink(missing_ok=True)
            time.sleep(pause)
            pause = min(2 * pause, 0.01)

    def _is_guard(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), os.stat(self._guard_file))
        except FileNotFoundError:
            return False

    def _leave(self) -> None:
        if self._guard >= 0:
            os.close(self._guard)
        self._guard = -1

    def _read(self) -> str:
        try:
            return Path(self._lock_file).read_text()
        except OSError:
            return ""
