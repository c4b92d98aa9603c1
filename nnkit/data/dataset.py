"""A data set is arrays and what they mean.

Sources return :class:`Splits` of :class:`Dataset`; everything that trains takes ``dataset.arrays``,
a plain pytree, and knows nothing of either.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Num, Shaped

__all__ = ["Dataset", "Normalization", "Splits", "chunks"]


@dataclasses.dataclass(frozen=True, eq=False)
class Normalization:
    """The affine map of each channel (the last axis), z = (x - mean) / std, and its inverse.

    A channel with ``std = 0`` did not vary where the numbers were taken: ``apply`` makes it 0 and
    ``invert`` its mean. The arithmetic is float64, the results float32.

    Attributes:
      mean: what is taken off each channel, (channels,).
      std: what each channel is divided by, (channels,).

    >>> normalization = Normalization(mean=np.array([2.0, 5.0]), std=np.array([0.5, 0.0]))
    >>> normalization.apply(np.array([[3.0, 5.0]]))
    array([[2., 0.]], dtype=float32)
    >>> normalization.invert(np.array([[2.0, 0.0]]))
    array([[3., 5.]], dtype=float32)
    """

    mean: Float[np.ndarray, " channels"]
    std: Float[np.ndarray, " channels"]

    def apply(self, x: Num[np.ndarray, "n ... channels"]) -> Float[np.ndarray, "n ... channels"]:
        """``x`` normalised."""

        def update(block: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> None:
            block -= mean
            block *= scale

        scale = np.divide(1.0, self.std, out=np.zeros_like(self.std), where=self.std > 0)
        return _by_channel(x, update, self.mean, scale)

    def invert(self, z: Num[np.ndarray, "n ... channels"]) -> Float[np.ndarray, "n ... channels"]:
        """What :meth:`apply` made of ``x``, back on the scale of ``x``."""

        def update(block: np.ndarray, mean: np.ndarray, std: np.ndarray) -> None:
            block *= std
            block += mean

        return _by_channel(z, update, self.mean, self.std)


def _by_channel(x: np.ndarray, update: Callable[..., None], *numbers: np.ndarray) -> np.ndarray:
    """``update(rows, *numbers)`` in place on float64 pieces of ``x``, gathered as float32.

    A row is one example laid flat and the numbers are repeated along it: numpy's inner loop then
    runs over a whole image and not over its 3 channels, which is eleven times as fast.
    """
    if np.ndim(x) < 2 or np.shape(x)[-1:] != numbers[0].shape:
        raise ValueError(
            f"the normalisation has {numbers[0].size} channels and got an array of shape {np.shape(x)}: "
            "its first axis must be the examples and its last the channels"
        )
    width = math.prod(x.shape[1:])
    across = [np.resize(number, width) for number in numbers]
    out = np.empty(x.shape, np.float32)
    rows = out.reshape(len(x), width)
    for part, block in chunks(x):
        wide = block.reshape(len(block), width).astype(np.float64)
        update(wide, *across)
        rows[part] = wide
    return out


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Examples and their labels or targets, with their names.

    Attributes:
      x: the examples, (n, ...); images are (n, height, width, channels), a grey image has one
        channel. May be a read-only memory map.
      y: an integer label or a target for each example, (n, ...).
      name: what to call it in tables and errors.
      classes: the classes by their label; empty where ``y`` are targets of a regression.
      normalization: what was done to ``x``; ``None`` while it is as its source has it.

    Raises:
      ValueError: ``x`` and ``y`` differ in length.

    >>> Dataset(np.zeros((3, 8, 8, 1), np.uint8), np.array([0, 1, 1]), "dots", ("round", "square"))
    Dataset(dots: 3 of (8, 8, 1) uint8, 2 classes)
    """

    x: Shaped[np.ndarray, "n ..."]
    y: Shaped[np.ndarray, "n ..."]
    name: str = "data"
    classes: tuple[str, ...] = ()
    normalization: Normalization | None = None

    def __post_init__(self):
        # Frozen for the user; here the fields are brought to their types (a memory map stays one).
        object.__setattr__(self, "x", np.asanyarray(self.x))
        object.__setattr__(self, "y", np.asanyarray(self.y))
        object.__setattr__(self, "classes", tuple(self.classes))
        if self.x.ndim == 0 or self.y.ndim == 0 or len(self.x) != len(self.y):
            raise ValueError(
                f"{self.name} has x of shape {self.x.shape} and y of shape {self.y.shape}: "
                "the first axis of both is the examples"
            )

    def __len__(self) -> int:
        return len(self.x)

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """``(x, y)``, the pytree that is cut into batches."""
        return self.x, self.y

    def take(self, indices: Any) -> Dataset:
        """The examples at ``indices`` (integers, a mask or a slice); a slice copies nothing.

        >>> Dataset(np.arange(6.0).reshape(3, 2), np.array([7, 8, 9])).take([2, 0]).y
        array([9, 7])
        """
        return dataclasses.replace(self, x=np.asarray(self.x)[indices], y=np.asarray(self.y)[indices])

    def __repr__(self) -> str:
        what = (
            f"{len(self.classes)} classes" if self.classes else f"targets {self.y.shape[1:]} {self.y.dtype}"
        )
        normalized = ", normalised" if self.normalization is not None else ""
        return f"Dataset({self.name}: {len(self)} of {self.x.shape[1:]} {self.x.dtype}, {what}{normalized})"


class Splits(NamedTuple):
    """A data set's parts; one that is not there is ``None``.

    >>> Splits(Dataset(np.zeros((4, 2)), np.arange(4))).map(lambda part: part.take(slice(0, 3))).train
    Dataset(data: 3 of (2,) float64, targets () int64)
    """

    train: Dataset
    validation: Dataset | None = None
    test: Dataset | None = None

    def map(self, f: Callable[[Dataset], Dataset]) -> Splits:
        """``f`` of each part that is there."""
        validation = None if self.validation is None else f(self.validation)
        return Splits(f(self.train), validation, None if self.test is None else f(self.test))


def chunks(x: np.ndarray, size: int = 2**16) -> Iterator[tuple[slice, np.ndarray]]:
    """``x`` in pieces of about ``size`` numbers along its first axis, each with its place.

    The pieces fit the processor's cache: a float64 pass over 60,000 images of 28x28 takes half a
    megabyte at a time, not 376.

    >>> [(part.start, len(block)) for part, block in chunks(np.zeros((5, 3)), size=6)]
    [(0, 2), (2, 2), (4, 1)]
    """
    rows = max(1, size // max(1, x[:1].size))
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        yield part, np.asarray(x[part])
