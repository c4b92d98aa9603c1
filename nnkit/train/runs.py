"""The folder that a run leaves: config.json, metrics.csv, result.json, each whole or absent.

config.json says what is needed to do the run again: the settings, the versions, the device, the
revision of the code. metrics.csv has one row an epoch and gives back the very bits.
"""

from __future__ import annotations

import csv
import dataclasses
import enum
import importlib.metadata
import io
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnkit.train.files import check_writable, is_leftover, remove_leftovers, write_atomically

__all__ = [
    "create_run",
    "plain",
    "provenance",
    "read_config",
    "read_metrics",
    "read_result",
    "write_metrics",
    "write_result",
]

_ALWAYS = ("jax", "jaxlib", "numpy", "nnkit")
# Distribution by module: recorded where the run has imported them.
_IF_IMPORTED = {
    "optax": "optax",
    "flax": "flax",
    "sklearn": "scikit-learn",
    "tensorflow_datasets": "tensorflow-datasets",
    "torch": "torch",
}


def create_run(
    folder: str | os.PathLike[str], config: Any, *, seed: int | None = None, overwrite: bool = False
) -> Path:
    """Makes the run folder and writes its config.json: the settings and :func:`provenance`.

    Args:
      folder: made with the folders above it.
      config: the settings, a dict or a dataclass, nested as they like, of numbers, strings, paths,
        enums, None and small arrays.
      seed: the run's seed; by default what ``config`` has under ``seed``.
      overwrite: whether an earlier run in this folder may be deleted with all its files. A folder
        that holds something else is never deleted.

    Raises:
      FileExistsError: the folder has files in it, and ``overwrite`` is False or it is no run folder.
      TypeError: a setting cannot be written as JSON; the message names it.
      OSError: the folder cannot be written in; see :func:`nnkit.train.files.check_writable`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as parent:
    ...     run = create_run(f"{parent}/first", {"epochs": 14, "seed": 0})
    ...     sorted(read_config(run))
    ['command', 'config', 'device', 'git', 'platform', 'seed', 'started', 'versions']
    """
    settings = plain(config, "config")
    if not isinstance(settings, dict):
        raise TypeError(f"config must be a dict or a dataclass, got {type(config).__name__}")
    record = {"config": settings, "seed": settings.get("seed") if seed is None else int(seed), **provenance()}
    check_writable(folder)
    run = Path(folder)
    run.mkdir(parents=True, exist_ok=True)
    present = sorted(entry.name for entry in run.iterdir() if not is_leftover(entry))
    if present and not overwrite:
        raise FileExistsError(
            f"the run folder {str(folder)!r} is not empty: choose another name, or pass overwrite=True "
            "to delete what is in it"
        )
    if present and not _is_run(run):
        raise FileExistsError(
            f"the folder {str(folder)!r} holds something that is no run ({present[0]!r}) and is not deleted: "
            "choose another name"
        )
    remove_leftovers(run)
    # config.json goes last: an overwriting that was interrupted can be taken up again.
    for name in sorted(present, key=lambda name: name == "config.json"):
        entry = run / name
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    _write_json(run / "config.json", record)
    return run


def provenance() -> dict[str, Any]:
    """Where and with what this process runs, as plain values: what config.json has beside the settings.

    ``git`` is about the working directory; revision and dirty are None outside a repository. The
    number of cores is there because sums on one core and on several can differ in the last bits.
    """
    versions = {"python": platform.python_version()} | {name: _version(name) for name in _ALWAYS}
    versions |= {name: _version(name) for module, name in _IF_IMPORTED.items() if module in sys.modules}
    devices = jax.devices()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "command": _command(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": _git(),
        "versions": versions,
        "device": {
            "backend": jax.default_backend(),
            "kind": devices[0].device_kind,
            "count": len(devices),
            "processes": jax.process_count(),
            "x64": bool(jax.config.read("jax_enable_x64")),
        },
        "platform": {"system": platform.platform(), "machine": platform.machine(), "cores": cores},
    }


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The contents of config.json; the settings are under ``config``."""
    return json.loads(_read_text(Path(folder) / "config.json", "it is not a run folder"))


def write_result(folder: str | os.PathLike[str], result: Mapping[str, Any]) -> None:
    """Writes result.json: nested dicts and lists of numbers and strings.

    JSON has no NaN: floats that are not finite become "nan", "inf" and "-inf", which ``float`` reads.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as run:
    ...     write_result(run, {"test_accuracy": np.float32(0.5), "test_loss": float("nan")})
    ...     read_result(run)
    {'test_accuracy': 0.5, 'test_loss': 'nan'}
    """
    _write_json(Path(folder) / "result.json", plain(result, "result"))


def read_result(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The contents of result.json."""
    return json.loads(_read_text(Path(folder) / "result.json", "the run has not ended"))


