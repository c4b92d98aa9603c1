"""Image-classification sets of TensorFlow Datasets, as memory-mapped arrays.

TFDS prepares a data set once, which takes a network; its records are converted once to arrays in
nnkit's cache, because reading them image by image takes 4 to 40 s for 60,000; from then on opening
it neither imports TFDS nor reads the records. TensorFlow itself is needed for neither reading nor
converting, only for preparing some of the sets.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
import warnings
from pathlib import Path
from typing import NamedTuple

from nnkit.checks import unknown_name
from nnkit.data.cache import DamagedCacheError, cache_root, open_entry
from nnkit.data.dataset import Dataset, Splits
from nnkit.data.tfds_convert import KNOWN, PARTS, convert, prepare

__all__ = ["load_tfds"]

_NAME = re.compile(r"(?P<base>[a-z]\w*)(?:/(?P<config>[\w.\-]+))?(?::(?P<version>[\d.*]+))?")
_VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)")


class _Name(NamedTuple):
    """``base/config:version``, as TFDS writes it."""

    base: str
    config: str | None
    version: str | None


def load_tfds(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    verify: bool = True,
) -> Splits:
    """The published parts of a TFDS image-classification set, ``name`` or ``name/config:version``.

    Args:
      name: what TFDS calls it.
      data_dir: where TFDS keeps prepared data sets; by default the environment's ``TFDS_DATA_DIR``,
        else ``~/tensorflow_datasets``.
      cache_dir: where the arrays go; by default the environment's ``NNKIT_CACHE``, else ``~/.cache/nnkit``.
        Entries there can be deleted at any time.
      verify: compare the arrays' checksums, which reads them once, about 0.5 s a gigabyte.

    Raises:
      ImportError: TFDS is not installed and the arrays are not in the cache.
      ConnectionError: the data set is not prepared and there is no network.
      ValueError: an unknown name, or a data set that is not images of one shape with one label each.
      DamagedCacheError: the arrays are damaged and what they were made from is gone.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise unknown_name("data set", name, KNOWN)
    wanted = _Name(match["base"], match["config"], match["version"])
    root = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    cache = cache_root(cache_dir) / "tfds"

    prepared = _find_prepared(wanted, root)
    if prepared is None and (entry := _newest_entry(wanted, cache)) is not None:
        try:
            return _open(entry, name, verify)
        except DamagedCacheError as error:
            raise DamagedCacheError(
                f"{error}; what it was made from is not in {root}: delete {entry} and load {name} again, "
                "with a network or with the prepared data set there"
            ) from error
    if prepared is None:
        prepared = prepare(name, wanted.base, root)
    entry = cache / prepared.relative_to(root).parent / f"{prepared.name}-{_fingerprint(prepared)}"
    try:
        return _open(entry, name, verify)
    except FileNotFoundError:
        pass
    except DamagedCacheError as error:
        warnings.warn(f"{error}; making it again from {prepared}", stacklevel=2)
    convert(name, prepared, entry)
    return _open(entry, name, verify)


def _open(entry: Path, name: str, verify: bool) -> Splits:
    arrays, notes = open_entry(entry, verify=verify)
    classes = tuple(notes["classes"])
    parts = {
        part: Dataset(arrays[f"{part}_x"], arrays[f"{part}_y"], name, classes)
        for part in PARTS
        if f"{part}_x" in arrays
    }
    return Splits(**parts)


def _newest_entry(wanted: _Name, cache: Path) -> Path | None:
    folder = cache / wanted.base / (wanted.config or "")
    if not folder.is_dir():
        return None
    entries = [
        (_version(path.name.partition("-")[0], wanted.version), path.stat().st_mtime_ns, path)
        for path in folder.iterdir()
    ]
    return max((entry for entry in entries if entry[0]), default=(None, 0, None))[2]


def _version(text: str, wanted: str | None) -> tuple[int, ...] | None:
    """``text`` as a version that is one of those ``wanted`` (``3.0.1``, ``3.*.*``), else ``None``."""
    match = _VERSION.fullmatch(text)
    if match is None or not fnmatch.fnmatchcase(text, wanted or "*"):
        return None
    return tuple(int(number) for number in match.groups())


def _find_prepared(wanted: _Name, root: Path) -> Path | None:
    """The folder of the newest fitting version, found by its name alone, without TFDS."""
    top = root / wanted.base
    if wanted.config is not None:
        return _newest_prepared(top / wanted.config, wanted.version)
    if not top.is_dir():
        return None
    if (found := _newest_prepared(top, wanted.version)) is not None:
        return found
    configs = [path.name for path in sorted(top.iterdir()) if _newest_prepared(path, wanted.version)]
    default = top / ".config" / "metadata.json"
    if (
        default.exists()
        and (config := json.loads(default.read_text("utf-8"))["default_config_name"]) in configs
    ):
        return _newest_prepared(top / config, wanted.version)
    if len(configs) > 1:
        names = ", ".join(f"{wanted.base}/{config}" for config in configs)
        raise ValueError(f"{top} has several configurations of {wanted.base}: name one of {names}")
    return _newest_prepared(top / configs[0], wanted.version) if configs else None


def _newest_prepared(folder: Path, wanted: str | None) -> Path | None:
    if not folder.is_dir():
        return None
    found = [
        (_version(path.name, wanted), path) for path in folder.iterdir() if (path / "features.json").exists()
    ]
    return max((pair for pair in found if pair[0]), default=(None, None))[1]


def _fingerprint(prepared: Path) -> str:
    """Twelve digits that change when the prepared data set is made anew."""
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(prepared.iterdir())]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:12]
