"""TensorFlow Datasets really used: data sets that TFDS itself builds, here, from image files."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from nnkit import data
from nnkit.data import tfds_convert
from nnkit.data.cache import DamagedCacheError

DIGITS = data.load("digits").train
PARTS = {"train": slice(0, 900), "validation": slice(900, 960), "test": slice(960, 1000)}


class NnkitDigits(tfds.core.GeneratorBasedBuilder):
    """Scikit-learn's digits out of a folder of PNG files, ``<part>/<index>_<label>.png``."""

    VERSION = tfds.core.Version("1.2.0")
    folder = None

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(8, 8, 1)),
            "label": tfds.features.ClassLabel(names=[f"digit {i}" for i in range(10)]),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {part: self._generate_examples(part) for part in PARTS}

    def _generate_examples(self, part):
        for path in sorted((self.folder / part).iterdir()):
            index, label = path.stem.split("_")
            yield int(index), {"image": path, "label": int(label)}


class NnkitShuffled(NnkitDigits):
    """The same in TFDS's own random order, in two configurations of which the second is the default."""

    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name, version="1.0.0") for name in ("half", "whole")]  # noqa: RUF012
    DEFAULT_BUILDER_CONFIG_NAME = "whole"

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(8, 8, 1)),
            "label": tfds.features.ClassLabel(num_classes=10),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples("train")}

    def _generate_examples(self, part):
        for index, example in super()._generate_examples(part):
            if index % 2 or self.builder_config.name == "whole":
                yield index, example


class NnkitSizes(NnkitDigits):
    """Images of no fixed shape."""

    def _info(self):
        features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=10)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))


class NnkitText(NnkitDigits):
    """No images at all."""

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict({"text": tfds.features.Text()})
        )

    def _generate_examples(self, part):
        yield 0, {"text": part}


class NnkitTestOnly(NnkitDigits):
    def _split_generators(self, dl_manager):
        return {"test": self._generate_examples("test")}


class NnkitNeeds(NnkitDigits):
    """Cannot be prepared without a package that is not there."""

    def _split_generators(self, dl_manager):
        import nnkit_needs_this  # noqa: F401  # pyright: ignore[reportMissingImports]


class NnkitUnnamed(NnkitDigits):
    """Likewise, told as TFDS tells it when an image cannot be encoded."""

    def _split_generators(self, dl_manager):
        raise ModuleNotFoundError("Failed to encode example")


class NnkitFails(NnkitDigits):
    def _split_generators(self, dl_manager):
        raise OSError("the disk is on fire\nand more")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder in which the public loader has had TFDS prepare NnkitDigits."""
    root = tmp_path_factory.mktemp("tfds")
    NnkitDigits.folder = tmp_path_factory.mktemp("png")
    for part, where in PARTS.items():
        (NnkitDigits.folder / part).mkdir()
        for i, (image, label) in enumerate(zip(DIGITS.x[where], DIGITS.y[where], strict=True)):
            Image.fromarray(image[..., 0]).save(NnkitDigits.folder / part / f"{i:04}_{label}.png")
    data.load("nnkit_digits", data_dir=root, cache_dir=root / "cache")
    return root


@pytest.fixture
def root(prepared, tmp_path):
    """A copy of it to do anything with, and an empty cache beside it."""
    shutil.copytree(prepared / "nnkit_digits", tmp_path / "nnkit_digits")
    return tmp_path


def load(root, name="nnkit_digits", **options):
    return data.load(name, data_dir=root, cache_dir=root / "cache", **options)


def check_digits(splits):
    for part, where in PARTS.items():
        dataset = getattr(splits, part)
        assert (dataset.x.dtype, dataset.y.dtype) == (np.uint8, np.int32)
        np.testing.assert_array_equal(dataset.x, DIGITS.x[where])
        np.testing.assert_array_equal(dataset.y, DIGITS.y[where])
        assert dataset.classes == tuple(f"digit {i}" for i in range(10))


def entries(root):
    return sorted(path.name for path in (root / "cache" / "tfds" / "nnkit_digits").iterdir())


def test_what_tfds_prepared_is_what_went_in(prepared):
    assert (prepared / "nnkit_digits" / "1.2.0" / "dataset_info.json").exists()
    check_digits(load(prepared))


def test_it_is_converted_once(root, capsys):
    check_digits(load(root))
    assert capsys.readouterr().err.count("nnkit: converting") == 1
    before = [path.stat().st_mtime_ns for path in sorted((root / "cache").rglob("*"))]
    check_digits(load(root))
    assert capsys.readouterr().err == ""
    assert [path.stat().st_mtime_ns for path in sorted((root / "cache").rglob("*"))] == before
    entry = root / "cache" / "tfds" / "nnkit_digits" / entries(root)[0]
    notes = json.loads((entry / "manifest.json").read_text())["notes"]
    assert (notes["version"], notes["tfds"]) == ("1.2.0", tfds.__version__)


def test_the_second_opening_maps_the_arrays_and_needs_no_tfds(prepared):
    program = f"""
