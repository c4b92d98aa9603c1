"""The lecture's figure: the learning rate against training and validation error."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from nnkit.diagnose.figure import BLUE, GREY, RED, new_figure, saved
from nnkit.search.drawing import (
    coordinate,
    dimension_of,
    dress,
    error_of,
    found_at,
    members_of,
    plain_axes,
    short,
    shown,
    value_axis,
    value_of,
    with_states,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from nnkit.search.study import Study

__all__ = ["plot_rate"]


def plot_rate(
    study: Study,
    path: str | os.PathLike[str] | None = None,
    *,
    parameter: str = "lr",
    title: str = "",
) -> Figure:
    """The learning rate against training and validation error, every trial, on the rate's own scale.

    A point is the mean over seeds (and folds) of the epoch by which the trial is judged, its bar reaches from
    the lowest to the highest of them. Crosses at the top are trials that diverged, triangles those that a
    pruner stopped. An accuracy is drawn as the share of errors. Where nothing else was searched, a line
    joins the points. The training metric is the one without ``val_``; without one there is no such curve.

    Args:
      study: from :func:`sweep` or :func:`open_study`.
      path: the PNG file, if it is to be saved.
      parameter: the path of the hyper-parameter; any will do.
      title: above the picture.

    Raises:
      ValueError: the study has no such hyper-parameter, or no trial with a finite value.

    >>> def train_fn(key, hparams):
    ...     return {"loss": hparams["lr"] ** 2, "val_loss": hparams["lr"] ** 2 + 0.1}
    >>> study = search.sweep(train_fn, {"lr": search.log_uniform(1e-4, 1.0)}, sampler="grid", trials=5)
    >>> [text.get_text() for text in search.plot_rate(study).axes[0].get_legend().get_texts()]
    ['training', 'validation', 'best: lr = 0.0001, loss 0.1']
    """
    dimension, error = dimension_of(study, parameter), error_of(study)
    trials = [t for t in with_states(study, "complete", "pruned", "diverged") if parameter in t.params]
    complete = sorted(
        (t for t in trials if t.state == "complete"), key=lambda t: coordinate(dimension, t.params[parameter])
    )
    if not complete:
        raise ValueError(f"nothing to plot: no complete trial has {parameter!r}")
    figure = new_figure(7, 4.4, title)
    ax = figure.subplots()
    dress(ax, "x", "learning rate" if parameter == "lr" else parameter, dimension)
    held_out = study.metric.startswith("val_")
    curves = [(study.metric.removeprefix("val_"), "training", BLUE, "o")] if held_out else []
    curves.append((study.metric, "validation" if held_out else error.name, RED, "s"))
    handles: list[Any] = []
    seen = []
    for name, label, colour, marker in curves:
        rows = [(t, members_of(t, study, name)) for t in complete]
        rows = [(t, error.of(values)) for t, values in rows if values is not None]
        if not rows:
            continue
        x = found_at([t for t, _ in rows], parameter, dimension)
        mean, low, high = (np.array([f(values) for _, values in rows]) for f in (np.mean, np.min, np.max))
        several = len(rows[0][1]) > 1
        drawn = ax.errorbar(
            x, mean, [mean - low, high - mean] if several else None, color=colour, marker=marker,
            markersize=4 if len(x) < 100 else 2.5, linewidth=1.2, elinewidth=0.9, label=label,
            linestyle="-" if len(study.space.dimensions) == 1 else "none",
        )  # fmt: skip
        handles.append(drawn)
        seen += [low, high]
    if stopped := [t for t in trials if t.state == "pruned" and math.isfinite(value_of(t))]:
        values = error.of([t.value for t in stopped])
        handles += ax.plot(
            found_at(stopped, parameter, dimension), values, "v", color=GREY, markersize=4,
            markerfacecolor="none", label=f"stopped early ({len(stopped)})",
        )  # fmt: skip
        seen.append(values)
    if diverged := [t for t in trials if t.state == "diverged"]:
        x = found_at(diverged, parameter, dimension)
        handles += ax.plot(
            x, np.full(len(x), 0.98), "x", color=RED, markersize=6, transform=ax.get_xaxis_transform(),
            label=f"diverged ({len(diverged)})",
        )  # fmt: skip
    best = next(t for t in study.top(len(study.trials)) if parameter in t.params)
    x, y = coordinate(dimension, best.params[parameter]), float(error.of(best.values).mean())
    ax.plot(x, y, "o", markersize=11, markerfacecolor="none", markeredgecolor=GREY, zorder=5)
    text = f"best: {parameter} = {short(best.params[parameter])}, {error.name} {shown(y, error)}"
    handles.append(ax.axvline(x, color=GREY, linestyle=":", zorder=0, label=text))
    ax.set_ylabel(error.name, parse_math=False)
    value_axis(ax, np.concatenate(seen), share=error.share)
    plain_axes(ax)
    ax.legend(handles=handles, frameon=False, fontsize=9)
    return saved(figure, path)
