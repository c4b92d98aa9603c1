"""Parallel coordinates: every trial a line through its hyper-parameters to its value."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nnkit.diagnose.figure import GREY, RED, new_figure, saved
from nnkit.search.dimension import Dimension
from nnkit.search.drawing import (
    dimension_of,
    is_wide,
    value_of,
    with_states,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from nnkit.search.study import Study, Trial

__all__ = ["plot_parallel"]


def plot_parallel(
    study: Study,
    path: str | os.PathLike[str] | None = None,
    *,
    parameters: Sequence[str] | None = None,
    title: str = "",
) -> Figure:
    """Parallel coordinates: each trial a line through its hyper-parameters to its value, the best on top.

    Every axis has its own scale. The colour is the trial's place among all: dark is good, the best tenth
    is drawn thick. A line runs below the axes of hyper-parameters that the trial does not have, and
    trials that diverged are dashed, to the worse end of the last axis.

    Args:
      study: from :func:`sweep` or :func:`open_study`.
      path: the PNG file, if it is to be saved.
      parameters: the hyper-parameters' paths in the order of the axes; by default all with several values.
      title: above the picture.

    Raises:
      ValueError: an unknown hyper-parameter, or no trial with a finite value.

    >>> def train_fn(key, hparams):
    ...     return {"val_loss": hparams["a"] + hparams["b"]}
    >>> space = {"a": search.uniform(0, 1), "b": search.log_uniform(0.1, 1)}
    >>> figure = search.plot_parallel(search.sweep(train_fn, space, trials=4))
    >>> [text.get_text() for text in figure.axes[0].get_xticklabels()]
    ['a', 'b', 'val_loss']
    """
    if parameters is None:
        parameters = [p for p, d in study.space.dimensions.items() if d.count != 1]
    dimensions = [dimension_of(study, parameter) for parameter in parameters]
    trials = with_states(study, "complete", "diverged")
    sign = -1 if study.mode == "max" else 1
    complete = sorted(
        (t for t in trials if t.state == "complete"), key=lambda t: sign * value_of(t), reverse=True
    )
    diverged = [t for t in trials if t.state == "diverged"]
    values = np.array([value_of(t) for t in complete])
    wide = max(1.6, *(0.085 * len(parameter) for parameter in parameters))
    figure = new_figure(max(wide * len(dimensions) + 3, 5), 4.4, title)
    ax = figure.subplots()
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap

    place, ticks = _value_scale(values)
    # Without the lightest tenth, which is hard to see on white.
    colours = ListedColormap(colormaps["viridis"](np.linspace(0, 0.9, 256)))
    aside = 1.12 if sign > 0 else _ASIDE
    for t in diverged:
        heights = [_height(t, p, d) for p, d in zip(parameters, dimensions, strict=True)]
        ax.plot([*heights, aside], color=RED, linestyle="--", linewidth=0.7, alpha=0.6)
    for i, t in enumerate(complete):
        worse = 1 - i / max(len(complete) - 1, 1)  # the share of trials that are better than this one
        heights = [_height(t, p, d) for p, d in zip(parameters, dimensions, strict=True)]
        top = worse <= 0.1
        ax.plot(
            [*heights, place(value_of(t))], color=colours(worse),
            linewidth=2 if top else 0.9, alpha=0.95 if top else 0.55, zorder=2 + i / len(complete),
        )  # fmt: skip
    for x, marks in enumerate([*map(_marks, dimensions), ticks]):
        ax.axvline(x, color="black", linewidth=0.8, zorder=1)
        for height, text in marks:
            ax.plot([x - 0.02, x + 0.02], [height, height], color="black", linewidth=0.8, zorder=1)
            ax.text(
                x - 0.04, height, text, ha="right", va="center", fontsize=8, parse_math=False, zorder=4,
                bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.5},
            )  # fmt: skip
    if diverged:
        ax.text(len(dimensions) - 0.04, aside, "diverged", ha="right", va="center", fontsize=8, color=RED)
    missing = [p for p in parameters if any(p not in t.params for t in trials)]
    if missing:
        x = parameters.index(missing[0]) - 0.04
        ax.text(x, _ASIDE, "none", ha="right", va="center", fontsize=8, color=GREY)
    ax.set_xticks(range(len(dimensions) + 1), [*parameters, study.metric], parse_math=False)
    lowest = _ASIDE if missing or (diverged and sign < 0) else 0
    highest = aside if diverged and sign > 0 else 1
    ax.set(xlim=(-0.45, len(dimensions) + 0.1), ylim=(lowest - 0.05, highest + 0.05))
    ax.set_yticks([])
    ax.tick_params(axis="x", length=0)
    ax.spines[:].set_visible(False)
    bar = figure.colorbar(ScalarMappable(cmap=colours), ax=ax, pad=0.02, ticks=[0, 0.5, 1])
    bar.ax.set_yticklabels(["best", "median", "worst"])
    return saved(figure, path)


_ASIDE = -0.12
"""The height at which lines pass hyper-parameters that they have not."""


def _height(trial: Trial, path: str, dimension: Dimension) -> float:
    return dimension.position(trial.params[path]) if path in trial.params else _ASIDE


def _marks(dimension: Dimension) -> list[tuple[float, str]]:
    """The ticks of one of the parallel axes: heights and texts."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    if dimension.options is not None:
        return [(dimension.position(option), str(option)) for option in dimension.options]
    low, high = float(dimension.low or 0), float(dimension.high or 0)
    whole = dimension.kind == "integer"
    if dimension.log:
        locator = LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,))
    else:
        locator = MaxNLocator(4, integer=whole)
    found = [
        v for v in locator.tick_values(low, high) if low - 1e-9 * abs(low) <= v <= high + 1e-9 * abs(high)
    ]
    return [(dimension.position(int(v) if whole else v), f"{v:g}") for v in found]


def _value_scale(values: np.ndarray) -> tuple[Any, list[tuple[float, str]]]:
    """For the metric's axis: the height of a value, and the ticks."""
    wide, low, high = is_wide(values), values.min(), values.max()
    scale = math.log if wide else float
    width = (scale(high) - scale(low)) or 1.0

    def place(value: float) -> float:
        return (scale(value) - scale(low)) / width

    shares = np.linspace(0, 1, 5) if high > low else np.zeros(1)
    inverse = math.exp if wide else float
    return place, [(u, f"{inverse(scale(low) + u * width):.3g}") for u in shares]