import sys, time, numpy as np
sys.modules["tensorflow_datasets"] = None
from nnkit import data
start = time.perf_counter()
splits = data.load("nnkit_digits", data_dir={str(prepared)!r}, cache_dir={str(prepared / "cache")!r})
seconds = time.perf_counter() - start
assert isinstance(splits.train.x, np.memmap), type(splits.train.x)
assert {{"array_record", "PIL"}}.isdisjoint(sys.modules)
print(len(splits.train), seconds)
"""
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    length, seconds = out.split()
    assert length == "900"
    assert float(seconds) < 1


def test_the_cache_folder_is_that_of_the_environment(root, monkeypatch):
    monkeypatch.setenv("NNKIT_CACHE", str(root / "mine"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(root))
    check_digits(data.load("nnkit_digits"))
    assert (root / "mine" / "tfds" / "nnkit_digits").is_dir()


def test_the_arrays_stay_when_the_records_are_gone(root):
    load(root)
    shutil.rmtree(root / "nnkit_digits")
    check_digits(load(root))
    check_digits(load(root, "nnkit_digits:1.2.0"))
    check_digits(load(root, "nnkit_digits:1.*.*"))


def damage(root):
    (path,) = (root / "cache").rglob("train_x.npy")
    content = bytearray(path.read_bytes())
    content[-100] ^= 4
    path.write_bytes(content)


def test_damaged_arrays_are_named_and_made_again(root):
    load(root)
    damage(root)
    with pytest.warns(
        UserWarning, match=r"train_x.npy is damaged: its SHA-256 .*; making it again from .*1.2.0"
    ):
        check_digits(load(root))
    check_digits(load(root))


def test_damaged_arrays_that_cannot_be_made_again_are_refused(root):
    load(root)
    damage(root)
    shutil.rmtree(root / "nnkit_digits")
    with pytest.raises(
        DamagedCacheError, match=r"train_x.npy is damaged: .* is not in .*: delete .* and load nnkit_digits"
    ):
        load(root)


def test_records_prepared_anew_are_converted_anew(root):
    load(root)
    for path in (root / "nnkit_digits" / "1.2.0").iterdir():
        os.utime(path, ns=(1, 1))
    check_digits(load(root))
    assert len(entries(root)) == 2


def as_tfrecords(folder):
    """The prepared data set in TFDS's default format, which takes TensorFlow to write: rewritten by hand."""
    builder = tfds.builder_from_directory(folder)
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    info = json.loads((folder / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    for split in info["splits"]:
        source = builder.as_data_source(split["name"], deserialize_method=raw)
        records = [bytes(source[i]) for i in range(len(source))]
        shards = [records[: len(records) // 3], records[len(records) // 3 :]]
        split["shardLengths"] = [str(len(shard)) for shard in shards]
        for i, shard in enumerate(shards):
            with (folder / f"nnkit_digits-{split['name']}.tfrecord-0000{i}-of-00002").open("wb") as file:
                for record in shard:
                    file.write(struct.pack("<Q4x", len(record)) + record + bytes(4))
    (folder / "dataset_info.json").write_text(json.dumps(info))
    for path in folder.glob("*array_record*"):
        path.unlink()
    return folder


def test_tfds_default_format_is_read_without_tensorflow(root):
    as_tfrecords(root / "nnkit_digits" / "1.2.0")
    check_digits(load(root))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-7], r"-00001-of-00002 is truncated: its last record has \d+ of \d+ bytes"),
        (lambda content: content + b"\xff" * 12, r"is damaged: no record at byte \d+"),
        (lambda content: content + b"\0" * 5, r"is damaged: no record at byte \d+"),
        (lambda content: b"", r"1.2.0 is damaged, its part train: 300 of 900 records"),
        (
            lambda content: content + content,
            r"1.2.0 is damaged, its part train: images \(1024, 8, 8, 1\) uint8 after 300 of 900",
        ),
        (lambda content: content[:20] + b"\xff" * 60 + content[80:], "1.2.0 is damaged, its part train: "),
    ],
    ids=range(6),
)
def test_damaged_tfrecords_are_named(root, change, message):
    folder = as_tfrecords(root / "nnkit_digits" / "1.2.0")
    path = folder / "nnkit_digits-train.tfrecord-00001-of-00002"
    path.write_bytes(change(path.read_bytes()))
    check_damage(root, message)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("nnkit_digits-test.array_record-00000-of-00001", lambda content: content[:-2000], "damaged, its part test: "),
        ("nnkit_digits-train.array_record-00000-of-00001", lambda c: c[:70_000] + b"\0\1" + c[70_002:],
         "damaged, its part train: Corrupted"),
        ("dataset_info.json", lambda content: content[:100], "1.2.0 is damaged .*: delete it and have TFDS prepare"),
        ("features.json", lambda content: content[:100], "1.2.0 is damaged .*: delete it and have TFDS prepare"),
    ],
    ids=range(4),
)  # fmt: skip
def test_damaged_records_are_named(root, file, change, message):
    path = root / "nnkit_digits" / "1.2.0" / file
    path.write_bytes(change(path.read_bytes()))
    check_damage(root, message)


