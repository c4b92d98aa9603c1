"""Shows what optimizers do: their walks on four functions, and their race on real images.

    python experiments/optimizers.py                                   # the bundled digits
    python experiments/optimizers.py --optimizers sgd momentum adam    # some of them
    python experiments/optimizers.py --dataset mnist --data-dir DIR    # a folder of IDX files

``runs/optimizers/`` then holds

    paths.png, paths.csv       walks on a narrow valley, a saddle, Rosenbrock's and Beale's function
    beale.gif                  the walks on Beale's function as an animation
    momentum.png               momentum 0.2, 0.7, 0.9 and 0.99 on the narrow valley
    race.png, race.csv         training loss by epoch and test accuracy, each optimizer at the learning
    race_epochs.csv            rate with the best validation accuracy, mean and spread over seeds
    rates.png, rates.csv       learning rate against final training loss: every training, diverged ones too
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mnist
from optimizers_paths import SURFACES, Walk, momentum_walks, walks
from optimizers_plots import animate, plot_momentum, plot_paths, plot_race, plot_rates
from optimizers_race import Summary, Sweep, learning_rates, summary, sweep
from optimizers_tables import epoch_rows, print_table, race_rows, rate_rows, walk_rows, write_rows

from nnkit import data, models, optim, train
from nnkit.checks import unknown_name
from nnkit.types import GradientTransformation

OPTIMIZERS: dict[str, Callable[[Any], GradientTransformation]] = {
    "sgd": optim.sgd,
    "momentum": lambda rate: optim.momentum(rate, 0.9),
    "nesterov": lambda rate: optim.nesterov(rate, 0.9),
    "adagrad": lambda rate: optim.adagrad(rate, initial_accumulator_value=0.0),
    "adadelta": optim.adadelta,
    "rmsprop": optim.rmsprop,
    "adam": optim.adam,
    "adamw": lambda rate: optim.adamw(rate, weight_decay=1e-2),
    "nadam": optim.nadam,
    "nadamw": lambda rate: optim.nadamw(rate, weight_decay=1e-2),
    "adamax": optim.adamax,
    "amsgrad": optim.amsgrad,
    "radam": optim.radam,
    "lion": lambda rate: optim.lion(rate, weight_decay=0.0),
    "lamb": optim.lamb,
    "muon": optim.muon,
}
WALKERS = ("sgd", "momentum", "nesterov", "adagrad", "rmsprop", "adam", "nadam", "lion")
MOMENTUM_RATE, MOMENTUM_STEPS = 0.01, 300


@dataclasses.dataclass(frozen=True)
class Config:
    """Compare optimizers on four functions and on real images.

    Every optimizer is trained at every rate of one grid with every seed. All of that is in rates.png;
    the race is run at the rate with the best mean validation accuracy.
    """

    dataset: str = "digits"
    """digits (bundled); mnist, fashion_mnist, ... with --data-dir; or any set of TensorFlow Datasets."""
    data_dir: Path | None = None
    """A folder of IDX files (train-images-idx3-ubyte, gzipped or not), or TensorFlow Datasets' own."""
    optimizers: tuple[str, ...] = tuple(OPTIMIZERS)
    """Which ones. The walks are taken by those of the lecture, nadam and lion."""
    hidden: tuple[int, ...] = (64,)
    """Widths of the hidden layers."""
    epochs: int | None = None
    """Passes over the training part. [3; digits 20]"""
    batch_size: int | None = None
    """Examples in a step. [128; digits 32]"""
    rates: tuple[float, float] = (1e-5, 100.0)
    """The lowest and the highest learning rate of the grid, for all optimizers."""
    rates_per_decade: int | None = None
    """How fine the grid is. [1; digits 3]"""
    repeats: int | None = None
    """How many seeds, from --seed up; a seed decides initial parameters and order. [3; digits 5]"""
    seed: int = 0
    """The first seed; it also decides the split."""
    validation: float | None = None
    """Share of the examples held out for validation. [0.1 of the training set; digits 0.2]"""
    test: float = 0.2
    """Share held out for the test, where a data set has no test set of its own."""
    path_steps: int | None = None
    """Steps of every walk; by default as many as suit the surface, 60 to 300."""
    frames: int = 48
    """Pictures in the animation, which ends with one more second of the last."""
    name: str = "optimizers"
    """The folder in --runs."""
    runs: Path = Path("runs")
    """Where run folders go."""
    overwrite: bool = False
    """Replace a run of the same name."""


@dataclasses.dataclass(frozen=True)
class Settings(Config):
    """A configuration with every setting spelled out."""

    epochs: int = 3
    batch_size: int = 128
    rates_per_decade: int = 1
    repeats: int = 3
    validation: float = 0.1


DIGITS = {"epochs": 20, "batch_size": 32, "rates_per_decade": 3, "repeats": 5, "validation": 0.2}


