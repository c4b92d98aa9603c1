"""metrics.jsonl: a line of JSON for each row of a run, with the time that metrics.csv leaves out.

A line is whole or it does not count: what a killed process left of its last one is passed over by the
reader and cut off by the next writer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nnkit.train.files import sync_folder, write_atomically
from nnkit.train.runs import plain
from nnkit.train.saving import DamagedFileError

__all__ = ["append_records", "complete_records", "cut_records", "read_records"]

_NAME = "metrics.jsonl"
_NOT_FINITE = frozenset({"nan", "inf", "-inf"})


def append_records(folder: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Appends a line for each of ``rows`` to metrics.jsonl and waits until the disk has them.

    All lines go in one write. Where it fails, on a full disk for instance, the file is cut back to what
    it was. Values are what ``write_result`` takes; floats read back as the same bits, and those that are
    not finite are written as "nan", "inf" and "-inf", since JSON has none.

    For one writer at a time.

    Raises:
      TypeError: a value that JSON has not; nothing is written.
      OSError: the disk refuses.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as run:
    ...     train.append_records(run, [{"epoch": 1, "step": 8, "loss": np.float32(0.5)}])
    ...     train.append_records(run, [{"epoch": 2, "step": 16, "loss": float("nan")}])
    ...     print(Path(f"{run}/metrics.jsonl").read_text().strip())
    ...     train.read_records(run)[1]
    {"epoch": 1, "step": 8, "loss": 0.5}
    {"epoch": 2, "step": 16, "loss": "nan"}
    {'epoch': 2, 'step': 16, 'loss': nan}
    """
    data = b"".join(_line(row, number) for number, row in enumerate(rows))
    if not data:
        return
    path = Path(folder) / _NAME
    try:
        new = not path.exists()
        with open(path, "ab+", buffering=0) as file:
            end = _end_of_whole_lines(file)
            try:
                file.truncate(end)
                if file.write(data) != len(data):
                    raise OSError(f"the disk took a part of the lines for {str(path)!r}: make room on it")
                os.fsync(file.fileno())
            except BaseException:
                file.truncate(end)
                raise
    except FileNotFoundError:
        raise FileNotFoundError(
            f"cannot write {str(path)!r}: the folder {str(folder)!r} does not exist; make it first"
        ) from None
    if new:
        sync_folder(path.parent)


def read_records(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; the texts "nan", "inf" and "-inf" come back as floats.

    A last line without its end, left by a process that was killed while it wrote, is no row.

    Raises:
      FileNotFoundError: there is no such file.
      DamagedFileError: a line that has its end is no JSON object; the message has its number.
    """
    return [row for _, row in _read(Path(folder) / _NAME)]


def cut_records(folder: str | os.PathLike[str], step: int) -> int:
    """Drops the rows whose ``step`` is beyond ``step``, and says how many; the file is whole at any moment.

    What a resumed run calls first: the steps behind its checkpoint will be taken, and written, again.
    Rows without a step stay. Without the file there is nothing to do.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as run:
    ...     train.append_records(run, [{"step": 8}, {"step": 16}, {"step": 24}])
    ...     train.cut_records(run, 16), train.read_records(run)
    (1, [{'step': 8}, {'step': 16}])
    """
    path = Path(folder) / _NAME
    if not path.exists():
        return 0
    rows = _read(path)
    kept = [line for line, row in rows if row.get("step", 0) <= step]
    if (content := b"".join(kept)) != path.read_bytes():  # a torn last line goes too
        write_atomically(path, content)
    return len(rows) - len(kept)


def complete_records(folder: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Makes metrics.jsonl hold these rows and no others, in their order; lines that are there stay as they are.

    A run that was stopped between a checkpoint and its rows has rows that the file has not.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as run:
    ...     train.append_records(run, [{"step": 8, "seconds": 1.5}, {"step": 24}])
    ...     complete_records(run, [{"step": 8}, {"step": 16}])
    ...     train.read_records(run)
    [{'step': 8, 'seconds': 1.5}, {'step': 16}]
    """
    path = Path(folder) / _NAME
    there = {row.get("step"): line for line, row in _read(path)} if path.exists() else {}
    lines = [there.get(row["step"]) or _line(row, number) for number, row in enumerate(rows)]
    content = b"".join(lines)
    if not path.exists() and not content:
        return
    if not path.exists() or content != path.read_bytes():
        write_atomically(path, content)


def _line(row: Mapping[str, Any], number: int) -> bytes:
    return (json.dumps(plain(row, f"row {number}"), allow_nan=False) + "\n").encode()


def _read(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Each whole line, its end included, and its row."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"no {path.name} in {str(path.parent)!r}: the run has recorded nothing, or the name is another"
        ) from None
    found = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"a {type(row).__name__} and no object")
        except ValueError as error:
            raise DamagedFileError(
                f"line {number} of {str(path)!r} is damaged ({error}): delete that line, or use metrics.csv"
            ) from None
        found.append((line + b"\n", {name: _number(value) for name, value in row.items()}))
    return found


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) and value in _NOT_FINITE else value


def _end_of_whole_lines(file: Any) -> int:
    """Where the last whole line of the file ends; looked for backwards, a block at a time."""
    at = file.seek(0, os.SEEK_END)
    while at > 0:
        start = max(0, at - 4096)
        file.seek(start)
        block = file.read(at - start)
        if (found := block.rfind(b"\n")) >= 0:
            return start + found + 1
        at = start
    return 0
