"""Trees to files and back, every number verified.

The file is an ordinary ``.npz``: one ``.npy`` a leaf, named by its path (``dense_0/kernel``), which
``numpy.load`` reads too, and a manifest of each leaf's dtype, shape and SHA-256. Damage is an error
that names the leaf, never a wrong number.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Mapping
from typing import IO, Any, BinaryIO

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from nnkit.packing import packed_like, unpack
from nnkit.train.files import write_atomically
from nnkit.tree import flatten, path_str
from nnkit.types import PyTree

__all__ = ["DamagedFileError", "describe", "load_tree", "save_tree"]

_MANIFEST, _FORMAT = "manifest.json", "nnkit tree 1"
_PYTHON = {"bool": bool, "int": int, "float": float, "complex": complex}
_WIDTHS = {"int": (8, 16, 32, 64), "uint": (8, 16, 32, 64), "float": (16, 32, 64), "complex": (64, 128)}
_NUMPY = {"bool", *(f"{kind}{width}" for kind, widths in _WIDTHS.items() for width in widths)}
# What a path may consist of to be an entry's name as it is; others get a number, as zip bends or
# cuts some characters. The space in such a name keeps it apart from every path.
_PLAIN = re.compile(r"[A-Za-z0-9_./-]{1,200}")


class DamagedFileError(ValueError):
    """A file that cannot be read back as it was written: damaged, cut off, or not ``save_tree``'s."""


def save_tree(path: str | os.PathLike[str], tree: PyTree) -> None:
    """Writes the leaves of ``tree`` to the file ``path``, atomically and each with its SHA-256.

    Leaves are JAX or numpy arrays of any dtype that JAX has, typed PRNG keys, or Python numbers.
    bfloat16 and its kin, which ``.npy`` does not know, are stored as unsigned integers of the same
    width, keys as their ``jax.random.key_data``. Equal trees give equal bytes. Nothing is compressed:
    trained numbers hardly shrink.

    Raises:
      ValueError, TypeError: a leaf cannot be saved, or two have the same path; nothing is written.
      OSError: see :func:`nnkit.train.files.write_atomically`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_tree(f"{folder}/a.npz", {"dense_0": {"bias": jnp.ones(2)}, "epoch": 3})
    ...     load_tree(f"{folder}/a.npz")
    {'dense_0': {'bias': Array([1., 1.], dtype=float32)}, 'epoch': 3}
    """
    for path_to, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, jax.Array) and leaf.is_deleted():
            raise ValueError(
                f"leaf {path_str(path_to)!r} was donated to a compiled function: save the state which that "
                "returned"
            )
    leaves = flatten(tree)
    entries = {name: describe(name, leaf) for name, leaf in leaves.items()}
    write_atomically(path, lambda file: _write(file, leaves, entries))


def load_tree(path: str | os.PathLike[str], like: PyTree | None = None) -> PyTree:
    """Reads what :func:`save_tree` wrote, each leaf verified against its SHA-256.

    Args:
      path: the file.
      like: a tree of the same structure whose leaves are arrays or ``jax.ShapeDtypeStruct``s, for
        instance ``jax.eval_shape(trainer.init, key, x)``; its values are not looked at. It gives the
        result its tuples, NamedTuples, Nones and empty dicts, which a file has not, and every leaf
        must fit it. Without it the result is nested dicts, split at each ``/`` of the paths.

    Returns:
      The tree. Its arrays are numpy's where numpy's were saved, or where ``like`` has numpy's; else
      JAX's, on the default device.

    Raises:
      DamagedFileError: the file, or a leaf that the message names, is not what was written.
      ValueError: leaves are missing, unexpected, or of another shape or dtype than in ``like``.
      FileNotFoundError: no such file.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_tree(f"{folder}/a.npz", (np.float32([1, 2]), None, {}))
    ...     load_tree(f"{folder}/a.npz", like=(np.zeros(2, np.float32), None, {}))
    (array([1., 2.], dtype=float32), None, {})
    """
    where = str(path)
    wanted = None if like is None else flatten(like)
    try:
        with open(path, "rb") as file:
            archive, entries = _open(where, file)
            if wanted is None:
                kinds = {name: entry["kind"] for name, entry in entries.items()}
            else:
                _check_fit(where, entries, {name: describe(name, leaf) for name, leaf in wanted.items()})
                kinds = {name: _kind_like(leaf, entries[name]["kind"]) for name, leaf in wanted.items()}
            leaves = {name: _read(where, archive, name, entries[name], kind) for name, kind in kinds.items()}
    except FileNotFoundError:
        raise FileNotFoundError(
            f"no file {where!r}: nothing was saved there, or under another name"
        ) from None
    if like is None:
        return _nested(where, leaves)
    return packed_like(jax.tree.unflatten(jax.tree.structure(unpack(like)), list(leaves.values())), like)


