"""Whether a process of this machine still lives: a lock that the kernel takes away with the process."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: others know a worker by its beats alone.
    fcntl = None

__all__ = ["Presence", "is_gone", "this_machine"]


class Presence:
    """A file in the folder for temporary files that this process holds locked until it ends, however it ends.

    A number of a process says less: it is used again, it means something else in another container, and a
    killed process keeps it until its parent looks. The lock is gone at once, and containers that do not see
    each other's files say nothing about each other.
    """

    def __init__(self, name: str):
        self._path = _path(name)
        self._file: int | None = None
        if fcntl is None:
            return
        try:
            self._file = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.close()  # No such folder, or one without locks: the worker is known by its beats alone.

    def close(self) -> None:
        if self._file is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = None


def is_gone(name: str, machine: str | None) -> bool:
    """Whether the process that made ``Presence(name)`` on ``machine`` has surely ended.

    False where it lives, and where that cannot be seen from here: on another machine, or in a container that
    has another folder for temporary files.
    """
    here = this_machine()
    if fcntl is None or here is None or machine != here:
        return False
    try:
        file = os.open(_path(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        # Shared: of several that look at once none takes another one for the process itself.
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(file)
    return True


def this_machine() -> str | None:
    """The kernel's own name of its run since it was started; None where it has none.

    Host names do not tell machines apart: containers on different ones are often called alike.
    """
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() or None
    except OSError:
        return None


def _path(name: str) -> Path:
    return Path(tempfile.gettempdir()) / f"nnkit-{Path(name).name}.lock"
