"""``grid``: every combination of evenly spaced values, in an order that sees all of the space early."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nnkit.checks import unknown_name
from nnkit.search.dimension import Dimension, Value
from nnkit.search.draws import fill, generator, share
from nnkit.search.space import Flat, Space, as_space
from nnkit.search.storage import require_optuna

if TYPE_CHECKING:
    from optuna import Study
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

__all__ = ["Axes", "Grid", "grid", "grid_for"]

Axes = dict[str, int | list[Value]]
"""By path how many values, or which."""
_KEY = "nnkit:grid"
"""Under which a study has the grid that it was begun with."""


def grid(
    space: Mapping[str, Any] | Space, sizes: Mapping[str, int | Sequence[Value]], *, seed: int = 0
) -> BaseSampler:
    """A sampler that tries each combination of evenly spaced values once.

    The order is shuffled, so that a grid that is not finished has seen all of the space. Trials beyond the end
    halve the distances, one hyper-parameter after the other; where there are no more values, it starts over.
    ``sampler="grid"`` is the grid with as many values as the number of trials allows, the same for all ranges.

    Args:
      space: where to search.
      sizes: by path how many values, spaced evenly on the hyper-parameter's own scale, or the values
        themselves. Of a choice or of whole numbers that are left out each value is taken.
      seed: of the order.

    Raises:
      ValueError, TypeError: for a path that the space does not have, a range without a size, a size below 1, or a
        value that is not in the space.
      ImportError: where Optuna is not installed.

    >>> space = {"lr": search.log_uniform(1e-4, 1e-1), "width": search.choice([32, 64])}
    >>> sampler = search.grid(space, {"lr": 4})
    >>> import optuna
    >>> study = optuna.create_study(sampler=sampler)
    >>> trials = [search.as_space(space).suggest(study.ask()) for _ in range(8)]
    >>> sorted(trial["lr"] for trial in trials if trial["width"] == 64)
    [0.0001, 0.001, 0.01, 0.1]
    """
    space = as_space(space)
    axes: Axes = {}
    for path, size in sizes.items():
        if path not in space.dimensions:
            raise unknown_name("hyper-parameter", path, space.dimensions)
        axes[path] = _checked(space.dimensions[path], path, size)
    for path, dimension in space.dimensions.items():
        if path not in axes:
            if dimension.count is None:
                raise ValueError(
                    f"grid needs a size for {path!r}, which is {dimension}: write {{{path!r}: 8}}"
                )
            axes[path] = dimension.count
    return _sampler(Grid(space, axes, seed, given=True))


def grid_for(space: Space, trials: int, seed: int) -> BaseSampler:
    """The finest grid of equal sizes that ``trials`` cover.

    Raises:
      ValueError: where the choices alone have more combinations.
    """
    sizes = {path: len(d.options) if d.options is not None else 1 for path, d in space.dimensions.items()}
    if (least := _count(space, sizes)) > trials:
        raise ValueError(
            f"the sampler 'grid' with trials={trials} cannot try all {least} combinations of the choices: "
            f"give it {least} trials, or take 'random'"
        )
    growing = [path for path, dimension in space.dimensions.items() if dimension.options is None]
    while growing:
        path = min(growing, key=lambda path: sizes[path])
        more = {**sizes, path: sizes[path] + 1}
        if more[path] <= (space.dimensions[path].count or math.inf) and _count(space, more) <= trials:
            sizes = more
        else:
            growing.remove(path)
    return _sampler(Grid(space, dict(sizes), seed, given=False))


class Grid:
    """The points of a grid by a trial's turn."""

    def __init__(self, space: Space, axes: Axes, seed: int, *, given: bool):
        self.space, self.axes, self.seed, self.given = space, axes, seed, given
        self._orders: dict[str, tuple[list[Flat], Iterator[list[Flat]]]] = {}

    def draw(self, study: Study, trial: FrozenTrial, turn: int, given: Flat) -> Flat:
        point = self.point(self._axes_of(study), turn)

        def value(path: str) -> Value:
            # An enqueued trial may have another kind than the point.
            found = point.get(path)
            return (
                self.space.dimensions[path].at(share(self.seed, turn, path)) if path not in point else found
            )

        return fill(self.space, given, value)

    def point(self, axes: Axes, turn: int) -> Flat:
        points, more = self._orders.setdefault(repr(axes), ([], _levels(self.space, axes, self.seed)))
        while turn >= len(points) and (found := next(more, None)) is not None:
            points.extend(found)
        return points[turn % len(points)]

    def _axes_of(self, study: Study) -> Axes:
        """The axes that the study was begun with: with more trials than at first a grid goes on, and is no other."""
        stored = {
            path: size if isinstance(size, int) else [self.space.dimensions[path].stored(v) for v in size]
            for path, size in self.axes.items()
        }
        begun = study.user_attrs.get(_KEY)
        if begun is None:
            study.set_user_attr(_KEY, stored)
        elif begun != stored:
            if self.given:
                raise ValueError(
                    f"the study was begun with the grid {begun}, and this one is {stored}: "
                    "take that one, or another study"
                )
            known = self.space.dimensions
            return {
                p: s if isinstance(s, int) else [known[p].restored(v) for v in s] for p, s in begun.items()
            }
        return self.axes