def describe(name: str, leaf: Any) -> dict[str, Any]:
    """The manifest's entry for a leaf or for what stands for one: kind, dtype, shape."""
    for kind, python_type in _PYTHON.items():
        if type(leaf) is python_type:
            if kind == "int" and not -(2**63) <= leaf < 2**63:
                raise ValueError(f"leaf {name!r} is the int {leaf}, which does not fit into 64 bits")
            return {"kind": kind, "dtype": np.dtype(python_type).name, "shape": []}
    dtype, shape = getattr(leaf, "dtype", None), getattr(leaf, "shape", None)
    if dtype is None or shape is None:
        raise TypeError(
            f"leaf {name!r} is a {type(leaf).__name__}: a tree's leaves are arrays, PRNG keys and numbers"
        )
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        entry = {"kind": "key", "dtype": str(dtype), "shape": list(shape)}
        return entry | (
            {"implementation": str(jax.random.key_impl(leaf))} if isinstance(leaf, jax.Array) else {}
        )
    dtype = np.dtype(dtype)
    if dtype.name not in _NUMPY and not hasattr(ml_dtypes, dtype.name):
        raise TypeError(f"leaf {name!r} has dtype {dtype}: a tree's arrays hold numbers or bools")
    kind = "numpy" if isinstance(leaf, np.ndarray | np.generic) else "jax"
    return {"kind": kind, "dtype": dtype.name, "shape": list(shape)}


def _stored(leaf: Any, entry: Mapping[str, Any]) -> np.ndarray:
    """The leaf as an array that ``.npy`` knows, in C order and little-endian."""
    if entry["kind"] == "key":
        leaf = jax.random.key_data(leaf)
    array = np.asarray(leaf, order="C")
    if array.dtype.name not in _NUMPY:
        array = array.view(f"u{array.dtype.itemsize}")
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


class _Hashing:
    """A file that hashes what goes through it, so that a large leaf is passed over once."""

    def __init__(self, file: IO[bytes]):
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self.file.write(data)


def _write(file: BinaryIO, leaves: Mapping[str, Any], entries: Mapping[str, dict[str, Any]]) -> None:
    # ZipInfo's date is 1980 unless told: equal trees give equal bytes.
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        manifest = {}
        for number, (name, leaf) in enumerate(leaves.items()):
            member = f"{name}.npy" if _PLAIN.fullmatch(name) else f"leaf {number}.npy"
            with archive.open(zipfile.ZipInfo(member), "w", force_zip64=True) as out:
                hashing = _Hashing(out)
                np.lib.format.write_array(hashing, _stored(leaf, entries[name]), allow_pickle=False)  # type: ignore[arg-type]
            manifest[name] = entries[name] | {"member": member, "sha256": hashing.sha256.hexdigest()}
        text = json.dumps({"format": _FORMAT, "leaves": manifest}, indent=1)
        archive.writestr(zipfile.ZipInfo(_MANIFEST), text)


