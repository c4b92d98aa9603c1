"""The IDX format, in which MNIST and its relatives are published: read and write any array.

A file is two zero bytes, the code of the dtype, the number of axes, the length of each axis as a
big-endian 32-bit number, and the values in C order, big-endian (Y. LeCun, "The MNIST database",
section "File formats"). It may be compressed by gzip, with or without a name that says so.
"""

from __future__ import annotations

import gzip
import math
import os
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Num

__all__ = ["read_idx", "write_idx"]

_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_KNOWN = ", ".join(f"0x{code:02x} {np.dtype(dtype).newbyteorder('=')}" for code, dtype in _DTYPES.items())


def read_idx(path: str | os.PathLike[str]) -> Num[np.ndarray, ...]:
    """The array in an IDX file, raw or gzipped, in the machine's byte order.

    A raw file of bytes is mapped into memory, read-only, and costs nothing until it is used.

    Raises:
      ValueError: the file is damaged: what is wrong with it, what was found and what was expected.
      FileNotFoundError: there is no such file.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_idx(f"{folder}/labels-idx1-ubyte.gz", np.array([5, 0, 4], np.uint8))
    ...     read_idx(f"{folder}/labels-idx1-ubyte.gz")
    array([5, 0, 4], dtype=uint8)
    """
    path = Path(path)
    with path.open("rb") as file:
        if file.read(2) == b"\x1f\x8b":
            file.seek(0)
            array = _read_gzip(path, file)
        else:
            file.seek(0)
            array = _read_raw(path, file)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _read_raw(path: Path, file: BinaryIO) -> np.ndarray:
    dtype, shape = _read_header(path, file)
    start, size = file.tell(), os.fstat(file.fileno()).st_size
    expected = start + math.prod(shape) * dtype.itemsize
    if size != expected:
        raise _wrong_length(path, dtype, shape, f"has {size} bytes", expected, too_long=size > expected)
    if size == start:
        return np.empty(shape, dtype)
    return np.memmap(file, dtype, "r", start, shape)


def _read_gzip(path: Path, file: BinaryIO) -> np.ndarray:
    packed = os.fstat(file.fileno()).st_size
    try:
        with gzip.GzipFile(fileobj=file) as unpacked:
            dtype, shape = _read_header(path, unpacked)
            start = unpacked.tell()
            expected = start + math.prod(shape) * dtype.itemsize
            # Deflate packs at most 1032 bytes in one: a damaged header must not reserve a terabyte.
            if expected > 1032 * packed:
                raise _wrong_length(
                    path, dtype, shape, f"is {packed} bytes gzipped", expected, too_long=False
                )
            array = np.empty(math.prod(shape), dtype)
            values, filled = memoryview(array.view(np.uint8).data), 0
            while filled < len(values) and (got := unpacked.readinto(values[filled : filled + 2**20])):
                filled += got
            beyond = len(unpacked.read(1))
            if filled < len(values) or beyond:
                found = f"has {'more than ' if beyond else ''}{start + filled} bytes"
                raise _wrong_length(path, dtype, shape, found, expected, too_long=bool(beyond))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is a damaged gzip file ({error}): fetch it again") from error
    return array.reshape(shape)


def _read_header(path: Path, file: BinaryIO | gzip.GzipFile) -> tuple[np.dtype, tuple[int, ...]]:
    magic = file.read(4)
    if len(magic) < 4:
        raise ValueError(f"{path} is truncated: it has {len(magic)} bytes and an IDX file at least 4")
    if magic[:2] != b"\0\0":
        raise ValueError(
            f"{path} is not an IDX file: it begins with the bytes {magic.hex(' ')} and must begin with 00 00"
        )
    if magic[2] not in _DTYPES:
        raise ValueError(f"{path} has the unknown IDX dtype code 0x{magic[2]:02x}, expected one of {_KNOWN}")
    lengths = file.read(4 * magic[3])
    if len(lengths) < 4 * magic[3]:
        raise ValueError(
            f"{path} is truncated: its header of {magic[3]} axes takes {4 + 4 * magic[3]} bytes "
            f"and it has {4 + len(lengths)}"
        )
    return np.dtype(_DTYPES[magic[2]]), tuple(int(length) for length in np.frombuffer(lengths, ">u4"))


def _wrong_length(
    path: Path, dtype: np.dtype, shape: tuple[int, ...], found: str, expected: int, *, too_long: bool
) -> ValueError:
    kind = "too long" if too_long else "truncated"
    return ValueError(f"{path} is {kind}: it {found}, {shape} {dtype.name} with its header takes {expected}")


def write_idx(path: str | os.PathLike[str], array: Num[np.ndarray, ...]) -> None:
    """Writes an array as an IDX file, gzipped if the name ends in ``.gz``.

    The file appears whole or not at all, and equal arrays make equal files.

    Raises:
      ValueError: a dtype that the format does not have, or an axis of 2**32 or more.

    >>> write_idx("x", np.array([1, 2]))
    Traceback (most recent call last):
    ...
    ValueError: IDX has no dtype int64: convert the array to one of uint8, int8, int16, int32, float32, float64
    """
    array, path = np.asarray(array), Path(path)
    codes = {np.dtype(dtype).name: code for code, dtype in _DTYPES.items()}
    if array.dtype.name not in codes:
        raise ValueError(f"IDX has no dtype {array.dtype}: convert the array to one of {', '.join(codes)}")
    if max(array.shape, default=0) >= 2**32:
        raise ValueError(f"IDX has no axis of 2**32 or more, and the array has shape {array.shape}")
    code = codes[array.dtype.name]
    header = bytes([0, 0, code, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    data = header + array.astype(_DTYPES[code], copy=False).tobytes()
    if path.name.endswith(".gz"):
        data = gzip.compress(data, mtime=0)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
