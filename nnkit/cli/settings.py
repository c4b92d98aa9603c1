"""What can be set of a training run, the lecture's defaults, and settings from files."""

from __future__ import annotations

import dataclasses
import json
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from nnkit.checks import unknown_name

__all__ = ["Config", "Settings", "as_toml", "read_settings", "resolved", "settings_from"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a network on small images.

    Settings that are not given come from the data set: the lecture's (14 epochs of batches of 64,
    Adam at 1e-4 that falls by 0.9 an epoch) for sets of MNIST's size. The 1,797 bundled digits have
    others, chosen by validation accuracy: 60 epochs of batches of 32 at 3e-3 that falls by 0.93 an
    epoch, dropout 0.25, label smoothing 0.1.
    """

    dataset: str = "digits"
    """digits (bundled); mnist, fashion_mnist, emnist/... with --data-dir; or any set of TensorFlow Datasets."""
    data_dir: Path | None = None
    """A folder of IDX files (train-images-idx3-ubyte, gzipped or not), or TensorFlow Datasets' own."""
    model: str = "mlp"
    """mlp, mlp_bn_dropout (batch normalisation and dropout after each hidden layer), cnn (two convolutions of
    32 and 64 channels with max pooling), lenet, resnet18, resnet20 or resnet50."""
    hidden: tuple[int, ...] | None = None
    """Widths of the hidden dense layers. [256 128; cnn 128]"""
    dropout: float | None = None
    """Probability of dropping a hidden unit. [mlp and cnn 0; mlp_bn_dropout 0.5; digits 0.25]"""
    optimizer: str = "adam"
    """sgd, momentum, nesterov, adagrad, rmsprop, adam or adamw."""
    epochs: int | None = None
    """Passes over the training part. [14; digits 60]"""
    batch_size: int | None = None
    """Examples in a step. [64; digits 32]"""
    learning_rate: float | None = None
    """The rate of the first epoch. [1e-4; digits 3e-3]"""
    decay: float | None = None
    """What the rate is multiplied by after each epoch. [0.9; digits 0.93]"""
    l1: float = 0.0
    """Strength of the penalty on absolute weights (never on biases)."""
    l2: float = 0.0
    """Strength of the penalty on squared weights (never on biases)."""
    label_smoothing: float | None = None
    """Share of each label that is spread over all classes. [0; digits 0.1]"""
    validation: float | None = None
    """Share of the examples held out for validation. [0.1 of the training set; digits 0.2]"""
    folds: int | None = None
    """Cut all but the test part into so many folds instead, of which one is for validation."""
    fold: int = 0
    """Which of the --folds, from 0 on."""
    test: float = 0.2
    """Share held out for the test, where a data set has no test set of its own."""
    stratify: bool = True
    """Whether every part has the same share of each class."""
    patience: int | None = None
    """End when the validation loss has not fallen for so many epochs, with the parameters of the best one."""
    guard: Literal["explain", "skip", "roll_back"] = "explain"
    """When a loss becomes inf or NaN: end and say where it arose, leave the update out, or go back and halve the
    rate."""
    checkpoint_every: int | None = None
    """Steps from one checkpoint to the next. [ends of epochs, at most one in ten seconds]"""
    log: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ()
    """Trackers that are told of the run, beside its own files."""
    seed: int = 0
    """Decides split, initialisation, order and dropout: same seed, same run, to the last bit."""
    repeats: int = 1
    """Train with this many seeds, from --seed up, and report mean and spread."""
    name: str | None = None
    """The run's folder in --runs; by default data set, model and seed."""
    runs: Path = Path("runs")
    """Where run folders go."""
    overwrite: bool = False
    """Replace a run of the same name."""


@dataclasses.dataclass(frozen=True)
class Settings(Config):
    """A configuration with every setting spelled out; None where a network has no such setting."""

    epochs: int = 14
    batch_size: int = 64
    learning_rate: float = 1e-4
    decay: float = 0.9
    label_smoothing: float = 0.0
    validation: float = 0.1
    name: str = ""

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.runs / self.name


DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {
        "epochs": 60,
        "batch_size": 32,
        "learning_rate": 3e-3,
        "decay": 0.93,
        "validation": 0.2,
        "label_smoothing": 0.1,
    },
}
HAS_DROPOUT = {"mlp": 0.0, "mlp_bn_dropout": 0.5, "cnn": 0.0}


