"""Trains the lecture's network on small images and leaves a run folder to look at.

    python experiments/mnist.py                                    # the bundled digits
    python experiments/mnist.py --dataset mnist --data-dir DIR     # a folder of IDX files
    python experiments/mnist.py --dataset cifar10                  # TensorFlow Datasets

``runs/<name>/`` then holds config.json, metrics.csv, result.json, curves.png, confusion.png,
mistakes.png and the trained parameters; experiments/predict.py evaluates them again.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnkit import data, losses, metrics, models, optim, regularizers, train
from nnkit.checks import unknown_name
from nnkit.diagnose import plot_confusion, plot_curves, plot_examples
from nnkit.types import Layer

OPTIMIZERS = {
    "sgd": optim.sgd,
    "momentum": lambda rate: optim.momentum(rate, 0.9),
    "nesterov": lambda rate: optim.nesterov(rate, 0.9),
    "adagrad": optim.adagrad,
    "rmsprop": optim.rmsprop,
    "adam": optim.adam,
    "adamw": optim.adamw,
}


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
    test: float = 0.2
    """Share held out for the test, where a data set has no test set of its own."""
    stratify: bool = True
    """Whether every part has the same share of each class."""
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
    """The configuration with what was not given taken from the data set and the model."""
    config = dataclasses.replace(config, dataset=config.dataset.lower().replace("-", "_"))
    given = {
        f.name: value for f in dataclasses.fields(config) if (value := getattr(config, f.name)) is not None
    }
    defaults = dict(DEFAULTS.get(config.dataset, {}))
    if config.model in HAS_DROPOUT:
        defaults["dropout"] = 0.25 if config.dataset == "digits" else HAS_DROPOUT[config.model]
        defaults["hidden"] = (128,) if config.model == "cnn" else (256, 128)
    settings = Settings(**{**defaults, **given})
    if settings.name:
        return settings
    name = f"{config.dataset.replace('/', '-')}-{config.model}-seed{config.seed}"
    return dataclasses.replace(settings, name=name)


def load_splits(config: Settings) -> data.Splits:
    """Training, validation and test part, standardised by the training part."""
    splits = data.load(config.dataset, data_dir=config.data_dir)
    if splits.test is None:
        fractions = (1 - config.validation - config.test, config.validation, config.test)
        splits = data.split(splits.train, fractions, seed=config.seed, stratify=config.stratify)
    elif splits.validation is None and config.validation > 0:
        splits = data.hold_out(splits, config.validation, seed=config.seed, stratify=config.stratify)
    return data.standardize(splits)


def build_model(config: Settings, classes: int) -> Layer:
    return models.build(config.model, classes, hidden=config.hidden, dropout=config.dropout)


class Outcome(NamedTuple):
    """What a run found on the test part."""

    loss: float
    accuracy: float
    macro_f1: float
    calibration_error: float


def evaluate(
    model: Layer, params: Any, state: Any, test: data.Dataset
) -> tuple[Outcome, np.ndarray, np.ndarray]:
    """The outcome on ``test``, the logits, and the confusion matrix."""
    logits = train.predict(model, params, state, test.x)
    labels = jnp.asarray(test.y)
    values = losses.softmax_cross_entropy(logits, labels)
    confusion = metrics.confusion_matrix(logits, labels, len(test.classes))
    bins = metrics.calibration_bins(logits, labels)
    outcome = Outcome(
        loss=float(values.mean()),
        accuracy=float(metrics.accuracy(logits, labels).mean()),
        macro_f1=float(metrics.f1(confusion)),
        calibration_error=float(metrics.expected_calibration_error(bins)),
    )
    return outcome, np.asarray(logits), np.asarray(confusion)


def run(config: Settings) -> Outcome:
    """One training run: everything from the data to the folder."""
    if config.optimizer not in OPTIMIZERS:
        raise unknown_name("optimizer", config.optimizer, OPTIMIZERS)
    if not config.learning_rate > 0 or not config.decay > 0:
        raise ValueError(
            f"learning_rate and decay must be positive, got {config.learning_rate:g} and {config.decay:g}"
        )
    if not 0 < config.test < 1:
        raise ValueError(f"test must be a share between 0 and 1, got {config.test:g}")
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"seed must be a whole number from 0 to 2**32 - 1, got {config.seed}")
    splits = load_splits(config)
    train_set, validation_set, test_set = splits
    assert test_set is not None
    model = build_model(config, len(train_set.classes))
    data.check_batch_size(config.batch_size, len(train_set))
    steps = data.num_batches(len(train_set), config.batch_size)
    rate = optim.exponential_decay(config.learning_rate, steps, config.decay, staircase=True)

    loss = partial(losses.softmax_cross_entropy, label_smoothing=config.label_smoothing)
    penalties = [
        penalty(strength)
        for penalty, strength in ((regularizers.l1, config.l1), (regularizers.l2, config.l2))
        if strength
    ]
    trainer = train.trainer(
        model,
        loss,
        OPTIMIZERS[config.optimizer](rate),
        metrics={"accuracy": metrics.accuracy},
        regularizer=regularizers.combine(*penalties) if penalties else None,
    )
    folder = train.create_run(config.runs / config.name, config, seed=config.seed, overwrite=config.overwrite)
    rows: list[dict[str, Any]] = []

    def record(ts: Any, row: dict[str, Any]) -> None:
        rows.append({**row, "learning_rate": float(rate(ts.step - 1))})
        train.write_metrics(folder, rows)

    started = time.perf_counter()
    try:
        ts, _ = train.fit(
            trainer,
            train_set,
            epochs=config.epochs,
            key=jax.random.key(config.seed),
            batch_size=config.batch_size,
            validation=validation_set,
            on_epoch=record,
        )
    except (ValueError, TypeError):
        if not rows:  # what it was given was refused, and nothing was computed
            shutil.rmtree(folder)
        raise
    seconds = time.perf_counter() - started
    outcome, logits, confusion = evaluate(model, ts.params, ts.state, test_set)
    train.save_tree(folder / "model.npz", {"params": ts.params, "state": ts.state})
    plot_curves(rows, folder / "curves.png")
    plot_confusion(confusion, test_set.classes, folder / "confusion.png")
    plot_mistakes(test_set, logits, folder / "mistakes.png")
    train.write_result(folder, {**outcome._asdict(), "test_examples": len(test_set), "seconds": seconds})
    return outcome


def plot_mistakes(test: data.Dataset, logits: np.ndarray, path: Path) -> None:
    """The test images of which the network is most confidently wrong."""
    assert test.normalization is not None
    confidences = np.asarray(jax.nn.softmax(logits)).max(axis=-1)
    plot_examples(
        test.normalization.invert(test.x),
        test.y,
        logits.argmax(axis=-1),
        confidences,
        path,
        classes=test.classes,
    )


def print_table(title: str, rows: dict[str, Outcome]) -> None:
    """The final table: one row for each seed, mean and standard deviation below."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in ("", "test loss", "test accuracy", "macro F1", "calibration error"):
        table.add_column(column, justify="right" if column else "left")
    shown = dict[str, Any](rows)
    if len(rows) > 1:
        values = np.array(list(rows.values()))
        shown["mean"], shown["std"] = values.mean(axis=0), values.std(axis=0, ddof=1)
    for name, (loss, accuracy, f1, calibration) in shown.items():
        if name == "mean":
            table.add_section()
        table.add_row(name, f"{loss:.4f}", f"{accuracy:.2%}", f"{f1:.4f}", f"{calibration:.4f}")
    Console().print(table)


