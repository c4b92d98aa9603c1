"""A journal whose writers may be killed in the middle of a line."""

from __future__ import annotations

import json
import os
from typing import Any, BinaryIO

from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import get_lock_file
from optuna.storages.journal._storage import JournalOperation

__all__ = ["WholeLines"]


class WholeLines(JournalFileBackend):
    """Optuna's journal file, which takes away the half line that a killed writer has left.

    The kernel may end a write of more than a page in its middle when the process is killed, and a trial's
    history is longer than that. The next line would be glued to the half one, and nobody could read on.
    """

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        # Under the lock nobody else is writing: a last line without an end has nobody who will end it. Where the
        # lock was taken from a writer that had only stalled, appending keeps the lines of both.
        with get_lock_file(self._lock), open(self._file_path, "ab+") as file:
            _remove_half_line(file)
            file.write(lines.encode())
            file.flush()
            # What a trial is being asked and told goes to the disk with the line that ends it, not four times
            # before: a killed process loses nothing of it, and a power failure trials that had not ended.
            if any(log["op_code"] not in _OF_A_RUNNING_TRIAL or "state" in log for log in logs):
                os.fsync(file.fileno())


def _remove_half_line(file: BinaryIO) -> None:
    """Takes away what comes after the last whole line of ``file``."""
    size = end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - _BLOCK)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        end = start if found < 0 else start + found + 1
        if found >= 0:
            break
    if end < size:
        file.truncate(end)


_BLOCK = 4096
_OF_A_RUNNING_TRIAL = {
    JournalOperation.CREATE_TRIAL,
    JournalOperation.SET_TRIAL_PARAM,
    JournalOperation.SET_TRIAL_INTERMEDIATE_VALUE,
    JournalOperation.SET_TRIAL_USER_ATTR,
}
