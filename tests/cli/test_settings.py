"""Settings from files are typed, and what is wrong in a file is said with its name."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from pathlib import Path

import pytest

from nnkit import train
from nnkit.cli.settings import Config, as_toml, read_settings, resolved, settings_from

EVERYTHING = Config(
    dataset="mnist", data_dir=Path("da ta"), hidden=(8, 4), dropout=0.5, epochs=3, learning_rate=1e-5, l2=2.0,
    stratify=False, log=("tensorboard", "wandb"), name='a "b" \\ é', patience=2, checkpoint_every=5,
)  # fmt: skip


def test_toml_holds_every_setting():
    found = settings_from(tomllib.loads(as_toml(EVERYTHING)), "a.toml")
    assert Config(**found) == EVERYTHING
    assert Config(**settings_from(tomllib.loads(as_toml(Config())), "a.toml")) == Config()


def test_a_runs_config_holds_every_setting_but_its_name(tmp_path):
    settings = resolved(dataclasses.replace(EVERYTHING, overwrite=True))
    folder = train.create_run(tmp_path / "run", settings)
    expected = {f.name: getattr(settings, f.name) for f in dataclasses.fields(Config)}
    del expected["name"], expected["overwrite"]
    assert read_settings(folder) == read_settings(folder / "config.json") == expected


def test_other_json_keeps_the_name(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"name": "mine", "epochs": 2}))
    assert read_settings(tmp_path / "a.json") == {"name": "mine", "epochs": 2}


def test_whole_numbers_are_floats_where_floats_are_asked_for():
    assert repr(settings_from({"l2": 1, "decay": "inf"}, "a")["l2"]) == "1.0"


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"epoch": 3}, "in a.toml: unknown setting 'epoch'; did you mean 'epochs'?"),
        ({"epochs": "ten"}, "epochs in a.toml must be int, got 'ten'"),
        ({"epochs": 2.5}, "epochs in a.toml must be int, got 2.5"),
        ({"epochs": True}, "epochs in a.toml must be int, got True"),
        ({"l2": "much"}, "l2 in a.toml must be float, got 'much'"),
        ({"l2": 10**400}, "l2 in a.toml must be float, got 1000"),
        ({"l2": None}, "l2 in a.toml must be float, got None"),
        ({"hidden": 8}, r"hidden in a.toml must be tuple\[int, \.\.\.\], got 8"),
        ({"hidden": [8, "x"]}, "hidden in a.toml must be int, got 'x'"),
        ({"log": ["tensorbord"]}, r"log in a.toml must be Literal\['tensorboard', 'mlflow', 'wandb'\], got"),
        ({"guard": "pray"}, "guard in a.toml must be Literal"),
        ({"stratify": 1}, "stratify in a.toml must be bool, got 1"),
        ({"runs": None}, "runs in a.toml must be Path, got None"),
    ],
)
def test_a_setting_that_cannot_be_meant(found, message):
    with pytest.raises((ValueError, TypeError), match=message):
        settings_from(found, "a.toml")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "epochs = ", r"a\.toml' is no TOML: "),
        ("a.json", "{", r"a\.json' is no JSON: "),
        ("a.toml", b'name = "\xff"', r"a\.toml' is no text in UTF-8: "),
        ("a.json", '{"epoch": 3}', r"in .*a\.json: unknown setting 'epoch'"),
        ("a.toml", "epoch = 3", r"in .*a\.toml: unknown setting 'epoch'"),
        ("a", "[1]", "holds a list, and settings are an object of names"),
    ],
)
def test_a_file_that_is_none(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        read_settings(tmp_path / name)


def test_the_lectures_settings_are_the_defaults():
    found = resolved(Config(dataset="mnist"))
    assert (found.epochs, found.batch_size, found.learning_rate, found.decay) == (14, 64, 1e-4, 0.9)
    assert (found.model, found.hidden, found.optimizer, found.dropout) == ("mlp", (256, 128), "adam", 0.0)
    assert (found.label_smoothing, found.validation, found.folder) == (0.0, 0.1, Path("runs/mnist-mlp-seed0"))