def check_damage(root, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(root)
    assert "\n" not in str(caught.value)
    assert str(root) in str(caught.value)
    assert not list((root / "cache").rglob("*.npy"))


def test_a_full_disk_is_an_error_and_leaves_nothing(root, monkeypatch):
    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", full)
    with pytest.raises(OSError, match="No space left on device"):
        load(root)
    assert not list((root / "cache").rglob("*.npy"))


def test_an_image_decoder_is_needed(root, monkeypatch):
    monkeypatch.setattr(
        tfds_convert, "_read", lambda *_: (_ for _ in ()).throw(ImportError("PIL is not installed."))
    )
    with pytest.raises(ImportError, match=r"needs more \(PIL is not installed.\): pip install nnkit\[tfds\]"):
        load(root)


def test_configurations(root):
    whole = load(root, "nnkit_shuffled").train
    half = load(root, "nnkit_shuffled/half").train
    assert (len(whole), len(half)) == (900, 450)
    assert load(root, "nnkit_shuffled").train.x.filename == whole.x.filename
    assert whole.classes == tuple("0123456789")
    assert not np.array_equal(whole.y, DIGITS.y[:900])

    def content(x, y):
        return sorted(row.tobytes() for row in np.concatenate([np.reshape(x, (len(x), -1)), y[:, None]], 1))

    assert content(*whole.arrays) == content(DIGITS.x[:900], DIGITS.y[:900])
    assert content(*half.arrays) == content(DIGITS.x[1:900:2], DIGITS.y[1:900:2])
    (root / "nnkit_shuffled" / ".config" / "metadata.json").unlink()
    with pytest.raises(
        ValueError, match="several configurations of nnkit_shuffled: name one of nnkit_shuffled/half, nnkit"
    ):
        load(root, "nnkit_shuffled")


def test_the_newest_fitting_version_is_taken(root):
    for version in ("1.10.0", "incomplete.XYZ_9.0.0"):
        shutil.copytree(root / "nnkit_digits" / "1.2.0", root / "nnkit_digits" / version)
    assert "1.10.0" in str(load(root).train.x.filename)
    assert "1.2.0" in str(load(root, "nnkit_digits:1.2.*").train.x.filename)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("nnkit_sizes", ValueError, r"the images of nnkit_sizes differ in shape, \(None, None, 3\)"),
        (
            "nnkit_text",
            ValueError,
            r"nnkit_text is not an image-classification set, .*: it has text \(Text\)",
        ),
        ("nnkit_test_only", ValueError, "nnkit_test_only has no part called train, only test"),
        (
            "nnkit_needs",
            ImportError,
            "preparing nnkit_needs needs nnkit_needs_this: pip install nnkit_needs_this, or prepare",
        ),
        (
            "nnkit_fails",
            RuntimeError,
            r"TFDS could not prepare nnkit_fails \(the disk is on fire\): prepare it where",
        ),
        ("nnkit_shuffled/third", ValueError, "TensorFlow Datasets has no nnkit_shuffled/third: "),
        ("nnkit_digits:9.9.9", ValueError, "TensorFlow Datasets has no nnkit_digits:9.9.9: .*only: 1.2.0"),
    ],
)
def test_what_cannot_be_had(root, name, error, message):
    with pytest.raises(error, match=message) as caught:
        load(root, name)
    assert "\n" not in str(caught.value)
    assert not list((root / "cache").rglob("*.npy"))


