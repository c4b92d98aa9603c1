"""The metric over two hyper-parameters: trials, and contours between them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nnkit.diagnose.figure import RED, new_figure, saved
from nnkit.search.dimension import Dimension
from nnkit.search.drawing import (
    coordinate,
    dimension_of,
    dress,
    error_of,
    found_at,
    is_wide,
    readable,
    short,
    shown,
    with_states,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from nnkit.search.study import Study, Trial

__all__ = ["plot_contour"]


def plot_contour(
    study: Study,
    x: str,
    y: str,
    path: str | os.PathLike[str] | None = None,
    *,
    title: str = "",
) -> Figure:
    """The metric over two hyper-parameters: a point for each trial, and contours between them.

    Between the points the metric is interpolated, linearly on the hyper-parameters' own scales and on the
    metric's (a triangulation); what the other hyper-parameters do is noise in it. There are contours where
    both have numbers and three points or more are not in line. Crosses are trials that diverged.

    Args:
      study: from :func:`sweep` or :func:`open_study`.
      x: the path of the hyper-parameter on the horizontal axis.
      y: that on the vertical one.
      path: the PNG file, if it is to be saved.
      title: above the picture.

    Raises:
      ValueError: an unknown hyper-parameter, the same one twice, no trial with a finite value, or none that
        has both.

    >>> def train_fn(key, hparams):
    ...     return {"val_loss": hparams["a"] ** 2 + hparams["b"]}
    >>> space = {"a": search.uniform(-1, 1), "b": search.log_uniform(0.1, 1)}
    >>> ax = search.plot_contour(search.sweep(train_fn, space, trials=9), "a", "b").axes[0]
    >>> ax.get_xlabel(), ax.get_ylabel(), ax.get_yscale()
    ('a', 'b', 'log')
    """
    if x == y:
        raise ValueError(f"plot_contour needs two hyper-parameters, and got {x!r} twice")
    across, up = dimension_of(study, x), dimension_of(study, y)
    trials = [t for t in with_states(study, "complete", "diverged") if x in t.params and y in t.params]
    complete = [t for t in trials if t.state == "complete"]
    if not complete:
        raise ValueError(f"nothing to plot: no complete trial has both {x!r} and {y!r}")
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import FuncFormatter

    error = error_of(study)
    values = error.of([t.value for t in complete])
    norm = (LogNorm if is_wide(values) else Normalize)(values.min(), max(values.max(), values.min() + 1e-12))
    better_dark = "viridis" if study.mode == "min" or error.share else "viridis_r"
    figure = new_figure(6.2, 4.6, title)
    ax = figure.subplots()
    dress(ax, "x", x, across)
    dress(ax, "y", y, up)
    surface = _surface(complete, x, y, across, up, np.log(values) if is_wide(values) else values)
    if surface is not None:
        columns, rows, heights = surface
        heights = np.ma.exp(heights) if is_wide(values) else heights
        levels = norm.inverse(np.linspace(0, 1, 13))
        ax.contourf(columns, rows, heights, levels, cmap=better_dark, norm=norm, alpha=0.75, extend="both")
    points = ax.scatter(
        found_at(complete, x, across), found_at(complete, y, up), c=values, cmap=better_dark, norm=norm,
        s=26, edgecolors="white", linewidths=0.8, zorder=3,
    )  # fmt: skip
    if diverged := [t for t in trials if t.state == "diverged"]:
        ax.scatter(
            found_at(diverged, x, across), found_at(diverged, y, up), marker="x", color=RED, s=26, zorder=3,
            label=f"diverged ({len(diverged)})",
        )  # fmt: skip
    best = study.best
    if x in best.params and y in best.params:
        ax.plot(
            coordinate(across, best.params[x]), coordinate(up, best.params[y]), "*", color=RED, markersize=15,
            markeredgecolor="white", zorder=4, linestyle="none",
            label=f"best: {short(best.params[x])}, {short(best.params[y])}",
        )  # fmt: skip
    figure.legend(
        *ax.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=9
    )
    bar = figure.colorbar(points, ax=ax, pad=0.02)
    bar.set_label(error.name)
    if is_wide(values):
        readable(bar.ax.yaxis, values.min(), values.max())
    if error.share:
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value, error)))
    ax.spines[["top", "right"]].set_visible(False)
    return saved(figure, path)


def _surface(
    trials: Sequence[Trial], x: str, y: str, across: Dimension, up: Dimension, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray, Any] | None:
    """The interpolated metric on a fine mesh, or None where it cannot be interpolated."""
    from matplotlib.tri import LinearTriInterpolator, Triangulation

    if across.options is not None or up.options is not None:
        return None
    # One point for each place, with the mean of what was found there: a triangulation needs distinct ones.
    at = np.array([(across.position(t.params[x]), up.position(t.params[y])) for t in trials])
    at, where = np.unique(at.round(9), axis=0, return_inverse=True)
    means = np.bincount(where.ravel(), values) / np.bincount(where.ravel())
    if np.linalg.matrix_rank(at - at[0], tol=1e-6) < 2:
        return None
    interpolated = LinearTriInterpolator(Triangulation(*at.T), means)
    shares = np.linspace(0, 1, 301)
    heights = interpolated(*np.meshgrid(shares, shares))
    return _line(across, shares), _line(up, shares), heights


def _line(dimension: Dimension, shares: np.ndarray) -> np.ndarray:
    """The values at evenly spaced positions, counted ones as if they were not."""
    low, high = float(dimension.low or 0), float(dimension.high or 0)
    # Counted values do not stand at 0 and 1, and log ones of integers begin half a value earlier.
    first, last = dimension.position(dimension.low), dimension.position(dimension.high)
    u = (shares - first) / (last - first)
    return low * (high / low) ** u if dimension.log else low + u * (high - low)
