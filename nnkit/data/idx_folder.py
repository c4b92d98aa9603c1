"""A folder of IDX files, named as MNIST, Fashion-MNIST, KMNIST and EMNIST are published."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np

from nnkit.data.dataset import Dataset, Splits
from nnkit.data.idx import read_idx

__all__ = ["CLASSES", "find_idx_folder", "load_idx_folder"]

_DIGITS = tuple("0123456789")
_CLOTHES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
CLASSES = {
    "mnist": _DIGITS,
    "fashion_mnist": _CLOTHES,
    "kmnist": ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
}
"""What the labels of the published sets mean; the files themselves do not say."""

# train-images-idx3-ubyte, t10k-labels.idx1-ubyte, emnist-letters-train-images-idx3-ubyte.gz, ...
_FILE = re.compile(
    r"(?:(?P<set>.+)[-_.])?(?P<part>train|t10k|test)[-_.](?P<kind>images|labels)[-_.]idx\d+[-_.]ubyte(?:\.gz)?",
    re.IGNORECASE,
)
_Files = dict[tuple[str, str], Path]


def find_idx_folder(data_dir: Path, name: str) -> Path | None:
    """Where under ``data_dir`` the IDX files of ``name`` are, if anywhere.

    In itself, in a folder called like the data set (``FashionMNIST`` for ``fashion_mnist``), or in
    the ``raw`` folder of either, where torchvision puts them.
    """
    own = [
        child for child in sorted(data_dir.iterdir()) if child.is_dir() and _plain(child.name) == _plain(name)
    ]
    for folder in (data_dir, *own):
        for place in (folder, folder / "raw"):
            if place.is_dir() and any(_FILE.fullmatch(file.name) for file in place.iterdir()):
                return place
    return None


def load_idx_folder(folder: Path, name: str) -> Splits:
    """Training and test set from IDX files, raw or gzipped; raw images stay on disk, memory-mapped.

    Images become (n, height, width, 1); EMNIST's are transposed as published and are left so.
    Classes are those of :data:`CLASSES`, or the labels' numbers.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: files of several sets of which ``name`` is none, a damaged file, files that hold
        something else than images and labels, or labels that ``name`` does not have.

    >>> import tempfile
    >>> from nnkit.data import write_idx
    >>> folder = Path(tempfile.mkdtemp())
    >>> write_idx(folder / "train-images-idx3-ubyte", np.zeros((3, 28, 28), np.uint8))
    >>> write_idx(folder / "train-labels-idx1-ubyte", np.array([7, 2, 1], np.uint8))
    >>> load_idx_folder(folder, "mnist").train
    Dataset(mnist: 3 of (28, 28, 1) uint8, 10 classes)
    """
    files = _files(folder, name)
    test = None
    if ("test", "images") in files or ("test", "labels") in files:
        test = _part(files, "test", folder, name)
    splits = Splits(_part(files, "train", folder, name), test=test)
    top = max(int(part.y.max(initial=0)) for part in splits if part is not None)
    classes = CLASSES.get(name) or tuple(str(label) for label in range(top + 1))
    if top >= len(classes):
        raise ValueError(
            f"{folder} has labels up to {top} and {name} has {len(classes)} classes: give another name"
        )
    return splits.map(lambda part: dataclasses.replace(part, classes=classes))


def _files(folder: Path, name: str) -> _Files:
    """The files of the data set ``name`` by part and kind."""
    sets: dict[str, _Files] = {}
    names: dict[str, str] = {}
    # Raw files come after gzipped ones of the same name and so win: they need no unpacking.
    for path in sorted(folder.iterdir(), key=lambda path: (not path.name.endswith(".gz"), path.name)):
        if match := _FILE.fullmatch(path.name):
            prefix, part, kind = match["set"] or "", match["part"].lower(), match["kind"].lower()
            names[_plain(prefix)] = prefix
            sets.setdefault(_plain(prefix), {})["train" if part == "train" else "test", kind] = path
    wanted = _plain(name)
    if wanted in sets:
        return sets[wanted]
    # Files without a prefix are whatever the caller says, unless the name begins another one's.
    if "" in sets and not any(prefix.startswith(wanted) for prefix in sets):
        return sets[""]
    found = ", ".join(repr(names[key]) for key in sorted(sets) if key)
    raise ValueError(f"{folder} has no IDX files of {name!r}; it has {found}: load one of these by its name")


def _part(files: _Files, part: str, folder: Path, name: str) -> Dataset:
    for kind, rank in (("images", 3), ("labels", 1)):
        if (part, kind) not in files:
            published = f"{'train' if part == 'train' else 't10k'}-{kind}-idx{rank}-ubyte"
            raise FileNotFoundError(
                f"{folder} has no {part} {kind} of {name}: expected {published} or {published}.gz"
            )
    images, labels = files[part, "images"], files[part, "labels"]
    x, y = read_idx(images), read_idx(labels)
    if x.ndim not in (3, 4):
        raise ValueError(f"{images} holds an array of shape {x.shape}: expected images, (n, height, width)")
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer):
        raise ValueError(f"{labels} holds {y.dtype} of shape {y.shape}: expected integer labels, (n,)")
    if len(x) != len(y):
        raise ValueError(f"{images} has {len(x)} images and {labels} has {len(y)} labels: expected as many")
    return Dataset(x[..., None] if x.ndim == 3 else x, y.astype(np.int32), name)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
