"""The cache of arrays: whole or not there, and damage is never read in silence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from nnkit.data.cache import DamagedCacheError, cache_root, open_entry, writing_entry

X = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)


def write(folder, x=X, notes=None):
    with writing_entry(folder, notes or {"classes": ["a", "b"]}) as temporary:
        np.save(temporary / "x.npy", x)
        np.save(temporary / "y.npy", np.arange(len(x)))


def test_there_and_back(tmp_path):
    write(tmp_path / "deep" / "entry")
    arrays, notes = open_entry(tmp_path / "deep" / "entry")
    assert set(arrays) == {"x", "y"}
    assert isinstance(arrays["x"], np.memmap)
    assert not arrays["x"].flags.writeable
    np.testing.assert_array_equal(arrays["x"], X)
    assert notes == {"classes": ["a", "b"]}


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv("NNKIT_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "nnkit"
    monkeypatch.setenv("NNKIT_CACHE", str(tmp_path / "env"))
    assert cache_root() == tmp_path / "env"
    assert cache_root("~/mine") == tmp_path / "mine"


def test_no_entry(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_entry(tmp_path / "entry")


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda entry: flip(entry / "x.npy"), r"x.npy is damaged: its SHA-256 is not the one"),
        (
            lambda entry: os.truncate(entry / "y.npy", 100),
            r"y.npy is damaged: it has 100 bytes and was written with 144",
        ),
        (
            lambda entry: (entry / "x.npy").unlink(),
            r"x.npy is damaged: it has no bytes and was written with 152",
        ),
        (
            lambda entry: (entry / "manifest.json").write_text('{"for'),
            r"manifest.json is damaged \(JSONDecodeError",
        ),
        (
            lambda entry: (entry / "manifest.json").write_bytes(b"\xff\xfe"),
            r"manifest.json is damaged \(UnicodeDecode",
        ),
        (lambda entry: (entry / "manifest.json").write_text("[]"), r"manifest.json is damaged \(TypeError"),
        (lambda entry: (entry / "manifest.json").write_text("{}"), r"manifest.json is damaged \(KeyError"),
        (lambda entry: (entry / "manifest.json").unlink(), r"entry is damaged: it has no manifest.json"),
        (
            lambda entry: edit(entry / "manifest.json", format=9),
            r"has format 9, and this version of nnkit reads 1",
        ),
    ],
    ids=range(9),
)
def test_damage_is_named_and_repaired(tmp_path, damage, message):
    entry = tmp_path / "entry"
    write(entry)
    damage(entry)
    with pytest.raises(DamagedCacheError, match=message) as error:
        open_entry(entry)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)
    write(entry)
    np.testing.assert_array_equal(open_entry(entry)[0]["x"], X)
    assert [path.name for path in tmp_path.iterdir()] == ["entry"]


def test_without_verification_sizes_are_compared_alone(tmp_path):
    write(tmp_path / "entry")
    flip(tmp_path / "entry" / "x.npy")
    assert open_entry(tmp_path / "entry", verify=False)[0]["x"][-1, -1, -1] == 22
    os.truncate(tmp_path / "entry" / "x.npy", 100)
    with pytest.raises(DamagedCacheError):
        open_entry(tmp_path / "entry", verify=False)


def test_an_error_leaves_nothing(tmp_path):
    def fail():
        with writing_entry(tmp_path / "entry", {}) as temporary:
            np.save(temporary / "x.npy", X)
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fail()
    assert not list(tmp_path.iterdir())


KILLED = """
import os, sys, numpy as np
from pathlib import Path
from nnkit.data import cache
if sys.argv[2] == "sealed":
    cache.os.replace = lambda *_: os._exit(9)
with cache.writing_entry(Path(sys.argv[1]), {}) as folder:
    np.save(folder / "x.npy", np.zeros(3))
    if sys.argv[2] == "written":
        os._exit(9)
"""


@pytest.mark.parametrize("when", ["written", "sealed"])
def test_a_killed_process_leaves_no_half_entry(tmp_path, when):
    run = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "entry"), when], check=False)
    assert run.returncode == 9
    with pytest.raises(FileNotFoundError):
        open_entry(tmp_path / "entry")
    left = list(tmp_path.iterdir())
    assert [path.name[:8] for path in left] == [".making-"]
    write(tmp_path / "entry")
    assert left[0].exists(), "may belong to a process that is still at work"
    yesterday = time.time() - 2 * 86400
    os.utime(left[0], (yesterday, yesterday))
    write(tmp_path / "other")
    assert not left[0].exists()


def test_of_many_writers_one_wins_and_readers_see_whole_entries(tmp_path):
    entry = tmp_path / "entry"

    def work(i):
        write(entry, np.full((50, 50), i, np.uint8))
        return np.unique(open_entry(entry)[0]["x"]).tolist()

    with ThreadPoolExecutor(8) as pool:
        seen = list(pool.map(work, range(24)))
    assert len(seen[0]) == 1
    assert all(values == seen[0] for values in seen)
    assert [path.name for path in tmp_path.iterdir()] == ["entry"]


def test_many_repair_a_damaged_entry_at_once(tmp_path):
    entry = tmp_path / "entry"
    write(entry)
    flip(entry / "x.npy")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: write(entry), range(8)))
    np.testing.assert_array_equal(open_entry(entry)[0]["x"], X)
    assert [path.name for path in tmp_path.iterdir()] == ["entry"]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        OSError, match=r"cannot write to the cache folder .*file.*: name another by cache_dir or the"
    ):
        write(tmp_path / "file" / "entry")
