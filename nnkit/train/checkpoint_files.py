"""The folder of one checkpoint: how it is written, verified, replaced and removed.

A folder ``step_000001200`` holds ``state.npz`` (of ``save_tree``), ``run.json`` and ``SHA256SUMS`` of
both, which ``sha256sum -c`` reads too. It is made under another name and renamed when all of it is on
the disk, so that a folder under its own name is whole unless something damaged it later.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnkit.checks import unknown_name
from nnkit.train.files import is_leftover, sync_folder, unused_name, write_atomically
from nnkit.train.runs import plain
from nnkit.train.saving import DamagedFileError, save_tree
from nnkit.types import PyTree

__all__ = [
    "STATE",
    "Entry",
    "Mode",
    "best_first",
    "checked_mode",
    "discard",
    "folders",
    "read_entry",
    "readable",
    "record_text",
    "step_of",
    "tidy",
    "write",
]

Mode = Literal["min", "max"]

STATE, _RECORD, _SUMS = "state.npz", "run.json", "SHA256SUMS"
_FORMAT = "nnkit checkpoint 1"
_NAME = re.compile(r"step_(\d{9,})(\.replaced)?")


class Entry(NamedTuple):
    """What run.json says.

    Attributes:
      step: the checkpoint's.
      score: by which the best are told, or None.
      record: what was saved beside the tree.
    """

    step: int
    score: float | None
    record: dict[str, Any]


def record_text(step: int, score: float | None, record: Mapping[str, Any]) -> str:
    """The contents of run.json. Floats keep their bits, and NaN is written as Python's json reads it.

    >>> print(record_text(3, 0.5, {"rows": [{"loss": np.float32(0.1)}]}).replace(chr(10), ""))
    {"format": "nnkit checkpoint 1","step": 3,"score": 0.5,"record": {"rows": [{"loss": 0.10000000149011612}]}}
    """
    if not isinstance(record, Mapping):
        raise TypeError(f"a checkpoint's record is a dict of JSON's types, got {type(record).__name__}")
    try:
        text = json.dumps(dict(record), default=_in_json)
    except TypeError:
        plain(record, "record")  # Its error says where in the record.
        raise
    parts = {"format": _FORMAT, "step": step, "score": score}
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in parts.items()]
    return "{" + ",\n".join([*lines, f'"record": {text}']) + "}\n"


def _in_json(value: Any) -> Any:
    is_array = isinstance(value, jax.Array | np.ndarray | np.generic)
    if is_array and not jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return np.asarray(value).tolist()
    return plain(value, "record")


def folders(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, damaged or not, the newest first.

    One that was being replaced when its process was killed comes after the one that replaced it.
    """
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (step_of(path), not _is_replaced(path)), reverse=True)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name.

    >>> step_of(Path("run/checkpoints/step_000001200"))
    1200
    """
    name = _NAME.fullmatch(path.name)
    assert name is not None
    return int(name[1])


def _is_replaced(path: Path) -> bool:
    return path.suffix == ".replaced"


def write(folder: Path, step: int, tree: PyTree, text: str) -> Path:
    """Writes a checkpoint, in place of an earlier one of the same step; returns its path.

    After an exception nothing of it is left, and what was there is there.
    """
    target = folder / f"step_{step:09d}"
    replaced = folder / f"{target.name}.replaced"
    temporary = unused_name(folder)
    try:
        temporary.mkdir()
        save_tree(temporary / STATE, tree)
        write_atomically(temporary / _RECORD, text.encode())
        write_atomically(temporary / _SUMS, _sums(temporary).encode())
        if os.path.lexists(target):
            discard([replaced])
            os.rename(target, replaced)
        os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if os.path.lexists(replaced) and not os.path.lexists(target):
            os.rename(replaced, target)
        raise
    sync_folder(folder)
    discard([replaced])
    return target


def discard(paths: Iterable[Path]) -> None:
    """Removes checkpoints. Each is renamed first: what is half removed looks like no checkpoint."""
    doomed = []
    for path in paths:
        if os.path.lexists(path):
            os.rename(path, temporary := unused_name(path.parent))
            doomed.append(temporary)
    if doomed:
        sync_folder(doomed[0].parent)
    for path in doomed:
        _remove(path)


def tidy(folder: Path) -> None:
    """Removes what killed processes left half written, half removed or half replaced."""
    for path in folder.iterdir():
        if is_leftover(path):
            _remove(path)
    for path in folders(folder):
        if _is_replaced(path):
            if os.path.lexists(path.with_suffix("")):
                discard([path])
            else:
                os.rename(path, path.with_suffix(""))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        # What cannot be removed now is removed by the next process that opens the folder.
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sums(folder: Path) -> str:
    return "".join(_line(name, _digest(folder / name)) for name in (STATE, _RECORD))


def _line(name: str, digest: str) -> str:
    return f"{digest}  {name}\n"  # As sha256sum writes it.


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_entry(path: Path) -> Entry:
    """Verifies a checkpoint, every byte of it, and returns what its run.json says.

    Raises:
      DamagedFileError: in words that follow on the checkpoint's name.
      ValueError: it is whole, and of a format that this function does not know.
    """
    try:
        sums = (path / _SUMS).read_bytes()
        text = (path / _RECORD).read_bytes()
        digests = {STATE: _digest(path / STATE), _RECORD: hashlib.sha256(text).hexdigest()}
    except OSError as error:
        name = Path(error.filename or path).name
        reason = f"{name} is missing" if isinstance(error, FileNotFoundError) else f"{name}: {error.strerror}"
        raise DamagedFileError(reason) from error
    lines = {name: _line(name, digest).encode() for name, digest in digests.items()}
    if sums != b"".join(lines.values()):
        wrong = [name for name, line in lines.items() if line not in sums]
        what = f"{' and '.join(wrong)} or the SHA-256" if wrong else "the text"
        raise DamagedFileError(f"{what} in {_SUMS} is not what was written")
    try:
        entry = json.loads(text)
        written_as = entry["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFileError(f"{_RECORD} is not what a checkpoint has ({error})") from error
    if written_as != _FORMAT:
        raise ValueError(
            f"the checkpoint {str(path)!r} has the format {written_as!r}, which this nnkit does not read: "
            "use the version that wrote it"
        )
    if entry["step"] != step_of(path):
        raise DamagedFileError(f"it is the checkpoint of step {entry['step']} under another name")
    return Entry(entry["step"], entry["score"], entry["record"])


def readable(path: Path, name: Callable[[Path, object], None] = lambda *_: None) -> Entry | None:
    """The entry of a checkpoint; of a damaged one None, and ``name`` is called."""
    try:
        return read_entry(path)
    except DamagedFileError as error:
        name(path, error)
        return None


def best_first(scores: Mapping[Path, float | None], mode: Mode) -> list[Path]:
    """The checkpoints that have a score, the best first."""
    sign = 1 if mode == "min" else -1
    found = {
        path: sign * score for path, score in scores.items() if score is not None and not math.isnan(score)
    }
    return sorted(found, key=lambda path: (found[path], step_of(path)))


def checked_mode(mode: Any, what: str) -> Mode:
    """``mode``, or an error that names the argument."""
    if mode not in ("min", "max"):
        raise unknown_name(what, mode, ["min", "max"])
    return mode
