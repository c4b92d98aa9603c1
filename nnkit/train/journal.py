"""What a run writes while it runs: its rows and its checkpoints, in one folder."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from nnkit.train.checkpoints import Checkpoints, restore
from nnkit.train.files import is_leftover
from nnkit.train.position import Position, check_program, check_settings
from nnkit.train.records import append_records, complete_records
from nnkit.train.runs import create_run, plain, provenance, write_metrics
from nnkit.types import TrainState

__all__ = ["Journal", "checkpoints_of", "open_folder"]

_CLOCK = frozenset({"seconds"})
"""What a row has that differs from one run to the next; metrics.csv leaves it out."""
_SECONDS = 1.0
"""How long rows wait to be written together: putting a file on the disk takes as long as a short epoch."""


def checkpoints_of(folder: str | os.PathLike[str]) -> Path:
    """Where a run folder keeps its checkpoints."""
    return Path(folder) / "checkpoints"


def open_folder(run_dir: str | os.PathLike[str], config: Any, resume: bool | str) -> Path:
    """The run folder, made where it does not exist.

    A folder that has only a config.json, as ``create_run`` leaves it, is one in which nothing has run.
    """
    folder = Path(run_dir)
    present = {e.name for e in folder.iterdir() if not is_leftover(e)} if folder.is_dir() else set()
    if "config.json" in present and (resume or present == {"config.json"}):
        return folder
    if present:
        what = "a run" if checkpoints_of(folder).is_dir() else f"something that is no run ({min(present)!r})"
        way = "pass resume=True to go on with it, or another run_dir"
        if resume or "config.json" not in present:
            what, way = f"{what} and no config.json", "choose another run_dir"
        raise FileExistsError(f"the run folder {str(folder)!r} has {what} in it: {way}")
    return create_run(folder, config) if jax.process_index() == 0 else folder


class Journal:
    """The folder of one run, to go on from and to write to.

    Args:
      folder: from :func:`open_folder`.
      fingerprint: what tells this run from others, see :func:`nnkit.train.position.check_settings`.
      config: what is put into each checkpoint as the configuration.
      options: ``keep_last``, ``keep_best`` and ``mode`` of :class:`Checkpoints`.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any], config: Any, **options: Any):
        self.folder = folder
        # As config.json has it, so that what could be written there can be written into a checkpoint.
        self._fingerprint, self._config = dict(fingerprint), plain(config, "config")
        self._options = options
        self._store: Checkpoints | None = None
        self._rows: list[dict[str, Any]] = []
        self._written, self._written_at = 0, 0.0
        self._provenance = provenance()  # once, since it asks git, which takes longer than a checkpoint

    def restore(self, like: TrainState, *, anyway: bool) -> Position | None:
        """Where the run was saved last; None where it never was."""

        where = str(self.folder)
        found = restore(
            checkpoints_of(self.folder),
            like,
            on_damaged=lambda text: warnings.warn(text, stacklevel=2),
            check=lambda record: check_settings(
                record["fingerprint"], self._fingerprint, where, anyway=anyway
            ),
        )
        if found is None:
            return None
        check_program(found.record["fingerprint"], self._fingerprint, where, anyway=anyway)
        return Position.restored(found.tree, found.record)

    def open(self, rows: list[dict[str, Any]]) -> None:
        """Begins to write: the files show these rows, and nothing of what came after them."""
        self._store = Checkpoints(checkpoints_of(self.folder), **self._options)
        self.show(rows)

    def show(self, rows: list[dict[str, Any]]) -> None:
        """Makes metrics.csv and metrics.jsonl hold these rows, and goes on from there."""
        self._rows, self._written = rows, len(rows)
        if jax.process_index() == 0:
            self._write_table()
            complete_records(self.folder, rows)

    def append(self, row: dict[str, Any]) -> None:
        """One more row, which is in the files within a second, and before the next checkpoint."""
        self._rows = [*self._rows, row]
        if time.monotonic() - self._written_at > _SECONDS:
            self._flush()

    def _flush(self) -> None:
        if jax.process_index() == 0 and self._written < len(self._rows):
            append_records(self.folder, self._rows[self._written :])
            self._write_table()
        self._written, self._written_at = len(self._rows), time.monotonic()

    def _write_table(self) -> None:
        bare = [{name: value for name, value in row.items() if name not in _CLOCK} for row in self._rows]
        if bare:
            write_metrics(self.folder, bare)
        else:
            (self.folder / "metrics.csv").unlink(missing_ok=True)

    def save(self, position: Position, *, score: float | None) -> None:
        """Begins a checkpoint; the state's buffers may be given up when it returns."""
        assert self._store is not None
        self._flush()
        record = {**position.record(), "fingerprint": self._fingerprint, "config": self._config}
        self._store.save(
            int(position.ts.step), position.ts, record | {"provenance": self._provenance}, score=score
        )

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            self.close()
        except Exception as second:
            if error is None:
                raise
            error.add_note(str(second))  # what ended the run comes first

    def close(self) -> None:
        """Waits until all is on the disk."""
        if self._store is not None:
            self._flush()
            self._store.close()
