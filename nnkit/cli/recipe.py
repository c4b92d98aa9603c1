"""The recipe: from settings to data, a network, a trainer, and a run folder with all that came of it."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnkit import data, losses, metrics, models, optim, record, regularizers, train
from nnkit.checks import is_static_number, unknown_name
from nnkit.cli.report import draw
from nnkit.cli.settings import Config, Settings
from nnkit.cli.trained import card_of, write_card
from nnkit.search.folds import fold_of
from nnkit.train.checkpoints import steps as saved_steps
from nnkit.train.events import Callback, View
from nnkit.types import Layer, Schedule, Trainer, TrainState

__all__ = [
    "OPTIMIZERS",
    "Outcome",
    "build_model",
    "build_trainer",
    "evaluate",
    "folded",
    "leave",
    "load_splits",
    "raw_splits",
    "run",
    "stopping_rule",
    "together",
]

OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "sgd": optim.sgd,
    "momentum": lambda rate: optim.momentum(rate, 0.9),
    "nesterov": lambda rate: optim.nesterov(rate, 0.9),
    "adagrad": optim.adagrad,
    "rmsprop": optim.rmsprop,
    "adam": optim.adam,
    "adamw": optim.adamw,
}


class Outcome(NamedTuple):
    """What a run found on a part of the data."""

    loss: float
    accuracy: float
    macro_f1: float
    calibration_error: float


def load_splits(config: Settings) -> data.Splits:
    """Training, validation and test part, standardised by the training part."""
    return data.standardize(raw_splits(config))


def raw_splits(config: Settings) -> data.Splits:
    """The same parts as published."""
    if config.folds is not None:
        return folded(raw_splits(dataclasses.replace(config, folds=None, fold=0)), config)
    if config.fold:
        raise ValueError(f"--fold {config.fold} is one of --folds, which are not given")
    splits = data.load(config.dataset, data_dir=config.data_dir)
    if splits.test is None:
        fractions = (1 - config.validation - config.test, config.validation, config.test)
        return data.split(splits.train, fractions, seed=config.seed, stratify=config.stratify)
    if splits.validation is None and config.validation > 0:
        return data.hold_out(splits, config.validation, seed=config.seed, stratify=config.stratify)
    return splits


def folded(splits: data.Splits, config: Settings) -> data.Splits:
    """The parts of one fold: the others of the training and validation part, itself, and the test part."""
    assert config.folds is not None
    pool = together(splits)
    labels: Any = pool.y if config.stratify else None
    places = fold_of(np.arange(len(pool)), config.fold, config.folds, seed=config.seed, labels=labels)
    training, held_out = (np.asarray(part) for part in places)
    return splits._replace(train=pool.take(training), validation=pool.take(held_out))


def together(splits: data.Splits) -> data.Dataset:
    """What is no test part."""
    train, validation = splits.train, splits.validation
    if validation is None:
        return train
    x, y = (np.concatenate(both) for both in zip(train.arrays, validation.arrays, strict=True))
    return dataclasses.replace(train, x=x, y=y)


def build_model(config: Settings, classes: int) -> Layer:
    """The network, for so many classes; its dropout rate may be traced."""
    return models.build(config.model, classes, hidden=config.hidden, dropout=config.dropout)


def build_trainer(config: Settings, model: Layer, steps: int) -> tuple[Trainer, Schedule]:
    """The trainer and its learning rate by step; an epoch has ``steps`` of them.

    Learning rate, decay, penalties and label smoothing may be traced, as a search does.
    """
    if config.optimizer not in OPTIMIZERS:
        raise unknown_name("optimizer", config.optimizer, OPTIMIZERS)
    pair = config.learning_rate, config.decay
    if any(is_static_number(value) and not value > 0 for value in pair):
        shown = " and ".join(f"{value:g}" if is_static_number(value) else "a traced one" for value in pair)
        raise ValueError(f"learning_rate and decay must be positive, got {shown}")
    rate = optim.exponential_decay(config.learning_rate, steps, config.decay, staircase=True)
    penalties = [
        penalty(strength)
        for penalty, strength in ((regularizers.l1, config.l1), (regularizers.l2, config.l2))
        if not (is_static_number(strength) and strength == 0)
    ]
    trainer = train.trainer(
        model,
        partial(losses.softmax_cross_entropy, label_smoothing=config.label_smoothing),
        OPTIMIZERS[config.optimizer](rate),
        metrics={"accuracy": metrics.accuracy},
        regularizer=regularizers.combine(*penalties) if penalties else None,
    )
    return trainer, rate


def evaluate(
    model: Layer, params: Any, state: Any, part: data.Dataset
) -> tuple[Outcome, np.ndarray, np.ndarray]:
    """The outcome on a part of the data, the logits, and the confusion matrix."""
    logits = train.predict(model, params, state, part.x)
    labels = jnp.asarray(part.y)
    values = losses.softmax_cross_entropy(logits, labels)
    confusion = metrics.confusion_matrix(logits, labels, len(part.classes))
    bins = metrics.calibration_bins(logits, labels)
    outcome = Outcome(
        loss=float(values.mean()),
        accuracy=float(metrics.accuracy(logits, labels).mean()),
        macro_f1=float(metrics.f1(confusion)),
        calibration_error=float(metrics.expected_calibration_error(bins)),
    )
    return outcome, np.asarray(logits), np.asarray(confusion)


def run(config: Settings, *, resume: bool = False, callbacks: Iterable[Callback] = ()) -> Outcome:
    """One training run: everything from the data to the folder.

    The folder then has what ``fit`` writes (config.json, metrics.csv, metrics.jsonl, checkpoints/), model.npz
    with the parameters and model.json with what is needed to use them, result.json and three pictures.

    Args:
      config: all settings.
      resume: whether to go on with the run in its folder.
      callbacks: what ``fit`` tells of it besides.
    """
    if not 0 < config.test < 1:
        raise ValueError(f"test must be a share between 0 and 1, got {config.test:g}")
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"seed must be a whole number from 0 to 2**32 - 1, got {config.seed}")
    raw = raw_splits(config)
    splits = data.standardize(raw)
    assert splits.test is not None
    model = build_model(config, len(splits.train.classes))
    data.check_batch_size(config.batch_size, len(splits.train))
    steps = data.num_batches(len(splits.train), config.batch_size)
    trainer, rate = build_trainer(config, model, steps)
    folder = config.folder
    if not resume:
        train.create_run(folder, config, seed=config.seed, overwrite=config.overwrite)
    with _removed_if_refused(folder, not resume):
        ts, rows = train.fit(
            trainer,
            splits.train,
            epochs=config.epochs,
            key=jax.random.key(config.seed),
            batch_size=config.batch_size,
            validation=splits.validation,
            callbacks=[*callbacks, _rate_of(rate), *_trackers(config)],
            early_stopping=stopping_rule(config),
            guard=config.guard,
            run_dir=folder,
            resume=True,  # a folder in which nothing has run yet begins a run
            config=config,
            checkpoint_every=config.checkpoint_every,
        )
    return leave(folder, model, ts, rows, (raw, splits), sum(row["seconds"] for row in rows))


def leave(
    folder: Path,
    model: Layer,
    ts: TrainState,
    rows: Sequence[Mapping[str, Any]],
    parts: tuple[data.Splits, data.Splits],
    seconds: float,
) -> Outcome:
    """Writes what a run leaves at its end: the network, the outcome on the test part, and the pictures.

    Args:
      folder: the run's.
      model: the network.
      ts: the state at the end.
      rows: the history.
      parts: the data as published, and standardised.
      seconds: that training took.
    """
    raw, splits = parts
    assert splits.test is not None
    train.save_tree(folder / "model.npz", {"params": ts.params, "state": ts.state})
    write_card(folder, card_of(raw.train, splits.train))
    outcome, logits, confusion = evaluate(model, ts.params, ts.state, splits.test)
    draw(folder, rows, splits.test, logits, confusion)
    train.write_result(folder, {**outcome._asdict(), "test_examples": len(splits.test), "seconds": seconds})
    return outcome


@contextmanager
def _removed_if_refused(folder: Path, new: bool) -> Iterator[None]:
    """Removes a new folder where what it was given is refused before anything is computed."""
    try:
        yield
    except (ValueError, TypeError, ImportError):
        if new and not (folder / "metrics.csv").exists() and not saved_steps(folder / "checkpoints"):
            shutil.rmtree(folder)
        raise


def _rate_of(rate: Schedule) -> Callback:
    """Adds to each row the rate of the epoch's last step."""

    def callback(event: str, view: View) -> Mapping[str, Any] | None:
        return {"learning_rate": float(rate(view.state.step - 1))} if event == "epoch" else None

    return callback


def stopping_rule(config: Config) -> train.EarlyStopping | None:
    """The rule of --patience, or None."""
    if config.patience is None:
        return None
    return train.early_stopping("val_loss", patience=config.patience, restore_best=True)


def _trackers(config: Settings) -> Iterator[Callback]:
    """A callback for each tracker that the settings name."""
    for name in config.log:
        if name == "tensorboard":
            logger = record.tensorboard(config.folder / "tensorboard")
        elif name == "mlflow":
            logger = record.mlflow(config.dataset, name=config.name)
        else:
            logger = record.wandb(config.dataset.replace("/", "-"), name=config.name, dir=str(config.folder))
        yield record.log_to(logger, histograms=name == "tensorboard")
