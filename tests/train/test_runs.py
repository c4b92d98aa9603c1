"""The run folder: complete, readable, never half-written, and never in the way of an earlier run."""

from __future__ import annotations

import csv
import enum
import json
import math
import os
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnkit.train import runs
from nnkit.train.runs import (
    create_run,
    provenance,
    read_config,
    read_metrics,
    read_result,
    write_metrics,
    write_result,
)


class Data(enum.Enum):
    DIGITS = 1


@dataclass(frozen=True)
class Optimizer:
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)


@dataclass(frozen=True)
class Config:
    data: Data = Data.DIGITS
    data_dir: Path | None = Path("data/mnist")
    seed: int = 3
    widths: Sequence[int] = (256, 128)
    optimizer: Optimizer = field(default_factory=Optimizer)


def test_config_json_says_all_that_a_second_run_needs(tmp_path):
    before = datetime.now(UTC)
    run = create_run(tmp_path / "runs" / "first", Config())
    assert run == tmp_path / "runs" / "first"
    assert os.listdir(run) == ["config.json"]
    config = read_config(run)
    assert config["config"] == {
        "data": "DIGITS",
        "data_dir": "data/mnist",
        "seed": 3,
        "widths": [256, 128],
        "optimizer": {"learning_rate": 0.0001, "betas": [0.9, 0.999]},
    }
    assert config["seed"] == 3
    versions = config["versions"]
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert versions["jax"] == jax.__version__
    assert versions["numpy"] == np.__version__
    assert versions["optax"] == optax.__version__
    assert {"jaxlib", "nnkit"} <= versions.keys()
    device = config["device"]
    assert device["backend"] == jax.default_backend()
    assert device["kind"] == jax.devices()[0].device_kind
    assert device["count"] == jax.device_count()
    assert device["x64"] is False
    assert config["platform"]["cores"] >= 1
    started = datetime.fromisoformat(config["started"])
    assert started.utcoffset() == timedelta(0)
    assert before - timedelta(seconds=1) <= started <= datetime.now(UTC)
    # For the eye: indented, and the settings first.
    assert (run / "config.json").read_text().startswith('{\n  "config": {\n    "data": "DIGITS",\n')


def test_the_seed_may_be_given_apart_from_the_settings(tmp_path):
    assert read_config(create_run(tmp_path / "a", {"seed": 1}, seed=np.int32(2)))["seed"] == 2
    assert read_config(create_run(tmp_path / "b", {}))["seed"] is None


def test_versions_of_libraries_that_were_not_imported_are_left_out(monkeypatch):
    monkeypatch.delitem(sys.modules, "optax")
    assert "optax" not in provenance()["versions"]


def test_a_package_that_is_not_installed_has_no_version(monkeypatch):
    monkeypatch.setattr(runs, "_ALWAYS", ("jax", "no-such-distribution"))
    assert provenance()["versions"]["no-such-distribution"] is None


class Pair(NamedTuple):
    a: int
    b: float


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (np.float32(0.1), 0.10000000149011612),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (jnp.bfloat16(1.5), 1.5),
        (jnp.arange(3), [0, 1, 2]),
        (Pair(1, 2.0), {"a": 1, "b": 2.0}),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
        (np.array([1.0, np.inf]), [1.0, "inf"]),
        ({1: {"x": None}}, {"1": {"x": None}}),
        (np.dtype("float32"), "float32"),
        ("é", "é"),
        (0.1 + 0.2, 0.1 + 0.2),
    ],
)
def test_what_settings_can_be(tmp_path, value, written):
    run = create_run(tmp_path / "run", {"x": value})
    assert read_config(run)["config"] == {"x": written}
    # Strict JSON: other programs than Python read it.
    json.loads((run / "config.json").read_bytes(), parse_constant=pytest.fail)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"a": {"b": [1, print]}},
            "config['a']['b'][1] is a builtin_function_or_method, which JSON has not: "
            "pass its name or its numbers",
        ),
        ({"a": 1j}, "config['a'] is a complex, which JSON has not: pass its name or its numbers"),
        ({"key": jax.random.key(0)}, "config['key'] is a "),
        ({"a": Config}, "config['a'] is a type, which JSON has not: pass its name or its numbers"),
        ([1, 2], "config must be a dict or a dataclass, got list"),
    ],
)
def test_what_settings_cannot_be(tmp_path, config, message):
    with pytest.raises(TypeError) as caught:
        create_run(tmp_path / "run", config)
    assert str(caught.value).startswith(message)
    assert os.listdir(tmp_path) == []


