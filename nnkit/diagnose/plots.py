"""The pictures of a run: its curves, its confusion matrix, its worst mistakes.

Each function returns a matplotlib ``Figure`` and saves it as a PNG where it is given a path. Without
pyplot there is no need of a display, no global state, and no figure that stays in memory.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Int, Num, Shaped

from nnkit.train.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_confusion", "plot_curves", "plot_examples"]

# From Okabe and Ito's colours, which the colour-blind can tell apart.
_BLUE, _RED, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
# Classes up to which the cells of a confusion matrix have room for counts, and its axes for every name.
_COUNTED, _NAMED = 20, 60


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
    figure = _figure(4.6 * len(shown) + 0.3, 3.8, title)
    best = _best_epoch(history) if best is None else best
    epochs = [float(row.get("epoch", i)) for i, row in enumerate(history, 1)]
    for ax, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        if name == "learning_rate":
            _draw(ax, name, {name: (*_curve(history, name), _GREEN, "o-")}, None)
        else:
            training = (*_curve(history, name), _BLUE, "o-")
            validation = (*_curve(history, f"val_{name}"), _RED, "s--")
            _draw(ax, name, {"training": training, "validation": validation}, best)
        ax.set_xlim(min(epochs) - 0.5, max(epochs) + 0.5)
    return _saved(figure, path)


def plot_confusion(
    matrix: Num[ArrayLike, "classes classes"],
    classes: Sequence[str] | None = None,
    path: str | os.PathLike[str] | None = None,
    *,
    title: str = "",
) -> Figure:
    """A confusion matrix and beside it the accuracy of each class.

    The colour is the cell's share of its row (its true class), on a scale that sets rare mistakes apart
    from none. For up to 20 classes the cells hold their counts; an empty cell is a zero.

    Args:
      matrix: ``matrix[i, j]`` examples of class ``i`` were taken for class ``j``.
      classes: the classes' names; by default their numbers.
      path: the PNG file, if it is to be saved.
      title: above the picture.

    Raises:
      ValueError: the matrix is not square or holds no counts; there are too few or too many names.

    >>> plot_confusion(np.array([[9, 1], [2, 8]]), ["cat", "dog"]).get_suptitle()
    'accuracy 85.00% of 20 examples'
    """
    counts = np.asarray(matrix)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or not counts.size:
        raise ValueError(f"matrix must be square, (classes, classes), got the shape {counts.shape}")
    if not (np.isfinite(counts).all() and (counts >= 0).all()):
        raise ValueError("matrix must hold counts, and some of its values are negative or not finite")
    if classes is not None and len(classes) != len(counts):
        raise ValueError(f"classes has {len(classes)} names, and matrix has {len(counts)} classes")
    n, names, total = len(counts), _names(classes, len(counts)), counts.sum()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1e-300)
    heading = f"accuracy {counts.trace() / total:.2%} of {total:,.0f} examples" if total else "no examples"
    side = min(max(0.48 * n, 3.6), 9.6)
    figure = _figure(side + 3.4, side + 1.4, title, heading)
    from matplotlib.colors import PowerNorm
    from matplotlib.ticker import PercentFormatter

    cells, bars = figure.subplots(1, 2, sharey=True, width_ratios=[side, 1.3])
    # With this power a share of 1% gets 16% of the colour, and one mistake in a hundred is seen.
    image = cells.imshow(shares, cmap="Blues", norm=PowerNorm(0.4, 0, 1), aspect="auto")
    ticks = np.arange(0, n, math.ceil(n / _NAMED))
    turned = 90 if max(map(len, names)) > (3 if n > 6 else 8) else 0
    cells.set_xticks(ticks, [names[t] for t in ticks], rotation=turned, parse_math=False)
    cells.set_yticks(ticks, [names[t] for t in ticks], parse_math=False)
    cells.tick_params(labelsize=9 if n <= _COUNTED else 7, length=2)
    cells.set(xlabel="predicted class", ylabel="true class")
    bars.barh(np.arange(n), shares.diagonal(), color=_BLUE)
    bars.set(xlim=(0, 1), xticks=[0, 0.5, 1], xlabel="accuracy of the class")
    bars.xaxis.set_major_formatter(PercentFormatter(1))
    bars.tick_params(axis="y", left=False, labelleft=False)
    bars.spines[["top", "right"]].set_visible(False)
    bar = figure.colorbar(image, ax=[cells, bars], ticks=[0, 0.01, 0.05, 0.2, 0.5, 1], pad=0.02, aspect=30)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1))
    bar.set_label("share of the true class")
    if n <= _COUNTED:
        # Below a luminance of 0.18 white has the better contrast, above it black (both 4.5 or more).
        luminance = image.to_rgba(shares)[..., :3] ** 2.2 @ [0.2126, 0.7152, 0.0722]
        for i, j in zip(*np.nonzero(counts), strict=True):
            colour = "white" if luminance[i, j] < 0.18 else "black"
            cells.text(j, i, f"{counts[i, j]:.10g}", ha="center", va="center", color=colour, fontsize=8)
        for i, share in enumerate(shares.diagonal()):
            text = f"{share:.1%}" if counts[i].sum() else "none"
            shift, where, colour = (-0.04, "right", "white") if share > 0.6 else (0.04, "left", "black")
            bars.text(share + shift, i, text, ha=where, va="center", color=colour, fontsize=8)
    return _saved(figure, path)


def plot_examples(
    images: Shaped[ArrayLike, "n height width *channels"],
    labels: Int[ArrayLike, " n"],
    predictions: Int[ArrayLike, " n"],
    confidences: Float[ArrayLike, " n"],
    path: str | os.PathLike[str] | None = None,
    *,
    classes: Sequence[str] | None = None,
    count: int = 24,
    title: str = "",
) -> Figure:
    """The images on which the model was wrong and most sure of it, the surest first.

    Args:
      images: (n, height, width), or with a last axis of 1 or 3 channels. Each is scaled to its own
        darkest and brightest value, so standardised images will do.
      labels: the true classes; examples whose label is negative (ignored) are passed over.
      predictions: the predicted ones.
      confidences: the probabilities that the model gave to its predictions.
      path: the PNG file, if it is to be saved.
      classes: the classes' names; by default their numbers.
      count: at most how many images.
      title: above the grid.

    Raises:
      ValueError: shapes that do not fit.

    >>> figure = plot_examples(np.eye(8)[None], np.array([1]), np.array([7]), np.array([0.9]))
    >>> figure.axes[0].get_title()
    '1 → 7\\n90%'
    """
    pictures, truth, taken, sure = (np.asarray(a) for a in (images, labels, predictions, confidences))
    if pictures.ndim == 4 and pictures.shape[-1] == 1:
        pictures = pictures[..., 0]
    if pictures.ndim != 3 and not (pictures.ndim == 4 and pictures.shape[-1] == 3):
        raise ValueError(
            "images must be (n, height, width), with 1 or 3 channels last or none, got the shape "
            f"{np.shape(images)}: reshape them"
        )
    for name, array in (("labels", truth), ("predictions", taken), ("confidences", sure)):
        if array.shape != pictures.shape[:1]:
            raise ValueError(f"{name} must have the shape {pictures.shape[:1]}, got {array.shape}")
    wrong = np.flatnonzero((truth != taken) & (truth >= 0))
    # Stable: equal ones in the order of the data. NaN is the least sure.
    chosen = wrong[np.argsort(-np.nan_to_num(sure[wrong].astype(float), nan=-1), kind="stable")][:count]
    names = _names(classes, int(max(truth.max(initial=0), taken.max(initial=0))) + 1)
    heading = f"{len(wrong)} wrong of {(truth >= 0).sum()}"
    if len(chosen):
        heading += f", the surest {len(chosen)}: true → predicted"
    texts = [f"{names[truth[i]]} → {names[taken[i]]}" for i in chosen]
    long = any(len(text) > 16 for text in texts)
    rows = max(math.ceil(len(chosen) / 8), 1)
    columns = max(math.ceil(len(chosen) / rows), 4)
    figure = _figure(1.25 * columns + 0.2, (1.75 if long else 1.6) * rows + 0.5, title, heading)
    for ax in figure.subplots(rows, columns, squeeze=False).flat:
        ax.set_axis_off()
    for ax, i, text in zip(figure.axes, chosen, texts, strict=False):
        picture = np.nan_to_num(pictures[i].astype(float), posinf=0, neginf=0)
        picture -= picture.min()
        ax.imshow(picture / max(picture.max(), 1e-300), cmap="gray", vmin=0, vmax=1)
        text = text.replace(" → ", "\n→ ") if long else text
        ax.set_title(f"{text}\n{sure[i]:.0%}", fontsize=8, parse_math=False)
    return _saved(figure, path)


def _figure(width: float, height: float, *titles: str) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install nnkit[experiments]") from error
    figure = Figure((width, height), dpi=120, layout=ConstrainedLayoutEngine(w_pad=0.1))
    FigureCanvasAgg(figure)
    if text := "\n".join(filter(None, titles)):
        figure.suptitle(text, fontsize=11, parse_math=False)
    return figure


def _saved(figure: Figure, path: str | os.PathLike[str] | None) -> Figure:
    if path is not None:
        png = io.BytesIO()
        figure.savefig(png, format="png")
        write_atomically(path, png.getvalue())
    return figure


def _names(classes: Sequence[str] | None, n: int) -> list[str]:
    if classes is None:
        return [str(i) for i in range(n)]
    if len(classes) < n:
        raise ValueError(f"classes has {len(classes)} names, and there is a class {n - 1}")
    return [name if len(name) <= 18 else f"{name[:17]}…" for name in map(str, classes)]


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
            notes.append(f"{label}: not finite, first in epoch {epochs[~finite][0]:g}")
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
        ax.axvline(marked[0], color=_GREY, linestyle=":", zorder=0, label=f"best, epoch {best}: {text}")
        ax.plot(*marked, "o", markersize=9, markerfacecolor="none", markeredgecolor=_GREY)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.set(xlabel="epoch", ylabel=name.replace("_", " "))
    ax.set_title("\n".join(notes), color=_RED, fontsize=9)
    ax.grid(color="#e5e5e5", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    if len(seen) and len(curves) > 1:
        ax.legend(frameon=False, fontsize=9)
