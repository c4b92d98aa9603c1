"""Checkpoints of a run: whole or absent, verified when read, written while the run goes on.

One folder holds those of one run, each a folder of its own (``nnkit.train.checkpoint_files``), and one
process at a time writes to it. Where several processes train together it is process 0, and all of them
see the folder.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from nnkit.checks import unknown_name
from nnkit.train import checkpoint_files as files
from nnkit.train.files import check_writable
from nnkit.train.host_copies import HostCopies
from nnkit.train.preflight import whole
from nnkit.train.saving import DamagedFileError, load_tree
from nnkit.types import PyTree

__all__ = ["Checkpoint", "CheckpointError", "Checkpoints", "restore", "steps"]

Mode = Literal["min", "max"]


class CheckpointError(OSError):
    """A checkpoint could not be written. What was written before it is as it was."""


class Checkpoint(NamedTuple):
    """A checkpoint that was read and verified.

    Attributes:
      path: its folder.
      step: the step after which it was saved.
      tree: what was saved.
      record: what was saved beside it.
    """

    path: Path
    step: int
    tree: PyTree
    record: dict[str, Any]


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
        self._mode: Mode = _checked_mode(mode, "Checkpoints(mode=...)")
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
        kept = {*_newest(known)[: self._keep_last], *_best(known, self._mode)[: self._keep_best]}
        files.discard(old for old in present if old not in kept)
        self._scores = {old: known[old] for old in kept}

    def _failure(self, what: str, error: Exception) -> CheckpointError:
        good = next((old for old in files.folders(self.folder) if _entry(old) is not None), None)
        last = (
            f"the last good checkpoint is {str(good)!r}" if good else "there is no good checkpoint before it"
        )
        why = getattr(error, "strerror", None) or error
        return CheckpointError(f"{what} in {str(self.folder)!r}: {why}; {last}")


def restore(
    folder: str | os.PathLike[str],
    like: PyTree,
    *,
    best: Mode | None = None,
    on_damaged: Callable[[str], object] | None = None,
) -> Checkpoint | None:
    """The newest checkpoint that is what was written, every byte verified; None where there is none.

    Args:
      folder: of :class:`Checkpoints`. Nothing in it is changed.
      like: a tree of the structure, shapes and dtypes of what was saved; see ``load_tree``. Arrays go
        where its arrays lie, or where its specs have a sharding.
      best: "min" or "max" for the checkpoint of the least or the greatest score instead of the newest.
        NaN is never best; where no checkpoint has a score there is none.
      on_damaged: called with a line of text for each checkpoint that is damaged, before an earlier one
        is tried; by default the line is a warning.

    Raises:
      DamagedFileError: there are checkpoints and all of them are damaged; the text says how.
      ValueError: the checkpoint is whole and does not fit ``like``; the text says which path differs.
      RuntimeError: processes that train together found different checkpoints.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as run:
    ...     train.restore(run, {}) is None
    True
    """
    best = None if best is None else _checked_mode(best, "restore(best=...)")
    damaged: list[str] = []

    def name(path: Path, reason: object) -> None:
        if os.path.lexists(path):  # Else the run, which goes on, has removed it meanwhile.
            text = f"the checkpoint {str(path)!r} is damaged and is not used: {reason}"
            damaged.append(text)
            warnings.warn(text, stacklevel=4) if on_damaged is None else on_damaged(text)

    present = files.folders(Path(folder))
    if best is not None:
        scored = {path: entry.score for path in present if (entry := _entry(path, name)) is not None}
        present = _best(scored, best)
    found = None
    for path in present:
        entry = _entry(path, name)
        if entry is None:
            continue
        try:
            tree = load_tree(path / files.STATE, like)
        except (DamagedFileError, FileNotFoundError) as error:
            name(path, error)
            continue
        found = Checkpoint(path, entry.step, jax.tree.map(_placed, tree, like), entry.record)
        break
    _check_agreed(folder, -1 if found is None else found.step)
    if found is None and damaged:
        raise DamagedFileError(
            f"no checkpoint in {str(folder)!r} can be used. {'. '.join(damaged)}. Take them from a backup, or start "
            "the run anew in another folder"
        )
    return found


def steps(folder: str | os.PathLike[str]) -> list[int]:
    """The steps of the checkpoints in ``folder``, the oldest first; they are not verified.

    >>> steps("no_such_run/checkpoints")
    []
    """
    return sorted({files.step_of(path) for path in files.folders(Path(folder))})


def _entry(path: Path, name: Callable[[Path, object], None] = lambda *_: None) -> files.Entry | None:
    """The entry of a checkpoint; of a damaged one None, and ``name`` is called."""
    try:
        return files.read_entry(path)
    except DamagedFileError as error:
        name(path, error)
        return None


def _scores(paths: list[Path]) -> dict[Path, float | None]:
    return {path: entry.score for path in paths if (entry := _entry(path)) is not None}


def _newest(paths: Mapping[Path, Any]) -> list[Path]:
    return sorted(paths, key=files.step_of, reverse=True)


def _best(scores: Mapping[Path, float | None], mode: Mode) -> list[Path]:
    """The checkpoints that have a score, the best first."""
    sign = 1 if mode == "min" else -1
    found = {
        path: sign * score for path, score in scores.items() if score is not None and not math.isnan(score)
    }
    return sorted(found, key=lambda path: (found[path], files.step_of(path)))


def _placed(leaf: Any, like: Any) -> Any:
    """A leaf that was read, on the devices on which ``like`` lies."""
    sharding = getattr(like, "sharding", None)
    if not isinstance(leaf, jax.Array) or sharding is None or sharding == leaf.sharding:
        return leaf
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = _placed(jax.random.key_data(leaf), jax.random.key_data(like))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    array = np.asarray(leaf)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _check_agreed(folder: Any, step: int) -> None:
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils  # Costs time to import, and few runs need it.

    seen = np.ravel(multihost_utils.process_allgather(np.int32(step)))
    if (seen != seen[0]).any():
        found = ", ".join("none" if s < 0 else str(s) for s in seen.tolist())
        raise RuntimeError(
            f"the processes found different newest checkpoints in {str(folder)!r} (steps {found}): "
            "put the run where all of them see the same files"
        )


def _checked_mode(mode: Any, what: str) -> Mode:
    if mode not in ("min", "max"):
        raise unknown_name(what, mode, ["min", "max"])
    return mode


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
