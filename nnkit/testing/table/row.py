"""One line of the equivalence table: a function, an oracle, a dtype, a bound, and how to measure."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from nnkit.testing.equivalent import Distance

__all__ = ["Bound", "Row"]


class Bound(NamedTuple):
    """What a distance may be at most; one of the two is None."""

    ulps: int | None = None
    relative: float | None = None

    def holds(self, distance: Distance) -> bool:
        """Whether the distance is within the bound (NaN is not)."""
        if self.ulps is not None:
            return distance.ulps <= self.ulps
        return self.relative is not None and distance.relative <= self.relative

    def __str__(self) -> str:
        return f"{self.ulps} ulp" if self.ulps is not None else f"{self.relative:g}"


class Row(NamedTuple):
    """One comparison.

    Attributes:
      family: "optimizers", "layers", ...
      name: nnkit's function and its options, in short.
      oracle: "optax", "flax" (linen), "nnx" (Flax's), "torch" or "jax".
      dtype: what it is computed in.
      bound: what the tests assert.
      measure: runs the comparison.
    """

    family: str
    name: str
    oracle: str
    dtype: str
    bound: Bound
    measure: Callable[[], Distance]

    @property
    def distribution(self) -> str:
        """What must be installed."""
        return "flax" if self.oracle == "nnx" else self.oracle
