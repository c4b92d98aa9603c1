"""Whatever becomes of a checkpoint, it is named or as it was; wherever a process is killed, one is whole."""

from __future__ import annotations

import json
import os
import random
import shutil
import stat
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nnkit.train import Checkpoints, DamagedFileError, checkpoint_files, restore
from nnkit.train.checkpoint_files import folders, read_entry
from tests.train.test_checkpoints import LIKE, check_restored, never, saved, tree
from tests.train.test_saving import assert_same

FILES = ("state.npz", "run.json", "SHA256SUMS")


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    """fsync is a matter of power cuts; the test of its order puts its own in its place."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def truncated(data: bytes, where: random.Random) -> Iterator[bytes]:
    for length in {len(data) - 1, len(data) // 2, 1, *(where.randrange(1, len(data)) for _ in range(5))}:
        yield data[:length]


def with_flipped_bits(data: bytes, where: random.Random, count: int) -> Iterator[bytes]:
    bits = range(8 * len(data))
    for bit in bits if count >= len(bits) else where.sample(bits, count):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        yield bytes(changed)


def damages(data: bytes, count: int) -> Iterator[bytes | None]:
    """What can become of a file; None where it is gone."""
    where = random.Random(0)
    yield None
    yield b""
    yield bytes(len(data))
    yield data + b"\n"
    yield from truncated(data, where)
    yield from with_flipped_bits(data, where, count)


def check_damage(folder: Path, count: int) -> None:
    """Whatever becomes of any file of the newest checkpoint, it is named and the previous one is used."""
    saved(folder, 10, 20)
    newest = folder / "step_000000020"
    for name in FILES:
        data = (newest / name).read_bytes()
        others = [(folder / "step_000000010" / name).read_bytes()]
        for damaged in [*damages(data, count), *others]:
            (newest / name).unlink(missing_ok=True)
            if damaged is not None:
                (newest / name).write_bytes(damaged)
            said: list[str] = []
            check_restored(folder, 10, said.append)
            assert len(said) == 1
            start = f"the checkpoint '{newest}' is damaged and is not used: "
            assert said[0].startswith(start)
            assert name in said[0].removeprefix(start)
            assert "\n" not in said[0]
        (newest / name).write_bytes(data)
        check_restored(folder, 20)


def test_damage(tmp_path):
    check_damage(tmp_path, 60)


@pytest.mark.slow
def test_every_flipped_bit(tmp_path):
    check_damage(tmp_path, 10**9)


def _no_sums(monkeypatch):
    """A reader that finds what json and load_tree stumble over, and nothing else."""

    def read(path):
        try:
            found = json.loads((path / "run.json").read_bytes())
            (path / "SHA256SUMS").read_text()
            return checkpoint_files.Entry(found["step"], found["score"], found["record"])
        except Exception as error:
            raise DamagedFileError(f"SHA256SUMS run.json {error}") from error

    monkeypatch.setattr(checkpoint_files, "read_entry", read)


def _sums_of_the_tree_only(monkeypatch):
    true = checkpoint_files._line
    monkeypatch.setattr(
        checkpoint_files, "_line", lambda name, d: true(name, d if name == "state.npz" else "0")
    )


def _sums_in_any_order(monkeypatch):
    """It looks for the sums of the files, and not at what else the text has."""

    class Sums(bytes):
        def __ne__(self, other):
            return not all(line in self for line in other.splitlines())

    true = Path.read_bytes
    monkeypatch.setattr(
        Path, "read_bytes", lambda path: Sums(true(path)) if path.name == "SHA256SUMS" else true(path)
    )


def _no_fallback(monkeypatch):
    monkeypatch.setattr(checkpoint_files, "folders", lambda folder: folders(folder)[:1])


def _older_first(monkeypatch):
    monkeypatch.setattr(checkpoint_files, "folders", lambda folder: folders(folder)[::-1])


READERS = [_no_sums, _sums_of_the_tree_only, _sums_in_any_order, _no_fallback, _older_first]


@pytest.mark.parametrize("mutate", READERS)
def test_wrong_readers_fail_the_test_of_damage(tmp_path, monkeypatch, mutate):
    mutate(monkeypatch)
    with pytest.raises((AssertionError, DamagedFileError)):
        check_damage(tmp_path, 60)


def test_all_damaged_is_an_error_that_lists_them(tmp_path):
    saved(tmp_path, 10, 20, 30, 40, 50)
    one, two, three, four, five = (tmp_path / f"step_{n:09d}" for n in (10, 20, 30, 40, 50))
    (one / "run.json").unlink()
    (two / "state.npz").write_bytes(b"")
    (three / "SHA256SUMS").write_bytes((three / "SHA256SUMS").read_bytes() + b"\n")
    shutil.rmtree(four)
    four.write_text("a file")
    shutil.rmtree(five)
    shutil.copytree(one, five)
    (five / "run.json").write_bytes(
        b'{"format": "nnkit checkpoint 1", "step": 10, "score": null, "record": {}}'
    )
    (five / "SHA256SUMS").write_text(checkpoint_files._sums(five))
    said: list[str] = []
    with pytest.raises(DamagedFileError) as caught:
        restore(tmp_path, LIKE, on_damaged=said.append)
    reasons = [
        f"the checkpoint '{five}' is damaged and is not used: it is the checkpoint of step 10 under another name",
        f"the checkpoint '{four}' is damaged and is not used: SHA256SUMS: Not a directory",
        f"the checkpoint '{three}' is damaged and is not used: the text in SHA256SUMS is not what was written",
        f"the checkpoint '{two}' is damaged and is not used: state.npz or the SHA-256 in SHA256SUMS is not "
        "what was written",
        f"the checkpoint '{one}' is damaged and is not used: run.json is missing",
    ]
    assert said == reasons
    assert str(caught.value) == (
        f"no checkpoint in '{tmp_path}' can be used. {'. '.join(reasons)}. Take them from a backup, or start "
        "the run anew in another folder"
    )


def test_damage_is_a_warning_where_nobody_listens(tmp_path):
    saved(tmp_path, 1, 2)
    (tmp_path / "step_000000002" / "run.json").unlink()
    with pytest.warns(
        UserWarning, match=r"step_000000002' is damaged and is not used: run.json is missing"
    ) as told:
        found = restore(tmp_path, LIKE)
    assert found is not None
    assert found.step == 1
    assert told[0].filename == __file__


def test_a_file_whose_sums_are_right_and_whose_tree_is_none(tmp_path):
    """Only load_tree's own hashes can tell what was wrong before the sums were taken."""
    saved(tmp_path, 1, 2)
    newest = tmp_path / "step_000000002"
    (newest / "state.npz").write_bytes(b"nothing")
    (newest / "SHA256SUMS").write_text(checkpoint_files._sums(newest))
    said: list[str] = []
    check_restored(tmp_path, 1, said.append)
    assert "is cut off, damaged, or no file of save_tree" in said[0]


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ('{"format": "nnkit checkpoint 2"}', ValueError, "has the format 'nnkit checkpoint 2', which this nnkit does"),
        ("[]", DamagedFileError, "run.json is not what a checkpoint has (list indices must be integers"),
        ("?", DamagedFileError, "run.json is not what a checkpoint has (Expecting value"),
    ],
)  # fmt: skip
def test_records_of_others(tmp_path, text, error, message):
    saved(tmp_path, 1)
    newest = tmp_path / "step_000000001"
    (newest / "run.json").write_text(text)
    (newest / "SHA256SUMS").write_text(checkpoint_files._sums(newest))
    with pytest.raises(error) as caught:
        restore(tmp_path, LIKE, on_damaged=lambda text: None)
    assert message in str(caught.value)
    assert type(caught.value) is error


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({**LIKE, "w": np.zeros(41, np.float32)}, "'w' is float32[40] and should be float32[41]"),
        ({**LIKE, "w": np.zeros(40, np.float16)}, "'w' is float32[40] and should be float16[40]"),
        ({"w": LIKE["w"], "b": {"d": LIKE["b"]["c"]}}, "'b/d' is missing; 'b/c' is unexpected"),
    ],
)
def test_another_model_is_no_damage(tmp_path, like, message):
    saved(tmp_path, 1, 2)
    with pytest.raises(ValueError, match="parameters of another model") as caught:
        restore(tmp_path, like, on_damaged=never)
    assert not isinstance(caught.value, DamagedFileError)
    assert str(caught.value).startswith(
        f"parameters of another model: {message} (file '{tmp_path}/step_000000002/"
    )


