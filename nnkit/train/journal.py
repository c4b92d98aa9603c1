"""What a run writes while it runs: its rows and its checkpoints, in one folder."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from nnkit.train.checkpoints import Checkpoints, restore
from nnkit.train.files import is_leftover
from nnkit.train.position import Position, check_same_run
from nnkit.train.records import append_records, cut_records
from nnkit.train.runs import create_run, provenance, write_metrics
from nnkit.types import TrainState

__all__ = ["Journal", "checkpoints_of", "open_folder"]

_CLOCK = frozenset({"seconds"})
"""What a row has that differs from one run to the next; metrics.csv leaves it out."""


def checkpoints_of(folder: str | os.PathLike[str]) -> Path:
    """Where a run folder keeps its checkpoints."""
    return Path(folder) / "checkpoints"


def open_folder(
    run_dir: str | os.PathLike[str], config: Any, settings: Mapping[str, Any], resume: Any
) -> Path:
    """The run folder, made where it does not exist.

    A folder that has only a config.json, as ``create_run`` leaves it, is one in which nothing has run.
    """
    folder = Path(run_dir)
    present = {e.name for e in folder.iterdir() if not is_leftover(e)} if folder.is_dir() else set()
    if "config.json" in present and (resume or present == {"config.json"}):
        return folder
    if present and not resume and checkpoints_of(folder).is_dir():
        raise FileExistsError(
            f"the run folder {str(folder)!r} has a run in it: pass resume=True to go on with it, or another run_dir"
        )
    if jax.process_index() == 0:
        return create_run(folder, settings if config is None else config)
    return folder


class Journal:
    """The folder of one run, to go on from and to write to.

    Args:
      folder: from :func:`open_folder`.
      fingerprint: what tells this run from others, see :func:`nnkit.train.position.check_same_run`.
      config: what is put into each checkpoint as the configuration.
      options: ``keep_last``, ``keep_best`` and ``mode`` of :class:`Checkpoints`.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any], config: Any, **options: Any):
        self.folder = folder
        self._fingerprint, self._config = dict(fingerprint), config
        self._options = options
        self._store: Checkpoints | None = None
        self._provenance = provenance()  # once, since it asks git, which takes longer than a checkpoint

    def restore(self, like: TrainState, *, anyway: bool) -> Position | None:
        """Where the run was saved last; None where it never was."""
        found = restore(
            checkpoints_of(self.folder), like, on_damaged=lambda text: warnings.warn(text, stacklevel=2)
        )
        if found is None:
            return None
        check_same_run(found.record["fingerprint"], self._fingerprint, str(self.folder), anyway=anyway)
        return Position.restored(found.tree, found.record)

    def open(self, rows: list[dict[str, Any]]) -> None:
        """Begins to write: the files show these rows, and nothing of what came after them."""
        self._store = Checkpoints(checkpoints_of(self.folder), **self._options)
        self.show(rows)

    def show(self, rows: list[dict[str, Any]]) -> None:
        """Makes metrics.csv and metrics.jsonl hold these rows."""
        if jax.process_index() == 0:
            self._write(rows)
            cut_records(self.folder, rows[-1]["step"] if rows else 0)

    def _write(self, rows: list[dict[str, Any]]) -> None:
        bare = [{name: value for name, value in row.items() if name not in _CLOCK} for row in rows]
        if bare:
            write_metrics(self.folder, bare)
        else:
            (self.folder / "metrics.csv").unlink(missing_ok=True)

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Writes the last row to metrics.jsonl, and all to metrics.csv."""
        if jax.process_index() == 0:
            append_records(self.folder, rows[-1:])
            self._write(rows)

    def save(self, position: Position, *, score: float | None) -> None:
        """Begins a checkpoint; the state's buffers may be given up when it returns."""
        assert self._store is not None
        record = {**position.record(), "fingerprint": self._fingerprint, "config": self._config}
        self._store.save(
            int(position.ts.step), position.ts, record | {"provenance": self._provenance}, score=score
        )

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()

    def close(self) -> None:
        """Waits until all is on the disk."""
        if self._store is not None:
            self._store.close()
