"""metrics.jsonl has every row once, whatever moment the process was killed at."""

from __future__ import annotations

import errno
import json
import math
import os
import re

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnkit.train import records
from nnkit.train.records import append_records, cut_records, read_records
from nnkit.train.saving import DamagedFileError

ROWS = [{"epoch": i, "step": 8 * i, "loss": 0.1 / i, "name": "é\n"} for i in range(1, 4)]


@given(
    st.lists(st.dictionaries(st.text(max_size=5), st.floats() | st.integers() | st.booleans() | st.none()))
)
def test_what_is_read_is_what_was_written(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("run")
    append_records(folder, rows)
    append_records(folder, [{"last": 1}])
    found = read_records(folder)
    assert found.pop() == {"last": 1}
    assert repr(found) == repr(rows)  # NaN and the sign of a zero too


def test_numbers_of_every_kind(tmp_path):
    append_records(tmp_path, [{"a": jnp.float32(0.1), "b": np.int64(3), "c": np.inf, "d": jnp.bfloat16(1.5)}])
    assert read_records(tmp_path) == [{"a": float(np.float32(0.1)), "b": 3, "c": math.inf, "d": 1.5}]
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # other programs than Python read it


def test_every_place_where_a_write_can_be_torn(tmp_path):
    append_records(tmp_path, ROWS)
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for length in range(len(whole) + 1):
        (tmp_path / "metrics.jsonl").write_bytes(whole[:length])
        complete = sum(end <= length for end in ends)
        assert read_records(tmp_path) == ROWS[:complete]
        append_records(tmp_path, ROWS[complete:])
        assert (tmp_path / "metrics.jsonl").read_bytes() == whole


def test_a_torn_line_longer_than_a_block_is_cut_off(tmp_path):
    append_records(tmp_path, [{"a": 1}])
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"b": "' + b"x" * 10_000)
    append_records(tmp_path, [{"c": 2}])
    assert read_records(tmp_path) == [{"a": 1}, {"c": 2}]


def test_rows_beyond_a_step_are_cut_and_the_rest_keeps_its_bytes(tmp_path):
    assert cut_records(tmp_path, 8) == 0
    append_records(tmp_path, [{"note": "no step"}, *ROWS])
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    assert cut_records(tmp_path, 24) == 0
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole
    assert cut_records(tmp_path, 16) == 1
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(whole.splitlines(keepends=True)[:3])
    assert cut_records(tmp_path, 0) == 2
    assert read_records(tmp_path) == [{"note": "no step"}]


def test_cutting_takes_a_torn_line_too(tmp_path):
    append_records(tmp_path, ROWS)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"epoch": 4')
    assert cut_records(tmp_path, 24) == 0
    assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"\n")
    assert read_records(tmp_path) == ROWS


def test_a_cut_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    append_records(tmp_path, ROWS)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        cut_records(tmp_path, 8)
    assert read_records(tmp_path) == ROWS


@pytest.mark.parametrize("fault", ["short", "error"])
def test_a_full_disk_leaves_the_lines_before(tmp_path, monkeypatch, fault):
    append_records(tmp_path, ROWS[:1])
    before = (tmp_path / "metrics.jsonl").read_bytes()

    class Full:
        """A file on a disk that takes ten bytes more."""

        def __init__(self, path):
            self.file = open(path, "ab+", buffering=0)  # noqa: SIM115

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            written = self.file.write(data[:10])
            if fault == "error":
                raise OSError(errno.ENOSPC, "No space left on device")
            return written

    monkeypatch.setattr(records, "open", lambda path, *_, **__: Full(path), raising=False)
    with pytest.raises(
        OSError, match="the disk took a part of the lines" if fault == "short" else "No space"
    ):
        append_records(tmp_path, ROWS[1:])
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_the_lines_are_on_the_disk_before_the_call_returns(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    append_records(tmp_path, ROWS[:1])
    size = (tmp_path / "metrics.jsonl").stat().st_size
    assert synced[0] == size
    assert len(synced) == 2  # the folder too, which has the new name
    append_records(tmp_path, [])
    assert len(synced) == 2
    append_records(tmp_path, ROWS[1:2])
    assert synced[2:] == [(tmp_path / "metrics.jsonl").stat().st_size]


def test_a_damaged_line_is_named(tmp_path):
    append_records(tmp_path, ROWS)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for wrong in (b'{"epoch": \n', b"[1]\n", b"\xff\n", b"\n"):
        path.write_bytes(lines[0] + wrong + lines[2])
        with pytest.raises(DamagedFileError, match=r"^line 2 of '.*metrics\.jsonl' is damaged"):
            read_records(tmp_path)
        with pytest.raises(DamagedFileError, match="line 2 of"):
            cut_records(tmp_path, 8)


def test_errors(tmp_path):
    with pytest.raises(TypeError, match=re.escape("row 1['a'] is a object, which JSON has not")):
        append_records(tmp_path, [{"a": 1}, {"a": object()}])
    assert not (tmp_path / "metrics.jsonl").exists()
    with pytest.raises(FileNotFoundError, match=r"the folder .*nowhere' does not exist; make it first"):
        append_records(tmp_path / "nowhere", [{"a": 1}])
    with pytest.raises(FileNotFoundError, match=r"no metrics\.jsonl in .*: the run has recorded nothing"):
        read_records(tmp_path)
