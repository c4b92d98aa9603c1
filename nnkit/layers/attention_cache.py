"""How far a sequence has come that is decoded piece by piece: an index in the state.

A layer with a cache changes its state at test time, where the others change theirs in training: each call
of ``apply(..., train=False)`` takes the next one or several positions of the sequence. Its parameters are those
of the layer without, so a model is trained without a cache and its parameters go into one with. ``init``
makes the empty cache, for the batch size of its ``x``; a new sequence starts from that state again.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax.core import Tracer

from nnkit.checks import LayerError
from nnkit.layers.lift import param
from nnkit.types import Array, State

__all__ = ["next_index"]


def next_index(layer: str, state: State, length: int, limit: int | None = None) -> Array:
    """The position of the first of ``length`` new ones, raising where they are known to pass ``limit``."""
    index = jnp.asarray(param(layer, state, "index", (), "it counts the positions that were decoded"))
    if limit is not None:
        check_room(layer, index, length, limit)
    return index


def check_room(layer: str, index: int | Array, length: int, limit: int) -> None:
    """Raises where ``index + length`` is known and past ``limit``."""
    before = 0 if isinstance(index, Tracer) else int(index)
    if before + length > limit:
        raise LayerError(
            layer,
            f"has room for {limit} positions and got {length} after {before}: make it larger, or start again "
            "from the state that init made",
        )
