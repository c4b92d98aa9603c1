"""Trees to and from safetensors files, which other libraries and languages read.

The format is a length, a header in JSON and the arrays' bytes, so it is written and read here. It has no
checksums; :func:`nnkit.train.save_tree`, which has, also keeps PRNG keys and Python numbers.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from nnkit.interop.arrays import to_jax, to_numpy
from nnkit.packing import packed_like, unpack
from nnkit.train.files import write_atomically
from nnkit.train.saving import DamagedFileError
from nnkit.tree import flatten
from nnkit.types import PyTree

__all__ = ["load_safetensors", "safetensors_metadata", "save_safetensors"]

_DTYPES = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16, "U32": np.uint32,
    "I32": np.int32, "U64": np.uint64, "I64": np.int64, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F32": np.float32, "F64": np.float64, "C64": np.complex64, "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}  # fmt: skip
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_METADATA = "__metadata__"
_LARGEST_HEADER = 100_000_000
"""What safetensors' own reader accepts."""


def save_safetensors(
    path: str | os.PathLike[str], tree: PyTree, *, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes the arrays of ``tree`` to the safetensors file ``path``, atomically and named by their paths.

    Args:
      path: the file.
      tree: a tree of arrays of JAX, numpy or PyTorch: ``params``, ``{"params": params, "state": state}``, or
        what :func:`nnkit.interop.to_torch` returns. bfloat16 and the 8-bit floats stay what they are.
      metadata: strings by name, kept in the header.

    Raises:
      TypeError, ValueError: a leaf that the format has no place for, by its path; nothing is written.
      OSError: see :func:`nnkit.train.files.write_atomically`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     interop.save_safetensors(f"{folder}/a.safetensors", {"dense_0": {"bias": jnp.ones(2)}})
    ...     interop.load_safetensors(f"{folder}/a.safetensors")
    {'dense_0': {'bias': array([1., 1.], dtype=float32)}}
    """
    for name, text in (metadata or {}).items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise TypeError(
                f"metadata holds strings by name, got {name!r}: {text!r}: write str(...) or json.dumps"
            )
    arrays = {name: _storable(name, leaf) for name, leaf in flatten(tree).items()}
    # Wide types first: every array then begins at a multiple of its width.
    order = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        array = arrays[name]
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": _NAMES[array.dtype], "shape": array.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def write(file: BinaryIO) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            little = arrays[name].dtype.newbyteorder("<")
            file.write(np.asarray(arrays[name], order="C").astype(little, copy=False).tobytes())

    write_atomically(path, write)


def load_safetensors(path: str | os.PathLike[str], like: PyTree | None = None) -> PyTree:
    """Reads a safetensors file, of whatever library.

    Args:
      path: the file.
      like: a tree of arrays or ``jax.ShapeDtypeStruct``s, for instance ``jax.eval_shape(model.init, key,
        x)[0]``, which the file's arrays must fit.

    Returns:
      With ``like`` a tree of its structure, of JAX's arrays. Without, nested dicts split at each ``/``, of
      numpy's, as :func:`nnkit.interop.from_torch` takes them.

    Raises:
      DamagedFileError: the file is cut off, damaged or no safetensors file.
      TypeError: a leaf of ``like`` that is no array, by its path.
      ValueError: by path, arrays that are missing, unexpected, of another shape or dtype than in ``like``, or
        that JAX would cut to 32 bits.
      FileNotFoundError: no such file.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     interop.save_safetensors(f"{folder}/a.safetensors", (jnp.ones(2, jnp.bfloat16), jnp.zeros(1)))
    ...     interop.load_safetensors(f"{folder}/a.safetensors", like=(jnp.ones(2, jnp.bfloat16), jnp.ones(1)))
    (Array([1, 1], dtype=bfloat16), Array([0.], dtype=float32))
    """
    there = _read(path)[1]
    if like is None:
        return _nested(path, {name: _copied(array) for name, array in there.items()})
    wanted = flatten(like)
    for name, leaf in wanted.items():
        _check_like(name, leaf)
    wrong = [f"{name!r} is missing" for name in wanted if name not in there]
    wrong += [f"{name!r} is unexpected" for name in there if name not in wanted]
    for name in wanted:
        if name in there and _spec(there[name]) != _spec(wanted[name]):
            wrong.append(f"{name!r} is {_spec(there[name])} and should be {_spec(wanted[name])}")
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"{str(path)!r} holds other arrays: {'; '.join(wrong[:5])}{more}")
    leaves = [to_jax(name, _copied(there[name])) for name in wanted]
    return packed_like(jax.tree.unflatten(jax.tree.structure(unpack(like)), leaves), like)


def safetensors_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The strings that were saved beside the arrays.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     interop.save_safetensors(f"{folder}/a.safetensors", {}, metadata={"epoch": "3"})
    ...     interop.safetensors_metadata(f"{folder}/a.safetensors")
    {'epoch': '3'}
    """
    return _read(path)[0]


def _storable(name: str, leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise TypeError(
            f"{name!r} is a PRNG key, which safetensors has no place for: save jax.random.key_data(key), or "
            "the whole with train.save_tree"
        )
    array = to_numpy(name, leaf)
    if array.dtype.newbyteorder("=") not in _NAMES:
        raise TypeError(f"{name!r} has dtype {array.dtype}, which safetensors has no place for")
    if name == _METADATA:
        raise ValueError(f"an array cannot be called {_METADATA!r} in a safetensors file")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _check_like(name: str, leaf: Any) -> None:
    if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
        raise TypeError(
            f"like has a {type(leaf).__name__} at {name!r}: pass an array or jax.ShapeDtypeStruct, or read "
            "without like"
        )
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise TypeError(f"like has a PRNG key at {name!r}, which safetensors has no place for")


def _spec(array: Any) -> str:
    return f"{np.dtype(array.dtype).newbyteorder('=')}{list(array.shape)}"


def _copied(array: np.ndarray) -> np.ndarray:
    """In memory of its own, so that one array does not keep the whole file; of this machine's byte order."""
    return array.astype(array.dtype.newbyteorder("="))


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """The strings, and the arrays as views of the file's bytes; every word of the header checked."""
    try:
        with open(path, "rb") as file:
            data = memoryview(file.read())
    except FileNotFoundError:
        raise FileNotFoundError(
            f"no file {str(path)!r}: nothing was saved there, or under another name"
        ) from None
    try:
        length = int.from_bytes(data[:8], "little")
        if len(data) < 8 or length > min(_LARGEST_HEADER, len(data) - 8):
            raise ValueError("its header goes beyond its end")
        header = json.loads(bytes(data[8 : 8 + length]), object_pairs_hook=_without_doubles)
        if not isinstance(header, dict):
            raise ValueError(f"its header is a {type(header).__name__}, not a dict")
        metadata = header.pop(_METADATA, {})
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError(f"its {_METADATA} is not a dict of strings")
        return metadata, _views(header, data[8 + length :])
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(
            f"{str(path)!r} is cut off, damaged or no safetensors file ({error}): use another"
        ) from error


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has {next(n for n in found if names.count(n) > 1)!r} twice")
    return found


def _views(header: Mapping[str, Any], data: memoryview) -> dict[str, np.ndarray]:
    """The arrays that the header tells of; ValueError where it is not as the format wants."""
    for name, entry in header.items():
        _check_entry(name, entry)
    end, arrays = 0, {}
    for name in sorted(header, key=lambda name: header[name]["data_offsets"]):
        entry = header[name]
        begin, stop = entry["data_offsets"]
        dtype = np.dtype(_DTYPES[entry["dtype"]])
        if begin != end or stop - begin != math.prod(entry["shape"]) * dtype.itemsize:
            raise ValueError(f"{name!r} does not lie where it should")
        end = stop
        if end > len(data):
            break
        try:
            arrays[name] = np.frombuffer(data[begin:end], dtype.newbyteorder("<")).reshape(entry["shape"])
        except ValueError as error:  # more axes than numpy has, or longer ones, of which one has no entries
            raise ValueError(f"{name!r} has the shape {entry['shape']}: {error}") from None
    if end != len(data):
        raise ValueError(f"it holds {len(data)} bytes of arrays, and {end} are told of")
    return {name: arrays[name] for name in header}


def _check_entry(name: str, entry: Any) -> None:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(f"{name!r} is not told of by dtype, shape and data_offsets")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in _DTYPES:
        raise ValueError(f"{name!r} has the dtype {entry['dtype']!r}, which is none of {', '.join(_DTYPES)}")
    for what in ("shape", "data_offsets"):
        numbers = entry[what]
        if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError(f"{name!r} has {what} {numbers!r}, not whole numbers from 0")
    if len(entry["data_offsets"]) != 2:
        raise ValueError(f"{name!r} has data_offsets {entry['data_offsets']}, not two")


def _nested(path: str | os.PathLike[str], leaves: Mapping[str, np.ndarray]) -> PyTree:
    if list(leaves) == [""]:
        return leaves[""]
    nested: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        node: Any = nested
        for parent in parents:
            node = node.setdefault(parent, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict) or last in node:
            raise ValueError(
                f"{name!r} in {str(path)!r} lies in another array: pass load_safetensors(..., like=tree)"
            )
        node[last] = leaf
    return nested