def test_an_argument_that_is_not_utf8_is_no_obstacle(tmp_path, monkeypatch):
    argument = os.fsdecode(b"--data-dir=\xff")
    monkeypatch.setattr(sys, "argv", ["main.py", argument])
    run = create_run(tmp_path / "run", {"data_dir": argument})
    assert read_config(run)["config"]["data_dir"] == argument


# ------------------------------------------------------------------ command line and git


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["experiments/mnist.py", "--name", "a b"], "experiments/mnist.py --name 'a b'"),
        (["HERE/experiments/mnist.py", "--epochs=3"], "experiments/mnist.py --epochs=3"),
        (["/somewhere/env/bin/nnkit", "train", "--data-dir", "/data"], "nnkit train --data-dir /data"),
        (["-c"], "-c"),
    ],
)
def test_the_command_line_has_no_path_of_this_machine(tmp_path, monkeypatch, argv, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [word.replace("HERE", str(tmp_path)) for word in argv])
    assert provenance()["command"] == command


def git(*words: str) -> str:
    who = ["-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *who, *words], check=True, capture_output=True, text=True).stdout.strip()


def test_git_revision_and_changes(tmp_path, monkeypatch):
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):  # Set where a hook runs the tests.
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    assert provenance()["git"] == {"revision": None, "dirty": None}
    git("init", "-q")
    assert provenance()["git"] == {"revision": None, "dirty": False}
    Path("code.py").write_text("1")
    git("add", "code.py")
    git("commit", "-q", "-m", "first")
    revision = git("rev-parse", "HEAD")
    assert len(revision) == 40
    assert provenance()["git"] == {"revision": revision, "dirty": False}
    Path("code.py").write_text("2")
    assert provenance()["git"] == {"revision": revision, "dirty": True}
    # Also from a folder below; and a file that git does not know yet can matter as well.
    git("checkout", "-q", "code.py")
    Path("below").mkdir()
    monkeypatch.chdir("below")
    assert provenance()["git"] == {"revision": revision, "dirty": False}
    Path("new.py").write_text("3")
    assert provenance()["git"] == {"revision": revision, "dirty": True}


@pytest.mark.parametrize("error", [FileNotFoundError("git"), subprocess.TimeoutExpired("git", 10)])
def test_no_git_is_no_error(monkeypatch, error):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(subprocess, "run", fail)
    assert provenance()["git"] == {"revision": None, "dirty": None}


# ------------------------------------------------------------------ the folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_an_earlier_run_stays(tmp_path):
    run = create_run(tmp_path / "run", {"epochs": 1})
    write_result(run, {"accuracy": 0.9})
    before = contents(run)
    with pytest.raises(FileExistsError) as caught:
        create_run(run, {"epochs": 2})
    assert str(caught.value) == (
        f"the run folder '{run}' is not empty: choose another name, or pass overwrite=True to delete what is in it"
    )
    assert contents(run) == before


def test_overwrite_deletes_all_of_the_earlier_run(tmp_path):
    run = create_run(tmp_path / "run", {"epochs": 1})
    write_result(run, {"accuracy": 0.9})
    (run / "checkpoints" / "7").mkdir(parents=True)
    (run / "checkpoints" / "7" / "state.npz").write_bytes(b"x")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").write_bytes(b"x")
    (run / "link").symlink_to(tmp_path / "elsewhere")
    create_run(run, {"epochs": 2}, overwrite=True)
    assert list(contents(run)) == ["config.json"]
    assert read_config(run)["config"] == {"epochs": 2}
    assert (tmp_path / "elsewhere" / "kept").exists()