def write_metrics(folder: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes metrics.csv: a row for each of ``rows``, a column for each name in the order of first sight.

    Values are numbers, bools, scalar arrays or None; what a row does not have, or has as None, is an
    empty cell. Floats are written such that reading gives the same bits, float32 and narrower ones as
    the float64 of the same value.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as run:
    ...     write_metrics(run, [{"epoch": 1, "loss": 0.1}, {"epoch": 2, "loss": 0.05, "val_loss": 0.2}])
    ...     print(Path(f"{run}/metrics.csv").read_text().strip())
    ...     read_metrics(run)[0]
    epoch,loss,val_loss
    1,0.1,
    2,0.05,0.2
    {'epoch': 1, 'loss': 0.1}
    """
    rows = list(rows)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    for name in columns:
        if not isinstance(name, str) or not name or not name.isprintable():
            raise ValueError(f"{name!r} cannot be the name of a metric: use printable text")
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(
        [_cell(row.get(name), name, number) for name in columns] for number, row in enumerate(rows)
    )
    write_atomically(Path(folder) / "metrics.csv", text.getvalue().encode())


def read_metrics(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of metrics.csv as :func:`write_metrics` got them, without the empty cells."""
    text = _read_text(Path(folder) / "metrics.csv", "the run has not ended an epoch")
    header, *rows = csv.reader(io.StringIO(text, newline=""))
    return [{name: _number(cell) for name, cell in zip(header, row, strict=True) if cell} for row in rows]


def _is_run(folder: Path) -> bool:
    try:
        config = read_config(folder)
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and {"config", "seed", "command", "versions"} <= config.keys()


def _cell(value: Any, name: str, row: int) -> str:
    if value is None:
        return ""
    if _is_numeric(value):
        if value.shape != ():
            raise TypeError(
                f"metric {name!r} of row {row} has shape {value.shape}: write one number a column"
            )
        value = value.item()
    if not isinstance(value, bool | int | float):
        raise TypeError(f"metric {name!r} of row {row} is a {type(value).__name__}: metrics are numbers")
    return repr(value)


def _number(cell: str) -> bool | int | float:
    if cell in ("True", "False"):
        return cell == "True"
    try:
        return int(cell)
    except ValueError:
        return float(cell)


def plain(value: Any, where: str) -> Any:
    """``value`` in JSON's own types; ``where`` is its name for the error."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()  # type: ignore[attr-defined]
    elif isinstance(value, enum.Enum):
        return value.name
    elif isinstance(value, os.PathLike):
        return os.fspath(value)
    elif isinstance(value, np.dtype):
        return value.name
    elif _is_numeric(value):
        value = np.asarray(value).tolist()
    if isinstance(value, Mapping):
        return {str(name): plain(item, f"{where}[{str(name)!r}]") for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{number}]") for number, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{where} is a {type(value).__name__}, which JSON has not: pass its name or its numbers")


def _is_numeric(value: Any) -> bool:
    is_array = isinstance(value, jax.Array | np.ndarray | np.generic)
    return is_array and not jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    # A path whose bytes are not UTF-8 comes as lone surrogates; escaped they are valid JSON.
    write_atomically(path, text.encode("utf-8", "backslashreplace") + b"\n")


def _read_text(path: Path, otherwise: str) -> str:
    try:
        return path.read_bytes().decode()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"no {path.name} in {str(path.parent)!r}: {otherwise}, or the name is another"
        ) from None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None  # Run from a checkout that is not installed.


def _command() -> str:
    """The command line without the interpreter; the script as seen from the working directory."""
    script, here = sys.argv[0], Path.cwd()
    if Path(script).is_absolute():
        inside = Path(script).is_relative_to(here)
        script = str(Path(script).relative_to(here)) if inside else Path(script).name
    return shlex.join([script, *sys.argv[1:]])


def _git() -> dict[str, Any]:
    revision, changes = _ask_git("rev-parse", "HEAD"), _ask_git("status", "--porcelain")
    return {"revision": revision, "dirty": None if changes is None else changes != ""}


def _ask_git(*words: str) -> str | None:
    # No optional locks: a run must not get in the way of somebody's commit.
    command = ["git", "--no-optional-locks", *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
