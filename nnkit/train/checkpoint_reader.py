"""The newest checkpoint that is what was written."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from nnkit.train import checkpoint_files as files
from nnkit.train.checkpoint_files import Mode
from nnkit.train.saving import DamagedFileError, load_tree
from nnkit.types import PyTree

__all__ = ["Checkpoint", "restore", "steps"]


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


def restore(
    folder: str | os.PathLike[str],
    like: PyTree,
    *,
    best: Mode | None = None,
    on_damaged: Callable[[str], object] | None = None,
    check: Callable[[dict[str, Any]], object] | None = None,
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
      check: called with a checkpoint's record before its tree is read; what it raises is raised.

    Raises:
      DamagedFileError: there are checkpoints and all of them are damaged; the text says how.
      ValueError: the checkpoint is whole and does not fit ``like``; the text says which path differs.
      RuntimeError: processes that train together found different checkpoints.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as run:
    ...     train.restore(run, {}) is None
    True
    """
    best = None if best is None else files.checked_mode(best, "restore(best=...)")
    damaged: list[str] = []

    def name(path: Path, reason: object) -> None:
        if os.path.lexists(path):  # Else the run, which goes on, has removed it meanwhile.
            text = f"the checkpoint {str(path)!r} is damaged and is not used: {reason}"
            damaged.append(text)
            warnings.warn(text, stacklevel=4) if on_damaged is None else on_damaged(text)

    present = files.folders(Path(folder))
    if best is not None:
        scored = {path: entry.score for path in present if (entry := files.readable(path, name)) is not None}
        present = files.best_first(scored, best)
    found = None
    for path in present:
        entry = files.readable(path, name)
        if entry is None:
            continue
        if check is not None:
            check(entry.record)
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
