"""A run that has ended, ready for use without its data: the parameters, and what inputs must look like."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnkit import data, models, train
from nnkit.cli.settings import Settings, settings_from
from nnkit.train.files import write_atomically
from nnkit.types import Layer

__all__ = [
    "Card",
    "Trained",
    "card_of",
    "load_parameters",
    "load_run",
    "read_card",
    "read_record",
    "settings_of_run",
    "write_card",
]


@dataclasses.dataclass(frozen=True)
class Card:
    """What is to be known of a network beside its parameters: model.json.

    Attributes:
      classes: the labels' names.
      shape: of an input: (height, width, channels).
      top: the largest value in the training images: white.
      mean: what is taken off each channel of an image ...
      std: ... and what it is then divided by.
    """

    classes: tuple[str, ...]
    shape: tuple[int, ...]
    top: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def normalization(self) -> data.Normalization:
        """The map from an image with values up to ``top`` to the network's input."""
        return data.Normalization(np.array(self.mean), np.array(self.std))


def card_of(raw: data.Dataset, standardized: data.Dataset) -> Card:
    """The card of a network that was trained on a part, given as published and as standardised."""
    normalization = standardized.normalization
    assert normalization is not None
    return Card(
        raw.classes,
        raw.x.shape[1:],
        float(raw.x.max()),
        tuple(normalization.mean.tolist()),
        tuple(normalization.std.tolist()),
    )


def write_card(folder: Path, card: Card) -> None:
    """Writes model.json."""
    text = json.dumps(dataclasses.asdict(card), indent=1, allow_nan=False)
    write_atomically(folder / "model.json", text.encode() + b"\n")


def read_card(folder: Path) -> Card:
    """Reads model.json."""
    path = folder / "model.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        lists = {name: tuple(found.pop(name)) for name in ("classes", "shape", "mean", "std")}
        return Card(**lists, **found)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"no model.json in {str(folder)!r}: the run has not ended ('nnkit resume {folder}' goes on with it), "
            "or was made by an older version"
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{str(path)!r} is damaged ({error}): repeat the run") from None


def read_record(folder: Path, name: Literal["config.json", "result.json"]) -> dict[str, Any]:
    """What is in one of a run's records.

    Raises:
      FileNotFoundError, ValueError: there is none, or it holds no object of names; the message names it.
    """
    path = folder / name
    try:
        found = train.read_config(folder) if name == "config.json" else train.read_result(folder)
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is damaged ({error}): repeat the run") from None
    if not isinstance(found, dict):
        raise ValueError(f"{str(path)!r} is damaged (a {type(found).__name__}, no object): repeat the run")
    return found


def settings_of_run(folder: Path) -> Settings:
    """The settings with which a run was made; its folder is where it is now, wherever it was then."""
    found = read_record(folder, "config.json").get("config")
    if not isinstance(found, dict):
        raise ValueError(f"{str(folder / 'config.json')!r} has no settings under 'config': it is of no run")
    missing = {"dataset", "model", "hidden"} - set(found)
    if missing:
        raise ValueError(
            f"{folder} is no run of 'nnkit train': its configuration has no {', '.join(sorted(missing))}"
        )
    settings = Settings(**settings_from(found, f"{folder}/config.json"))
    folder = folder if folder.name else folder.absolute()
    return dataclasses.replace(settings, runs=folder.parent, name=folder.name)


class Trained(NamedTuple):
    """A network with its parameters."""

    card: Card
    model: Layer
    params: Any
    state: Any


def load_run(folder: Path) -> Trained:
    """The network of a run that has ended.

    Raises:
      FileNotFoundError: the folder is no run, or it has not ended.
      DamagedFileError: its parameters are not what was saved.
      ValueError: they are those of another network.
    """
    config, card = settings_of_run(folder), read_card(folder)
    model = models.build(config.model, len(card.classes), hidden=config.hidden, dropout=config.dropout)
    return Trained(card, model, *load_parameters(folder, model, card.shape))


def load_parameters(folder: Path, model: Layer, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """The parameters and state in model.npz, those of ``model`` for inputs of ``shape``."""
    like = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *shape), jnp.float32))
    saved = train.load_tree(folder / "model.npz", {"params": like[0], "state": like[1]})
    return saved["params"], saved["state"]