def test_other_files_are_no_damage(tmp_path):
    saved(tmp_path, 1)
    (tmp_path / "step_000000001" / ".notes").write_text("mine")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "step_1").mkdir()
    check_restored(tmp_path, 1)
    saved(tmp_path, 2, keep_last=1)
    assert set(os.listdir(tmp_path)) == {"step_000000002", "step_1", "notes.txt"}


# ------------------------------------------------------------------ killed at any moment


class Killed(BaseException):
    pass


CALLS = ("mkdir", "rename", "replace", "unlink", "remove", "rmdir", "fsync")


def killed_after(number: int, act: Callable[[], object], monkeypatch) -> bool:
    """Whether ``act`` was stopped: after so many calls nothing that it does reaches the disk any more."""
    left = number

    def stopping(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        nonlocal left
        if left <= 0:
            raise Killed
        left -= 1
        return call(*args, **options)

    with monkeypatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, partial(stopping, getattr(os, name)))
        patch.setattr("builtins.open", partial(stopping, open))
        try:
            act()
        except Killed:
            return True
    return False


def check_killed(folder: Path, monkeypatch, step: int, keep_last: int) -> None:
    """Killed before any of its calls, a save leaves the old checkpoint or the new one, and nothing in halves."""
    saved(before := folder / "before", 10, 20)
    here = folder / "here"
    open_and_close = lambda: Checkpoints(here, keep_last=keep_last).close()
    for number in range(1000):
        shutil.rmtree(here, ignore_errors=True)
        shutil.copytree(before, here)
        with Checkpoints(here, keep_last=keep_last, asynchronous=False) as store:
            if not killed_after(number, lambda: store.save(step, tree(7), {"number": 7}), monkeypatch):
                break
        for path in folders(here):
            read_entry(path)
        found = restore(here, LIKE, on_damaged=never)
        assert found is not None, "no checkpoint is left"
        assert (found.step, found.record["number"]) in ((20, 20), (step, 7))
        assert_same(found.tree, tree(found.record["number"]))
        stopped = 0  # The next process can be killed too.
        while killed_after(stopped, open_and_close, monkeypatch):
            stopped += 1
        assert {path.name for path in here.iterdir()} <= {f"step_{n:09d}" for n in (10, 20, step)}
        again = restore(here, LIKE, on_damaged=never)
        assert again is not None
        assert (again.step, again.record) == (found.step, found.record)
    assert number > 20
    found = restore(here, LIKE, on_damaged=never)
    assert found is not None
    assert (found.step, found.record["number"]) == (step, 7)