@pytest.mark.parametrize("name", ["thesis.tex", "config.json"])
@pytest.mark.parametrize("text", ["{}", "[1]", "not json"])
def test_overwrite_never_deletes_what_is_no_run(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(FileExistsError) as caught:
        create_run(tmp_path, {}, overwrite=True)
    assert str(caught.value) == (
        f"the folder '{tmp_path}' holds something that is no run ('{name}') and is not deleted: "
        "choose another name"
    )
    assert contents(tmp_path) == {name: text.encode()}


def test_an_overwriting_that_was_interrupted_can_be_taken_up_again(tmp_path, monkeypatch):
    run = create_run(tmp_path / "run", {"epochs": 1})
    for name in ("a", "z"):
        (run / name).write_bytes(b"x")
    unlink = Path.unlink

    def interrupted(path: Path, missing_ok: bool = False) -> None:
        if path.name == "z":
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", interrupted)
        with pytest.raises(KeyboardInterrupt):
            create_run(run, {"epochs": 2}, overwrite=True)
    assert list(contents(run)) == ["config.json", "z"]
    create_run(run, {"epochs": 2}, overwrite=True)
    assert list(contents(run)) == ["config.json"]


def test_a_folder_that_is_empty_but_for_what_a_killed_process_left_will_do(tmp_path):
    leftover = tmp_path / ".nnkit-0123456789abcdef.tmp"
    leftover.write_bytes(b"half")
    create_run(tmp_path, {})
    assert os.listdir(tmp_path) == ["config.json"]
    # Not so in a folder that is refused: there a run may be writing at this moment.
    leftover.write_bytes(b"half")
    with pytest.raises(FileExistsError):
        create_run(tmp_path, {})
    assert leftover.exists()


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "taken").write_bytes(b"x")
    for folder in (tmp_path / "taken", tmp_path / "taken" / "run"):
        with pytest.raises(NotADirectoryError) as caught:
            create_run(folder, {})
        assert str(caught.value) == (
            f"cannot write in '{folder}': '{tmp_path}/taken' is not a folder; choose another folder"
        )


def test_a_run_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        read_config(tmp_path / "run")
    assert str(caught.value) == (
        f"no config.json in '{tmp_path}/run': it is not a run folder, or the name is another"
    )
    with pytest.raises(
        FileNotFoundError, match=r"^no metrics\.csv in '.*': the run has not ended an epoch, or"
    ):
        read_metrics(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"^no result\.json in '.*': the run has not ended, or"):
        read_result(tmp_path)


@pytest.mark.parametrize("write", [write_metrics, write_result])
def test_an_interrupted_write_leaves_the_file_before(tmp_path, monkeypatch, write):
    write(tmp_path, [{"a": 1}] if write is write_metrics else {"a": 1})
    before = contents(tmp_path)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, [{"a": 2}] if write is write_metrics else {"a": 2})
    assert contents(tmp_path) == before


# ------------------------------------------------------------------ metrics and results


def test_metrics_have_the_columns_of_all_rows_in_the_order_of_first_sight(tmp_path):
    rows = [
        {"epoch": 1, "loss": 0.5},
        {"epoch": 2, "val_loss": 0.25, "loss": 0.1},
        {"accuracy": 1.0, "epoch": 3},
    ]
    write_metrics(tmp_path, rows)
    assert (tmp_path / "metrics.csv").read_text() == (
        "epoch,loss,val_loss,accuracy\n1,0.5,,\n2,0.1,0.25,\n3,,,1.0\n"
    )
    assert read_metrics(tmp_path) == rows


def number_bits(value: Any) -> tuple[type, Any]:
    if isinstance(value, float):
        return float, "nan" if math.isnan(value) else struct.pack("d", value)
    return type(value), value


def check_bits(write, read, folder: Path, rows: list[dict[str, Any]]) -> None:
    write(folder, rows)
    got = read(folder)
    wanted = [{name: value for name, value in row.items() if value is not None} for row in rows]
    assert [{k: number_bits(v) for k, v in row.items()} for row in got] == [
        {k: number_bits(v) for k, v in row.items()} for row in wanted
    ]


