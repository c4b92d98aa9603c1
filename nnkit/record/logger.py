"""What a tracker of experiments is told, and in which form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from jaxtyping import Num, Shaped, UInt8

from nnkit.train.runs import plain

__all__ = ["Logger", "finite_part", "picture", "settings_of"]


class Logger(Protocol):
    """Where a run is told to. Any object with these five methods will do.

    ``step`` is the number of optimizer steps taken. An exception of any method costs that call and never the
    run, see :func:`nnkit.record.log_to`.
    """

    def scalars(self, step: int, values: Mapping[str, float], /) -> None:
        """Numbers by name; they may be NaN or infinite."""
        ...

    def histograms(self, step: int, values: Mapping[str, np.ndarray], /) -> None:
        """Arrays of any shape by name, whose numbers are to be seen as a distribution."""
        ...

    def images(self, step: int, values: Mapping[str, np.ndarray], /) -> None:
        """Images by name: (height, width) or (height, width, 1 or 3), uint8 or from 0 to 1."""
        ...

    def hyperparameters(self, settings: Mapping[str, Any], metrics: Mapping[str, float], /) -> None:
        """The run's settings, flat: numbers, bools, texts, None.

        Called twice: at the start without metrics, and at the end with the last ones.
        """
        ...

    def close(self) -> None:
        """Nothing more will come."""
        ...


def settings_of(config: Any) -> dict[str, Any]:
    """A configuration, nested or not, as plain settings by path; lists become text.

    >>> from nnkit.record.logger import settings_of
    >>> settings_of({"optimizer": {"learning_rate": 0.1}, "hidden": (256, 128)})
    {'optimizer/learning_rate': 0.1, 'hidden': '[256, 128]'}
    """
    found: dict[str, Any] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for inner, item in value.items():
                add(f"{name}/{inner}" if name else inner, item)
        else:
            found[name] = str(value) if isinstance(value, list) else value

    add("", plain({} if config is None else config, "config"))
    return found


def finite_part(values: Num[np.ndarray, "..."]) -> Num[np.ndarray, " n"]:
    """The numbers of an array that are finite, in a row, as float64.

    >>> from nnkit.record.logger import finite_part
    >>> finite_part(np.array([[1.0, np.nan]]))
    array([1.])
    """
    flat = np.asarray(values, np.float64).reshape(-1)
    return flat[np.isfinite(flat)]


def picture(name: str, image: Shaped[np.ndarray, "height width *channels"]) -> UInt8[np.ndarray, "h w 3"]:
    """An image in the one form that all trackers take: (height, width, 3), from 0 to 255.

    Raises:
      ValueError: another shape, or numbers that are neither uint8 nor from 0 to 1.

    >>> from nnkit.record.logger import picture
    >>> picture("eye", np.eye(2))[0].tolist()
    [[255, 255, 255], [0, 0, 0]]
    """
    pixels = np.asarray(image)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.ndim != 3 or pixels.shape[-1] not in (1, 3):
        raise ValueError(
            f"the image {name!r} has shape {np.shape(image)}: pass (height, width) or (height, width, 1 or 3)"
        )
    if pixels.dtype != np.uint8:
        pixels = pixels.astype(np.float64)
        if not (pixels.min(initial=0) >= 0 and pixels.max(initial=0) <= 1):
            raise ValueError(
                f"the image {name!r} has numbers from {pixels.min():g} to {pixels.max():g}: pass uint8, or 0 to 1"
            )
        pixels = np.rint(pixels * 255).astype(np.uint8)
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3))
