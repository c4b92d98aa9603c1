"""Arrays on disk that were expensive to make: written whole or not at all, checked when opened.

An entry is a folder of ``.npy`` files and a ``manifest.json`` with the size and SHA-256 of each. It is
made in a temporary folder beside its place and moved there by one rename, so that a process that
dies leaves no half an entry, and of two that make the same entry at once one wins.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["DamagedCacheError", "cache_root", "open_entry", "writing_entry"]

_FORMAT = 1
_MANIFEST = "manifest.json"
_MAKING = ".making-"
_DAY = 86400.0


class DamagedCacheError(ValueError):
    """An entry whose files are not those that were written."""


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """``cache_dir``, else the environment's ``NNKIT_CACHE``, else ``~/.cache/nnkit``.

    >>> cache_root("/data/cache").as_posix()
    '/data/cache'
    """
    return Path(cache_dir or os.environ.get("NNKIT_CACHE") or "~/.cache/nnkit").expanduser()


def open_entry(folder: Path, *, verify: bool = True) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of an entry by name, memory-mapped, and what was noted with them.

    Args:
      folder: the entry.
      verify: compare checksums, which reads all files once, about 0.5 s a gigabyte.

    Raises:
      FileNotFoundError: there is no such entry.
      DamagedCacheError: a file is missing, or has not the size or the checksum that it was written with.
    """
    manifest = folder / _MANIFEST
    if folder.is_dir() and not manifest.exists():
        raise DamagedCacheError(f"{folder} is damaged: it has no {_MANIFEST}")
    try:
        entry = json.loads(manifest.read_text("utf-8"))
        files, notes, version = entry["files"], entry["notes"], entry["format"]
        expected = {name: (file["bytes"], file["sha256"]) for name, file in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCacheError(f"{manifest} is damaged ({type(error).__name__}: {error})") from error
    if version != _FORMAT:
        raise DamagedCacheError(f"{manifest} has format {version}, and this version of nnkit reads {_FORMAT}")
    arrays = {}
    for name, (size, digest) in expected.items():
        path = folder / f"{name}.npy"
        found = path.stat().st_size if path.exists() else "no"
        if found != size:
            raise DamagedCacheError(f"{path} is damaged: it has {found} bytes and was written with {size}")
        if verify and _sha256(path) != digest:
            raise DamagedCacheError(f"{path} is damaged: its SHA-256 is not the one that it was written with")
        arrays[name] = np.load(path, mmap_mode="r", allow_pickle=False)
    return arrays, notes


@contextlib.contextmanager
def writing_entry(folder: Path, notes: Mapping[str, Any]) -> Iterator[Path]:
    """A temporary folder to write ``.npy`` files into, which becomes the entry ``folder`` at the end.

    An entry that is there already and sound is kept: another process was faster. One that is
    damaged is replaced.

    Raises:
      OSError: the place cannot be written to.

    >>> import tempfile
    >>> entry = Path(tempfile.mkdtemp()) / "entry"
    >>> with writing_entry(entry, {"unit": "m"}) as folder:
    ...     np.save(folder / "heights.npy", np.array([1.5, 1.75]))
    >>> arrays, notes = open_entry(entry)
    >>> print(arrays["heights"], notes["unit"])
    [1.5  1.75] m
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder.parent)
        temporary = _beside(folder)
        temporary.mkdir()
    except OSError as error:
        raise OSError(
            f"cannot write to the cache folder {folder.parent} ({error.strerror}): "
            "name another by cache_dir or the environment variable NNKIT_CACHE"
        ) from error
    try:
        yield temporary
        _seal(temporary, notes)
        _move(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _seal(folder: Path, notes: Mapping[str, Any]) -> None:
    files = {}
    for path in sorted(folder.glob("*.npy")):
        _sync(path)
        files[path.stem] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    manifest = {"format": _FORMAT, "notes": dict(notes), "files": files}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1), "utf-8")
    _sync(folder / _MANIFEST)


def _move(temporary: Path, folder: Path) -> None:
    for _ in range(3):  # each further time another process came between
        with contextlib.suppress(OSError):
            os.replace(temporary, folder)
            return
        try:
            open_entry(folder)
            return
        except FileNotFoundError:
            continue
        except DamagedCacheError:
            # Moved aside first: readers then find the old entry, none, or the new one, never a mixture.
            aside = _beside(folder)
            with contextlib.suppress(OSError):
                os.replace(folder, aside)
            shutil.rmtree(aside, ignore_errors=True)
    os.replace(temporary, folder)


def _beside(folder: Path) -> Path:
    return folder.parent / f"{_MAKING}{uuid.uuid4().hex}"


def _remove_abandoned(parent: Path) -> None:
    """Deletes what processes that were killed more than a day ago left behind."""
    for path in parent.glob(f"{_MAKING}*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _DAY:
                shutil.rmtree(path, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
