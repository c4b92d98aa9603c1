"""A run is told to a logger, and a logger that fails does not end the run."""

from __future__ import annotations

import subprocess
import sys
import types
import warnings
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnkit import record
from nnkit.record.logger import picture, settings_of

PARAMS = {"dense_0": {"kernel": jnp.arange(4.0), "bias": jnp.zeros(2, jnp.bfloat16)}}


class Notes:
    """A logger that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def scalars(self, step, values):
        self.told.append(("scalars", step, dict(values)))

    def histograms(self, step, values):
        self.told.append(("histograms", step, dict(values)))

    def images(self, step, values):
        self.told.append(("images", step, dict(values)))

    def hyperparameters(self, settings, metrics):
        self.told.append(("hyperparameters", dict(settings), dict(metrics)))

    def close(self):
        self.told.append(("close",))


class Broken(Notes):
    """A logger whose server is gone."""

    def scalars(self, step, values):
        super().scalars(step, values)
        raise ConnectionError("gone")

    def hyperparameters(self, settings, metrics):
        super().hyperparameters(settings, metrics)
        raise ConnectionError("gone")


def view(step: int = 0, /, **metrics: Any) -> Any:
    state = types.SimpleNamespace(params=PARAMS)
    return types.SimpleNamespace(
        step=step, metrics=metrics, state=state, config={"rate": 0.1, "net": {"hidden": (8,)}}
    )


def test_epochs_settings_and_the_end():
    notes = Notes()
    callback = record.log_to(notes)
    callback("start", view())
    callback("chunk", view(2, loss=3.0))
    callback("epoch", view(4, epoch=1, step=4, loss=2.0, note="text", missing=None, ok=np.bool_(True)))
    callback("checkpoint", view(4))
    callback("end", view(4, epoch=1, step=4, loss=jnp.float32(2.0)))
    settings = {"rate": 0.1, "net/hidden": "[8]"}
    assert notes.told == [
        ("hyperparameters", settings, {}),
        ("scalars", 4, {"epoch": 1.0, "loss": 2.0, "ok": 1.0}),
        ("hyperparameters", settings, {"epoch": 1.0, "loss": 2.0}),
        ("close",),
    ]


def test_every_so_many_dispatches_beside_the_epochs():
    notes = Notes()
    callback = record.log_to(notes, every=2)
    for step in range(1, 6):
        callback("chunk", view(step, loss=float(step)))
    callback("epoch", view(5, loss=3.0))
    assert notes.told == [
        ("scalars", 2, {"chunk/loss": 2.0}),
        ("scalars", 4, {"chunk/loss": 4.0}),
        ("scalars", 5, {"loss": 3.0}),
    ]


@pytest.mark.parametrize(
    ("histograms", "paths"),
    [(True, ["dense_0/bias", "dense_0/kernel"]), (".*/kernel", ["dense_0/kernel"])],
)
def test_parameters_by_path(histograms, paths):
    notes = Notes()
    record.log_to(notes, histograms=histograms)("epoch", view(1, loss=0.0))
    found = notes.told[1][2]
    assert sorted(found) == paths
    assert all(type(array) is np.ndarray and array.dtype == np.float32 for array in found.values())
    if "dense_0/kernel" in found:
        np.testing.assert_array_equal(found["dense_0/kernel"], [0, 1, 2, 3])


def test_a_choice_of_no_parameter_is_said_once():
    notes = Notes()
    callback = record.log_to(notes, histograms="kernel")
    with pytest.warns(RuntimeWarning, match="'kernel'.*no parameter.*dense_0/bias, dense_0/kernel"):
        callback("epoch", view(1, loss=0.0))
    callback("epoch", view(2, loss=0.0))  # a second warning would be an error
    assert [name for name, *_ in notes.told] == ["scalars", "scalars"]


def test_images_of_the_view():
    notes = Notes()
    callback = record.log_to(notes, images=lambda v: {"step": jnp.full((2, 2), v.step / 10)})
    callback("epoch", view(3, loss=0.0))
    assert notes.told[1][:2] == ("images", 3)
    np.testing.assert_allclose(notes.told[1][2]["step"], 0.3)


def test_a_logger_that_fails_is_a_warning_and_after_three_in_a_row_left_alone():
    broken = Broken()
    callback = record.log_to(broken)
    message = r"the logger Broken failed in {} \(ConnectionError: gone\); the run goes on{}$"
    with pytest.warns(RuntimeWarning, match=message.format("hyperparameters", "")):
        callback("start", view())
    with pytest.warns(RuntimeWarning, match=message.format("scalars", "")):
        callback("epoch", view(1, loss=0.0))
    with pytest.warns(
        RuntimeWarning, match=message.format("scalars", ", and the logger is not called again")
    ):
        callback("epoch", view(2, loss=0.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        callback("epoch", view(3, loss=0.0))
        callback("end", view(3, loss=0.0))
    assert [call[0] for call in broken.told] == ["hyperparameters", "scalars", "scalars", "close"]


def test_a_success_starts_the_count_again():
    class Shaky(Notes):
        def scalars(self, step, values):
            if step % 3:
                raise TimeoutError("slow")
            super().scalars(step, values)

    shaky = Shaky()
    callback = record.log_to(shaky)
    for step in range(1, 13):
        with pytest.warns(RuntimeWarning, match="TimeoutError: slow") if step % 3 else nullcontext():
            callback("epoch", view(step, loss=0.0))
    assert [call[1] for call in shaky.told] == [3, 6, 9, 12]


def test_images_that_fail_are_a_warning_too():
    def wrong(view):
        raise KeyError("no such layer")

    notes = Notes()
    with pytest.warns(RuntimeWarning, match="failed in images"):
        record.log_to(notes, images=wrong)("epoch", view(1, loss=0.0))
    assert [call[0] for call in notes.told] == ["scalars"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_is_no_failure_passes(error):
    class Stopped(Notes):
        def scalars(self, step, values):
            raise error

    with pytest.raises(error):
        record.log_to(Stopped())("epoch", view(1, loss=0.0))


def test_process_0_speaks_alone(monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    notes = Notes()
    callback = record.log_to(notes)
    for event in ("start", "epoch", "end"):
        callback(event, view(1, loss=0.0))
    assert notes.told == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logger": "runs/first"}, "log_to needs a logger and got str, which has no scalars, histograms, "),
        (
            {"every": 0},
            r"log_to\(every=...\), unless it is 'epoch', must be a whole number of at least 1, got 0",
        ),
        ({"every": "step"}, "must be a whole number of at least 1, got 'step'"),
        ({"images": np.zeros((2, 2))}, r"log_to\(images=...\) takes a function of the view, got ndarray"),
        ({"histograms": "*"}, r"log_to\(histograms='\*'\) is no regular expression \(nothing to repeat"),
        ({"histograms": 3}, r"log_to\(histograms=...\) takes a bool or a regular expression, got int"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        record.log_to(**{"logger": Notes(), **arguments})


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros(4), r"the image 'a' has shape \(4,\): pass \(height, width\)"),
        (np.zeros((2, 2, 2)), r"has shape \(2, 2, 2\)"),
        (np.full((2, 2), 1.5), "has numbers from 1.5 to 1.5: pass uint8, or 0 to 1"),
        (np.full((2, 2), np.nan), "has numbers from nan to nan"),
        (np.full((2, 2), 200, np.int32), "has numbers from 200 to 200"),
    ],
)
def test_what_is_no_image(image, message):
    with pytest.raises(ValueError, match=message):
        picture("a", image)


def test_images_of_every_form_become_one():
    grey = np.array([[0.0, 1.0], [0.5, 0.1]])
    np.testing.assert_array_equal(picture("a", grey)[..., 2], [[0, 255], [128, 26]])
    colour = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    np.testing.assert_array_equal(picture("a", colour), colour)
    assert picture("a", colour[..., :1]).shape == (2, 2, 3)


def test_settings_are_flat():
    assert settings_of(None) == {}
    assert settings_of({"a": {"b": 1, "c": {"d": None}}, "e": [1, 2], "f": True}) == {
        "a/b": 1, "a/c/d": None, "e": "[1, 2]", "f": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "library", "extra"),
    [
        ("tensorboard", "tensorboardX", "tensorboard"),
        ("mlflow", "mlflow", "mlflow"),
        ("wandb", "wandb", "wandb"),
    ],
)
def test_a_library_that_is_missing_is_one_line_with_the_extra(monkeypatch, name, library, extra):
    for module in (library, f"{library}.tracking"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"need {library}: pip install nnkit\[{extra}\]$") as error:
        getattr(record, name)("here")
    assert "\n" not in str(error.value)


def test_importing_record_costs_none_of_them():
    code = "import sys, nnkit.record; print({'tensorboardX', 'mlflow', 'wandb', 'PIL'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
