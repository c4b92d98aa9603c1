"""Every optimizer with its options, to be built of nnkit or of optax: ``ROWS[name](optim)``."""

from __future__ import annotations

from nnkit.testing.table.optimizers import IGNORE, LOW
from nnkit.testing.table.optimizers import OPTAX as ROWS

__all__ = ["IGNORE", "LOW", "ROWS"]