def main(config: Config) -> int:
    outcomes: dict[str, Outcome] = {}
    full = resolved(config)
    if config.repeats < 1:
        print(f"error: repeats must be at least 1, got {config.repeats}", file=sys.stderr)
        return 1
    network = full.model + (f" {full.hidden}" if full.hidden else "")
    network += f", dropout {full.dropout:g}" if full.dropout is not None else ""
    print(
        f"{full.dataset}, {network}: {full.epochs} epochs, batches of "
        f"{full.batch_size}, {full.optimizer} at {full.learning_rate:g} times {full.decay:g} an epoch, label "
        f"smoothing {full.label_smoothing:g}, {full.validation:.0%} for validation",
        flush=True,
    )
    for seed in range(config.seed, config.seed + config.repeats):
        name = f"{config.name}-seed{seed}" if config.name and config.repeats > 1 else config.name
        one = resolved(dataclasses.replace(config, seed=seed, name=name, repeats=1))
        try:
            outcomes[f"seed {seed}"] = run(one)
        except KeyboardInterrupt:
            print(
                f"\ninterrupted: the epochs so far are in {one.runs / one.name}/metrics.csv",
                file=sys.stderr,
            )
            return 130
        except (ValueError, TypeError, OSError, ImportError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        print(f"seed {seed}: test accuracy {outcomes[f'seed {seed}'].accuracy:.2%}, in {one.runs / one.name}")
    print_table(f"{full.dataset}, {full.model}", outcomes)
    return 0


if __name__ == "__main__":
    try:
        import tyro
    except ImportError:
        sys.exit("the command line needs tyro: pip install 'nnkit[experiments]'")
    sys.exit(main(tyro.cli(Config, description=__doc__)))
