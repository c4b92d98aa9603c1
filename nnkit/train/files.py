"""Files that are whole or absent: what is written appears under its name in one instant.

A run can be interrupted at any moment, by a key press, a full disk or a killed process. Whoever
opens a file that was written here finds the old contents or the new, never a part.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

__all__ = [
    "check_writable",
    "is_leftover",
    "remove_leftovers",
    "sync_folder",
    "unused_name",
    "write_atomically",
]

_PREFIX, _SUFFIX = ".nnkit-", ".tmp"


def write_atomically(path: str | os.PathLike[str], content: bytes | Callable[[BinaryIO], object]) -> None:
    """Writes the file ``path`` such that at every moment it is whole: the old contents or the new.

    The contents go to a temporary file in the same folder, from there to the disk (fsync), and only
    then under their name (``os.replace``, atomic by POSIX); last the folder goes to the disk, because
    the new name is in it. After an exception, ``KeyboardInterrupt`` included, the temporary file is
    gone and the old contents stand. A killed process can leave its temporary file behind:
    :func:`remove_leftovers`.

    Args:
      path: the file; a symbolic link is followed. Its folder must exist.
      content: the bytes, or a function that writes them into the binary file it is given.

    Raises:
      OSError: ``path`` or its folder is not what it must be, or the disk refuses.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_atomically(f"{folder}/note.txt", b"all of it")
    ...     print(Path(f"{folder}/note.txt").read_text(), os.listdir(folder))
    all of it ['note.txt']
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(
            f"cannot write the file {str(path)!r}: a folder has that name; use another name"
        )
    if not target.parent.is_dir():
        raise _not_a_folder(target.parent, f"cannot write {str(path)!r}")
    temporary = unused_name(target.parent)
    try:
        with open(temporary, "xb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Raises unless files can be written in ``folder``, or it can be made where it does not exist.

    Found out by writing: a small file is made and removed, in ``folder`` or in the nearest folder above
    it that exists. Permission bits alone would not tell (a read-only disk, a quota, the superuser).

    Raises:
      OSError: in one line, with the path and what to do.

    >>> check_writable(".")
    >>> check_writable("/dev/null/run")
    Traceback (most recent call last):
        ...
    NotADirectoryError: cannot write in '/dev/null/run': '/dev/null' is not a folder; choose another folder
    """
    nearest = Path(os.path.abspath(folder))
    while not os.path.lexists(nearest) and nearest != nearest.parent:
        # Where a file is in the way the path below it does not exist either, so the walk ends at the file.
        nearest = nearest.parent
    if not nearest.is_dir():
        raise _not_a_folder(nearest, f"cannot write in {str(folder)!r}")
    try:
        write_atomically(probe := unused_name(nearest), b"probe")
        probe.unlink()
    except OSError as error:
        raise PermissionError(
            f"cannot write in {str(folder)!r}: {error.strerror or error} in {str(nearest)!r}; "
            "choose another folder, or make that one writable"
        ) from error


def remove_leftovers(folder: str | os.PathLike[str]) -> int:
    """Removes the temporary files that killed processes left in ``folder``; returns how many.

    For the one process that owns the folder, before it starts to write: a file that another process
    is writing there at this moment would be taken away from it.
    """
    leftovers = [file for file in Path(folder).iterdir() if is_leftover(file)]
    for file in leftovers:
        file.unlink(missing_ok=True)
    return len(leftovers)


def unused_name(folder: Path) -> Path:
    """A name in ``folder`` that nothing has, and that :func:`is_leftover` knows."""
    return folder / f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}"


def is_leftover(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` has the name of a temporary file of :func:`write_atomically`."""
    name = Path(path).name
    return name.startswith(_PREFIX) and name.endswith(_SUFFIX)


def _not_a_folder(folder: Path, what: str) -> OSError:
    if os.path.lexists(folder):
        return NotADirectoryError(f"{what}: {str(folder)!r} is not a folder; choose another folder")
    return FileNotFoundError(f"{what}: the folder {str(folder)!r} does not exist; make it first")


def sync_folder(folder: Path) -> None:
    """Waits until the disk has the names of the files in ``folder``."""
    if os.name == "nt":  # Windows opens no folders, and journals the new name by itself.
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and FUSE file systems have no fsync for folders; the file itself is on the disk.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
