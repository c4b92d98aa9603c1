"""The equivalence table: every function that has a counterpart elsewhere, with the bound it is held to.

A row is one line, or one small function, in the file of its family.
"""

from collections.abc import Iterator

from nnkit.testing.table import activations, layers, losses, optimizers, optimizers_torch, schedules
from nnkit.testing.table.row import Bound, Row

__all__ = ["Bound", "Row", "rows"]


def rows() -> Iterator[Row]:
    """Every row of every family; nothing is computed and no oracle imported."""
    for family in (optimizers, optimizers_torch, schedules, losses, activations, layers):
        yield from family.rows()
