"""Whether dropout and batch normalisation do on MNIST what their papers claim.

    python experiments/claims.py --data-dir DIR         # a folder of MNIST's IDX files
    python experiments/claims.py --dataset digits       # the bundled digits, in seconds

Dropout (Srivastava et al. 2014): a network that is wide for its data errs less on data that it has not seen. Batch
normalisation (Ioffe & Szegedy 2015): the loss falls faster, and rates are usable that are too high without.
Each number is the mean of several seeds; the tables are printed, the curves go to claims-<dataset>.png.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from uncertainty import table

from nnkit import data, initializers, layers, losses, metrics, optim, train
from nnkit.types import Layer


@dataclasses.dataclass(frozen=True)
class Config:
    """Dropout and batch normalisation, each with and without."""

    dataset: str = "mnist"
    """mnist or fashion_mnist, with --data-dir; digits (bundled)."""
    data_dir: Path | None = None
    """A folder of IDX files."""
    examples: int = 5000
    """Training examples; as many are held out for validation, if there are."""
    hidden: tuple[int, ...] = (512, 512)
    """Widths of the hidden layers."""
    dropout: float = 0.5
    """The probability of dropping a hidden unit; of an input it is 0.2, as in the paper."""
    dropout_epochs: int = 40
    """Passes with and without dropout, by Adam at 1e-3 times 0.93 after each."""
    rates: tuple[float, ...] = (0.03, 0.3, 3.0)
    """Rates of plain SGD with and without batch normalisation."""
    norm_epochs: int = 5
    """Passes with and without batch normalisation."""
    batch_size: int = 100
    """Examples in a step."""
    seeds: int = 3
    """Runs of each kind."""
    out: Path = Path("runs/claims")
    """Where the figure goes."""


def network(
    classes: int, hidden: tuple[int, ...], *, dropout: float | None = None, normalise: bool = False
) -> Layer:
    """Dense layers with ReLU, with dropout or with batch normalisation."""
    body: list[Layer] = [layers.flatten]
    if dropout is not None:
        body.append(layers.dropout(0.2))
    for features in hidden:
        body.append(layers.dense(features, kernel_init=initializers.he_normal(), use_bias=not normalise))
        body += [layers.batch_norm(momentum=0.9)] if normalise else []
        body.append(layers.relu)
        body += [layers.dropout(dropout)] if dropout is not None else []
    return layers.serial(*body, layers.dense(classes))


def parts(config: Config) -> tuple[data.Dataset, data.Dataset]:
    """Training and validation part, both from the training set, standardised by the training part."""
    whole = data.load(config.dataset, data_dir=config.data_dir).train
    few = min(config.examples, len(whole) // 2) / len(whole)
    split = data.split(whole, (few, few, 1 - 2 * few), seed=0, stratify=True)
    split = data.standardize(split)
    assert split.validation is not None
    return split.train, split.validation


Curves = dict[str, np.ndarray]
"""By metric: (seeds, epochs)."""


def runs(
    model: Layer, optimizer: Any, epochs: int, config: Config, sets: tuple[data.Dataset, data.Dataset]
) -> Curves:
    """The history of each seed. A loss that has become NaN stays in it."""
    trainer = train.trainer(
        model, losses.softmax_cross_entropy, optimizer, metrics={"accuracy": metrics.accuracy}
    )
    histories = []
    for seed in range(config.seeds):
        _, history = train.fit(
            trainer,
            sets[0],
            epochs=epochs,
            key=jax.random.key(seed),
            batch_size=config.batch_size,
            validation=sets[1],
            progress=False,
        )
        histories.append(history)
    names = ("loss", "accuracy", "val_loss", "val_accuracy")
    return {name: np.array([[row[name] for row in history] for history in histories]) for name in names}


def error(curves: Curves, epoch: int = -1, part: str = "val_") -> str:
    """The error after an epoch, in per cent: mean and standard deviation over seeds."""
    values = 100 * (1 - curves[f"{part}accuracy"][:, epoch])
    return f"{values.mean():.2f} ± {values.std(ddof=1):.2f}" if len(values) > 1 else f"{values.mean():.2f}"


def plot(dropping: dict[str, Curves], norming: dict[str, Curves], path: Path) -> None:
    """Validation error of the two with and without dropout, loss of those with and without normalisation."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, curves in dropping.items():
        values = 100 * (1 - curves["val_accuracy"])
        epochs = np.arange(1, values.shape[1] + 1)
        left.plot(epochs, values.mean(0), label=name)
        left.fill_between(epochs, values.min(0), values.max(0), alpha=0.2)
    left.set(xlabel="epoch", ylabel="validation error, %", title="dropout", yscale="log")
    for i, (name, curves) in enumerate(norming.items()):
        values = np.minimum(np.nan_to_num(curves["val_loss"], nan=math.inf), 3.0)
        style = "-" if name.startswith("with ") else "--"
        epochs = np.arange(1, values.shape[1] + 1)
        right.plot(epochs, values.mean(0), style, color=f"C{i // 2}", label=name)
    right.set(
        xlabel="epoch", ylabel="validation loss, at most 3", title="batch normalisation, SGD", yscale="log"
    )
    for axis in (left, right):
        axis.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def main(config: Config) -> int:
    try:
        if config.seeds < 1 or config.examples < config.batch_size:
            raise ValueError(
                f"there must be a seed and examples for one batch, got seeds={config.seeds}, "
                f"examples={config.examples} and batch_size={config.batch_size}"
            )
        sets = parts(config)
        classes = len(sets[0].classes)
        steps = data.num_batches(len(sets[0]), config.batch_size)
        adam = optim.adam(optim.exponential_decay(1e-3, steps, 0.93, staircase=True))
        dropping = {
            f"{'with' if rate else 'without'} dropout": runs(
                network(classes, config.hidden, dropout=rate),
                adam,
                config.dropout_epochs,
                config,
                sets,
            )
            for rate in (config.dropout, None)
        }
        norming = {
            f"{'with' if normalise else 'without'} batch norm, rate {rate:g}": runs(
                network(classes, config.hidden, normalise=normalise),
                optim.sgd(rate),
                config.norm_epochs,
                config,
                sets,
            )
            for rate in config.rates
            for normalise in (True, False)
        }
    except (ValueError, TypeError, OSError, ImportError) as wrong:
        print(f"error: {wrong}", file=sys.stderr)
        return 1
    print(f"{config.dataset}: {len(sets[0])} examples, {len(sets[1])} for validation, {config.seeds} seeds\n")
    print(
        table(
            ["", "validation error, %", "training error, %"],
            [[name, error(curves), error(curves, part="")] for name, curves in dropping.items()],
        )
    )
    print(
        "\n"
        + table(
            ["", "validation error, %, after 1 epoch", f"after {config.norm_epochs}"],
            [[name, error(curves, 0), error(curves)] for name, curves in norming.items()],
        )
    )
    path = config.out / f"claims-{config.dataset}.png"
    plot(dropping, norming, path)
    print(f"\nthe figure is {path}")
    return 0


if __name__ == "__main__":
    try:
        import tyro
    except ImportError:
        sys.exit("the command line needs tyro: pip install 'nnkit[experiments]'")
    sys.exit(main(tyro.cli(Config, description=__doc__)))
