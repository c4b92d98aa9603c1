"""A journal whose writers may be killed in the middle of a line."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any, BinaryIO

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import get_lock_file
from optuna.storages.journal._storage import JournalOperation
from optuna.trial import TrialState

__all__ = ["Journal", "WholeLines"]


class Journal(JournalStorage):
    """Optuna's storage on a journal, which does not take a claim of long ago for one of now.

    Whether a claim was the first one Optuna reads off the trial that this thread had last. A worker that was
    taken for dead and claims the same trial anew would be told yes, even if another one was faster.
    """

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        result = self._replay_result
        result._worker_id_to_owned_trial_id.pop(result.worker_id, None)
        return super().set_trial_state_values(trial_id, state, values)


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
