"""A checkpoint is what was saved, to the last bit, or an error says what is wrong with it."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnkit import optim
from nnkit.packing import Packed, unpack
from nnkit.train import CheckpointError, Checkpoints, checkpoint_files, restore
from nnkit.train.checkpoint_files import read_entry, step_of
from nnkit.train.checkpoints import steps
from nnkit.train.host_copies import HostArray, HostCopies
from tests.train.test_saving import ML_DTYPES, NUMPY_DTYPES, any_bits, assert_same, spec, train_state

FILES = {"run.json", "state.npz", "SHA256SUMS"}


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    """fsync is a matter of power cuts; the test of its order puts its own in its place."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def tree(number: int) -> dict[str, Any]:
    return {"w": np.full(40, number, np.float32), "b": {"c": jnp.full((3,), number)}}


LIKE = {"w": np.zeros(40, np.float32), "b": {"c": jax.ShapeDtypeStruct((3,), np.int32)}}


def saved(folder: Path, *numbers: int, **options: Any) -> Path:
    """A folder of checkpoints, each with its step's tree."""
    with Checkpoints(folder, asynchronous=False, **{"keep_last": len(numbers), **options}) as store:
        for number in numbers:
            store.save(number, tree(number), {"number": number})
    return folder


def never(text: str) -> None:
    raise AssertionError(text)


def check_restored(folder: Path, number: int, on_damaged: Callable[[str], object] = never) -> None:
    found = restore(folder, LIKE, on_damaged=on_damaged)
    assert found is not None
    assert found.step == number
    assert found.record == {"number": number}
    assert_same(found.tree, tree(number))


# ------------------------------------------------------------------ what is saved comes back


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_train_state_comes_back(tmp_path, asynchronous):
    ts = train_state()
    with Checkpoints(tmp_path / "a" / "b", asynchronous=asynchronous) as store:
        store.save(5, ts, {"history": [{"loss": 0.1}]}, score=0.1)
        store.wait()
        for like in (ts, spec(ts)):
            found = restore(tmp_path / "a" / "b", like)
            assert found is not None
            assert_same(found.tree, ts)
            assert found.path == tmp_path / "a" / "b" / "step_000000005"
            assert (found.step, found.record) == (5, {"history": [{"loss": 0.1}]})
    assert set(os.listdir(found.path)) == FILES


def test_every_dtype(tmp_path):
    with jax.enable_x64(True):
        arrays = {name: any_bits(name, (2, 3)) for name in NUMPY_DTYPES + ML_DTYPES}
        keys = {name: jax.random.key(3, impl=name) for name in ("threefry2x32", "rbg", "unsafe_rbg")}
        everything = {
            "numpy": arrays,
            "jax": jax.tree.map(jnp.array, arrays),
            "scalars": jax.tree.map(lambda a: jnp.array(a[0, 0]), arrays),
            "empty": jnp.zeros((0, 3)),
            "keys": {**keys, "many": jax.random.split(jax.random.key(0), (2, 3))},
            "numbers": [1, 0.5, True, 2j, None],
        }
        with Checkpoints(tmp_path) as store:
            store.save(0, everything, {})
            store.wait()
            for like in (everything, spec(everything)):
                found = restore(tmp_path, like)
                assert found is not None
                assert_same(found.tree, everything)


@pytest.mark.parametrize("population", [False, True])
def test_packed_optimizer_states(tmp_path, population):
    params = {f"dense_{i}": {"bias": jnp.arange(3.0) + i} for i in range(70)} | {"w": jnp.ones((70, 70))}
    state = optim.adam(1e-3).init(params)
    state = jax.tree.map(lambda x: x + 1, state)
    is_packed = lambda x: isinstance(x, Packed)
    assert any(map(is_packed, jax.tree.leaves(state, is_leaf=is_packed)))
    if population:
        state = jax.tree.map(lambda x: jnp.stack([x, x + 1]), state)
    copy = HostCopies().copy(state)
    assert jax.tree.structure(copy) == jax.tree.structure(unpack(state))
    assert all(isinstance(leaf, HostArray) for leaf in jax.tree.leaves(copy))
    with Checkpoints(tmp_path) as store:
        store.save(1, state, {})
        store.wait()
    found = restore(tmp_path, state)
    assert found is not None
    assert_same(found.tree, state)
    found = restore(tmp_path, jax.eval_shape(lambda: state))
    assert found is not None
    assert_same(found.tree, state)


