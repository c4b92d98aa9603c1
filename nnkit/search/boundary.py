"""The lecture's warning: a best value on the boundary of the space says that the space is too small."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from nnkit.checks import is_static_number
from nnkit.search.dimension import Dimension

if TYPE_CHECKING:
    from nnkit.search.study import Study

__all__ = ["AtBoundary", "boundary_warnings"]


@dataclass(frozen=True)
class AtBoundary:
    """One hyper-parameter of the best trial that lies at an end of its range; printed it is a sentence."""

    path: str
    value: Any
    end: Literal["lower", "upper"]
    dimension: Dimension
    instead: str
    """What to search next, as one writes it."""
    beyond: bool
    """Whether that goes beyond the end; a count does not go below 1, nor a share above."""

    def __str__(self) -> str:
        why = "the optimum may lie beyond" if self.beyond else "it hides what is close to that end"
        return (
            f"the best {self.path} is {_digits(self.value)}, at the {self.end} end of {self.dimension}: {why}. "
            f"Search {self.instead}"
        )


def boundary_warnings(study: Study, margin: float = 0.05) -> list[AtBoundary]:
    """The hyper-parameters whose best value lies at an end of their range, with the range to search instead.

    A value is at an end if no more than the share ``margin`` of the range lies between them, on the
    hyper-parameter's own scale: of ``log_uniform(1e-5, 1)`` half of the last quarter of a decade. Of integers
    and of a choice of three or more numbers in order only the outermost value is, if it is not within the
    margin besides. What is not numbers has no ends.

    The range instead is as wide on the same scale, with the best value in its middle: the window of the
    coarse-to-fine search, moved. A range that begins at 0 or above stays there, one within 0 and 1 stays
    within, and one that ends below 1 (a momentum) below 1.

    Args:
      study: from :func:`sweep` or :func:`open_study`.
      margin: a share of the range, from 0 to below a half.

    Raises:
      ValueError: no trial has a finite value; a margin out of its range.

    >>> def train_fn(key, hparams):
    ...     return {"val_loss": -hparams["lr"]}
    >>> study = search.sweep(train_fn, {"lr": search.log_uniform(1e-4, 1e-2)}, sampler="grid", trials=5)
    >>> search.boundary_warnings(study)[0].instead
    'log_uniform(0.001, 0.1)'
    """
    if not 0 <= margin < 0.5:
        raise ValueError(f"margin must be from 0 to below 0.5, got {margin}: it is a share of the range")
    found = []
    for path, value in study.best.params.items():
        dimension = study.space.dimensions[path]
        end = _end(dimension, value, margin)
        if end is not None and (instead := _instead(dimension, value, end)):
            found.append(AtBoundary(path, value, end, dimension, *instead))
    return found


def _end(dimension: Dimension, value: Any, margin: float) -> Literal["lower", "upper"] | None:
    if dimension.options is None:
        place = dimension.position
        first, last = place(dimension.low), place(dimension.high)  # counted values do not begin at 0
    elif len(ordered := _ordered(dimension)) >= 3:
        place, first, last = ordered.index, 0, len(ordered) - 1
    else:
        return None
    share = (place(value) - first) / (last - first)
    # 1e-9: the ends themselves are at 0 and 1 up to rounding.
    if share <= margin + 1e-9:
        return "lower"
    return "upper" if share >= 1 - margin - 1e-9 else None


def _ordered(dimension: Dimension) -> list[Any]:
    """The options of a choice in their order; none if they are not all numbers."""
    options = dimension.options or ()
    return sorted(options) if all(map(is_static_number, options)) else []  # type: ignore[type-var]


def _instead(dimension: Dimension, value: Any, end: str) -> tuple[str, bool] | None:
    """The range to search, as one writes it, and whether it goes beyond the end."""
    if dimension.options is not None:
        return _one_more(_ordered(dimension), end)
    low, high = float(dimension.low or 0), float(dimension.high or 0)
    if dimension.log:
        half = math.sqrt(high / low)
        new = value / half, value * half
    else:
        half = (high - low) / 2
        new = value - half, value + half
        if low >= 0:
            top = math.inf if high > 1 else 1.0 if high == 1 else (1 + high) / 2
            new = max(new[0], 0.0), min(new[1], top)
    more = "" if dimension.step in (None, 1) else f", step={dimension.step}"
    if dimension.kind == "integer":
        # On the grid of the old range, and above 0 if that was.
        step, old = int(dimension.step or 1), int(low)
        least = -((old - (old > 0)) // step) if old >= 0 else -math.inf
        first = max(math.floor((new[0] - old) / step + 0.5), least)
        last = max(math.floor((new[1] - old) / step + 0.5), first + 1)
        new = old + first * step, old + last * step
        more += ", log=True" if dimension.log else ""
    beyond = new[0] < low if end == "lower" else new[1] > high
    return f"{dimension.kind}({_digits(new[0])}, {_digits(new[1])}{more})", beyond


def _one_more(options: list[Any], end: str) -> tuple[str, bool] | None:
    """The options and one beyond the end, in the same ratio if they are positive; None if it cannot be."""
    edge, inner = (options[0], options[1]) if end == "lower" else (options[-1], options[-2])
    further = edge * edge / inner if options[0] > 0 else 2 * edge - inner
    whole = all(isinstance(option, int) for option in options)
    further = round(further) if whole else float(f"{further:.3g}")
    if further in options or further < 0 <= options[0] or further == 0 < options[0]:
        return None
    return f"choice({[further, *options] if end == 'lower' else [*options, further]})", True


def _digits(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