def resolved(config: Config) -> Settings:
    """The configuration with what was not given taken from the data set and the model.

    >>> from nnkit.cli.settings import Config, resolved
    >>> resolved(Config(dataset="mnist", model="cnn")).hidden
    (128,)
    """
    config = dataclasses.replace(config, dataset=config.dataset.lower().replace("-", "_"))
    fields = [f.name for f in dataclasses.fields(Config)]
    given = {name: value for name in fields if (value := getattr(config, name)) is not None}
    defaults = dict(DEFAULTS.get(config.dataset, {}))
    if config.model in HAS_DROPOUT:
        defaults["dropout"] = 0.25 if config.dataset == "digits" else HAS_DROPOUT[config.model]
        defaults["hidden"] = (128,) if config.model == "cnn" else (256, 128)
    settings = Settings(**{**defaults, **given})
    if settings.name:
        return settings
    name = f"{config.dataset.replace('/', '-')}-{config.model}-seed{config.seed}"
    name += "" if config.folds is None else f"-fold{config.fold}"
    return dataclasses.replace(settings, name=name)


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a file: a run's config.json or its folder, any other JSON object, or TOML.

    Of a run come all but its name and whether it replaced another: it is to be repeated and not replaced.

    Raises:
      FileNotFoundError: no such file.
      ValueError, TypeError: it is no such file, a setting is unknown, or has another type.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"no file {str(file)!r}: pass a run folder, its config.json, or a TOML file"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(file)!r} is no text in UTF-8: {error}") from None
    try:
        found = tomllib.loads(text) if file.suffix == ".toml" else json.loads(text)
    except ValueError as error:
        raise ValueError(f"{str(file)!r} is no {file.suffix[1:].upper() or 'JSON'}: {error}") from None
    # A run's config.json has the settings beside versions, device and the rest.
    if isinstance(found, dict) and isinstance(found.get("config"), dict):
        found = {name: value for name, value in found["config"].items() if name not in ("name", "overwrite")}
    if not isinstance(found, dict):
        raise ValueError(f"{str(file)!r} holds a {type(found).__name__}, and settings are an object of names")
    return settings_from(found, str(file))


def settings_from(found: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Plain values by name as settings of :class:`Config`, each of its type.

    >>> from nnkit.cli.settings import settings_from
    >>> settings_from({"hidden": [64], "data_dir": "here", "l2": 0}, "a.toml")
    {'hidden': (64,), 'data_dir': PosixPath('here'), 'l2': 0.0}
    """
    hints = typing.get_type_hints(Config)
    settings = {}
    for name, value in found.items():
        if name not in hints:
            raise ValueError(f"in {where}: {unknown_name('setting', name, hints)}")
        settings[name] = _typed(hints[name], value, f"{name} in {where}")
    return settings


def _typed(hint: Any, value: Any, what: str) -> Any:
    """``value`` as what the annotation says; Config's are plain types, tuples of them, literals and None."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    kind = options[0]
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is tuple and isinstance(value, list | tuple):
        return tuple(_typed(inner[0], item, what) for item in value)
    if typing.get_origin(kind) is Literal and value in inner:
        return value
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)  # a text, too: JSON has no inf
        except (ValueError, OverflowError):
            pass
    if isinstance(kind, type) and type(value) is kind:
        return value
    wanted = getattr(kind, "__name__", str(kind)) if typing.get_origin(kind) is None else str(kind)
    raise TypeError(f"{what} must be {wanted.replace('typing.', '')}, got {value!r}")


def as_toml(config: Config) -> str:
    """The settings as TOML, those that are None left out.

    >>> from nnkit.cli.settings import Config, as_toml
    >>> print(as_toml(Config(hidden=(64, 32), l2=1e-4)).splitlines()[:4])
    ['dataset = "digits"', 'model = "mlp"', 'hidden = [64, 32]', 'optimizer = "adam"']
    """
    lines = []
    for field in dataclasses.fields(Config):
        value = getattr(config, field.name)
        if value is None:
            continue
        value = list(value) if isinstance(value, tuple) else value
        plain = str(value) if isinstance(value, Path) else value
        # JSON's numbers, bools, arrays and escaped texts are TOML's, and its floats always have a point or exponent.
        lines.append(f"{field.name} = {json.dumps(plain, ensure_ascii=False)}")
    return "\n".join(lines) + "\n"