# Without a network, without TFDS, without such a data set


def test_no_network_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds_convert, "_answers", lambda url: False)
    with pytest.raises(
        ConnectionError,
        match=r"^mnist is not prepared in .* and storage.googleapis.com cannot be reached: prepare it where there is "
        r"a network with tfds.builder\('mnist', file_format='array_record'\).download_and_prepare\(\) and copy its "
        r"folder mnist into .*, or give a folder of IDX files as data_dir$",
    ):
        data.load("mnist", data_dir=tmp_path, cache_dir=tmp_path)


@pytest.fixture
def server(monkeypatch):
    """A host that answers everything with an error page."""
    monkeypatch.setenv("no_proxy", "*")
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    monkeypatch.setattr(http.server.BaseHTTPRequestHandler, "log_message", lambda *_: None)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/file"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_host_that_answers_is_a_network(server):
    assert tfds_convert._answers(server)


def test_a_closed_port_is_none(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    assert not tfds_convert._answers("http://127.0.0.1:1/file")


def test_a_look_up_that_hangs_is_given_up(monkeypatch):
    def hang(*_args, **_options):
        time.sleep(2)
        raise OSError

    monkeypatch.setattr("urllib.request.urlopen", hang)
    monkeypatch.setattr(tfds_convert, "_PATIENCE", 0.05)
    start = time.perf_counter()
    assert not tfds_convert._answers("http://example.invalid/file")
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("minst", "'mnist'"),
        ("fashon-mnist", "'fashion_mnist'"),
        ("cifar_10", "'cifar10'"),
        ("digit", "'digits'"),
        ("nnkit_digit", "'nnkit_digits'"),
        ("caltech_bird_2010", "'caltech_birds2010'"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(tmp_path, name, near):
    with pytest.raises(ValueError, match=rf"^unknown data set .*did you mean .*{near}") as error:
        load(tmp_path, name)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("name", ["", "my data", "42", "a:b:c"])
def test_what_is_no_name(tmp_path, name):
    with pytest.raises(ValueError, match=rf"^unknown data set '{name}'. Known: cifar10, cifar100, digits"):
        load(tmp_path, name)


def test_without_tfds(tmp_path, monkeypatch, prepared):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(
        ImportError, match=r"^mnist is read with TensorFlow Datasets: pip install nnkit\[tfds\], or give"
    ):
        load(tmp_path, "mnist")
    with pytest.raises(
        ValueError, match=r"unknown data set 'minst'; did you mean 'mnist'.*pip install nnkit\[tfds\]"
    ):
        load(tmp_path, "minst")
    with pytest.raises(ImportError, match=r"^nnkit_digits is read with TensorFlow Datasets"):
        data.load("nnkit_digits", data_dir=prepared, cache_dir=tmp_path)
    check_digits(load(prepared))
