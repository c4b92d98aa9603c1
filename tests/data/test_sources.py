"""Data sets by name: digits, folders of IDX files, and what is said of others."""

from __future__ import annotations

import gzip
import shutil
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

from nnkit import data

RNG = np.random.default_rng(0)
IMAGES = {
    "train": RNG.integers(0, 256, (30, 5, 4), dtype=np.uint8),
    "t10k": RNG.integers(0, 256, (10, 5, 4), dtype=np.uint8),
}
LABELS = {"train": np.arange(30, dtype=np.uint8) % 10, "t10k": np.arange(10, dtype=np.uint8)}


def publish(folder, prefix="", suffix="", dot="-", parts=("train", "t10k"), labels=LABELS):
    folder.mkdir(parents=True, exist_ok=True)
    for part in parts:
        name = {"train": "train", "t10k": "test" if prefix.startswith("emnist") else "t10k"}[part]
        data.write_idx(folder / f"{prefix}{name}-images{dot}idx3-ubyte{suffix}", IMAGES[part])
        data.write_idx(folder / f"{prefix}{name}-labels{dot}idx1-ubyte{suffix}", labels[part])
    return folder


def test_digits():
    splits = data.load("digits")
    images, labels = load_digits(return_X_y=True)
    assert (splits.validation, splits.test) == (None, None)
    assert (splits.train.x.shape, splits.train.x.dtype, splits.train.y.dtype) == (
        (1797, 8, 8, 1),
        np.uint8,
        np.int32,
    )
    np.testing.assert_array_equal(splits.train.x.reshape(1797, 64), images)
    np.testing.assert_array_equal(splits.train.y, labels)
    assert splits.train.classes == tuple("0123456789")


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"digits come with scikit-learn: pip install nnkit\[experiments\]"):
        data.load("digits")


@pytest.mark.parametrize(
    ("name", "where", "options"),
    [
        ("mnist", ".", {}),
        ("mnist", ".", {"suffix": ".gz"}),
        ("mnist", ".", {"dot": "."}),
        ("mnist", "MNIST/raw", {}),
        ("fashion_mnist", "FashionMNIST/raw", {"suffix": ".gz"}),
        ("Fashion-MNIST", "fashion-mnist", {"suffix": ".gz"}),
        ("mnist", "raw", {}),
        ("emnist-letters", "gzip/..", {"prefix": "emnist-letters-", "suffix": ".gz"}),
        ("emnist/letters", ".", {"prefix": "emnist-letters-"}),
        ("my_symbols", ".", {}),
    ],
)
def test_the_names_under_which_idx_files_are_published(tmp_path, name, where, options):
    publish(tmp_path / where, **options)
    splits = data.load(name, data_dir=tmp_path)
    for part, published in ((splits.train, "train"), (splits.test, "t10k")):
        assert (part.x.dtype, part.y.dtype) == (np.uint8, np.int32)
        np.testing.assert_array_equal(part.x, IMAGES[published][..., None])
        np.testing.assert_array_equal(part.y, LABELS[published])
    assert splits.validation is None
    assert isinstance(splits.train.x, np.memmap) == ("suffix" not in options)


def test_the_name_says_what_the_labels_mean(tmp_path):
    publish(tmp_path)
    assert data.load("fashion_mnist", data_dir=tmp_path).train.classes[8:] == ("Bag", "Ankle boot")
    assert data.load("mnist", data_dir=str(tmp_path)).test.classes == tuple("0123456789")
    assert data.load("else", data_dir=tmp_path).train.classes == tuple("0123456789")
    assert data.load("else", data_dir=tmp_path).train.name == "else"


def test_a_raw_file_is_taken_before_its_gzipped_twin(tmp_path):
    publish(tmp_path, suffix=".gz")
    publish(tmp_path)
    assert isinstance(data.load("mnist", data_dir=tmp_path).train.x, np.memmap)


def test_a_folder_of_several_sets(tmp_path):
    publish(tmp_path, prefix="emnist-letters-")
    publish(tmp_path, prefix="emnist-digits-", labels={part: 9 - LABELS[part] for part in LABELS})
    np.testing.assert_array_equal(data.load("emnist-digits", data_dir=tmp_path).test.y, 9 - LABELS["t10k"])
    np.testing.assert_array_equal(data.load("emnist/letters", data_dir=tmp_path).test.y, LABELS["t10k"])
    for name in ("emnist", "mnist"):
        message = (
            rf"has no IDX files of '{name}'; it has 'emnist-digits', 'emnist-letters': load one of these"
        )
        with pytest.raises(ValueError, match=message):
            data.load(name, data_dir=tmp_path)
    publish(tmp_path)
    np.testing.assert_array_equal(data.load("mnist", data_dir=tmp_path).test.y, LABELS["t10k"])
    with pytest.raises(ValueError, match="has no IDX files of 'emnist'"):
        data.load("emnist", data_dir=tmp_path)


def test_a_training_set_alone(tmp_path):
    publish(tmp_path, parts=("train",))
    assert data.load("mnist", data_dir=tmp_path).test is None


def _labels(folder, array):
    data.write_idx(folder / "train-labels-idx1-ubyte", array)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: (f / "train-labels-idx1-ubyte").unlink(), FileNotFoundError,
         "has no train labels of mnist: expected train-labels-idx1-ubyte or train-labels-idx1-ubyte.gz"),
        (lambda f: (f / "t10k-images-idx3-ubyte").unlink(), FileNotFoundError,
         "has no test images of mnist: expected t10k-images-idx3-ubyte"),
        (lambda f: _labels(f, LABELS["train"][:29]), ValueError, "has 30 images and .* has 29"),
        (lambda f: _labels(f, LABELS["train"] + 1), ValueError, "labels up to 10 and mnist has 10 classes"),
        (lambda f: _labels(f, LABELS["train"].astype(np.float32)), ValueError, r"float32 of shape \(30,\): expected"),
        (lambda f: _labels(f, IMAGES["train"]), ValueError, r"uint8 of shape \(30, 5, 4\): expected integer"),
        (lambda f: shutil.copy(f / "train-labels-idx1-ubyte", f / "train-images-idx3-ubyte"), ValueError,
         r"train-images-idx3-ubyte holds an array of shape \(30,\): expected images, \(n, height, width\)"),
        (lambda f: (f / "train-images-idx3-ubyte").write_bytes(b"<html>"), ValueError, "is not an IDX file"),
        (lambda f: (f / "train-images-idx3-ubyte").write_bytes(gzip.compress(b"\0\0\x08")), ValueError, "is truncated"),
    ],
    ids=range(9),
)  # fmt: skip
def test_damaged_folders_are_named(tmp_path, damage, error, message):
    damage(publish(tmp_path))
    with pytest.raises(error, match=message) as caught:
        data.load("mnist", data_dir=tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_digits_are_in_no_folder(tmp_path):
    with pytest.raises(
        ValueError, match=r"digits are bundled and take no data_dir: name the data set that is in"
    ):
        data.load("digits", data_dir=tmp_path)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data_dir .*nowhere is not a folder"):
        data.load("mnist", data_dir=tmp_path / "nowhere")
