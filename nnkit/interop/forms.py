"""How one layer's arrays are written in another library: their names there, and the way there and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

import numpy as np

from nnkit.interop.flattening import Shape
from nnkit.interop.parts import Part

__all__ = ["Arrays", "Form", "Move", "joined", "moved", "same"]

Arrays: TypeAlias = Mapping[str, np.ndarray]


class Form(NamedTuple):
    """One way in which a library writes a layer.

    Attributes:
      shapes: of its arrays there, by their names within the layer.
      write: from our arrays to theirs.
      read: from theirs to ours.
      leaves: which of our arrays it has.
    """

    shapes: dict[str, Shape]
    write: Callable[[Arrays], dict[str, np.ndarray]]
    read: Callable[[Arrays], dict[str, np.ndarray]]
    leaves: tuple[str, ...]


class Move(NamedTuple):
    """One array of ours that is one of theirs."""

    ours: str
    theirs: str
    write: Callable[[np.ndarray], np.ndarray]
    read: Callable[[np.ndarray], np.ndarray]


def same(array: np.ndarray) -> np.ndarray:
    return array


def moved(part: Part, *moves: Move) -> Form:
    """The form in which each array of ours is one of theirs; those that the layer has not are left out."""
    have = [move for move in moves if move.ours in part.shapes]
    return joined(
        part,
        tuple(move.ours for move in have),
        lambda ours: {move.theirs: move.write(ours[move.ours]) for move in have},
        lambda theirs: {move.ours: move.read(theirs[move.theirs]) for move in have},
    )


def joined(
    part: Part,
    leaves: tuple[str, ...],
    write: Callable[[Arrays], dict[str, np.ndarray]],
    read: Callable[[Arrays], dict[str, np.ndarray]],
) -> Form:
    """The form with these two functions."""
    # Views of one zero: shapes are found by doing.
    zeros = {leaf: np.broadcast_to(np.float32(0), part.shapes[leaf]) for leaf in leaves}
    return Form({name: array.shape for name, array in write(zeros).items()}, write, read, leaves)