def resolved(config: Config) -> Settings:
    """The configuration with what was not given taken from the data set.

    Raises:
      ValueError: for a setting that no run could be made with.
    """
    dataset = config.dataset.lower().replace("-", "_")
    given = {
        f.name: value for f in dataclasses.fields(config) if (value := getattr(config, f.name)) is not None
    }
    full = Settings(**{**(DIGITS if dataset == "digits" else {}), **given, "dataset": dataset})
    for name in full.optimizers:
        if name not in OPTIMIZERS:
            raise unknown_name("optimizer", name, OPTIMIZERS)
    if not full.optimizers or len(set(full.optimizers)) < len(full.optimizers):
        raise ValueError(f"optimizers must be different names, got {list(full.optimizers)}")
    least = {"epochs": 1, "repeats": 1, "path_steps": 1, "frames": 1, "batch_size": 1}
    for name, lowest in least.items():
        value = getattr(full, name)
        if value is not None and value < lowest:
            raise ValueError(f"{name} must be at least {lowest}, got {value}")
    if not 0 < full.test < 1 or not 0 < full.validation < 1:
        raise ValueError(
            f"test and validation must be shares between 0 and 1, got {full.test:g} and {full.validation:g}"
        )
    if not 0 <= full.seed <= 2**31 - full.repeats:
        raise ValueError(f"seed must be a whole number from 0 to 2**31 - repeats, got {full.seed}")
    learning_rates(*full.rates, full.rates_per_decade)
    return full


def load_splits(config: Settings) -> data.Splits:
    """Training, validation and test part, standardised by the training part: those of mnist.py."""
    return mnist.load_splits(
        mnist.Settings(
            dataset=config.dataset,
            data_dir=config.data_dir,
            validation=config.validation,
            test=config.test,
            seed=config.seed,
        )
    )


def run(config: Settings) -> dict[str, Summary]:
    """Everything from the data to the folder; the rows of the table come back."""
    started = time.perf_counter()
    splits = load_splits(config)
    data.check_batch_size(config.batch_size, len(splits.train))
    classes = len(splits.train.classes)
    model = models.mlp(classes, hidden=config.hidden)
    folder = train.create_run(config.runs / config.name, config, seed=config.seed, overwrite=config.overwrite)

    walkers = {name: OPTIMIZERS[name] for name in config.optimizers if name in WALKERS}
    if walkers:
        show_walks(walkers, config, folder)
    valley = SURFACES["narrow valley"]
    steps = MOMENTUM_STEPS if config.path_steps is None else config.path_steps
    plot_momentum(momentum_walks(valley, MOMENTUM_RATE, steps), valley, folder / "momentum.png")
    print(f"walks: {time.perf_counter() - started:.0f} s", flush=True)

    rates = learning_rates(*config.rates, config.rates_per_decade)
    seeds = range(config.seed, config.seed + config.repeats)
    sweeps: dict[str, Sweep] = {}
    for name in config.optimizers:
        before = time.perf_counter()
        sweeps[name] = sweep(
            OPTIMIZERS[name],
            model,
            splits,
            rates,
            seeds,
            epochs=config.epochs,
            batch_size=config.batch_size,
        )
        write_rows(folder / "rates.csv", rate_rows(sweeps))  # also there if the rest is interrupted
        row = summary(sweeps[name])
        edge = ", the edge of the grid" if sweeps[name].chosen in (0, len(rates) - 1) else ""
        print(
            f"{name}: {len(rates) * len(seeds)} trainings in {time.perf_counter() - before:.1f} s, "
            f"{sweeps[name].diverged.sum()} diverged, best at {row.learning_rate:.2g}{edge}",
            flush=True,
        )
    rows = {name: summary(found) for name, found in sweeps.items()}
    write_rows(folder / "race.csv", race_rows(rows, sweeps))
    write_rows(folder / "race_epochs.csv", epoch_rows(sweeps))
    plot_race(sweeps, folder / "race.png")
    plot_rates(sweeps, folder / "rates.png", classes=classes)
    train.write_result(
        folder,
        {
            "race": {name: row._asdict() for name, row in rows.items()},
            "diverged": {name: int(found.diverged.sum()) for name, found in sweeps.items()},
            "train_examples": len(splits.train),
            "seconds": time.perf_counter() - started,
        },
    )
    return rows


def show_walks(
    walkers: Mapping[str, Callable[[Any], GradientTransformation]], config: Settings, folder: Path
) -> None:
    walked: dict[str, dict[str, Walk]] = {
        name: walks(surface, dict(walkers), config.path_steps) for name, surface in SURFACES.items()
    }
    write_rows(folder / "paths.csv", walk_rows(walked))
    plot_paths(walked, folder / "paths.png")
    animate(walked["Beale"], SURFACES["Beale"], folder / "beale.gif", frames=config.frames)


def main(config: Config) -> int:
    try:
        full = resolved(config)
        print(
            f"{full.dataset}, hidden layers {full.hidden}: {full.epochs} epochs, batches of {full.batch_size}, "
            f"rates {full.rates[0]:g} to {full.rates[1]:g}, {full.rates_per_decade} to a decade, "
            f"{full.repeats} seeds",
            flush=True,
        )
        rows = run(full)
    except KeyboardInterrupt:
        print(f"\ninterrupted: what was finished is in {config.runs / config.name}", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print_table(f"{full.dataset}: mean and standard deviation over {full.repeats} seeds", rows)
    print(f"figures and tables are in {full.runs / full.name}")
    return 0


if __name__ == "__main__":
    try:
        import tyro
    except ImportError:
        sys.exit("the command line needs tyro: pip install 'nnkit[experiments]'")
    sys.exit(main(tyro.cli(Config, description=__doc__)))