def test_the_record_keeps_every_bit(tmp_path):
    record = {
        "rows": [{"loss": 0.1, "val_loss": math.nan, "best": -math.inf, "epoch": 2**70, "done": None}],
        "text": "ä\ud800\n",
        "flags": [True, False],
    }
    with Checkpoints(tmp_path) as store:
        store.save(1, {}, record)
        store.wait()
        found = restore(tmp_path, {})
        assert found is not None
        assert repr(found.record) == repr(record)
        store.save(
            2,
            {},
            {"f": np.float32(0.1), "nan": np.float32("nan"), "a": jnp.arange(2), "p": Path("x"), "t": (1, 2)},
        )
        store.wait()
        found = restore(tmp_path, {})
        assert found is not None
        assert repr(found.record) == repr(
            {"f": float(np.float32(0.1)), "nan": math.nan, "a": [0, 1], "p": "x", "t": [1, 2]}
        )


def test_sha256sum_reads_the_sums(tmp_path):
    saved(tmp_path, 1)
    folder = tmp_path / "step_000000001"
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    assert lines == [
        f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}"
        for name in ("state.npz", "run.json")
    ]
    if program := shutil.which("sha256sum"):
        subprocess.run([program, "-c", "--strict", "--status", "SHA256SUMS"], cwd=folder, check=True)


def test_nothing_saved_is_none(tmp_path):
    assert restore(tmp_path / "none", LIKE) is None
    assert steps(tmp_path / "none") == []
    Checkpoints(tmp_path / "new").close()
    assert restore(tmp_path / "new", LIKE) is None
    assert restore(tmp_path / "new", LIKE, best="min") is None


# ------------------------------------------------------------------ which are kept


NAN = math.nan


KEPT = [
    ([None] * 4, {}, [3, 4]),
    ([None] * 4, {"keep_last": 1}, [4]),
    ([0.1, 0.2, 0.3, 0.4], {"keep_best": 1}, [1, 3, 4]),
    ([0.1, 0.2, 0.3, 0.4], {"keep_best": 1, "mode": "max"}, [3, 4]),
    ([0.9, 0.2, 0.3, 0.4, 0.5], {"keep_best": 2, "keep_last": 1, "mode": "max"}, [1, 5]),
    ([0.9, 0.8, 0.3, 0.4, 0.5], {"keep_best": 2, "keep_last": 1, "mode": "max"}, [1, 2, 5]),
    ([NAN, 0.2, 0.3, 0.4], {"keep_best": 1, "keep_last": 1}, [2, 4]),
    ([0.2, NAN, 0.3, 0.4], {"keep_best": 1, "keep_last": 1}, [1, 4]),
    ([NAN, 0.2, 0.3, 0.4], {"keep_best": 1, "keep_last": 1, "mode": "max"}, [4]),
    ([NAN, NAN, NAN], {"keep_best": 2, "keep_last": 1}, [3]),
    ([0.5, None, 0.7], {"keep_best": 1, "keep_last": 1}, [1, 3]),
    ([0.2, 0.2, 0.3], {"keep_best": 1, "keep_last": 1}, [1, 3]),
    ([math.inf, -math.inf, 0.0], {"keep_best": 1, "keep_last": 1}, [2, 3]),
    ([0.3, 0.2, 0.1], {"keep_best": 9, "keep_last": 1}, [1, 2, 3]),
]