CELLS = st.floats() | st.integers() | st.booleans() | st.none()
AWKWARD = {
    "a": -0.0,
    "b": 5e-324,
    "c": 1e22,
    "d": math.inf,
    "e": math.nan,
    "f": 1.0,
    "g": 1,
    "h": True,
    "i": 0.1 + 0.2,
}


NAMES = st.text(min_size=1).filter(str.isprintable)


@given(st.lists(st.dictionaries(NAMES, CELLS, max_size=4), max_size=4))
def test_metrics_come_back_bit_for_bit(tmp_path_factory, rows):
    check_bits(write_metrics, read_metrics, tmp_path_factory.mktemp("run"), rows)


def test_awkward_numbers_come_back_bit_for_bit(tmp_path):
    check_bits(write_metrics, read_metrics, tmp_path, [AWKWARD, {"b": None, "z": 2**80}])


def write_wrongly(text):
    def write(folder: Path, rows: list[dict[str, Any]]) -> None:
        with open(folder / "metrics.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(AWKWARD), restval="")
            writer.writeheader()
            writer.writerows({name: text(value) for name, value in row.items()} for row in rows)

    return write


def test_the_mutants_are_right_without_their_fault(tmp_path):
    check_bits(write_wrongly(repr), read_metrics, tmp_path, [AWKWARD])


@pytest.mark.parametrize(
    "text",
    ["{:.16g}".format, "{:.15f}".format, lambda v: f"{np.float32(v)}", lambda v: v or "", lambda v: float(v)],
)
def test_mutants_fail(tmp_path, text):
    with pytest.raises(AssertionError):
        check_bits(write_wrongly(text), read_metrics, tmp_path, [AWKWARD])


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16", "float64"])
def test_array_scalars_keep_their_value(tmp_path, dtype):
    with jax.enable_x64(True):
        value = jnp.asarray(1 / 3, dtype)
        write_metrics(tmp_path, [{"jax": value, "numpy": np.asarray(value)[()], "int": np.int8(3)}])
        row = read_metrics(tmp_path)[0]
        assert type(row["int"]) is int
        for name in ("jax", "numpy"):
            assert jnp.asarray(row[name], dtype) == value
            assert float(row[name]) == float(value)


def test_no_rows(tmp_path):
    for rows in ([], [{}]):
        write_metrics(tmp_path, rows)
        assert read_metrics(tmp_path) == rows


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.ones(3), "metric 'recall' of row 1 has shape (3,): write one number a column"),
        ("good", "metric 'recall' of row 1 is a str: metrics are numbers"),
        (jnp.complex64(1j), "metric 'recall' of row 1 is a complex: metrics are numbers"),
        ([1.0], "metric 'recall' of row 1 is a list: metrics are numbers"),
    ],
)
def test_what_is_no_metric(tmp_path, value, message):
    with pytest.raises(TypeError) as caught:
        write_metrics(tmp_path, [{"epoch": 1}, {"epoch": 2, "recall": value}])
    assert str(caught.value) == message
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["", "a\nb", "\r", "\ud800", 3])
def test_what_is_no_name_of_a_metric(tmp_path, name):
    with pytest.raises(ValueError, match="cannot be the name of a metric: use printable text") as caught:
        write_metrics(tmp_path, [{name: 1}])
    assert str(caught.value).startswith(repr(name))


def test_a_result_comes_back(tmp_path):
    write_result(
        tmp_path, {"accuracy": np.float32(0.975), "loss": 0.1, "classes": {"0": 5}, "worst": math.nan}
    )
    got = read_result(tmp_path)
    assert np.float32(got["accuracy"]) == np.float32(0.975)
    assert got["loss"] == 0.1
    assert got["classes"] == {"0": 5}
    assert math.isnan(float(got["worst"]))
    with pytest.raises(TypeError, match=r"^result\['x'\] is a object"):
        write_result(tmp_path, {"x": object()})
    assert read_result(tmp_path) == got