@pytest.mark.parametrize("keep_last", [1, 2])
@pytest.mark.parametrize("step", [10, 20, 30])
def test_killed_at_any_call(tmp_path, monkeypatch, step, keep_last):
    check_killed(tmp_path, monkeypatch, step, keep_last)


def _written_in_place(monkeypatch):
    monkeypatch.setattr(checkpoint_files, "unused_name", lambda folder: folder / "step_000000030")


def _removed_in_place(monkeypatch):
    def discard(paths):
        for path in list(paths):
            shutil.rmtree(path, ignore_errors=True)

    monkeypatch.setattr(checkpoint_files, "discard", discard)


def _removed_before_replaced(monkeypatch):
    true = checkpoint_files.save_tree

    def save_tree(path, tree):
        checkpoint_files.discard([path.parent.parent / "step_000000020"])
        true(path, tree)

    monkeypatch.setattr(checkpoint_files, "save_tree", save_tree)


WRITERS = {"in place": (_written_in_place, 30), "removed in place": (_removed_in_place, 30),
           "removed first": (_removed_before_replaced, 20)}  # fmt: skip


@pytest.mark.parametrize(("mutate", "step"), WRITERS.values(), ids=WRITERS)
def test_wrong_writers_fail_the_test_of_kills(tmp_path, monkeypatch, mutate, step):
    mutate(monkeypatch)
    with pytest.raises((AssertionError, DamagedFileError, OSError)):
        check_killed(tmp_path, monkeypatch, step, 1)


def check_order(folder: Path, monkeypatch, act: Callable[[], object]) -> None:
    """Each file is on the disk before the folder gets its name, and the name before anything is removed."""
    events: list[str] = []

    def fsync(descriptor: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        events.append(f"{kind} {'checkpoints' if name == folder else 'inside'}")

    def rename(source, target) -> None:
        true(source, target)
        events.append(f"{Path(target).name.split('-')[0]}")

    true = os.rename
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: events.append("removed"))
    act()
    file = ["file inside", "folder inside"]
    assert events == [
        *(file * 3),
        "step_000000002",
        "folder checkpoints",
        ".nnkit",
        "folder checkpoints",
        "removed",
    ]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_what_is_on_the_disk_when(tmp_path, monkeypatch):
    saved(tmp_path, 1)
    store = Checkpoints(tmp_path, keep_last=1, asynchronous=False)
    check_order(tmp_path, monkeypatch, lambda: store.save(2, {}, {}))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_a_name_that_is_not_synced_fails(tmp_path, monkeypatch):
    saved(tmp_path, 1)
    store = Checkpoints(tmp_path, keep_last=1, asynchronous=False)
    monkeypatch.setattr(checkpoint_files, "sync_folder", lambda folder: None)
    with pytest.raises(AssertionError):
        check_order(tmp_path, monkeypatch, lambda: store.save(2, {}, {}))
