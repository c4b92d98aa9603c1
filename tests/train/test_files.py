"""Files are whole or absent, at whatever moment the writer is stopped."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from nnkit.train import files
from nnkit.train.files import check_writable, is_leftover, remove_leftovers, write_atomically

Write = Callable[[Path, object], None]


def put(write: Write, path: Path, contents: bytes, as_function: bool) -> None:
    """Writes ``contents`` at once, or in two halves through a function."""
    half = len(contents) // 2

    def in_halves(file) -> None:
        file.write(contents[:half])
        file.write(contents[half:])

    write(path, in_halves if as_function else contents)


@pytest.mark.parametrize("as_function", [False, True])
def test_writes_new_contents_over_old_and_leaves_nothing_else(tmp_path, as_function):
    for contents in (b"first", b"", b"the third one, longer"):
        put(write_atomically, tmp_path / "file", contents, as_function)
        assert (tmp_path / "file").read_bytes() == contents
        assert os.listdir(tmp_path) == ["file"]


def test_accepts_a_string_and_a_name_as_long_as_the_file_system_allows(tmp_path):
    name = "n" * 255
    write_atomically(str(tmp_path / name), b"x")
    assert (tmp_path / name).read_bytes() == b"x"


def test_has_the_permissions_of_an_ordinary_new_file(tmp_path):
    (tmp_path / "ordinary").write_bytes(b"")
    write_atomically(tmp_path / "ours", b"")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_a_symbolic_link_stays_one(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "file")
    write_atomically(tmp_path / "link", b"x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "elsewhere" / "file").read_bytes() == b"x"
    assert os.listdir(tmp_path / "elsewhere") == ["file"]


def check_order(write: Write, folder: Path, monkeypatch) -> None:
    """The contents are on the disk before the name moves, and the name before the call returns."""
    events: list[str] = []

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            events.append("folder synced")
        else:
            # What the kernel has, not what Python's buffer still holds.
            events.append(f"{os.fstat(descriptor).st_size} bytes synced")

    def replace(source: str, target: str) -> None:
        assert Path(source).parent == Path(target).parent
        events.append("renamed")
        os.rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        patch.setattr(os, "replace", replace)
        put(write, folder / "file", b"contents", as_function=True)
    assert events == ["8 bytes synced", "renamed", "folder synced"]


def check_interrupted(write: Write, folder: Path, monkeypatch) -> None:
    """Stopped at any of its calls, by any kind of exception, it leaves the old file and nothing else."""
    path = folder / "file"
    path.write_bytes(b"old")
    for error in (OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), SystemExit()):
        for name in ("fsync", "replace"):

            def stop(*_: object, error: BaseException = error) -> None:
                raise error

            with monkeypatch.context() as patch:
                patch.setattr(os, name, stop)
                with pytest.raises(type(error)):
                    put(write, path, b"new", as_function=False)
            assert path.read_bytes() == b"old"
            assert os.listdir(folder) == ["file"]

        def stop_half_way(file, error: BaseException = error) -> None:
            file.write(b"ne")
            file.flush()
            raise error

        with pytest.raises(type(error)):
            write(path, stop_half_way)
        assert path.read_bytes() == b"old"
        assert os.listdir(folder) == ["file"]


CHECKS = {"order": check_order, "interrupted": check_interrupted}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_write_atomically(check, tmp_path, monkeypatch):
    check(write_atomically, tmp_path, monkeypatch)


def write_wrongly(
    path: Path,
    content,
    *,
    in_place: bool = False,
    flush: bool = True,
    sync: bool = True,
    sync_folder: bool = True,
    sync_late: bool = False,
    caught: type[BaseException] = BaseException,
) -> None:
    temporary = path if in_place else path.with_name(".temporary")
    try:
        with open(temporary, "wb") as file:
            file.write(content) if isinstance(content, bytes) else content(file)
            if flush:
                file.flush()
            if sync:
                os.fsync(file.fileno())
        if not in_place:
            os.replace(temporary, path)
        if sync_late:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    except caught:
        temporary.unlink(missing_ok=True)
        raise
    if sync_folder:
        descriptor = os.open(path.parent, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


MUTANTS = [
    ("interrupted", {"in_place": True}),
    ("interrupted", {"caught": Exception}),
    ("interrupted", {"caught": OSError}),
    ("order", {"in_place": True}),
    ("order", {"flush": False}),
    ("order", {"sync": False}),
    ("order", {"sync": False, "sync_late": True}),
    ("order", {"sync_folder": False}),
]


def test_the_mutants_are_right_without_their_fault(tmp_path, monkeypatch):
    for check in CHECKS.values():
        check(write_wrongly, tmp_path, monkeypatch)


@pytest.mark.parametrize(("check", "fault"), MUTANTS)
def test_mutants_fail(check, fault, tmp_path, monkeypatch):
    failures = (AssertionError, FileNotFoundError, pytest.fail.Exception)
    with pytest.raises(failures):
        CHECKS[check](lambda path, content: write_wrongly(path, content, **fault), tmp_path, monkeypatch)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_without_fsync_of_folders_is_no_error(tmp_path, monkeypatch, code):
    fsync = os.fsync

    def refuse(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    write_atomically(tmp_path / "file", b"x")
    assert (tmp_path / "file").read_bytes() == b"x"


def test_a_disk_error_at_the_last_fsync_is_raised_and_the_new_file_is_whole(tmp_path, monkeypatch):
    fsync = os.fsync

    def fail(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EIO, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_of_that_name(tmp_path):
    with pytest.raises(IsADirectoryError) as caught:
        write_atomically(tmp_path, b"x")
    assert str(caught.value) == (
        f"cannot write the file '{tmp_path}': a folder has that name; use another name"
    )


def test_no_such_folder(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        write_atomically(tmp_path / "none" / "file", b"x")
    assert str(caught.value) == (
        f"cannot write '{tmp_path}/none/file': the folder '{tmp_path}/none' does not exist; make it first"
    )


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "taken").write_bytes(b"x")
    with pytest.raises(NotADirectoryError) as caught:
        write_atomically(tmp_path / "taken" / "file", b"x")
    assert str(caught.value) == (
        f"cannot write '{tmp_path}/taken/file': '{tmp_path}/taken' is not a folder; choose another folder"
    )


def test_check_writable_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path, tmp_path / "new", tmp_path / "new" / "newer", "runs/first", "."):
        check_writable(folder)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("below", ["", "/run", "/runs/run"])
def test_check_writable_of_a_path_through_a_file(tmp_path, below):
    (tmp_path / "taken").write_bytes(b"x")
    folder = f"{tmp_path}/taken{below}"
    with pytest.raises(NotADirectoryError) as caught:
        check_writable(folder)
    assert str(caught.value) == (
        f"cannot write in '{folder}': '{tmp_path}/taken' is not a folder; choose another folder"
    )
    assert (tmp_path / "taken").read_bytes() == b"x"


def test_check_writable_of_a_dangling_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(NotADirectoryError, match="link' is not a folder"):
        check_writable(tmp_path / "link" / "run")


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT])
def test_check_writable_of_a_folder_that_refuses(tmp_path, monkeypatch, code):
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    # The superuser may write anywhere, so the refusal is put in where the file is opened.
    monkeypatch.setattr(files, "open", refuse, raising=False)
    with pytest.raises(PermissionError) as caught:
        check_writable(tmp_path / "runs")
    assert str(caught.value) == (
        f"cannot write in '{tmp_path}/runs': {os.strerror(code)} in '{tmp_path}'; "
        "choose another folder, or make that one writable"
    )
    assert os.listdir(tmp_path) == []


@pytest.fixture
def ordinary_user():
    """The superuser may write anywhere, so he is an ordinary user for the length of the test."""
    if not hasattr(os, "geteuid"):
        pytest.skip("no user ids on this system")
    if (me := os.geteuid()) == 0:
        os.seteuid(65534)
    yield
    if me == 0:
        os.seteuid(0)


@pytest.mark.parametrize("folder", ["/", "/runs/first", "/usr"])
def test_check_writable_of_a_folder_of_somebody_else(ordinary_user, folder):
    with pytest.raises(PermissionError, match=f"cannot write in '{folder}': .+ in '/"):
        check_writable(folder)


def test_leftovers_of_a_killed_process_are_known_and_removed(tmp_path):
    names: list[Path] = []

    def spy(file) -> None:
        names.append(Path(file.name))
        file.write(b"x")

    write_atomically(tmp_path / "file", spy)
    names[0].write_bytes(b"half")  # What a SIGKILL leaves.
    assert is_leftover(names[0])
    assert not is_leftover(tmp_path / "file")
    assert remove_leftovers(tmp_path) == 1
    assert os.listdir(tmp_path) == ["file"]
    assert remove_leftovers(tmp_path) == 0
