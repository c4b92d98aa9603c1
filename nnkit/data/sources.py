"""Data sets by name."""

from __future__ import annotations

import os
from pathlib import Path

from nnkit.data.dataset import Splits
from nnkit.data.digits import load_digits
from nnkit.data.idx_folder import find_idx_folder, load_idx_folder
from nnkit.data.tfds import load_tfds

__all__ = ["load"]


def load(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    verify: bool = True,
) -> Splits:
    """The data set called ``name``, as published: raw uint8 images and int32 labels.

    - ``digits``: bundled with scikit-learn, all in ``train``; needs nothing else.
    - with a ``data_dir`` of IDX files, raw or gzipped (as MNIST, Fashion-MNIST and EMNIST are
      published): its training and test set. The name says what the labels mean.
    - any image-classification set of TensorFlow Datasets (``mnist``, ``fashion_mnist``, ``cifar10``,
      ``emnist/letters``, ...): its published parts, prepared under ``data_dir`` (by default TFDS's own),
      converted once to arrays in the cache, then memory-mapped.

    Args:
      name: which; case, and ``-`` for ``_``, do not matter.
      data_dir: a folder of IDX files or of prepared TFDS data sets.
      cache_dir: where converted arrays are kept; by default the environment's ``NNKIT_CACHE``, else
        ``~/.cache/nnkit``.
      verify: compare the checksums of converted arrays, about 0.5 s a gigabyte.

    Raises:
      ValueError: an unknown name, or damaged files.
      FileNotFoundError: ``data_dir`` or a file in it is missing.
      ImportError: what the source needs is not installed.
      ConnectionError: a TFDS set that is not prepared yet, and no network.

    >>> load("digits").train
    Dataset(digits: 1797 of (8, 8, 1) uint8, 10 classes)
    """
    base, slash, config = name.partition("/")
    name = base.lower().replace("-", "_") + slash + config
    if data_dir is not None and not Path(data_dir).expanduser().is_dir():
        raise FileNotFoundError(f"data_dir {data_dir} is not a folder")
    if name == "digits":
        if data_dir is not None:
            raise ValueError(
                "digits are bundled and take no data_dir: name the data set that is in "
                f"{data_dir}, for instance 'mnist', or leave data_dir out"
            )
        return load_digits()
    if data_dir is not None and (folder := find_idx_folder(Path(data_dir).expanduser(), name)) is not None:
        return load_idx_folder(folder, name)
    return load_tfds(name, data_dir=data_dir, cache_dir=cache_dir, verify=verify)
