"""Which sampler finds good hyper-parameters with few trials: all of them on one budget, over several seeds.

    python experiments/search.py                                              # the bundled digits
    python experiments/search.py --datasets digits fashion_mnist --data-dir DIR
    python experiments/search.py --samplers random tpe --repeats 20 --name tpe

A search trains a small network at a few dozen settings of learning rate, weight decay and dropout. All trials of all
searches have the same split and the same training seed, so that every sampler searches the same function, and the
spread over the sampler's seeds is the sampler's own. Selection is by the validation loss after the last
epoch; the test part is used once a search, for the chosen trial.

``runs/search/result.json`` has every search, written when it is done: called again, the script does what is
missing. ``searches.md`` and ``search-samplers.png`` are the tables and the figure; ``--report PAGE`` puts them between
the lines ``<!-- tables -->`` and ``<!-- end of tables -->`` of a Markdown page, the figure into ``images/`` beside it.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from search_report import plot, put_into, tables

from nnkit import data, losses, models, optim, search, train
from nnkit.checks import unknown_name
from nnkit.search.samplers import SAMPLERS
from nnkit.train.runs import plain, read_config, read_result

SPACE = search.as_space(
    {
        "lr": search.log_uniform(1e-5, 1.0),
        "weight_decay": search.log_uniform(1e-6, 1.0),
        "dropout": search.uniform(0, 0.6),
    }
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Compare samplers on the same budget over several seeds.

    A folder that has searches of the same settings is gone on with.
    """

    datasets: tuple[str, ...] = ("digits",)
    """digits (bundled); mnist, fashion_mnist with --data-dir."""
    data_dir: Path | None = None
    """A folder of IDX files, for all data sets but digits."""
    samplers: tuple[str, ...] = tuple(SAMPLERS)
    """Which ones. "gp" needs PyTorch."""
    repeats: int = 10
    """Searches of each sampler, with the sampler's seeds 0, 1, ..."""
    trials: int = 36
    """Trainings of a search."""
    batch: int = 4
    """How many trials are asked for together, none of which knows of another's result."""
    hidden: tuple[int, ...] = (64,)
    """Widths of the hidden layers."""
    epochs: int | None = None
    """Passes over the training part. [2; digits 10]"""
    examples: int = 10_000
    """Training examples, and half as many for validation; of the digits there are 1,078 and 360."""
    batch_size: int = 64
    """Examples in a step."""
    name: str = "search"
    """The folder in --runs."""
    runs: Path = Path("runs")
    """Where run folders go."""
    report: Path | None = None
    """A Markdown page into which tables and figure are put."""


class Task(NamedTuple):
    """What is searched on a data set: the training function, and what the chosen trial is tested with."""

    train_fn: Callable[..., Any]
    accuracy: Callable[[Any], float]
    """Of a trained state on the test part."""
    examples: int
    epochs: int


class Found(NamedTuple):
    """One search."""

    seed: int
    hparams: dict[str, Any]
    """The chosen trial's."""
    validation_loss: float
    test_accuracy: float
    so_far: list[float]
    """The best validation loss after each trial, infinite as long as all have diverged."""
    diverged: int
    seconds: float
    """Of the whole search, without reading the programs."""
    choosing: float
    """Of these, the seconds until the next batch was drawn and recorded."""


Results = dict[str, dict[str, list[Found]]]
"""By data set and sampler."""


def task_of(dataset: str, config: Config) -> Task:
    """The data set's training function, whose data are standardised by the training part."""
    if dataset == "digits":
        parts = data.split(data.load("digits").train, (0.6, 0.2, 0.2), seed=0, stratify=True)
    else:
        whole = data.load(dataset, data_dir=config.data_dir)
        if whole.test is None:
            raise ValueError(f"{dataset!r} has no test part: take digits, mnist or fashion_mnist")
        share = min(config.examples / len(whole.train), 0.6)
        parts = data.split(whole.train, (share, share / 2, 1 - 1.5 * share), seed=0, stratify=True)
        parts = parts._replace(test=whole.test)
    training, held_out, test = data.standardize(parts)
    assert held_out is not None
    assert test is not None
    data.check_batch_size(config.batch_size, len(training))
    classes = len(training.classes)
    epochs = config.epochs or (10 if dataset == "digits" else 2)
    labels, images = test.y, test.x  # for the function below alone

    def train_fn(key: Any, hparams: Any) -> Any:
        model = models.mlp(classes, hidden=config.hidden, dropout=hparams["dropout"])
        optimizer = optim.adamw(hparams["lr"], weight_decay=hparams["weight_decay"])
        trainer = train.trainer(model, losses.softmax_cross_entropy, optimizer)
        return train.run(
            trainer, key, training, epochs=epochs, batch_size=config.batch_size, validation=held_out
        )

    tested = models.mlp(
        classes, hidden=config.hidden, dropout=0.0
    )  # which makes no difference to predictions

    def accuracy(ts: Any) -> float:
        logits = train.predict(tested, ts.params, ts.state, images)
        return float(np.mean(np.argmax(logits, axis=-1) == labels))

    return Task(train_fn, accuracy, len(training), epochs)