def _open(where: str, file: BinaryIO) -> tuple[zipfile.ZipFile, dict[str, dict[str, Any]]]:
    try:
        archive = zipfile.ZipFile(file)
    except Exception as error:  # Damaged bytes make zipfile raise nearly anything.
        raise DamagedFileError(
            f"{where!r} is cut off, damaged, or no file of save_tree ({error}): use an earlier one"
        ) from error
    if _MANIFEST not in archive.namelist():
        raise DamagedFileError(f"{where!r} is damaged or no file of save_tree: it has no {_MANIFEST}")
    text = _member(where, "the manifest", archive, _MANIFEST)
    try:
        manifest = json.loads(text)
        if manifest["format"] != _FORMAT:
            raise ValueError(f"format {manifest['format']!r}")
        return archive, manifest["leaves"]
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFileError(
            f"{where!r} is no file of this save_tree ({error}): load it with its writer"
        ) from error


def _member(where: str, what: str, archive: zipfile.ZipFile, member: str) -> bytes:
    try:
        info = archive.getinfo(member)
        # Looked at first: a wrong size could ask for any amount of memory, a wrong method for any decoder.
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise zipfile.BadZipFile("its entry in the zip directory is wrong")
        return archive.read(info)
    except Exception as error:
        raise DamagedFileError(f"{what} in {where!r} is damaged ({error}): use an earlier file") from error


def _read(where: str, archive: zipfile.ZipFile, name: str, entry: Mapping[str, Any], kind: str) -> Any:
    data = _member(where, f"leaf {name!r}", archive, entry["member"])
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise DamagedFileError(
            f"leaf {name!r} in {where!r} is damaged (its SHA-256 is another): use an earlier file"
        )
    header = io.BytesIO(data)
    np.lib.format.read_magic(header)
    shape, _, dtype = np.lib.format.read_array_header_1_0(header)
    array = np.ndarray(shape, dtype, data, header.tell())
    if hasattr(ml_dtypes, entry["dtype"]):
        array = array.view(getattr(ml_dtypes, entry["dtype"]))
    if kind in _PYTHON:
        return array.item()
    if kind == "numpy":
        return array.astype(array.dtype.newbyteorder("="))
    if kind == "key":
        return _wrap_key(where, name, array, entry["implementation"])
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        raise ValueError(
            f"leaf {name!r} in {where!r} is {array.dtype}, which JAX would cut to 32 bits now: "
            "call jax.config.update('jax_enable_x64', True) first"
        )
    return jnp.array(array)  # A copy: bytes of Python's cannot be donated.


def _wrap_key(where: str, name: str, data: np.ndarray, implementation: str) -> jax.Array:
    try:
        return jax.random.wrap_key_data(jnp.array(data), impl=implementation)
    except ValueError as error:
        raise ValueError(f"leaf {name!r} in {where!r} is a key this JAX cannot make: {error}") from error


def _kind_like(leaf: Any, saved: str) -> str:
    if saved not in ("jax", "numpy") or isinstance(leaf, jax.ShapeDtypeStruct):
        return saved
    return "jax" if isinstance(leaf, jax.Array) else "numpy"


def _check_fit(where: str, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    wrong = [f"{name!r} is missing" for name in wanted if name not in saved]
    wrong += [f"{name!r} is unexpected" for name in saved if name not in wanted]
    for name, entry in wanted.items():
        if name in saved and (here := _text(entry)) != (there := _text(saved[name])):
            wrong.append(f"{name!r} is {there} and should be {here}")
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(
            f"parameters of another model: {'; '.join(wrong[:5])}{more} (file {where!r}). "
            "Build the model and the optimizer with the settings that the file was written with"
        )


def _text(entry: Mapping[str, Any]) -> str:
    return f"a Python {entry['kind']}" if entry["kind"] in _PYTHON else f"{entry['dtype']}{entry['shape']}"


def _nested(where: str, leaves: Mapping[str, Any]) -> PyTree:
    if list(leaves) == [""]:
        return leaves[""]
    nested: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
            if type(node) is not dict:
                break
        if type(node) is not dict or last in node:
            raise ValueError(
                f"leaf {name!r} in {where!r} lies in another leaf: pass load_tree(..., like=tree)"
            )
        node[last] = leaf
    return nested
