"""The IDX format: every dtype and rank there and back, and every kind of damage."""

from __future__ import annotations

import functools
import gzip
import struct

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nnkit.data import read_idx, write_idx

CODES = {0x08: "u1", 0x09: "i1", 0x0B: "i2", 0x0C: "i4", 0x0D: "f4", 0x0E: "f8"}
ARRAYS = st.sampled_from(sorted(CODES.values())).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4))
)


def by_hand(array: np.ndarray) -> bytes:
    """The file that the format's description asks for, packed with ``struct``."""
    code = next(code for code, dtype in CODES.items() if np.dtype(dtype) == array.dtype)
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape)
    return header + struct.pack(f">{array.size}{array.dtype.char}", *array.ravel().tolist())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(array=ARRAYS, suffix=st.sampled_from(["", ".gz"]))
def test_there_and_back(tmp_path, array, suffix):
    path = tmp_path / f"array-idx-ubyte{suffix}"
    write_idx(path, array)
    back = read_idx(path)
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    assert back.dtype.isnative
    assert back.tobytes() == array.tobytes()


@pytest.mark.parametrize("dtype", CODES.values())
def test_the_bytes_are_those_of_the_format(tmp_path, dtype):
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    write_idx(tmp_path / "a", array)
    assert (tmp_path / "a").read_bytes() == by_hand(array)
    write_idx(tmp_path / "a.gz", array)
    assert gzip.decompress((tmp_path / "a.gz").read_bytes()) == by_hand(array)


def test_a_file_by_hand(tmp_path):
    (tmp_path / "labels").write_bytes(b"\0\0\x08\x01\0\0\0\x03\x05\x00\x04")
    np.testing.assert_array_equal(read_idx(tmp_path / "labels"), [5, 0, 4])


def test_raw_bytes_are_mapped_and_the_map_is_read_only(tmp_path):
    write_idx(tmp_path / "x", np.ones((3, 2), np.uint8))
    array = read_idx(tmp_path / "x")
    assert isinstance(array, np.memmap)
    assert not array.flags.writeable


def test_a_gzipped_file_is_known_by_its_content(tmp_path):
    array = np.arange(6, dtype=np.int16)
    (tmp_path / "x-idx1").write_bytes(gzip.compress(by_hand(array)))
    (tmp_path / "y-idx1.gz").write_bytes(by_hand(array))
    np.testing.assert_array_equal(read_idx(tmp_path / "x-idx1"), array)
    np.testing.assert_array_equal(read_idx(tmp_path / "y-idx1.gz"), array)


def test_a_gzipped_file_of_more_than_one_piece(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, 3 * 2**20 + 17, dtype=np.uint8)
    write_idx(tmp_path / "x.gz", array)
    np.testing.assert_array_equal(read_idx(tmp_path / "x.gz"), array)


def test_equal_arrays_make_equal_files_and_nothing_else_is_left(tmp_path):
    for name in ("a.gz", "b.gz"):
        write_idx(tmp_path / name, np.asfortranarray(np.arange(6, dtype=np.int32).reshape(2, 3)))
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()
    assert (tmp_path / "a.gz").read_bytes()[4:8] == bytes(4), "gzip's time stamp"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gz", "b.gz"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    write_idx(tmp_path / "x", np.zeros(2, np.uint8))
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_idx(tmp_path / "x", np.ones(5, np.uint8))
    np.testing.assert_array_equal(read_idx(tmp_path / "x"), [0, 0])
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("dtype", [np.int64, np.float16, np.bool_, np.complex64])
def test_dtypes_that_the_format_lacks(tmp_path, dtype):
    with pytest.raises(
        ValueError, match=rf"IDX has no dtype {np.dtype(dtype)}: convert the array to one of uint8"
    ):
        write_idx(tmp_path / "x", np.zeros(2, dtype))
    assert not list(tmp_path.iterdir())


# With a fixed time, so that the parameters below have fixed names.
packed = functools.partial(gzip.compress, mtime=0)
WHOLE = by_hand(np.arange(6, dtype=np.int16).reshape(2, 3))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is truncated: it has 0 bytes and an IDX file at least 4"),
        (
            b"PK\x03\x04rest",
            "is not an IDX file: it begins with the bytes 50 4b 03 04 and must begin with 00 00",
        ),
        (
            b"\0\0\x0a" + WHOLE[3:],
            "has the unknown IDX dtype code 0x0a, expected one of 0x08 uint8, 0x09 int8",
        ),
        (WHOLE[:9], "is truncated: its header of 2 axes takes 12 bytes and it has 9"),
        (WHOLE[:-1], r"is truncated: it has 23 bytes, \(2, 3\) int16 with its header takes 24"),
        (WHOLE + b"\0", r"is too long: it has 25 bytes, \(2, 3\) int16 with its header takes 24"),
        (packed(WHOLE[:-1]), r"is truncated: it has 23 bytes, \(2, 3\) int16 with its header takes 24"),
        (packed(WHOLE + b"\0"), "is too long: it has more than 24 bytes"),
        (packed(WHOLE)[:-9], "is a damaged gzip file .*: fetch it again"),
        (
            packed(b"\0\0\x08\x02" + b"\xff" * 8),
            r"is truncated: it is \d+ bytes gzipped, \(4294967295, 4294967295\) uint8",
        ),
        (b"\0\0\x08\x02" + b"\xff" * 8, "is truncated: it has 12 bytes"),
    ],
    ids=range(11),
)
def test_damage_is_named(tmp_path, content, message):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_idx(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("pack", [bytes, packed], ids=["raw", "gzip"])
def test_no_shortened_file_is_read(tmp_path, pack):
    whole = pack(WHOLE)
    for length in range(len(whole)):
        (tmp_path / "x").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=str(tmp_path)):
            read_idx(tmp_path / "x")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_no_flipped_bit_of_a_gzipped_file_changes_the_numbers(tmp_path, place, bit):
    content = bytearray(packed(WHOLE))
    content[place % len(content)] ^= 1 << bit
    (tmp_path / "x").write_bytes(content)
    try:
        array = read_idx(tmp_path / "x")
    except ValueError as error:
        assert str(tmp_path) in str(error)  # noqa: PT017
    else:
        # Some bits of gzip's own header mean nothing.
        assert by_hand(array) == WHOLE


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing-here"):
        read_idx(tmp_path / "nothing-here")
