"""Checkpoints of a run: whole or absent, verified when read, written while the run goes on.

One folder holds those of one run, each a folder of its own (``nnkit.train.checkpoint_files``), and one
process at a time writes to it. Where several processes train together it is process 0, and all of them
see the folder.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

from nnkit.train import checkpoint_files as files
from nnkit.train.checkpoint_files import Mode
from nnkit.train.checkpoint_reader import Checkpoint, restore, steps
from nnkit.train.files import check_writable
from nnkit.train.host_copies import HostCopies
from nnkit.train.preflight import whole
from nnkit.types import PyTree

__all__ = ["Checkpoint", "CheckpointError", "Checkpoints", "restore", "steps"]


class CheckpointError(OSError):
    """A checkpoint could not be written. What was written before it is as it was."""


class Checkpoints:
    """Saves the state of a run every so often, and keeps the last and the best of it.

    The host's copy is made in :meth:`save`, since the next step takes the state's buffers; hashing and
    writing are left to a thread. A process that ends by itself, by an exception too, ends after that
    thread. Opening removes what a killed process left half done.

    Args:
      folder: made with the folders above it.
      keep_last: how many of the newest are kept, at least 1. Two leave one to go back to when the newest
        is damaged.
      keep_best: how many of those with the best scores are kept beside them. NaN is never best; of equal
        scores the earlier is better.
      mode: whether the best score is the least ("min") or the greatest ("max").
      asynchronous: whether a thread writes. If not, :meth:`save` returns when all is on the disk.

    Raises:
      ValueError: an argument that cannot be meant.
      OSError: the folder cannot be written in; see :func:`nnkit.train.files.check_writable`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as run, train.Checkpoints(run, keep_last=2) as checkpoints:
    ...     for step in (100, 200, 300):
    ...         checkpoints.save(step, {"w": jnp.full(2, step)}, {"seed": 0})
    ...     checkpoints.wait()
    ...     found = train.restore(run, {"w": jnp.zeros(2, int)})
    >>> found.step, found.tree, found.record
    (300, {'w': Array([300, 300], dtype=int32)}, {'seed': 0})
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        keep_last: int = 2,
        keep_best: int = 0,
        mode: Mode = "min",
        asynchronous: bool = True,
    ):
        self.folder = Path(folder)
        self._keep_last = whole(keep_last, "Checkpoints(keep_last=...)")
        self._keep_best = 0 if _is_zero(keep_best) else whole(keep_best, "Checkpoints(keep_best=...)")
        self._mode: Mode = files.checked_mode(mode, "Checkpoints(mode=...)")
        self._writes = jax.process_index() == 0
        self._copies = HostCopies()
        self._thread = ThreadPoolExecutor(1, "checkpoints") if asynchronous else None
        self._pending: Future[None] | None = None
        self._closed = False
        self._scores: dict[Path, float | None] | None = None  # of those that are known to be whole
        if self._writes:
            check_writable(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            files.tidy(self.folder)

    def save(self, step: int, tree: PyTree, record: Mapping[str, Any], *, score: float | None = None) -> None:
        """Saves ``tree`` as the checkpoint of ``step``; the buffers of ``tree`` may then be given up.

        A checkpoint of the same step is replaced. Those of later steps, from which the run has gone back,
        are removed. Where several processes train together each of them makes this call, as arrays that
        are spread over them are gathered.

        Args:
          step: how many steps were taken.
          tree: any tree that ``save_tree`` takes.
          record: what else belongs to the moment, in JSON's types: tuples come back as lists. Floats come
            back to the bit, NaN too.
          score: by which ``keep_best`` goes.

        Raises:
          CheckpointError: the checkpoint before this one could not be written, or without a thread this one.
          ValueError, TypeError: an argument, or a leaf of the tree, that cannot be saved.
        """
        if self._closed:
            raise ValueError("these Checkpoints are closed: make others to go on saving")
        step = _checked_step(step)
        score = None if score is None else _checked_score(score)
        text = files.record_text(step, score, record)
        self.wait()  # The thread reads the memory which the copy goes to.
        copy = self._copies.copy(tree, keep=self._writes)
        if not self._writes:
            return
        if self._thread is None:
            self._write(step, copy, text, score)
        else:
            self._pending = self._thread.submit(self._write, step, copy, text, score)

    def wait(self) -> None:
        """Returns when all that was saved is on the disk; raises :class:`CheckpointError` where it is not."""
        pending = self._pending
        if pending is not None:
            try:
                pending.result()
            finally:
                if pending.done():  # Ctrl-C may have come first.
                    self._pending = None

    def close(self) -> None:
        """Like :meth:`wait`, and gives the thread and the host's memory back."""
        try:
            self.wait()
        finally:
            self._closed = True
            self._copies.forget()
            if self._thread is not None:
                self._thread.shutdown()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except CheckpointError as ours:
            if error is None:
                raise
            error.add_note(str(ours))  # It would hide what ended the run.

    def _write(self, step: int, copy: PyTree, text: str, score: float | None) -> None:
        try:
            path = files.write(self.folder, step, copy, text)
        except Exception as error:
            raise self._failure(f"the checkpoint of step {step} could not be written", error) from error
        try:
            self._remove_old(path, score)
        except Exception as error:
            raise self._failure(f"checkpoints older than step {step} could not be removed", error) from error

    def _remove_old(self, path: Path, score: float | None) -> None:
        present = files.folders(self.folder)
        if self._scores is None:
            self._scores = _scores([old for old in present if old != path])
        self._scores[path] = score
        step = files.step_of(path)
        known = {old: s for old, s in self._scores.items() if old in present and files.step_of(old) <= step}
        kept = {*_newest(known)[: self._keep_last], *files.best_first(known, self._mode)[: self._keep_best]}
        files.discard(old for old in present if old not in kept)
        self._scores = {old: known[old] for old in kept}

    def _failure(self, what: str, error: Exception) -> CheckpointError:
        good = next((old for old in files.folders(self.folder) if files.readable(old) is not None), None)
        last = (
            f"the last good checkpoint is {str(good)!r}" if good else "there is no good checkpoint before it"
        )
        why = getattr(error, "strerror", None) or error
        return CheckpointError(f"{what} in {str(self.folder)!r}: {why}; {last}")


def _scores(paths: list[Path]) -> dict[Path, float | None]:
    return {path: entry.score for path in paths if (entry := files.readable(path)) is not None}


def _newest(paths: Mapping[Path, Any]) -> list[Path]:
    return sorted(paths, key=files.step_of, reverse=True)


def _is_zero(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value == 0


def _checked_step(step: Any) -> int:
    if isinstance(step, bool) or not isinstance(step, int | np.integer) or not 0 <= step < 2**31:
        raise ValueError(f"save(step=...) must be a whole number from 0 to {2**31 - 1}, got {step!r}")
    return int(step)


def _checked_score(score: Any) -> float:
    is_number = isinstance(score, int | float) and not isinstance(score, bool)
    if not is_number and getattr(score, "shape", None) != ():
        raise TypeError(f"save(score=...) must be one number or None, got {score!r}")
    return float(score)
