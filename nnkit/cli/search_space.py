"""Which settings of ``nnkit train`` a search can vary, and a configuration with a trial's values in it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from nnkit import models
from nnkit.checks import is_static_number, unknown_name
from nnkit.cli.recipe import OPTIMIZERS, build_model
from nnkit.cli.settings import Config, Settings, resolved
from nnkit.search.dimension import Dimension
from nnkit.search.parse import parse_space
from nnkit.search.space import Space

__all__ = ["SEARCHED", "read_space", "settings_of_trial"]


class Searched(NamedTuple):
    """One setting that can be searched: its field of ``Config``, whether it may be traced, and its range."""

    field: str
    traced: bool
    low: float = -math.inf
    high: float = math.inf
    low_too: bool = True
    high_too: bool = True
    names: tuple[str, ...] = ()


SEARCHED: dict[str, Searched] = {
    "learning_rate": Searched("learning_rate", True, 0, low_too=False),
    "lr": Searched("learning_rate", True, 0, low_too=False),
    "decay": Searched("decay", True, 0, low_too=False),
    "l1": Searched("l1", True, 0),
    "l2": Searched("l2", True, 0),
    "dropout": Searched("dropout", True, 0, 1, high_too=False),
    "label_smoothing": Searched("label_smoothing", True, 0, 1),
    "batch_size": Searched("batch_size", False, 1),
    "epochs": Searched("epochs", False, 1),
    "width": Searched("hidden", False, 1),
    "depth": Searched("hidden", False, 1),
    "hidden": Searched("hidden", False, 1),
    "model": Searched("model", False, names=tuple(models.MODELS)),
    "optimizer": Searched("optimizer", False, names=tuple(OPTIMIZERS)),
}
"""By its name in --space. The numbers that are traced run together in one program; of the others each
combination has a program of its own."""


def read_space(text: str, config: Config) -> Space:
    """The space in a text, checked against the settings that stay as they are.

    Args:
      text: ``lr=log:1e-5:1,width=int:16:256:log,optimizer=adam|sgd``; see :func:`nnkit.search.parse_space`.
      config: the fixed settings.

    Raises:
      ValueError, TypeError: in one line, for a text that is no space, a name that is no setting or none that can be
        searched, a range that the setting has not, or settings that do not go together.

    >>> from nnkit.cli.settings import Config
    >>> read_space("epoch=2|3", Config())
    Traceback (most recent call last):
    ...
    ValueError: in --space: unknown setting 'epoch'; did you mean 'epochs' or 'depth'? Known: batch_size, ...
    """
    space = parse_space(text)
    for path, dimension in space.dimensions.items():
        _check_dimension(path, dimension)
    _check_together(space, config)
    _check_networks(space, config)
    return space


def settings_of_trial(config: Config, values: Mapping[str, Any]) -> Settings:
    """The settings of one trial: the fixed ones with ``values``, by their names in the space, in their place.

    Values may be traced, where :data:`SEARCHED` says so.

    >>> from nnkit.cli.settings import Config
    >>> found = settings_of_trial(Config(), {"lr": 0.01, "width": 32, "depth": 3})
    >>> found.learning_rate, found.hidden, found.epochs
    (0.01, (32, 32, 32), 60)
    """
    changes: dict[str, Any] = {}
    for name, value in values.items():
        searched = SEARCHED[name]
        if searched.traced:
            # Whole numbers would not be promoted beside float32.
            changes[searched.field] = float(value) if is_static_number(value) else value.astype(jnp.float32)
        elif searched.field != "hidden":
            changes[searched.field] = value
    if "hidden" in values:
        changes["hidden"] = _widths(values["hidden"])
    elif {"width", "depth"} & set(values):
        hidden = resolved(dataclasses.replace(config, **changes)).hidden or ()
        depth = values.get("depth", len(hidden))
        changes["hidden"] = (values["width"],) * depth if "width" in values else _stretched(hidden, depth)
    return resolved(dataclasses.replace(config, **changes))


def _widths(value: Any) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,)


def _stretched(hidden: tuple[int, ...], depth: int) -> tuple[int, ...]:
    """The first widths, and the last one again where there are too few."""
    return (hidden + hidden[-1:] * depth)[:depth]


def _check_dimension(name: str, dimension: Dimension) -> None:
    if name not in SEARCHED:
        if name in Config.__dataclass_fields__:
            raise ValueError(
                f"in --space: {name} cannot be searched, only set for all trials with "
                f"--{name.replace('_', '-')}; what can: {', '.join(SEARCHED)}"
            )
        raise ValueError(f"in --space: {unknown_name('setting', name, SEARCHED)}")
    searched = SEARCHED[name]
    if searched.names:
        for option in dimension.options or (str(dimension),):
            if option not in searched.names:
                raise ValueError(f"in --space: {unknown_name(name, str(option), searched.names)}")
        return
    if not searched.traced:
        _check_static(name, dimension)
    ends = dimension.options if dimension.options is not None else (dimension.low, dimension.high)
    for end in ends:
        for number in end if name == "hidden" and isinstance(end, tuple) and end else (end,):
            _check_number(name, searched, number)


def _check_static(name: str, dimension: Dimension) -> None:
    write = "hidden=64|128x64" if name == "hidden" else f"{name}=int:16:256:log or {name}=16|32|64"
    if dimension.kind not in ("integer", "choice") or (name == "hidden" and dimension.kind != "choice"):
        raise ValueError(
            f"in --space: {name} is {dimension}, and what it sets is in whole numbers: write {write}"
        )
    if not dimension.static:
        raise ValueError(
            f"in --space: {name} is to be traced, and it shapes the program, which must know it: write {write}"
        )


def _check_number(name: str, searched: Searched, number: Any) -> None:
    wanted = "a number" if searched.traced else "a whole number"
    if not is_static_number(number) or (not searched.traced and not isinstance(number, int)):
        raise TypeError(f"in --space: {name} must be {wanted}, got {number!r}")
    above = number >= searched.low if searched.low_too else number > searched.low
    below = number <= searched.high if searched.high_too else number < searched.high
    if not (above and below):
        left, right = "[" if searched.low_too else "(", "]" if searched.high_too else ")"
        if searched.high == math.inf:
            bounds = f"{'at least' if searched.low_too else 'above'} {searched.low:g}"
        else:
            bounds = f"in {left}{searched.low:g}, {searched.high:g}{right}"
        raise ValueError(f"in --space: {name} must be {bounds}, got {number:g}")


def _check_together(space: Space, config: Config) -> None:
    """That no setting is searched twice, or searched and fixed."""
    names = set(space.dimensions)
    if {"lr", "learning_rate"} <= names:
        raise ValueError("in --space: lr is short for learning_rate: search one of them")
    if "hidden" in names and names & {"width", "depth"}:
        raise ValueError(
            "in --space: hidden says every width and the depth: search it alone, or width and depth"
        )
    for name in space.dimensions:
        field = SEARCHED[name].field
        default = Config.__dataclass_fields__[field].default
        # A width or depth changes the hidden layers that are fixed, so there they go together.
        if getattr(config, field) != default and name not in ("width", "depth"):
            option = f"--{field.replace('_', '-')}"
            raise ValueError(f"in --space: {name} is searched, and {option} fixes it: leave one of them out")


def _check_networks(space: Space, config: Config) -> None:
    """That every network that can come up has the settings which are searched or fixed."""
    model = space.dimensions.get("model")
    values = {name: (d.options[0] if d.options else d.low) for name, d in space.dimensions.items()}
    for name in (config.model,) if model is None else model.options or ():
        settings = settings_of_trial(config, values if model is None else {**values, "model": name})
        build_model(settings, 10)