def check_kept(
    folder: Path, scores: list[float | None], options: Any, kept: list[int], reopened: bool
) -> None:
    store = Checkpoints(folder, asynchronous=False, **options)
    for step, score in enumerate(scores, 1):
        if reopened:
            store = Checkpoints(folder, asynchronous=False, **options)
        store.save(step, {}, {}, score=score)
        assert max(steps(folder)) == step
    assert steps(folder) == kept
    assert sorted(os.listdir(folder)) == [f"step_{step:09d}" for step in kept]


@pytest.mark.parametrize(("scores", "options", "kept"), KEPT)
@pytest.mark.parametrize("reopened", [False, True])
def test_the_last_and_the_best_are_kept(tmp_path, scores, options, kept, reopened):
    check_kept(tmp_path, scores, options, kept, reopened)


def _ranked(scores: Any, key: Callable[[float, int], Any]) -> list[Path]:
    found = {path: score for path, score in scores.items() if score is not None}
    return sorted(found, key=lambda path: key(found[path], step_of(path)))


TRUE_BEST = checkpoint_files.best_first
RANKINGS: dict[str, Callable[[Any, Any], list[Path]]] = {
    "NaN like another number": lambda scores, mode: _ranked(
        scores, lambda s, n: (1 if mode == "min" else -1) * s if s == s else -math.inf
    ),
    "always the least": lambda scores, mode: TRUE_BEST(scores, "min"),
    "the later of equal ones": lambda scores, mode: _ranked(
        {p: s for p, s in scores.items() if s == s},
        lambda s, n: ((1 if mode == "min" else -1) * (s or 0), -n),
    ),
    "none": lambda scores, mode: [],
}


@pytest.mark.parametrize("ranking", RANKINGS)
def test_wrong_rankings_fail_the_test_of_what_is_kept(tmp_path, monkeypatch, ranking):
    monkeypatch.setattr(checkpoint_files, "best_first", RANKINGS[ranking])
    failed = 0
    for number, row in enumerate(KEPT):
        (folder := tmp_path / str(number)).mkdir()
        try:
            check_kept(folder, *row, reopened=False)
        except AssertionError:
            failed += 1
    assert failed


def test_the_best_is_restored(tmp_path):
    with Checkpoints(tmp_path, keep_last=9, asynchronous=False) as store:
        for step, score in enumerate([NAN, 0.3, 0.1, None, 0.2, 0.1]):
            store.save(step, {}, {}, score=score)
    for best, step in (("min", 3 - 1), ("max", 1), (None, 5)):
        found = restore(tmp_path, {}, best=best)
        assert found is not None
        assert found.step == step
    (tmp_path / "step_000000002" / "state.npz").unlink()
    said: list[str] = []
    found = restore(tmp_path, {}, best="min", on_damaged=said.append)
    assert found is not None
    assert found.step == 5
    assert len(said) == 1
    assert "step_000000002" in said[0]


def test_scores_are_numbers_of_any_kind(tmp_path):
    with Checkpoints(tmp_path, keep_last=1, keep_best=1) as store:
        for step, score in enumerate([3, np.float32(2), jnp.float32(1), 4.0]):
            store.save(step, {}, {}, score=score)
    assert steps(tmp_path) == [2, 3]


def test_damaged_ones_do_not_count_and_go(tmp_path):
    saved(tmp_path, 1, 2, 3)
    (tmp_path / "step_000000002" / "state.npz").write_bytes(b"")
    saved(tmp_path, 4, keep_last=3)
    assert steps(tmp_path) == [1, 3, 4]


def test_going_back_leaves_the_later_ones(tmp_path):
    saved(tmp_path, 1, 2, 3, 4)
    with Checkpoints(tmp_path, keep_last=4, asynchronous=False) as store:
        store.save(2, tree(7), {"number": 7})
        assert steps(tmp_path) == [1, 2]
    found = restore(tmp_path, LIKE)
    assert found is not None
    assert_same(found.tree, tree(7))
    assert sorted(os.listdir(tmp_path)) == ["step_000000001", "step_000000002"]