class Clock:
    """A callback of ``sweep`` that adds up how long the sampler and the record take before each batch."""

    def __init__(self) -> None:
        self.seconds, self.choosing, self._last = 0.0, 0.0, 0.0

    def __call__(self, event: str, view: Any) -> None:
        if event == "batch":
            self.choosing += view.seconds - self._last
        self._last = self.seconds = view.seconds


def searched(task: Task, sampler: str, seed: int, config: Config) -> Found:
    """One search, and the test of what it chose."""
    clock = Clock()
    study = search.sweep(
        task.train_fn,
        SPACE,
        sampler=sampler,
        trials=config.trials,
        batch=config.batch,
        sampler_seed=seed,
        callbacks=clock,
        progress=False,
    )
    tested = search.final_test(
        study,
        lambda trial: {"accuracy": task.accuracy(search.retrain(study, task.train_fn, trial.number)[0])},
    )
    values = [trial.value if trial.state == "complete" else np.inf for trial in study.trials]
    best = study.best
    assert best.value is not None
    return Found(
        seed=seed,
        hparams=best.hparams,
        validation_loss=best.value,
        test_accuracy=tested.numbers["accuracy"],
        so_far=np.minimum.accumulate(np.array(values, float)).tolist(),
        diverged=sum(trial.state == "diverged" for trial in study.trials),
        seconds=clock.seconds,
        choosing=clock.choosing,
    )


def check(config: Config) -> None:
    """Raises for settings with which nothing could be compared."""
    for name in config.samplers:
        if name not in SAMPLERS:
            raise unknown_name("sampler", name, SAMPLERS)
    for name in ("repeats", "trials", "batch", "batch_size", "examples"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
    if config.epochs is not None and config.epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {config.epochs}")
    if not config.samplers or not config.datasets:
        raise ValueError("there must be a sampler and a data set")


# What may differ between two calls that work on one folder.
_FREE = ("datasets", "data_dir", "samplers", "repeats", "name", "runs", "report")


def begun(config: Config) -> tuple[Path, Results]:
    """The folder, and what is there of the same settings.

    Raises:
      ValueError: what is there was made with others.
    """
    folder = config.runs / config.name
    if not (folder / "config.json").exists():
        return train.create_run(folder, config), {}
    now, then = (
        {name: value for name, value in settings.items() if name not in _FREE}
        for settings in (plain(config, "config"), read_config(folder)["config"])
    )
    if differing := [name for name in now if now[name] != then.get(name)]:
        name = differing[0]
        raise ValueError(
            f"{folder} has searches with {name}={then.get(name)}, and this is {now[name]}: pass another --name"
        )
    if not (folder / "result.json").exists():
        return folder, {}
    return folder, {
        dataset: {
            sampler: [Found(**{**one, "so_far": [float(value) for value in one["so_far"]]}) for one in found]
            for sampler, found in by_sampler.items()
        }
        for dataset, by_sampler in read_result(folder).items()
    }


def run(config: Config) -> Results:
    """All searches that are missing; the seeds one after the other, so that all samplers get equally far."""
    folder, results = begun(config)
    for dataset in config.datasets:
        task = task_of(dataset, config)
        there = results.setdefault(dataset, {})
        for seed in range(config.repeats):
            for sampler in config.samplers:
                if any(one.seed == seed for one in there.setdefault(sampler, [])):
                    continue
                before = time.perf_counter()
                found = searched(task, sampler, seed, config)
                there[sampler].append(found)
                train.write_result(folder, results)
                print(
                    f"{dataset}, {sampler}, seed {seed}: validation loss {found.validation_loss:.4f}, "
                    f"{time.perf_counter() - before:.1f} s",
                    flush=True,
                )
    plot(results, folder / "search-samplers.png")
    return results


def main(config: Config) -> int:
    try:
        check(config)
        results = run(config)
    except KeyboardInterrupt:
        print(f"\ninterrupted: what was finished is in {config.runs / config.name}", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    folder = config.runs / config.name
    text = tables(results)
    (folder / "searches.md").write_text(text)
    print("\n" + text)
    print(f"the figure is {folder / 'search-samplers.png'}")
    if config.report is not None:
        put_into(config.report, text, folder / "search-samplers.png")
        print(f"{config.report} has the tables and the figure")
    return 0


if __name__ == "__main__":
    try:
        import tyro
    except ImportError:
        sys.exit("the command line needs tyro: pip install 'nnkit[experiments]'")
    given = tyro.cli(Config, description=__doc__)
    # Each sweep traces its program anew, and all have the same: compiled once, it is read afterwards.
    jax.config.update("jax_compilation_cache_dir", str(given.runs / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    sys.exit(main(given))
