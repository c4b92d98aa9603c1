"""Which parameters are matrices, or batches of them, and along which axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from nnkit import tree
from nnkit.types import PyTree

__all__ = ["MuonDimensionNumbers", "axes", "fans", "map_matrices", "numbers_by_leaf", "two_axes"]


class MuonDimensionNumbers(NamedTuple):
    """Which axes of an array make it a matrix; the others are a batch of matrices.

    Attributes:
      reduction_axis: the axis, or axes, that a product with the inputs sums over.
      output_axis: the axis, or axes, of the outputs.
    """

    reduction_axis: Sequence[int] | int = 0
    output_axis: Sequence[int] | int = 1


def axes(x: Array, numbers: MuonDimensionNumbers | None = None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of the inputs and those of the outputs, counted from the front.

    >>> axes(jnp.ones((3, 2, 5)), MuonDimensionNumbers(reduction_axis=0, output_axis=-1))
    ((0,), (2,))
    """
    if numbers is None:
        if x.ndim != 2:
            raise ValueError(
                f"only matrices can be orthogonalized, got the shape {x.shape}: say which axes make the "
                "matrix with MuonDimensionNumbers(reduction_axis, output_axis)"
            )
        numbers = MuonDimensionNumbers()
    groups = [(g,) if isinstance(g, int) else tuple(g) for g in numbers]
    named = [i + x.ndim if i < 0 else i for group in groups for i in group]
    if len({*named}) < len(named) or not all(0 <= i < x.ndim for i in named):
        raise ValueError(f"{numbers} does not name distinct axes of the shape {x.shape}")
    return tuple(named[: len(groups[0])]), tuple(named[len(groups[0]) :])


def fans(x: Array, dimension_numbers: MuonDimensionNumbers | None = None) -> tuple[int, int]:
    """How many inputs and outputs the matrices of ``x`` have.

    >>> fans(jnp.ones((3, 2, 5)), MuonDimensionNumbers(reduction_axis=(0, 1), output_axis=-1))
    (6, 5)
    """
    reduction, output = axes(x, dimension_numbers)
    return math.prod(x.shape[i] for i in reduction), math.prod(x.shape[i] for i in output)


def two_axes(params: PyTree) -> PyTree:
    """The default: what has two axes is a matrix."""
    return jax.tree.map(lambda x: MuonDimensionNumbers() if jnp.ndim(x) == 2 else None, params)


def numbers_by_leaf(where: str, numbers: Any, params: PyTree) -> list[MuonDimensionNumbers | None]:
    """The dimension numbers of each leaf of ``params``, from a tree or prefix of them or a function to one."""
    numbers = numbers(params) if callable(numbers) else numbers
    spread: list[MuonDimensionNumbers | None] = []

    def add(n: Any, part: PyTree) -> None:
        spread.extend([n] * len(jax.tree.leaves(part)))

    try:
        jax.tree.map(add, numbers, params, is_leaf=_is_numbers)
    except ValueError as error:
        raise ValueError(
            f"{where}: the dimension numbers must be a tree like the parameters or a prefix of them, got "
            f"{jax.tree.structure(numbers, is_leaf=_is_numbers)} for {jax.tree.structure(params)}"
        ) from error
    for n in spread:
        if not _is_numbers(n):
            raise TypeError(f"{where}: dimension numbers must be MuonDimensionNumbers or None, got {n!r}")
    return spread


def map_matrices(where: str, f: Callable[..., Array], numbers: Any, updates: PyTree, *rest: PyTree) -> PyTree:
    """``f(numbers, u, *rest)`` of each leaf, or an error that names the leaf which is no matrix."""
    spread = numbers_by_leaf(where, MuonDimensionNumbers() if numbers is None else numbers, updates)
    paths = tree.flatten(updates).items()
    for (path, x), n in zip(paths, spread, strict=True):
        if n is None or (numbers is None and jnp.ndim(x) != 2):
            raise ValueError(
                f"{where}: {path or 'the root'} has the shape {jnp.shape(x)} and is not for Muon: pass its "
                "MuonDimensionNumbers, or leave it to Adam with muon(...)"
            )
    columns = [jax.tree.leaves(x) for x in (updates, *rest)]
    with jax.numpy_dtype_promotion("standard"):  # as in leafwise
        results = [f(n, *map(jnp.asarray, row)) for n, *row in zip(spread, *columns, strict=True)]
    return jax.tree.structure(updates).unflatten(results)


def _is_numbers(x: Any) -> bool:
    return x is None or isinstance(x, MuonDimensionNumbers)
