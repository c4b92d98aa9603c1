"""The last act of a step: adding the update to the parameters."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array

from nnkit.optim.leafwise import leafwise
from nnkit.types import PyTree

__all__ = ["apply_updates"]


def apply_updates(params: PyTree, updates: PyTree) -> PyTree:
    """The parameters after a step, θ + u, in the parameters' dtypes (optax's ``apply_updates``).

    The sum is taken in the wider of the two dtypes and rounded once. A parameter without an update
    (None) stays as it is.

    Raises:
      ValueError: where the trees or the shapes differ, naming the path.
      TypeError: for parameters that are not floating-point.

    >>> params = optim.apply_updates({"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([0.5, -0.5])})
    >>> params["w"].tolist()
    [1.5, 1.5]
    """

    def leaf(u: Array | None, p: Any) -> tuple[Any]:
        if u is None or p is None:
            return (p,)
        return ((p + u).astype(p.dtype),)

    return leafwise("apply_updates", leaf, {"updates": updates}, {"params": params}, none=True)[0]
