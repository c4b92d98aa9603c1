"""``nnkit export``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from nnkit import interop
from nnkit.cli.trained import Card, load_run
from nnkit.types import Array, Layer

__all__ = ["Export", "on_images"]


@dataclasses.dataclass(frozen=True)
class Export:
    """Write a run's network as a program that needs JAX and not nnkit, with the parameters beside it.

    It takes images (n, height, width, channels) as float32 from 0, black, to 1, white, any number of them, and
    gives the logits of the classes, whose names are in the run's model.json.
    """

    run: Path
    """The run's folder."""
    folder: Path
    """Where the program goes: a new folder, or one with an earlier export."""
    platforms: tuple[Literal["cpu", "cuda", "rocm", "tpu"], ...] = ("cpu", "cuda", "tpu")
    """Where it shall run."""

    def __call__(self) -> int:
        trained = load_run(self.run)
        x = jax.ShapeDtypeStruct((1, *trained.card.shape), jnp.float32)
        model = on_images(trained.model, trained.card)
        interop.export_predict(model, trained.params, trained.state, x, self.folder, platforms=self.platforms)
        print(f"{self.folder}: README.md there says how it is run")
        return 0


def on_images(model: Layer, card: Card) -> Layer:
    """The network for images from 0 to 1, its parameters as they are."""
    normalization = card.normalization
    factor = np.divide(card.top, normalization.std, out=np.zeros(len(card.std)), where=normalization.std > 0)
    shift = np.divide(-normalization.mean, normalization.std, out=np.zeros(len(card.std)), where=factor > 0)

    def apply(params: Any, state: Any, x: Array, *, key: Array | None = None, train: bool) -> Any:
        x = x * factor.astype(np.float32) + shift.astype(np.float32)
        return model.apply(params, state, x, key=key, train=train)

    return Layer(model.init, apply, model.name)
