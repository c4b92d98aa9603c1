"""The pictures of what a model gets wrong: its confusion matrix, its worst mistakes.

Each function returns a matplotlib ``Figure`` and saves it as a PNG where it is given a path. Without
pyplot there is no need of a display, no global state, and no figure that stays in memory.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Int, Num, Shaped

from nnkit.diagnose.figure import BLUE, new_figure, saved

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_confusion", "plot_examples"]

# Classes up to which the cells of a confusion matrix have room for counts, and its axes for every name.
_COUNTED, _NAMED = 20, 60


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
    figure = new_figure(side + 3.4, side + 1.4, title, heading)
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
    bars.barh(np.arange(n), shares.diagonal(), color=BLUE)
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
    return saved(figure, path)


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
    figure = new_figure(1.25 * columns + 0.2, (1.75 if long else 1.6) * rows + 0.5, title, heading)
    for ax in figure.subplots(rows, columns, squeeze=False).flat:
        ax.set_axis_off()
    for ax, i, text in zip(figure.axes, chosen, texts, strict=False):
        picture = np.nan_to_num(pictures[i].astype(float), posinf=0, neginf=0)
        picture -= picture.min()
        ax.imshow(picture / max(picture.max(), 1e-300), cmap="gray", vmin=0, vmax=1)
        text = text.replace(" → ", "\n→ ") if long else text
        ax.set_title(f"{text}\n{sure[i]:.0%}", fontsize=8, parse_math=False)
    return saved(figure, path)


def _names(classes: Sequence[str] | None, n: int) -> list[str]:
    if classes is None:
        return [str(i) for i in range(n)]
    if len(classes) < n:
        raise ValueError(f"classes has {len(classes)} names, and there is a class {n - 1}")
    return [name if len(name) <= 18 else f"{name[:17]}…" for name in map(str, classes)]
