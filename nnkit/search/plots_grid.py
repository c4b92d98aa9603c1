"""Why random beats grid: what a grid and random draws see of an important and of an unimportant parameter."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from nnkit.diagnose.figure import BLUE, GREEN, GREY, RED, new_figure, saved
from nnkit.search.drawing import (
    coordinate,
    dimension_of,
    dress,
    error_of,
    found_at,
    shown,
    value_axis,
    with_states,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from nnkit.search.study import Study

__all__ = ["plot_grid_and_random"]


def plot_grid_and_random(
    grid: Study,
    random: Study,
    important: str,
    unimportant: str,
    path: str | os.PathLike[str] | None = None,
    *,
    title: str = "",
) -> Figure:
    """Two studies over the same two hyper-parameters, each with its projections onto one and the other.

    After Figure 1 of J. Bergstra and Y. Bengio, "Random search for hyper-parameter optimization", JMLR 13,
    2012: n trials on a grid try only sqrt(n) different values of the parameter that matters, random ones
    n. Above each square the metric over the important parameter, on its right over the unimportant one;
    the lines show where the trials fall. A trial that diverged is a cross.

    Args:
      grid: the study on a grid.
      random: the one with random draws, over the same space.
      important: the path of the hyper-parameter that matters.
      unimportant: that of the one that does not.
      path: the PNG file, if it is to be saved.
      title: above the picture.

    Raises:
      ValueError: unknown hyper-parameters, studies of different spaces or metrics, or without a finite value.

    >>> def train_fn(key, hparams):
    ...     return {"val_loss": (hparams["a"] - 0.4) ** 2 + 0.01 * hparams["b"]}
    >>> space = {"a": search.uniform(0, 1), "b": search.uniform(0, 1)}
    >>> studies = [search.sweep(train_fn, space, sampler=name, trials=9) for name in ("grid", "random")]
    >>> [ax.get_title() for ax in search.plot_grid_and_random(*studies, "a", "b").axes if ax.get_title()]
    ['grid: 9 trials, 3 values of a', 'random: 9 trials, 9 values of a']
    """
    if words := grid.space.difference(random.space_spec):
        raise ValueError(
            f"plot_grid_and_random compares two searches of one space, and these differ: {words}"
        )
    if (grid.metric, grid.mode) != (random.metric, random.mode):
        raise ValueError(
            f"plot_grid_and_random compares one metric, and got {grid.metric} and {random.metric}"
        )
    across, up, error = dimension_of(grid, important), dimension_of(grid, unimportant), error_of(grid)
    figure = new_figure(10.4, 5, title)
    spec = figure.add_gridspec(2, 5, width_ratios=[4, 1, 0.15, 4, 1], height_ratios=[1, 3.2])
    panels: list[Any] = []
    everything = []
    for name, study, column, colour in (("grid", grid, 0, BLUE), ("random", random, 3, GREEN)):
        trials = [
            t
            for t in with_states(study, "complete", "diverged")
            if important in t.params and unimportant in t.params
        ]
        complete = [t for t in trials if t.state == "complete"]
        diverged = [t for t in trials if t.state == "diverged"]
        square = figure.add_subplot(spec[1, column])
        above = figure.add_subplot(spec[0, column], sharex=square)
        beside = figure.add_subplot(spec[1, column + 1], sharey=square)
        dress(square, "x", important, across)
        dress(square, "y", unimportant, up)
        x, y = found_at(complete, important, across), found_at(complete, unimportant, up)
        values = error.of([t.value for t in complete])
        # The projections: through the square to the panels at its sides.
        for ax, at in ((square, x), (above, x)):
            ax.vlines(at, 0, 1, transform=ax.get_xaxis_transform(), color=colour, alpha=0.25, linewidth=0.8)
        for ax, at in ((square, y), (beside, y)):
            ax.hlines(at, 0, 1, transform=ax.get_yaxis_transform(), color=GREY, alpha=0.25, linewidth=0.8)
        square.plot(x, y, "o", color=colour, markersize=5, label="trials")
        above.plot(x, values, "o", color=colour, markersize=4)
        beside.plot(values, y, "o", color=GREY, markersize=4)
        if diverged:
            at = found_at(diverged, important, across), found_at(diverged, unimportant, up)
            square.plot(*at, "x", color=RED, markersize=6, label="diverged")
        best = study.best
        place = coordinate(across, best.params[important]), coordinate(up, best.params[unimportant])
        lowest = float(error.of(best.value))
        square.plot(
            *place,
            "*",
            color=RED,
            markersize=14,
            markeredgecolor="white",
            label=f"best: {shown(lowest, error)}",
        )
        above.plot(place[0], lowest, "*", color=RED, markersize=10, markeredgecolor="white")
        beside.plot(lowest, place[1], "*", color=RED, markersize=10, markeredgecolor="white")
        different = len({t.params[important] for t in trials})
        above.set_title(
            f"{name}: {len(trials)} trials, {different} values of {important}", fontsize=10, parse_math=False
        )
        above.tick_params(axis="x", labelbottom=False)
        beside.tick_params(axis="y", labelleft=False)
        above.set_ylabel(error.name, parse_math=False)
        beside.set_xlabel(error.name, parse_math=False)
        square.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3, frameon=False, fontsize=9)
        for ax in (above, beside, square):
            ax.spines[["top", "right"]].set_visible(False)
        panels.append((above, beside))
        everything.append(values)
    values = np.concatenate(everything)
    for above, beside in panels:
        value_axis(above, values, share=error.share)
        value_axis(beside, values, share=error.share, which="x")
        beside.tick_params(axis="x", labelrotation=45, labelsize=8)
    # One scale for both, so that they can be compared.
    for axes, which in zip(zip(*panels, strict=True), "yx", strict=True):
        limits = [getattr(ax, f"get_{which}lim")() for ax in axes]
        for ax in axes:
            getattr(ax, f"set_{which}lim")(min(low for low, _ in limits), max(high for _, high in limits))
    return saved(figure, path)