def _sampler(found: Grid) -> BaseSampler:
    require_optuna()
    from nnkit.search.sampling import DrawnSampler

    return DrawnSampler("grid", found.space, found.seed, found.draw)


def _checked(dimension: Dimension, path: str, size: Any) -> int | list[Value]:
    if isinstance(size, str) or not isinstance(size, Sequence):
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"grid needs a whole number or a list of values for {path!r}, got {size!r}")
        if size < 1:
            raise ValueError(f"grid needs at least one value for {path!r}, got {size}")
        return size if dimension.count is None else min(size, dimension.count)
    if not size:
        raise ValueError(f"grid needs at least one value for {path!r}, got none")
    return [dimension.check(value, repr(path)) for value in size]


def _levels(space: Space, axes: Axes, seed: int) -> Iterator[list[Flat]]:
    """The points of the grid, and then those that each halving of a distance adds; each part shuffled."""
    axes, seen = dict(axes), set()
    while True:
        points = [p for p in _points(space, axes) if tuple(p.items()) not in seen]
        seen.update(tuple(p.items()) for p in points)
        yield [points[i] for i in generator(seed, len(seen), "order").permutation(len(points))]
        finer = {path: n for path, size in axes.items() if (n := _finer(space.dimensions[path], size))}
        if not finer:
            return
        path = min(finer, key=lambda path: finer[path])
        axes[path] = finer[path]


def _finer(dimension: Dimension, size: int | list[Value]) -> int | None:
    """How many values with half the distance; None where there are no more."""
    if isinstance(size, list) or dimension.options is not None or size == dimension.count:
        return None
    return min(max(2 * size - 1, 3), dimension.count or 2 * size + 1)


def _points(space: Space, axes: Axes) -> Iterator[Flat]:
    values = {path: _values(space.dimensions[path], size) for path, size in axes.items()}

    def extended(flat: Flat) -> Iterator[Flat]:
        path = next((path for path in space.active(flat) if path not in flat), None)
        if path is None:
            yield flat
            return
        for value in values[path]:
            yield from extended({**flat, path: value})

    return extended({})


def _values(dimension: Dimension, size: int | list[Value]) -> list[Value]:
    if isinstance(size, list):
        return size
    if size == 1 and dimension.options is None:
        three = dimension.grid(3)  # the middle of a finer grid, to the last bit
        return [three[len(three) // 2]]
    return dimension.grid(size)


def _count(space: Space, sizes: Mapping[str, int]) -> int:
    """How many points there are, without making them."""
    conditional = {path for path, spec in space.spec().items() if spec.get("conditional")}

    def counted(flat: Flat) -> int:
        active = space.active(flat)
        path = next((path for path in active if path in conditional and path not in flat), None)
        if path is None:
            return math.prod(sizes[path] for path in active if path not in flat)
        return sum(counted({**flat, path: kind}) for kind in space.dimensions[path].options or ())

    return counted({})
