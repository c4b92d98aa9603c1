"""Coarse to fine: rounds of points on a window, which then moves to the best point or shrinks around it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from nnkit.checks import is_static_number
from nnkit.search.dimension import Dimension, Value
from nnkit.search.draws import check_whole, fill, generator, share
from nnkit.search.space import Flat, Space, as_space
from nnkit.search.storage import require_optuna

if TYPE_CHECKING:
    from nnkit.search.windowed import CoarseToFine

__all__ = ["Rules", "Tried", "Window", "coarse_to_fine", "moved", "point", "whole"]

Window = dict[str, tuple[float, ...]]
"""By path: of a range its two ends in [0, 1] on its own scale, of a choice the places of its options."""


class Rules(NamedTuple):
    """The arguments of :func:`coarse_to_fine`."""

    points: int
    shrink: float
    margin: float
    seed: int


class Tried(NamedTuple):
    """A trial as the search sees it."""

    flat: Flat
    score: float | None
    """Low is good; None for a trial that has no finite value."""
    window: Window | None
    """From which it was drawn; None for one that was given."""


def coarse_to_fine(
    space: Mapping[str, Any] | Space,
    *,
    points: int | None = None,
    shrink: float = 0.5,
    margin: float = 0.1,
    seed: int = 0,
) -> CoarseToFine:
    """A sampler that searches coarsely first, and then ever finer around the best that it has found.

    Points are drawn in a window, at first the whole space, one in each of ``points`` equal parts of every
    hyper-parameter's scale (a Latin hypercube). When they are done, each hyper-parameter's side of the window

    * moves to the best point, as wide as before, where that lies within ``margin`` of an end behind which
      the space goes on: the optimum may be outside;
    * else shrinks to ``shrink`` of its width around the best point.

    It never leaves the space. Of a choice the better part of the options stays, once each was tried often
    enough; a hyper-parameter of a conditional's kind waits until its window has had ``points`` trials of that
    kind. Diverged and failed trials count as done and are never the best.

    For one hyper-parameter with an error that grows alike on both sides of its optimum, the best after n rounds
    is nearer to the optimum than shrink^(n - 1) / points of the scale, if 1/points + 1/(points shrink) + margin
    <= 1/2, as with the defaults.

    All that the search knows is in the study: whoever opens it draws the same points, also after a kill.
    Trials that are asked for while a round is not done are more points on the same window.

    Args:
      space: where to search.
      points: how many points make a round; None for 4 for each hyper-parameter that every trial has, and 8 at least.
      shrink: the new width over the old, in (0, 1).
      margin: how near to an end counts as near, as a share of the window's width in [0, 0.5).
      seed: of the random places within the parts.

    Raises:
      ValueError, TypeError: for numbers outside of these ranges.
      ImportError: where Optuna is not installed.

    Source: the lecture's advice for searching by hand; Bengio, "Practical recommendations for gradient-based
    training of deep architectures", 2012, section 3.3.

    >>> sampler = search.coarse_to_fine({"lr": search.log_uniform(1e-5, 1.0)}, points=8)
    >>> import optuna
    >>> study = optuna.create_study(sampler=sampler)
    >>> for _ in range(32):
    ...     trial = study.ask()
    ...     study.tell(trial, abs(np.log10(trial.suggest_float("lr", 1e-5, 1.0, log=True)) + 2)) and None
    >>> low, high = sampler.window(study)["lr"]
    >>> bool(low < 1e-2 < high), bool(high / low < 3)
    (True, True)
    """
    space = as_space(space)
    if points is None:
        points = max(8, 4 * len(space.active({})))
    check_whole("coarse_to_fine(points=...)", points, 2)
    check_whole("coarse_to_fine(seed=...)", seed, 0)
    if not is_static_number(shrink) or not 0 < shrink < 1:
        raise ValueError(
            f"coarse_to_fine(shrink=...) must be in (0, 1), got {shrink!r}: 0.5 halves the window"
        )
    if not is_static_number(margin) or not 0 <= margin < 0.5:
        raise ValueError(
            f"coarse_to_fine(margin=...) must be in [0, 0.5), got {margin!r}: "
            "it is the share of the window at each end that counts as near to it"
        )
    require_optuna()
    from nnkit.search.windowed import CoarseToFine

    return CoarseToFine(space, Rules(int(points), float(shrink), float(margin), int(seed)))


def whole(space: Space) -> Window:
    """The window that is the space.

    >>> whole(search.as_space({"lr": search.log_uniform(1e-5, 1.0), "width": search.choice([8, 16, 32])}))
    {'lr': (0.0, 1.0), 'width': (0, 1, 2)}
    """
    return {
        path: (0.0, 1.0) if dimension.options is None else tuple(range(len(dimension.options)))
        for path, dimension in space.dimensions.items()
    }


def point(space: Space, window: Window, rules: Rules, at: int, index: int, turn: int, given: Flat) -> Flat:
    """The values of the point with this ``index`` in the round ``at``, beside those that are given."""
    layer, i = divmod(index, rules.points)

    def value(path: str) -> Value:
        part = generator(rules.seed, at, layer, path).permutation(rules.points)[i]
        return _value(
            space.dimensions[path], window[path], (part + share(rules.seed, turn, path)) / rules.points
        )

    return fill(space, given, value)


def moved(space: Space, window: Window, tried: Sequence[Tried], rules: Rules) -> Window:
    """The window after a round, where each side is decided upon by itself."""
    sides = {}
    for path, dimension in space.dimensions.items():
        having = [one for one in tried if path in one.flat]
        here = [one.flat[path] for one in having if one.window and one.window[path] == window[path]]
        scores = [(one.score, one.flat[path]) for one in having if one.score is not None]
        if len(here) < rules.points or not scores:
            sides[path] = window[path]
        elif dimension.options is None:
            best = min(scores, key=lambda pair: pair[0])[1]
            sides[path] = _range(dimension, window[path], best, rules)
        else:
            sides[path] = _options(dimension, window[path], here, scores, rules)
    return sides


def _range(dimension: Dimension, side: tuple[float, ...], best: Any, rules: Rules) -> tuple[float, float]:
    low, high = side
    width, at = high - low, dimension.position(best)
    # Behind an end of the space there is nothing to look for.
    near_low = low > 0 and at < low + rules.margin * width
    near_high = high < 1 and at > high - rules.margin * width
    if not near_low and not near_high:
        width *= rules.shrink
    low = max(at - width / 2, 0.0)
    # Not 1 - width + width, which can be a little less than 1, and then seems to have something behind it.
    low, high = (low, low + width) if low + width < 1 else (1 - width, 1.0)
    return _with_neighbours(dimension, best, low, high)


def _with_neighbours(dimension: Dimension, best: Any, low: float, high: float) -> tuple[float, float]:
    """At least the values next to the best, or counted ones would be drawn again and again."""
    if dimension.step is not None and dimension.low is not None and dimension.high is not None:
        near = [best - dimension.step, best + dimension.step]
        places = [dimension.position(v) for v in near if dimension.low <= v <= dimension.high]
        low, high = min(low, *places, high), max(high, *places, low)
    return max(low, 0.0), min(high, 1.0)


def _options(
    dimension: Dimension,
    side: tuple[float, ...],
    here: Sequence[Value],
    scores: Sequence[tuple[float, Value]],
    rules: Rules,
) -> tuple[float, ...]:
    """The better part of the options, once each has had half of a round's points."""
    assert dimension.options is not None
    options = {place: dimension.options[int(place)] for place in side}
    if any(2 * here.count(option) < rules.points for option in options.values()):
        return side
    best = {
        place: min((score for score, value in scores if value == option), default=math.inf)
        for place, option in options.items()
    }
    few = math.ceil(rules.shrink * len(side))
    return tuple(sorted(sorted(side, key=lambda place: best[place])[:few]))


def _value(dimension: Dimension, side: tuple[float, ...], u: float) -> Value:
    if dimension.options is not None:
        return dimension.options[int(side[min(int(u * len(side)), len(side) - 1)])]
    low, high = side
    return dimension.at(low + u * (high - low))
