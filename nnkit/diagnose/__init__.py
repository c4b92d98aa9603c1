"""What a run looks like: plots of its curves and its mistakes."""

from nnkit.diagnose.curves import plot_curves, plot_run
from nnkit.diagnose.plots import plot_confusion, plot_examples

__all__ = ["plot_confusion", "plot_curves", "plot_examples", "plot_run"]
