"""``nnkit predict``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np

from nnkit import train
from nnkit.cli.images import read_images
from nnkit.cli.trained import load_run

__all__ = ["Predict"]


@dataclasses.dataclass(frozen=True)
class Predict:
    """Say what is on images: the label, and the probability that the network gives it.

    Each image is brought to the network's size and colours, and scaled as its training images were.
    """

    run: Path
    """The run's folder."""
    files: tuple[Path, ...]
    """png, jpg, or npy: uint8 or floats from 0 to 1, one image or several."""
    top: int = 3
    """How many of the likeliest labels are shown."""
    invert: bool = False
    """Take black for white: MNIST's figures are white on black, and ink on paper is not."""
    json: bool = False
    """Print a list of objects with file, label, confidence and all probabilities."""

    def __call__(self) -> int:
        if self.top < 1:
            raise ValueError(f"top must be at least 1, got {self.top}")
        if not self.files:
            raise ValueError("predict needs an image: nnkit predict RUN FILE ...")
        trained = load_run(self.run)
        images = [
            found for path in self.files for found in read_images(path, trained.card, invert=self.invert)
        ]
        x = np.stack([pixels for _, pixels in images])
        logits = train.predict(trained.model, trained.params, trained.state, x, batch_size=min(1000, len(x)))
        shares = np.asarray(jax.nn.softmax(logits), np.float64)
        names = [name for name, _ in images]
        if self.json:
            print(json.dumps(_objects(names, shares, trained.card.classes), indent=1))
        else:
            _print(names, shares, trained.card.classes, self.top)
        return 0


def _objects(names: list[str], shares: np.ndarray, classes: tuple[str, ...]) -> list[dict[str, object]]:
    return [
        {
            "file": name,
            "label": classes[int(row.argmax())],
            "confidence": float(row.max()),
            "probabilities": dict(zip(classes, row.tolist(), strict=True)),
        }
        for name, row in zip(names, shares, strict=True)
    ]


def _print(names: list[str], shares: np.ndarray, classes: tuple[str, ...], top: int) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("file", "label", "confidence", *(["then"] if top > 1 else []), box=SIMPLE_HEAD)
    table.columns[2].justify = "right"
    for name, row in zip(names, shares, strict=True):
        first, *others = np.argsort(-row, kind="stable")[:top]
        then = [", ".join(f"{classes[i]} {row[i]:.2%}" for i in others)] if top > 1 else []
        cells = [name, classes[first], f"{row[first]:.2%}", *then]
        table.add_row(*(Text(cell) for cell in cells))  # names are no markup
    Console().print(table)
