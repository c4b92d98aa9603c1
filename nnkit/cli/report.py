"""What is shown of a run that has ended: three pictures in its folder, and a table on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nnkit import data
from nnkit.diagnose import plot_confusion, plot_curves, plot_examples

__all__ = ["draw", "print_table"]


def draw(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    test: data.Dataset,
    logits: np.ndarray,
    confusion: np.ndarray,
) -> None:
    """curves.png, confusion.png and mistakes.png: the test images of which the network is most wrongly sure."""
    assert test.normalization is not None
    plot_curves(rows, folder / "curves.png")
    plot_confusion(confusion, test.classes, folder / "confusion.png")
    plot_examples(
        test.normalization.invert(test.x),
        test.y,
        logits.argmax(axis=-1),
        np.asarray(jax.nn.softmax(logits)).max(axis=-1),
        folder / "mistakes.png",
        classes=test.classes,
    )


def print_table(title: str, rows: Mapping[str, Sequence[float]]) -> None:
    """A row of the numbers of an ``Outcome`` for each run, and below several their mean and deviation."""
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
