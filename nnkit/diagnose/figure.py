"""A figure without pyplot, and its file."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING

from nnkit.train.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["BLUE", "COLOURS", "GREEN", "GREY", "RED", "new_figure", "saved"]

BLUE, RED, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
COLOURS = (BLUE, RED, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, which the colour-blind can tell apart."""


def new_figure(width: float, height: float, *titles: str) -> Figure:
    """An empty figure of so many inches, with those of the titles that are not empty above it."""
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


def saved(figure: Figure, path: str | os.PathLike[str] | None) -> Figure:
    """The figure, written to ``path`` as a PNG if there is one."""
    if path is not None:
        png = io.BytesIO()
        figure.savefig(png, format="png")
        write_atomically(path, png.getvalue())
    return figure
