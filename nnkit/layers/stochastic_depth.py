"""Stochastic depth."""

from __future__ import annotations

from typing import Literal

from nnkit.layers.dropout import dropping
from nnkit.types import Array, Layer

__all__ = ["stochastic_depth"]


def stochastic_depth(rate: float | Array, *, mode: Literal["row", "batch"] = "row") -> Layer:
    """Sets a whole example to 0 with probability ``rate`` while training: the last layer of a residual branch.

    ``y = m x / (1 - rate)`` with one Bernoulli(1 - rate) draw m for an example ("row") or for all of them
    ("batch"). An example whose branch is dropped passes its block through the shortcut alone, so that the
    network is shallower for it.

    Shapes: x (batch, ...), y as x.

    Args:
      rate: the probability of dropping, in [0, 1); may be a traced scalar. The paper lets it grow with depth.
      mode: what is dropped together.

    Raises:
      ValueError: for a rate outside [0, 1), for another mode.
      LayerError: without a key when train=True.

    Source: Huang et al. 2016, "Deep networks with stochastic depth"; torchvision's ``StochasticDepth``.

    >>> block = layers.residual(layers.serial(layers.dense(4), layers.relu, layers.stochastic_depth(0.2)))
    >>> params, state = block.init(jax.random.key(0), jnp.zeros((1, 4)))
    >>> block.apply(params, state, jnp.ones((3, 4)), key=jax.random.key(0), train=True)[0].shape
    (3, 4)
    """
    if mode not in ("row", "batch"):
        raise ValueError(f"stochastic_depth(mode=...) must be 'row' or 'batch', got {mode!r}")

    def drawn(x: Array) -> tuple[int, ...]:
        return (x.shape[0] if mode == "row" else 1, *(1,) * (x.ndim - 1))

    return dropping("stochastic_depth", rate, drawn)
