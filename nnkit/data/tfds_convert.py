"""The part of reading TensorFlow Datasets that needs it: preparing a data set, and its records."""

from __future__ import annotations

import difflib
import struct
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from nnkit.checks import unknown_name
from nnkit.data.cache import writing_entry

__all__ = ["KNOWN", "PARTS", "convert", "prepare"]

KNOWN = ("digits", "mnist", "fashion_mnist", "kmnist", "emnist", "cifar10", "cifar100", "svhn_cropped")
"""What an unknown name is compared with; TFDS has hundreds more."""
PARTS = ("train", "validation", "test")
_BATCH = 1024
_PATIENCE = 3.0


def prepare(name: str, base: str, root: Path) -> Path:
    """Has TFDS download and prepare ``name`` under ``root``; returns the folder.

    The network is tried first: TFDS itself would retry for 206 s before it gave up.

    Raises:
      ValueError: TFDS has no such data set.
      ConnectionError: it cannot be downloaded.
      ImportError: TFDS, or something that it needs for this data set, is not installed.
      RuntimeError: TFDS failed in another way.
    """
    if base not in KNOWN:
        try:
            names = _tfds(name).list_builders(with_community_datasets=False)
        except ImportError as error:
            unknown = unknown_name("data set", name, KNOWN)
            raise ValueError(f"{unknown}; all of TensorFlow Datasets with pip install nnkit[tfds]") from error
        if base not in names:
            near = difflib.get_close_matches(base, names, n=3, cutoff=0.6)
            raise unknown_name("data set", name, {*KNOWN, *near})
    tfds = _tfds(name)
    elsewhere = (
        f"prepare it where there is a network with tfds.builder('{name}', file_format='array_record')"
        f".download_and_prepare() and copy its folder {base} into {root}, or give a folder of IDX files as data_dir"
    )
    try:
        # array_record can be read without TensorFlow, TFDS's default format cannot.
        builder = tfds.builder(name, data_dir=root, file_format="array_record")
    except (ValueError, AssertionError) as error:
        raise ValueError(f"TensorFlow Datasets has no {name}: {_first_line(error)}") from error
    urls = [url for url in builder.url_infos or () if url.startswith("http")]
    if urls and not _answers(urls[0]):
        host = urls[0].split("/")[2]
        raise ConnectionError(f"{name} is not prepared in {root} and {host} cannot be reached: {elsewhere}")
    try:
        # TFDS's copies in the cloud are in its default format; even asking for them takes TensorFlow.
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    except ImportError as error:
        raise ImportError(
            f"preparing {name} needs {error.name}: pip install {error.name}, or {elsewhere}"
        ) from error
    except Exception as error:
        raise RuntimeError(f"TFDS could not prepare {name} ({_first_line(error)}): {elsewhere}") from error
    return Path(builder.data_dir)


def convert(name: str, prepared: Path, entry: Path) -> None:
    """Writes the images and labels of a prepared data set as the cache entry ``entry``.

    Raises:
      ImportError: TFDS or an image decoder is not installed.
      ValueError: the data set is not images of one shape with one label each, or is damaged.
    """
    tfds = _tfds(name)
    try:
        builder = tfds.builder_from_directory(prepared)
    except Exception as error:
        raise ValueError(
            f"{prepared} is damaged ({_first_line(error)}): delete it and have TFDS prepare it anew"
        ) from error
    image, label = _keys(tfds, name, builder.info)
    if "train" not in builder.info.splits:
        raise ValueError(f"{name} has no part called train, only {', '.join(builder.info.splits)}")
    print(f"nnkit: converting {prepared} to arrays in {entry}, once", file=sys.stderr)
    notes = {
        "name": name,
        "version": str(builder.info.version),
        "classes": builder.info.features[label].names,
        "source": str(prepared),
        "tfds": tfds.__version__,
    }
    with writing_entry(entry, notes) as folder:
        for part in PARTS:
            if part in builder.info.splits:
                _write_part(builder, part, image, label, folder)


