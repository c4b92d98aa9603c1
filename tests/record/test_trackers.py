"""What the trackers have of a run is what the run had; by the real libraries, where they are installed."""

from __future__ import annotations

import io
import json
import math
import time
from typing import Any

import numpy as np
import pytest

from nnkit import record
from tests.record.readers import events, settings, transactions, values

KERNEL = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
HOLED = np.array([1.0, np.nan, 3.0, np.inf])
IMAGE = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
SETTINGS = {"rate": 0.1, "model": "mlp", "stratify": True, "hidden": "[256, 128]", "name": None}


def tell(logger: record.Logger) -> None:
    """A run of two epochs."""
    logger.hyperparameters(SETTINGS, {})
    for step in (10, 20):
        logger.scalars(step, {"loss": 1.0 / step, "val_loss": math.nan if step == 20 else 0.3})
        logger.histograms(step, {"dense_0/kernel": KERNEL * step, "dense_0/bias": HOLED})
        logger.images(step, {"first": IMAGE, "grey": np.eye(2)})
    logger.hyperparameters(SETTINGS, {"loss": 0.05})
    logger.close()


def pixels(png: bytes) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(png)))


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX")
    tell(record.tensorboard(tmp_path / "run"))
    scalars = values(tmp_path / "run", "simple_value")
    assert scalars["loss"] == [(10, float(np.float32(0.1))), (20, float(np.float32(0.05)))]
    assert scalars["val_loss"][0] == (10, float(np.float32(0.3)))
    assert math.isnan(scalars["val_loss"][1][1])
    assert scalars["dense_0/bias/not_finite"] == [(10, 2.0), (20, 2.0)]
    (_, first), (step, last) = values(tmp_path / "run", "histo")["dense_0/kernel"]
    numbers = KERNEL.astype(float) * 20
    assert (step, last.num, last.min, last.max) == (20, 12, -20, 20)
    assert (first.min, first.max) == (-10, 10)
    assert last.sum == pytest.approx(numbers.sum(), abs=1e-12)
    assert last.sum_squares == pytest.approx((numbers**2).sum())
    counts, _ = np.histogram(numbers, 64)
    # TensorBoard's buckets have right ends only: an empty one is put before the first.
    assert [*last.bucket] == [0, *counts]
    assert values(tmp_path / "run", "histo")["dense_0/bias"][0][1].num == 2
    images = values(tmp_path / "run", "image")
    np.testing.assert_array_equal(pixels(images["first"][0][1].encoded_image_string), IMAGE)
    np.testing.assert_array_equal(pixels(images["grey"][1][1].encoded_image_string)[..., 0], np.eye(2) * 255)
    told = settings(tmp_path / "run")
    assert set(told) == {"_hparams_/session_start_info", "_hparams_/session_end_info"}
    hparams = told["_hparams_/session_start_info"].session_start_info.hparams
    assert hparams["rate"].number_value == 0.1
    assert hparams["model"].string_value == "mlp"
    assert hparams["stratify"].bool_value is True
    assert hparams["hidden"].string_value == "[256, 128]"
    assert "name" not in hparams


def test_a_killed_run_loses_nothing_that_was_told(tmp_path):
    pytest.importorskip("tensorboardX")
    logger = record.tensorboard(tmp_path)
    logger.hyperparameters(SETTINGS, {})
    logger.scalars(10, {"loss": 1.0})
    logger.histograms(10, {"kernel": KERNEL})
    logger.images(10, {"eye": np.eye(2)})
    found = [value.tag for event in events(tmp_path) for value in event.summary.value]
    assert found == ["_hparams_/session_start_info", "loss", "kernel", "eye"]
    logger.close()


def test_a_resumed_run_hides_what_lay_beyond_its_checkpoint(tmp_path):
    pytest.importorskip("tensorboardX")
    for steps in ([10, 20, 30], [20, 40]):
        logger = record.tensorboard(tmp_path)
        logger.hyperparameters(SETTINGS, {})
        for step in steps:
            logger.scalars(step, {"loss": float(step)})
        logger.close()
    starts = [event.step for event in events(tmp_path) if event.HasField("session_log")]
    assert starts == [10, 20]
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    seen = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in seen.Scalars("loss")] == [(10, 10), (20, 20), (40, 40)]


