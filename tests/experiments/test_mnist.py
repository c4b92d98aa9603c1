"""The main job end to end, as processes, on real images."""

from __future__ import annotations

import csv
import dataclasses
import functools
import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from nnkit import data, train

ROOT = Path(__file__).parent.parent.parent
SCRIPT, PREDICT = ROOT / "experiments/mnist.py", ROOT / "experiments/predict.py"


def script(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def mnist() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mnist", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["mnist"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A short run with batch normalisation and dropout."""
    runs = tmp_path_factory.mktemp("runs")
    done = script(SCRIPT, "--runs", runs, "--epochs", 4, "--model", "mlp_bn_dropout", "--hidden", 32)
    assert done.returncode == 0, done.stderr
    assert "test accuracy" in done.stdout
    return runs / "digits-mlp_bn_dropout-seed0"


def test_a_run_leaves_its_folder(finished):
    assert {path.name for path in finished.iterdir()} == {
        "config.json", "metrics.csv", "metrics.jsonl", "checkpoints", "result.json", "model.npz", "model.json",
        "curves.png", "confusion.png", "mistakes.png",
    }  # fmt: skip
    config = json.loads((finished / "config.json").read_text())
    assert config["config"]["epochs"] == 4
    assert config["config"]["learning_rate"] == 3e-3  # the digits' own, spelled out
    assert config["seed"] == 0
    assert {"jax", "jaxlib", "numpy", "nnkit", "python"} <= set(config["versions"])
    assert config["device"]["backend"] == "cpu"
    with (finished / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    assert float(rows[1]["learning_rate"]) == pytest.approx(3e-3 * 0.93, rel=1e-6)
    assert all(
        (finished / name).read_bytes().startswith(b"\x89PNG") for name in ("curves.png", "confusion.png")
    )


def test_prediction_gives_the_recorded_numbers(finished):
    done = script(PREDICT, finished)
    assert done.returncode == 0, done.stderr
    recorded = json.loads((finished / "result.json").read_text())
    assert f"{recorded['accuracy']:.2%}" in done.stdout


def test_the_same_seed_gives_the_same_bits_in_another_process(finished, tmp_path):
    script(SCRIPT, "--runs", tmp_path, "--epochs", 4, "--model", "mlp_bn_dropout", "--hidden", 32)
    again = tmp_path / finished.name
    assert (again / "result.json").exists()
    ours, theirs = train.load_tree(finished / "model.npz"), train.load_tree(again / "model.npz")
    np.testing.assert_array_equal(ours["params"]["dense_0"]["kernel"], theirs["params"]["dense_0"]["kernel"])
    columns = ["loss", "val_loss", "val_accuracy"]
    for a, b in zip(train.read_metrics(finished), train.read_metrics(again), strict=True):
        assert [a[c] for c in columns] == [b[c] for c in columns]


def test_prediction_notices_other_parameters_and_other_records(finished, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in filter(Path.is_file, finished.iterdir()):
        (copy / path.name).write_bytes(path.read_bytes())
    tree = train.load_tree(copy / "model.npz")
    tree["params"]["dense_0"]["kernel"] = tree["params"]["dense_0"]["kernel"] * 0
    train.save_tree(copy / "model.npz", tree)
    changed = script(PREDICT, copy)
    assert changed.returncode == 1
    assert "accuracy was recorded as" in changed.stderr
    (copy / "model.npz").write_bytes((finished / "model.npz").read_bytes()[:-100])
    damaged = script(PREDICT, copy)
    assert damaged.returncode == 1
    assert damaged.stderr.startswith("error: ")
    assert len(damaged.stderr.strip().splitlines()) == 1
    missing = script(PREDICT, tmp_path / "nowhere")
    assert missing.returncode == 1
    assert len(missing.stderr.strip().splitlines()) == 1


def test_an_interrupted_run_leaves_whole_files(tmp_path):
    command = [sys.executable, str(SCRIPT), "--runs", str(tmp_path), "--epochs", "100000", "--hidden", "16"]
    # A shell has its background jobs ignore SIGINT, and they hand that down.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, preexec_fn=heed)
    metrics = tmp_path / "digits-mlp-seed0" / "metrics.csv"
    deadline = time.monotonic() + 120
    while not metrics.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    try:
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "interrupted: the epochs so far are in" in stderr
    assert f"go on with: nnkit resume {metrics.parent}" in stderr
    assert "Traceback" not in stderr
    rows = train.read_metrics(metrics.parent)
    assert [row["epoch"] for row in rows] == list(range(1, len(rows) + 1))
    assert {path.name for path in metrics.parent.iterdir()} == {
        "config.json", "metrics.csv", "metrics.jsonl", "checkpoints",
    }  # fmt: skip


def test_a_folder_of_idx_files(mnist, tmp_path):
    digits = data.load("digits").train
    for part, rows in (("train", slice(0, 1500)), ("t10k", slice(1500, None))):
        data.write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", digits.x[rows, :, :, 0])
        data.write_idx(tmp_path / f"{part}-labels-idx1-ubyte", digits.y[rows].astype(np.uint8))
    config = mnist.Config(dataset="mnist", data_dir=tmp_path, epochs=2, hidden=(16,), runs=tmp_path / "runs")
    assert mnist.main(config) == 0
    recorded = train.read_config(tmp_path / "runs/mnist-mlp-seed0")["config"]
    assert (recorded["batch_size"], recorded["learning_rate"], recorded["decay"]) == (64, 1e-4, 0.9)
    assert train.read_result(tmp_path / "runs/mnist-mlp-seed0")["test_examples"] == 297


def test_the_lectures_settings_are_the_defaults(mnist):
    settings = mnist.resolved(mnist.Config(dataset="mnist"))
    assert (settings.epochs, settings.batch_size, settings.learning_rate, settings.decay) == (
        14,
        64,
        1e-4,
        0.9,
    )
    assert (settings.model, settings.optimizer, settings.dropout, settings.label_smoothing) == (
        "mlp",
        "adam",
        0.0,
        0.0,
    )
    assert mnist.resolved(mnist.Config(dataset="mnist", model="mlp_bn_dropout")).dropout == 0.5
    assert mnist.resolved(mnist.Config(epochs=3)).epochs == 3
    assert mnist.resolved(mnist.Config(dataset="Digits")).batch_size == 32


def test_several_seeds_have_a_folder_each_and_a_mean(mnist, tmp_path, capsys):
    assert mnist.main(mnist.Config(epochs=1, hidden=(16,), repeats=2, name="two", runs=tmp_path)) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"two-seed0", "two-seed1"}
    shown = capsys.readouterr().out
    assert "mean" in shown
    assert "std" in shown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "digist"}, "unknown data set 'digist'; did you mean 'digits'"),
        ({"model": "mpl"}, "unknown model 'mpl'; did you mean 'mlp'"),
        ({"optimizer": "adan"}, "unknown optimizer 'adan'; did you mean 'adam'"),
        ({"dropout": 1.5}, "dropout(rate) must be in [0, 1), got 1.5"),
        ({"hidden": (0,)}, "dense(features=...) must be at least 1, got 0"),
        ({"batch_size": 5000}, "5000"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 359, "model": "mlp_bn_dropout"}, "one value per channel"),
        ({"test": 0.0}, "test must be a share between 0 and 1, got 0"),
        ({"seed": -1}, "seed must be a whole number from 0 to 2**32 - 1, got -1"),
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"learning_rate": -1.0}, "learning_rate and decay must be positive, got -1 and 0.93"),
        ({"l2": -1.0}, "-1"),
        ({"epochs": 0}, "fit(epochs=...) must be a whole number of at least 1, got 0"),
        ({"validation": 0.9}, "sum"),
        ({"data_dir": Path("/nowhere"), "dataset": "mnist"}, "data_dir /nowhere is not a folder"),
        ({"runs": Path(__file__)}, "test_mnist.py"),
    ],
)
def test_what_is_wrong_is_said_in_few_lines_and_leaves_nothing(mnist, tmp_path, capsys, changes, message):
    config = dataclasses.replace(mnist.Config(epochs=1, hidden=(16,), runs=tmp_path / "runs"), **changes)
    assert mnist.main(config) == 1
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ")
    # The sentence, and where a note says in which data or batch, the note.
    assert len(stderr.strip().splitlines()) == (2 if "in the last batch" in stderr else 1)
    assert message in stderr.splitlines()[0]
    assert not [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]


def test_a_run_is_not_overwritten_unless_asked(finished, mnist, capsys):
    config = mnist.Config(epochs=1, hidden=(16,), model="mlp_bn_dropout", runs=finished.parent)
    before = (finished / "result.json").read_bytes()
    assert mnist.main(config) == 1
    assert "is not empty: choose another name" in capsys.readouterr().err
    assert (finished / "result.json").read_bytes() == before
