"""The curves of runs: metrics by epoch, of one run or of several side by side."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nnkit.diagnose.figure import BLUE, COLOURS, GREEN, GREY, RED, new_figure, saved
from nnkit.train import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_curves", "plot_run"]


def plot_curves(
    history: Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str] | None = None,
    *,
    metrics: Sequence[str] = ("loss", "accuracy"),
    best: int | None = None,
    title: str = "",
) -> Figure:
    """Training and validation metrics by epoch, a panel for each, and the learning rate if rows have it.

    A panel is logarithmic where its values are positive and span more than a factor of ten (accuracies
    never are). Values that are not finite are gaps, and the panel says since when.

    Args:
      history: the rows of ``fit``, with ``epoch``, ``loss``, ``val_loss``, ``accuracy``,
        ``val_accuracy``, ``learning_rate`` or some of them. Without ``epoch`` they count from 1.
      path: the PNG file, if it is to be saved.
      metrics: the panels; one that no row has is left out.
      best: the epoch to mark; by default the first one of the highest validation accuracy, else of the
        lowest validation loss.
      title: above the panels.

    Raises:
      ValueError: no row has any of ``metrics``.

    >>> rows = [{"epoch": 1, "loss": 0.9, "val_loss": 1.0}, {"epoch": 2, "loss": 0.5, "val_loss": 0.7}]
    >>> [ax.get_ylabel() for ax in plot_curves(rows).axes]
    ['loss']
    """
    columns = list(dict.fromkeys(name for row in history for name in row))
    shown = [name for name in metrics if name in columns or f"val_{name}" in columns]
    if not shown:
        raise ValueError(
            f"nothing to plot: the history has the columns {columns}, and curves are drawn of {list(metrics)}"
        )
    shown += [name for name in ("learning_rate",) if name in columns and name not in shown]
    figure = new_figure(4.6 * len(shown) + 0.3, 3.8, title)
    best = _best_epoch(history) if best is None else best
    epochs = [float(row.get("epoch", i)) for i, row in enumerate(history, 1)]
    for ax, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        if name == "learning_rate":
            _draw(ax, name, {name: (*_curve(history, name), GREEN, "o-")}, None)
        else:
            training = (*_curve(history, name), BLUE, "o-")
            validation = (*_curve(history, f"val_{name}"), RED, "s--")
            _draw(ax, name, {"training": training, "validation": validation}, best)
        ax.set_xlim(min(epochs) - 0.5, max(epochs) + 0.5)
    return saved(figure, path)


def plot_run(
    folders: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    path: str | os.PathLike[str] | None = None,
    *,
    metrics: Sequence[str] | None = None,
    title: str = "",
) -> Figure:
    """The curves of one run, or of several in the same panels, from the metrics.csv in their folders.

    One run is drawn as by :func:`plot_curves`. Several have a colour each, with solid lines for training
    and dashed ones for validation.

    Args:
      folders: a run folder, or several. A run that is still under way is drawn as far as it is.
      path: the PNG file, if it is to be saved.
      metrics: the panels; by default one for every metric that any of the runs has.
      title: above the panels.

    Raises:
      FileNotFoundError: a folder has no metrics.csv.
      ValueError: no folder, or no run has any of ``metrics``.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as run:
    ...     train.write_metrics(run, [{"epoch": 1, "loss": 0.9, "val_loss": 1.0, "f1": 0.5}])
    ...     [ax.get_ylabel() for ax in diagnose.plot_run([run, run]).axes]
    ['loss', 'f1']
    """
    several = [folders] if isinstance(folders, str | os.PathLike) else list(folders)
    if not several:
        raise ValueError("plot_run needs a run folder, got none")
    histories = [read_metrics(folder) for folder in several]
    if metrics is None:
        metrics = _metrics_of([row for history in histories for row in history])
    if len(histories) == 1:
        return plot_curves(histories[0], path, metrics=metrics, title=title)
    panels = [name for name in metrics if any(len(_curve(h, n)[0]) for h in histories for n in _pair(name))]
    if not panels:
        raise ValueError(f"nothing to plot: none of the runs has any of {list(metrics)}")
    figure = new_figure(4.6 * len(panels) + 0.3, 3.8, title)
    for ax, name in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        curves: dict[str, tuple[Any, ...]] = {}
        for i, (label, history) in enumerate(zip(_labels(several), histories, strict=True)):
            colour = COLOURS[i % len(COLOURS)]
            training, validation = (_curve(history, column) for column in _pair(name))
            if len(validation[0]):
                curves[label] = (*validation, colour, "s--")
            # matplotlib leaves what begins with "_" out of the legend, where one line a run is enough.
            hidden = f"_{label}, training" if len(validation[0]) else label
            if len(training[0]):
                curves[hidden] = (*training, colour, "o-")
        _draw(ax, name, curves, None)
    return saved(figure, path)


def _metrics_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """All metrics of the rows, without ``val_`` where the pair shares a panel; the learning rate last."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    names = dict.fromkeys(name.removeprefix("val_") for name in columns)
    last = ["learning_rate"] if "learning_rate" in names else []
    return [name for name in names if name not in ("epoch", "step", "seconds", *last)] + last


