"""The tables of experiments/optimizers.py, as CSV files and on the terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from optimizers_paths import Walk
from optimizers_race import Summary, Sweep

from nnkit.train.files import write_atomically

__all__ = ["epoch_rows", "print_table", "race_rows", "rate_rows", "walk_rows", "write_rows"]


def walk_rows(walked: Mapping[str, Mapping[str, Walk]]) -> Iterator[dict[str, Any]]:
    """A row for each walk: where it ended, and how high above the minimum."""
    for surface, found in walked.items():
        for name, one in found.items():
            yield {
                "surface": surface,
                "optimizer": name,
                "learning_rate": one.rate,
                "steps": len(one.points) - 1,
                "x": float(one.points[-1, 0]),
                "y": float(one.points[-1, 1]),
                "height": float(one.values[-1]),
            }


def race_rows(rows: Mapping[str, Summary], sweeps: Mapping[str, Sweep]) -> Iterator[dict[str, Any]]:
    """A row for each optimizer: what the terminal shows, unrounded."""
    for name, row in rows.items():
        found = sweeps[name]
        counts = {"seeds": len(found.seeds), "trainings": found.diverged.size}
        yield {"optimizer": name, **row._asdict(), **counts, "diverged": int(found.diverged.sum())}


def epoch_rows(sweeps: Mapping[str, Sweep]) -> Iterator[dict[str, Any]]:
    """A row for each epoch of each seed at the chosen rate; epoch 0 is the start."""
    for name, found in sweeps.items():
        for i, seed in enumerate(found.seeds):
            for epoch in range(found.train_loss.shape[2]):
                at = found.chosen, i, epoch
                yield {"optimizer": name, "seed": seed, "epoch": epoch, **_measures(found, at)}


def rate_rows(sweeps: Mapping[str, Sweep]) -> Iterator[dict[str, Any]]:
    """A row for each training, as it was after the last epoch."""
    for name, found in sweeps.items():
        for rate, seed in np.ndindex(found.diverged.shape):
            yield {
                "optimizer": name,
                "learning_rate": float(found.rates[rate]),
                "seed": found.seeds[seed],
                **_measures(found, (rate, seed, -1)),
                "diverged": bool(found.diverged[rate, seed]),
            }


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """A CSV file with the columns of the first row; floats are written to the last bit."""
    rows = list(rows)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


def print_table(title: str, rows: Mapping[str, Summary]) -> None:
    """The race, the best test accuracy first."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in ("optimizer", "rate", "training loss", "test accuracy"):
        table.add_column(column, justify="left" if column == "optimizer" else "right", no_wrap=True)
    for name, row in sorted(rows.items(), key=lambda item: -item[1].test_accuracy):
        table.add_row(
            name,
            f"{row.learning_rate:.2g}",
            f"{row.train_loss:.2e} ± {row.train_loss_std:.0e}",
            f"{row.test_accuracy:.2%} ± {100 * row.test_accuracy_std:.2f}",
        )
    Console().print(table)


def _measures(found: Sweep, at: tuple[int, ...]) -> dict[str, float]:
    names = "train_loss", "validation_accuracy", "test_accuracy"
    return {name: float(getattr(found, name)[at]) for name in names}
