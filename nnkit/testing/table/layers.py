"""Layers beside Flax linen's, Flax nnx's and PyTorch's: output, state and the gradients of parameters and input.

A row is one entry in the file of its family: our layer, an input, and for each oracle a module or function
(``layers_oracles``). What is compared, and over how many steps, is ``layers_case``'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import jax.numpy as jnp

from nnkit.testing.table import layers_attention, layers_plain, layers_recurrent, layers_spatial
from nnkit.testing.table.layers_case import Case, measure
from nnkit.testing.table.row import Bound, Row

__all__ = ["ORACLES", "TABLE", "Case", "measure", "rows"]

ORACLES = ("flax", "nnx", "torch")
TABLE: dict[str, Case] = {
    **layers_plain.TABLE,
    **layers_spatial.TABLE,
    **layers_recurrent.TABLE,
    **layers_attention.TABLE,
}


def rows() -> Iterator[Row]:
    """Each layer and oracle in float32 and float64, the largest over its modes and steps."""
    for name, case in TABLE.items():
        for oracle in ORACLES:
            if getattr(case, oracle) is not None:
                for dtype, bound in ((jnp.float32, 1e-5), (jnp.float64, 1e-10)):
                    found = partial(measure, case, oracle, dtype)
                    yield Row("layers", name, oracle, jnp.dtype(dtype).name, Bound(relative=bound), found)