def test_settings_without_a_single_step_are_written(tmp_path):
    pytest.importorskip("tensorboardX")
    logger = record.tensorboard(tmp_path)
    logger.hyperparameters(SETTINGS, {})
    assert list(tmp_path.iterdir()) == []
    logger.close()
    assert list(settings(tmp_path)) == ["_hparams_/session_start_info"]


def test_mlflow(tmp_path, monkeypatch):
    tracking = pytest.importorskip("mlflow.tracking")
    # MLflow's stores of files want to be asked for by name; a data base would want SQLAlchemy.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "store").as_uri()
    logger = record.mlflow("digits", name="first", uri=uri)
    tell(logger)
    client = tracking.MlflowClient(uri)
    assert client.get_experiment_by_name("digits") is not None
    run = client.get_run(logger.run_id)
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")
    assert run.data.params == {name: str(value) for name, value in SETTINGS.items()}

    def history(name: str) -> list[tuple[int, float]]:
        found = client.get_metric_history(logger.run_id, name)
        return sorted((metric.step, metric.value) for metric in found)

    assert history("loss") == [(10, 0.1), (20, 0.05)]  # the very bits
    assert math.isnan(history("val_loss")[1][1])
    assert history("histogram/dense_0/kernel/max") == [(10, 10), (20, 20)]
    assert history("histogram/dense_0/bias/median") == [(10, 2), (20, 2)]
    assert history("histogram/dense_0/bias/not_finite") == [(10, 2), (20, 2)]
    folder = client.download_artifacts(logger.run_id, "images/first", str(tmp_path))
    with open(f"{folder}/20.png", "rb") as file:
        np.testing.assert_array_equal(pixels(file.read()), IMAGE)


def test_a_run_of_mlflow_goes_on(tmp_path, monkeypatch):
    tracking = pytest.importorskip("mlflow.tracking")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "store").as_uri()
    first = record.mlflow("digits", uri=uri)
    first.scalars(10, {"loss": 1.0})
    again = record.mlflow("digits", uri=uri, run_id=first.run_id)
    again.scalars(20, {"loss": 0.5, "a?b": 1.0})
    assert again.run_id == first.run_id
    client = tracking.MlflowClient(uri)
    assert [m.value for m in client.get_metric_history(first.run_id, "loss")] == [1.0, 0.5]
    assert client.get_run(first.run_id).data.metrics["a_b"] == 1.0
    assert client.get_run(first.run_id).info.status == "RUNNING"


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = record.wandb("digits", name="first", mode="offline", dir=str(tmp_path))
    tell(logger)
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + 30
    while not any(written.HasField("exit") for written in transactions(path)):
        assert time.monotonic() < deadline  # finish() does not wait for wandb's own process to write its file
        time.sleep(0.05)
    rows: dict[int, dict[str, Any]] = {}
    config: dict[str, Any] = {}
    for written in transactions(path):
        if written.HasField("history"):
            row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in written.history.item}
            rows.setdefault(row["_step"], {}).update(row)
        config |= {u.key: json.loads(u.value_json) for u in written.config.update if u.key}
    assert sorted(rows) == [10, 20]
    assert (rows[10]["loss"], rows[20]["loss"]) == (0.1, 0.05)
    assert rows[10]["val_loss"] == 0.3
    assert math.isnan(float(rows[20]["val_loss"]))
    counts, edges = np.histogram(KERNEL.astype(float) * 20, 64)
    assert rows[20]["dense_0/kernel/values"] == [*counts]
    np.testing.assert_allclose(rows[20]["dense_0/kernel/bins"], edges)
    assert rows[20]["dense_0/bias/not_finite"] == 2
    picture = path.parent / "files" / rows[10]["first/path"]
    np.testing.assert_array_equal(pixels(picture.read_bytes()), IMAGE)
    assert {name: config[name] for name in SETTINGS} == SETTINGS
