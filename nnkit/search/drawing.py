"""What the pictures of a study share: trials as numbers, and axes on a hyper-parameter's own scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nnkit.checks import unknown_name
from nnkit.search.dimension import Dimension

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from nnkit.search.study import Study, Trial

__all__ = [
    "Error",
    "coordinate",
    "dimension_of",
    "dress",
    "error_of",
    "found_at",
    "is_wide",
    "members_of",
    "plain_axes",
    "readable",
    "short",
    "shown",
    "value_axis",
    "value_of",
    "with_states",
]


class Error(NamedTuple):
    """How a metric is drawn: an accuracy as the share of errors, all else as it is."""

    name: str
    """Without ``val_``."""
    share: bool

    def of(self, values: Any) -> np.ndarray:
        values = np.asarray(values, float)
        return 1 - values if self.share else values


def error_of(study: Study) -> Error:
    """What the study's metric is drawn as."""
    name = study.metric.removeprefix("val_")
    if study.mode == "max" and "accuracy" in name:
        return Error(name.replace("accuracy", "error").replace("_", " "), True)
    return Error(name.replace("_", " "), False)


def with_states(study: Study, *states: str) -> list[Trial]:
    """The study's trials in these states, repeats left out; an error if it has no complete one."""
    trials = [trial for trial in study.trials if trial.repeat_of is None]
    if not any(trial.state == "complete" for trial in trials):
        raise ValueError(f"nothing to plot: no trial of the study has a finite {study.metric} yet")
    return [trial for trial in trials if trial.state in states]


def dimension_of(study: Study, path: str) -> Dimension:
    """The study's hyper-parameter of this name, or an error with those that it has."""
    if path not in study.space.dimensions:
        raise unknown_name("hyper-parameter", path, study.space.dimensions)
    return study.space.dimensions[path]


def members_of(trial: Trial, study: Study, name: str) -> np.ndarray | None:
    """Each member's value of a metric in the epoch that the trial is judged by, flat; None if there is none."""
    values = np.asarray(trial.values, float)
    if name == study.metric:
        return values.ravel()
    if name not in trial.history:
        return None
    found, judged = np.asarray(trial.history[name], float), np.asarray(trial.history[study.metric], float)
    if found.ndim > values.ndim:
        # The last epoch whose metric is the value: others were not judged.
        here = judged == values[..., None] if judged.shape == found.shape else np.isfinite(found)
        last = here.shape[-1] - 1 - np.argmax(here[..., ::-1], axis=-1)
        found = np.take_along_axis(found, last[..., None], -1)[..., 0]
    return np.where(np.isfinite(found), found, math.nan).ravel()


def coordinate(dimension: Dimension, value: Any) -> float:
    """Where a value stands on an axis that :func:`dress` made."""
    return float(value) if dimension.options is None else float(dimension.options.index(value))


def found_at(trials: Sequence[Trial], path: str, dimension: Dimension) -> np.ndarray:
    """The coordinates of the trials' values, NaN where the hyper-parameter is not active."""
    return np.array(
        [coordinate(dimension, t.params[path]) if path in t.params else math.nan for t in trials], float
    )


def dress(ax: Axes, which: str, path: str, dimension: Dimension) -> None:
    """Makes an axis that of a hyper-parameter: its name, its scale, its whole range."""
    getattr(ax, f"set_{which}label")(path, parse_math=False)
    limits = getattr(ax, f"set_{which}lim")
    if dimension.options is not None:
        names = [str(option) for option in dimension.options]
        getattr(ax, f"set_{which}ticks")(range(len(names)), names, parse_math=False)
        limits(-0.5, len(names) - 0.5)
        return
    low, high = float(dimension.low or 0), float(dimension.high or 0)
    if dimension.log:
        getattr(ax, f"set_{which}scale")("log")
        beside = (high / low) ** 0.03
        limits(low / beside, high * beside)
        readable(getattr(ax, f"{which}axis"), low, high)
    else:
        beside = 0.03 * (high - low)
        limits(low - beside, high + beside)


def value_axis(ax: Axes, values: np.ndarray, *, share: bool = False, which: str = "y") -> None:
    """A metric's axis: logarithmic where its finite values are positive and span more than a factor of ten."""
    from matplotlib.ticker import FuncFormatter, PercentFormatter

    axis, values = getattr(ax, f"{which}axis"), values[np.isfinite(values)]
    if is_wide(values):
        getattr(ax, f"set_{which}scale")("log")
        readable(axis, values.min(), values.max())
        if share:
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    elif share:
        axis.set_major_formatter(PercentFormatter(1))


def is_wide(values: np.ndarray) -> bool:
    """Whether finite values want a logarithmic axis."""
    return bool(len(values)) and values.min() > 1e-38 and values.max() > 10 * values.min()


def plain_axes(ax: Axes) -> None:
    """The house's frame."""
    ax.grid(color="#e5e5e5", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def value_of(trial: Trial) -> float:
    """The trial's value, NaN where it has none."""
    return math.nan if trial.value is None else float(trial.value)


def short(value: Any) -> str:
    """A hyper-parameter's value in three digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def shown(value: float, error: Error) -> str:
    """A metric's value in three digits."""
    return f"{100 * value:.3g}%" if error.share else f"{value:.3g}"


def readable(axis: Any, low: float, high: float) -> None:
    """Numbers on a logarithmic axis: 1, 2 and 5 in each of few decades, else powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    few = high < 1000 * low
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,), numticks=12))
    if few:
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
