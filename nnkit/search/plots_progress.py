"""The best value so far, against trials and against seconds, of one study or of several side by side."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from nnkit.diagnose.figure import COLOURS, new_figure, saved
from nnkit.search.drawing import error_of, plain_axes, value_axis

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from nnkit.search.study import Study

__all__ = ["plot_progress"]


def plot_progress(
    studies: Study | Mapping[str, Study | Sequence[Study]],
    path: str | os.PathLike[str] | None = None,
    *,
    title: str = "",
) -> Figure:
    """The best value so far against the number of finished trials, and against seconds since the first began.

    Trials count in the order in which they ended, those that diverged, were stopped early or repeat another
    one too: they were asked for. The seconds are those of the clock, a pause between two workers included.
    Of several studies under one name (a sampler with several seeds) the line is the median and the band
    reaches from the lower to the upper quartile; it begins where all of them have a value.

    Args:
      studies: one, or by name one or several each. All have one metric.
      path: the PNG file, if it is to be saved.
      title: above the picture.

    Raises:
      ValueError: no study, studies of several metrics, or one without a finite value.

    >>> space = {"x": search.uniform(0, 3)}
    >>> study = search.sweep(lambda key, hparams: {"val_loss": hparams["x"]}, space, trials=4)
    >>> [ax.get_xlabel() for ax in search.plot_progress({"random": study}).axes]
    ['trials', 'seconds']
    """
    named = studies if isinstance(studies, Mapping) else {"": studies}
    groups = {name: list(one) if isinstance(one, Sequence) else [one] for name, one in named.items()}
    everyone = [study for group in groups.values() for study in group]
    if not all(groups.values()) or not everyone:
        raise ValueError("plot_progress needs a study, or by name one or several each, and got none")
    if len(metrics := {(study.metric, study.mode) for study in everyone}) > 1:
        asked = sorted(f"{mode} of {metric}" for metric, mode in metrics)
        raise ValueError(f"plot_progress compares studies of one metric, and got {' and '.join(asked)}")
    error = error_of(everyone[0])
    figure = new_figure(9.6, 3.9, title)
    by_trials, by_seconds = figure.subplots(1, 2, sharey=True)
    seen = []
    for number, (name, group) in enumerate(groups.items()):
        colour = COLOURS[number % len(COLOURS)]
        paths = [_path(study) for study in group]
        for ax, which in ((by_trials, 0), (by_seconds, 1)):
            x, low, middle, high = _together([(path[which], path[2]) for path in paths])
            low, middle, high = (error.of(values) for values in (low, middle, high))
            ax.step(x, middle, where="post", color=colour, label=name or None, linewidth=1.6)
            ax.plot(x[-1], middle[-1], "o", color=colour, markersize=4)
            if len(group) > 1:
                ax.fill_between(x, low, high, step="post", color=colour, alpha=0.15, linewidth=0)
            seen += [low, high]
    by_trials.set(xlabel="trials", ylabel=f"best {error.name} so far")
    by_seconds.set(xlabel="seconds", xlim=(0, 1.04 * by_seconds.dataLim.xmax))
    value_axis(by_trials, np.concatenate(seen), share=error.share)
    for ax in (by_trials, by_seconds):
        plain_axes(ax)
    if any(groups):
        by_seconds.legend(frameon=False, fontsize=9)
    return saved(figure, path)


def _path(study: Study) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Trials, seconds, and the best value after each; NaN before the first finite one."""
    rows = [
        (t.ended, t.number, t.started, t.value if t.state == "complete" else None)
        for t in study.trials
        if t.state in ("complete", "pruned", "diverged") and t.started is not None and t.ended is not None
    ]
    sign = -1 if study.mode == "max" else 1
    values = np.array([math.inf if value is None else sign * value for *_, value in sorted(rows)], float)
    if not np.isfinite(values).any():
        raise ValueError(f"nothing to plot: no trial of {study.name!r} has a finite {study.metric} yet")
    best = np.minimum.accumulate(values)
    begun = min(started for _, _, started, _ in rows)
    seconds = np.array([(ended - begun).total_seconds() for ended, *_ in sorted(rows)])
    return np.arange(1.0, len(rows) + 1), seconds, sign * np.where(np.isfinite(best), best, math.nan)


def _together(paths: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, ...]:
    """Where any of the paths steps, and there the lower quartile, the median and the upper quartile of all.

    One that has ended stays at its last value; as long as one has none there is no median.
    """
    x = np.unique(np.concatenate([x for x, _ in paths]))
    rows = []
    for at, values in paths:
        last = np.searchsorted(at, x, side="right") - 1
        rows.append(np.where(last >= 0, values[np.maximum(last, 0)], math.nan))
    return x, *np.quantile(np.array(rows), [0.25, 0.5, 0.75], axis=0)