def test_leftovers_of_killed_processes_go(tmp_path):
    saved(tmp_path, 1, 2, 3)
    (tmp_path / ".nnkit-0123.tmp").mkdir()
    (tmp_path / ".nnkit-0123.tmp" / "state.npz").write_bytes(b"half")
    (tmp_path / ".nnkit-4567.tmp").write_bytes(b"probe")
    shutil.copytree(tmp_path / "step_000000001", tmp_path / "step_000000001.replaced")
    (tmp_path / "step_000000003").rename(tmp_path / "step_000000003.replaced")
    check_restored(tmp_path, 3)
    Checkpoints(tmp_path).close()
    assert sorted(os.listdir(tmp_path)) == [f"step_{step:09d}" for step in (1, 2, 3)]
    check_restored(tmp_path, 3)


def test_one_that_a_running_process_removes_meanwhile_is_no_damage(tmp_path, monkeypatch):
    saved(tmp_path, 1, 2)

    def read(path):
        if path.name.endswith("2"):
            shutil.rmtree(path)
        return read_entry(path)

    monkeypatch.setattr(checkpoint_files, "read_entry", read)
    check_restored(tmp_path, 1)


# ------------------------------------------------------------------ the thread


class Gate:
    """Holds the writer up until it is opened."""

    def __init__(self, monkeypatch, error: BaseException | None = None):
        self.entered, self.opened, self.error = threading.Event(), threading.Event(), error
        true = checkpoint_files.write

        def write(*args):
            self.entered.set()
            assert self.opened.wait(30)
            if self.error is not None:
                raise self.error
            return true(*args)

        monkeypatch.setattr(checkpoint_files, "write", write)


def test_saving_goes_on_beside_the_run_and_one_at_a_time(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    bump = jax.jit(lambda x: x + 1, donate_argnums=0)
    x, row = jnp.zeros(3), {"loss": 1.0}
    with Checkpoints(tmp_path) as store:
        store.save(1, {"x": x}, row)
        assert gate.entered.wait(30)
        assert steps(tmp_path) == []
        x = bump(x)
        row["loss"] = 2.0
        second = threading.Thread(target=store.save, args=(2, {"x": x}, row))
        second.start()
        second.join(0.05)
        assert second.is_alive(), "two checkpoints are written at once"
        gate.opened.set()
        second.join(30)
        store.wait()
        assert steps(tmp_path) == [1, 2]
    for step in (2, 1):
        found = restore(tmp_path, {"x": x})
        assert found is not None
        assert found.record == {"loss": step}
        np.testing.assert_array_equal(found.tree["x"], np.full(3, step - 1))
        shutil.rmtree(found.path)


def failing(folder: Path, monkeypatch, error: BaseException) -> Checkpoints:
    """One good checkpoint, and another that cannot be written."""
    store = Checkpoints(folder)
    store.save(1, tree(1), {"number": 1})
    store.wait()
    gate = Gate(monkeypatch, error)
    gate.opened.set()
    store.save(2, tree(2), {"number": 2})
    return store


FULL = OSError(errno.ENOSPC, "No space left on device")
CASES: dict[str, Callable[[Checkpoints], object]] = {
    "save": lambda store: store.save(3, tree(3), {"number": 3}),
    "wait": lambda store: store.wait(),
    "close": lambda store: store.close(),
    "with": lambda store: store.__exit__(None, None, None),
}


@pytest.mark.parametrize("call", CASES.values(), ids=CASES)
def test_an_error_of_the_thread_is_raised_by_the_next_call(tmp_path, monkeypatch, call):
    store = failing(tmp_path, monkeypatch, FULL)
    with pytest.raises(CheckpointError) as caught:
        call(store)
    assert str(caught.value) == (
        f"the checkpoint of step 2 could not be written in '{tmp_path}': No space left on device; "
        f"the last good checkpoint is '{tmp_path}/step_000000001'"
    )
    assert caught.value.__cause__ is FULL
    check_restored(tmp_path, 1)
    monkeypatch.undo()
    store.wait()  # It is raised once.
    store.close()
    saved(tmp_path, 3)
    check_restored(tmp_path, 3)


def test_an_error_of_the_thread_does_not_hide_the_runs_own(tmp_path, monkeypatch):
    with pytest.raises(ZeroDivisionError) as caught, failing(tmp_path, monkeypatch, FULL):
        raise ZeroDivisionError("the run's own")
    assert caught.value.__notes__ == [
        f"the checkpoint of step 2 could not be written in '{tmp_path}': No space left on device; "
        f"the last good checkpoint is '{tmp_path}/step_000000001'"
    ]


def test_the_first_checkpoint_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_files, "save_tree", partial(_raise, FULL))
    with (
        pytest.raises(
            CheckpointError, match=r"could not be written .* left on device; there is no good checkpoint"
        ),
        Checkpoints(tmp_path) as store,
    ):
        store.save(1, {}, {})
    assert os.listdir(tmp_path) == []


