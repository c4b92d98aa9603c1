from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnkit import data, layers

FOLDER = Path(__file__).parent.parent.parent / "experiments"


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


module("uncertainty_plots")
uncertainty = module("uncertainty")
claims = module("claims")  # which takes the table of the other


def test_an_image_is_turned_about_its_middle():
    image = np.random.default_rng(0).random((8, 8, 1)).astype(np.float32)
    np.testing.assert_array_equal(uncertainty.rotated(image, 0), image)
    for turns in (1, 2, 3):
        turned = uncertainty.rotated(image, 90 * turns)
        # At the border a rounding of the angle decides whether a pixel lies inside: the inner ones count.
        np.testing.assert_allclose(turned[1:-1, 1:-1], np.rot90(image, -turns)[1:-1, 1:-1], atol=1e-5)
    np.testing.assert_allclose(uncertainty.rotated(np.ones((8, 8, 1), np.float32), 45), 1, atol=1e-6)


@pytest.mark.parametrize("form", ["train", "test"])
def test_the_exact_average_is_that_of_all_masks(form):
    rate = 0.3
    model = layers.serial(layers.dense(4), layers.relu, layers.dropout(rate, scale_at=form), layers.dense(3))
    x = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    params, state = model.init(jax.random.key(0), x)
    network = uncertainty.Trained(model, params, state)
    scale = 1 / (1 - rate) if form == "train" else 1.0
    found = uncertainty.exact_average(network, x, rate, scale)
    hidden = np.maximum(x @ params["dense_0"]["kernel"], 0)
    expected = np.zeros((5, 3))
    for mask in itertools.product([0, 1], repeat=4):
        p = jax.nn.softmax(hidden * np.float32(mask) * scale @ params["dense_1"]["kernel"])
        expected += np.asarray(p) * np.prod([1 - rate if m else rate for m in mask])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    # 4000 samples of probabilities, whose deviation is at most 1/2: five standard errors.
    sampled = network.doubts(x, 4000, jax.random.key(1)).mean
    np.testing.assert_allclose(sampled, expected, atol=5 * 0.5 / np.sqrt(4000))


@pytest.mark.slow
def test_doubts_rise_as_a_digit_is_turned(tmp_path, capsys):
    config = uncertainty.Config(epochs=30, hidden=(128,), samples=30, out=tmp_path)
    assert uncertainty.main(config) == 0
    shown = capsys.readouterr().out
    rows = [line.strip("| ").split(" | ") for line in shown.splitlines() if line.startswith("| ")]
    by_angle = {row[0]: float(row[2]) for row in rows[2:15]}
    assert list(by_angle) == [str(a) for a in range(0, 181, 15)]
    assert by_angle["45"] > 2 * by_angle["0"]
    calibration = {row[0]: float(row[3]) for row in rows[17:22]}
    scaled = next(value for name, value in calibration.items() if name.startswith("no dropout, temp"))
    assert scaled < calibration["no dropout"]
    assert (tmp_path / "rotation-digits.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_claims_are_tried(tmp_path, capsys):
    config = claims.Config(
        dataset="digits",
        examples=500,
        hidden=(32,),
        dropout_epochs=2,
        norm_epochs=2,
        rates=(0.1,),
        seeds=2,
        out=tmp_path,
    )
    assert claims.main(config) == 0
    shown = capsys.readouterr().out
    assert "| with dropout | " in shown
    assert "| without batch norm, rate 0.1 | " in shown
    assert (tmp_path / "claims-digits.png").read_bytes().startswith(b"\x89PNG")


def test_the_two_networks_of_a_claim_differ_in_one_thing():
    with_dropout, without = (claims.network(3, (8,), dropout=rate) for rate in (0.5, None))
    x = jnp.ones((2, 4, 4, 1))
    same = [jax.eval_shape(model.init, jax.random.key(0), x)[0] for model in (with_dropout, without)]
    assert same[0] == same[1]
    assert (
        "batch_norm_0"
        in jax.eval_shape(claims.network(3, (8,), normalise=True).init, jax.random.key(0), x)[0]
    )


def test_both_parts_come_from_the_training_set():
    config = claims.Config(dataset="digits", examples=500)
    training, validation = claims.parts(config)
    assert (len(training), len(validation)) == (500, 500)
    assert len(data.load("digits").train) == 1797


@pytest.mark.parametrize(
    ("script", "changes", "message"),
    [
        (uncertainty, {"dataset": "digist"}, "unknown data set 'digist'; did you mean 'digits'"),
        (uncertainty, {"digit": 10}, "digit must be one of the 10 classes, got 10"),
        (claims, {"dataset": "mnist", "data_dir": Path("/nowhere")}, "data_dir /nowhere is not a folder"),
        (claims, {"dataset": "digits", "seeds": 0}, "there must be a seed and examples for one batch, got seeds=0"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(capsys, script, changes, message):
    assert script.main(dataclasses.replace(script.Config(), **changes)) == 1
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ")
    assert message in stderr
    assert len(stderr.strip().splitlines()) == 1