def _write_part(builder: Any, part: str, image: str, label: str, folder: Path) -> None:
    n, feature = builder.info.splits[part].num_examples, builder.info.features[image]
    header = {
        "descr": np.lib.format.dtype_to_descr(feature.np_dtype),
        "fortran_order": False,
        "shape": (n, *feature.shape),
    }
    labels = np.empty(n, np.int32)
    done = 0
    # Written and not mapped: on a full disk a write is an error and a mapped page a crash.
    with (folder / f"{part}_x.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for images, numbers in _examples(builder, part, n, image, label):
            end = done + len(images)
            if images.shape[1:] != feature.shape or images.dtype != feature.np_dtype or end > n:
                raise _damaged(builder, part, f"images {images.shape} {images.dtype} after {done} of {n}")
            file.write(images.tobytes())
            labels[done:end] = numbers
            done = end
    if done != n:
        raise _damaged(builder, part, f"{done} of {n} records")
    np.save(folder / f"{part}_y.npy", labels)


def _damaged(builder: Any, part: str, found: str) -> ValueError:
    return ValueError(f"{builder.data_dir} is damaged, its part {part}: {found}; have TFDS prepare it anew")


def _examples(
    builder: Any, part: str, n: int, image: str, label: str
) -> Iterator[tuple[np.ndarray, list[int]]]:
    """The images and labels of a part, some at a time."""
    try:
        for examples in _read(builder, part, n):
            yield np.stack([example[image] for example in examples]), [example[label] for example in examples]
    except ImportError as error:
        raise ImportError(
            f"reading {builder.data_dir} needs more ({_first_line(error)}): pip install nnkit[tfds]"
        ) from error
    except Exception as error:
        raise _damaged(builder, part, _first_line(error)) from error


def _read(builder: Any, part: str, n: int) -> Iterator[list[dict[str, Any]]]:
    info = builder.info
    if info.file_format.value != "tfrecord":
        source = builder.as_data_source(part)
        for start in range(0, n, _BATCH):
            yield source.__getitems__(list(range(start, min(start + _BATCH, n))))
        return
    for path in info.splits[part].filepaths:
        records = _tfrecords(Path(path))
        while batch := list(islice(records, _BATCH)):
            yield [info.features.deserialize_example_np(record) for record in batch]


def _tfrecords(path: Path) -> Iterator[bytes]:
    """The records of a TFRecord file: length (8 bytes), its checksum (4), data, its checksum (4).

    Read here because TFDS can do so only through TensorFlow. The checksums are CRC-32C, which
    Python does not have; a record that does not decode is noticed all the same.
    """
    with path.open("rb") as file:
        while header := file.read(12):
            length = struct.unpack("<Q", header[:8])[0] if len(header) == 12 else -1
            if not 0 <= length <= path.stat().st_size:
                raise ValueError(f"{path} is damaged: no record at byte {file.tell() - len(header)}")
            record = file.read(length + 4)
            if len(record) != length + 4:
                raise ValueError(
                    f"{path} is truncated: its last record has {len(record)} of {length + 4} bytes"
                )
            yield record[:-4]


def _keys(tfds: Any, name: str, info: Any) -> tuple[str, str]:
    """The names of the image and of the label among the features."""
    features = info.features
    items = dict(features.items()) if isinstance(features, tfds.features.FeaturesDict) else {}
    images = [key for key, feature in items.items() if isinstance(feature, tfds.features.Image)]
    labels = [key for key, feature in items.items() if isinstance(feature, tfds.features.ClassLabel)]
    if isinstance(info.supervised_keys, tuple) and len(info.supervised_keys) == 2:
        images = [key for key in images if key == info.supervised_keys[0]]
        labels = [key for key in labels if key == info.supervised_keys[1]]
    if len(images) != 1 or len(labels) != 1:
        raise ValueError(
            f"{name} is not an image-classification set, one image and one label an example: "
            f"it has {', '.join(f'{key} ({type(feature).__name__})' for key, feature in items.items())}"
        )
    shape = items[images[0]].shape
    if None in shape:
        raise ValueError(
            f"the images of {name} differ in shape, {shape}: nnkit.data reads images of one shape"
        )
    return images[0], labels[0]


def _tfds(name: str) -> Any:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            f"{name} is read with TensorFlow Datasets: pip install nnkit[tfds], or give a folder of IDX files "
            "as data_dir"
        ) from error
    return tfds


def _answers(url: str) -> bool:
    """Whether anything, an error page included, comes back from ``url`` within three seconds."""
    answered = threading.Event()

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_PATIENCE):
                answered.set()
        except urllib.error.HTTPError as error:
            error.close()
            answered.set()
        except OSError:
            pass

    # In a thread, because the time-out does not bound the look-up of the host's address.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    return answered.is_set()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