def _raise(error: BaseException, *_: Any, **__: Any) -> Any:
    raise error


@pytest.mark.parametrize("name", ["fsync", "rename", "replace", "mkdir"])
def test_a_disk_that_refuses_leaves_what_was_there(tmp_path, monkeypatch, name):
    for step in (1, 2):  # In place of an old one, and beside it.
        saved(folder := tmp_path / str(step), 1)
        with Checkpoints(folder, asynchronous=False) as store, monkeypatch.context() as patch:
            patch.setattr(os, name, partial(_raise, FULL))
            with pytest.raises(CheckpointError, match=r"step_000000001'$"):
                store.save(step, tree(2), {"number": 2})
        check_restored(folder, 1)
        assert os.listdir(folder) == ["step_000000001"]


def test_old_ones_that_cannot_be_removed(tmp_path, monkeypatch):
    saved(tmp_path, 1)
    with Checkpoints(tmp_path, keep_last=1, asynchronous=False) as store, monkeypatch.context() as patch:
        patch.setattr(checkpoint_files, "discard", lambda paths: [_raise(FULL) for p in paths if p.exists()])
        with pytest.raises(CheckpointError) as caught:
            store.save(2, tree(2), {"number": 2})
    assert "older than step 2 could not be removed" in str(caught.value)
    assert str(caught.value).endswith(f"the last good checkpoint is '{tmp_path}/step_000000002'")
    check_restored(tmp_path, 2)


SMALL_DISK = """
import resource, sys
import numpy as np
from nnkit.train import CheckpointError, Checkpoints

resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
with Checkpoints(sys.argv[1]) as store:
    store.save(1, {"w": np.zeros(1000)}, {})
    store.save(2, {"w": np.zeros(100_000)}, {})
    try:
        store.wait()
    except CheckpointError as error:
        print(error)
    store.save(3, {"w": np.ones(1000)}, {})
store.folder.joinpath("late").mkdir()
Checkpoints(store.folder / "late").save(4, {"w": np.ones(10)}, {})  # Nobody waits, and the process ends.
"""


def run_python(code: str, *args: object, **environment: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **environment}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of a process")
def test_a_file_that_grows_too_large_and_a_process_that_ends_without_waiting(tmp_path):
    said = run_python(SMALL_DISK, tmp_path)
    assert said == (
        f"the checkpoint of step 2 could not be written in '{tmp_path}': File too large; "
        f"the last good checkpoint is '{tmp_path}/step_000000001'\n"
    )
    assert sorted(os.listdir(tmp_path)) == ["late", "step_000000001", "step_000000003"]
    found = restore(tmp_path, {"w": np.zeros(1000)})
    assert found is not None
    assert found.tree["w"][0] == 1
    found = restore(tmp_path / "late", {"w": np.zeros(10)})
    assert found is not None
    assert found.step == 4