def _pair(name: str) -> tuple[str, str]:
    return name, f"val_{name}"


def _labels(folders: Sequence[str | os.PathLike[str]]) -> list[str]:
    """The folders' names, or their paths where two have one name."""
    names = [Path(os.path.abspath(folder)).name for folder in folders]
    if len(set(names)) < len(names):
        names = [f"{i}: {os.fspath(folder)}" for i, folder in enumerate(folders, 1)]
    return [name.lstrip("_") or name for name in names]


def _curve(history: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Epochs and values of the rows that have ``name``."""
    rows = [(row.get("epoch", i), row[name]) for i, row in enumerate(history, 1) if row.get(name) is not None]
    epochs, values = np.array(rows, float).reshape(-1, 2).T
    return epochs, values


def _finite(values: np.ndarray) -> np.ndarray:
    return np.abs(values) < 1e38  # float32's range; matplotlib itself overflows near the end of float64's.


def _best_epoch(history: Sequence[Mapping[str, Any]]) -> int | None:
    for name, sign in (("val_accuracy", 1), ("val_loss", -1)):
        epochs, values = _curve(history, name)
        if _finite(values).any():
            return int(epochs[np.argmax(np.where(_finite(values), sign * values, -np.inf))])
    return None


def _draw(ax: Axes, name: str, curves: Mapping[str, tuple[Any, ...]], best: int | None) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

    marked, notes = None, []
    for label, (epochs, values, colour, style) in curves.items():
        finite = _finite(values)
        if len(values):
            gaps = np.where(finite, values, np.nan)
            ax.plot(epochs, gaps, style, color=colour, markersize=3.5, label=label)
        if not finite.all():
            notes.append(f"{label.lstrip('_')}: not finite, first in epoch {epochs[~finite][0]:g}")
        if best is not None and best in epochs[finite]:
            marked = (best, values[epochs == best][0])
    seen = np.concatenate([values[_finite(values)] for _, values, *_ in curves.values()])
    shares = "accuracy" in name and bool((seen <= 1).all())
    if shares:
        ax.yaxis.set_major_formatter(PercentFormatter(1))
    elif len(seen) and seen.min() > 1e-38 and seen.max() > 10 * seen.min():
        ax.set_yscale("log")
        # In a few decades 1, 2 and 5 of each, so that there are numbers to read at all.
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if seen.max() < 1e4 * seen.min() else (1,)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
    if marked:
        text = f"{marked[1]:.2%}" if shares else f"{marked[1]:.4g}"
        ax.axvline(marked[0], color=GREY, linestyle=":", zorder=0, label=f"best, epoch {best}: {text}")
        ax.plot(*marked, "o", markersize=9, markerfacecolor="none", markeredgecolor=GREY)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.set(xlabel="epoch", ylabel=name.replace("_", " "))
    ax.set_title("\n".join(notes), color=RED, fontsize=9)
    ax.grid(color="#e5e5e5", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    if len(seen) and len(curves) > 1:
        ax.legend(frameon=False, fontsize=9)