# ------------------------------------------------------------------ what cannot be meant


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_last": 0}, "Checkpoints(keep_last=...) must be a whole number of at least 1, got 0"),
        ({"keep_best": -1}, "Checkpoints(keep_best=...) must be a whole number of at least 1, got -1"),
        ({"keep_best": True}, "Checkpoints(keep_best=...) must be a whole number of at least 1, got True"),
        ({"mode": "mxa"}, "unknown Checkpoints(mode=...) 'mxa'; did you mean 'max'? Known: max, min"),
    ],
)
def test_arguments(tmp_path, options, message):
    with pytest.raises(ValueError, match="Checkpoints") as caught:
        Checkpoints(tmp_path / "a", **options)
    assert str(caught.value) == message
    assert os.listdir(tmp_path) == []


def donated() -> jax.Array:
    array = jnp.ones(3)
    array.delete()
    return array


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((-1, {}, {}), {}, ValueError, "save(step=...) must be a whole number from 0 to 2147483647, got -1"),
        ((2**31, {}, {}), {}, ValueError, "save(step=...) must be a whole number from 0 to 2147483647, got 2147483648"),
        ((1.0, {}, {}), {}, ValueError, "save(step=...) must be a whole number from 0 to 2147483647, got 1.0"),
        ((1, {}, []), {}, TypeError, "a checkpoint's record is a dict of JSON's types, got list"),
        ((1, {}, {"a": [{1, 2}]}), {}, TypeError, "record['a'][0] is a set, which JSON has not: pass its name"),
        ((1, {}, {"key": jax.random.key(0)}), {}, TypeError, "record['key'] is a PRNGKeyArray, which JSON has not"),
        ((1, {}, {}), {"score": "0.1"}, TypeError, "save(score=...) must be one number or None, got '0.1'"),
        ((1, {}, {}), {"score": np.ones(2)}, TypeError, "save(score=...) must be one number or None, got array("),
        ((1, {"a": "x"}, {}), {}, TypeError, "leaf 'a' is a str: a tree's leaves are arrays, PRNG keys and numbers"),
        ((1, {"a": {"b": donated()}}, {}), {}, ValueError, "leaf 'a/b' was donated to a compiled function: save the"),
    ],
)  # fmt: skip
def test_what_cannot_be_saved(tmp_path, arguments, options, error, message):
    with Checkpoints(tmp_path) as store:
        with pytest.raises(error) as caught:
            store.save(*arguments, **options)
        assert str(caught.value).startswith(message)
        store.wait()
        assert os.listdir(tmp_path) == []
        store.save(1, tree(1), {"number": 1})
    check_restored(tmp_path, 1)


def test_closed_and_unknown(tmp_path):
    store = Checkpoints(tmp_path)
    store.close()
    store.close()
    with pytest.raises(ValueError, match=r"^these Checkpoints are closed: make others to go on saving$"):
        store.save(1, {}, {})
    with pytest.raises(ValueError, match=r"^unknown restore\(best=\.\.\.\) 'newest'\. Known: max, min$"):
        restore(tmp_path, {}, best="newest")  # type: ignore[arg-type]


def test_a_folder_that_cannot_be_written_in(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"^cannot write in '.*/file/run': .*choose another folder$"):
        Checkpoints(tmp_path / "file" / "run")


def test_a_folder_that_goes_away(tmp_path):
    folder = tmp_path / "run"
    with Checkpoints(folder, asynchronous=False) as store:
        shutil.rmtree(folder)
        with pytest.raises(CheckpointError, match=r"No such file or directory; there is no good checkpoint"):
            store.save(1, {}, {})
