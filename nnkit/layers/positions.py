"""Positions that are added to a sequence: learned vectors, or sinusoids."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from nnkit import initializers, ops
from nnkit.checks import LayerError
from nnkit.layers.attention_cache import check_room, next_index
from nnkit.layers.embedding import rows
from nnkit.layers.lift import float_input, param, positive_int
from nnkit.types import Array, Initializer, Layer, Params, Spec, State

__all__ = ["learned_positions", "sinusoidal_positions"]


def learned_positions(
    max_length: int,
    *,
    embedding_init: Initializer = initializers.normal(0.02),  # noqa: B008 - a pure function
    cache: bool = False,
) -> Layer:
    """Adds a learned vector for each position, ``y_t = x_t + P[t]``.

    Shapes: x and y (batch, time, features) with time up to ``max_length``, ``embedding`` P
    (max_length, features).

    Args:
      max_length: how many positions there are.
      embedding_init: makes P; by default N(0, 0.02²), GPT-2's and BERT's.
      cache: whether calls with train=False go on where the last one ended; the state then holds the
        ``index``. Past ``max_length`` they raise, and in compiled code give NaN.

    Raises:
      LayerError: for a sequence longer than ``max_length``.

    Source: Gehring et al. 2017, "Convolutional sequence to sequence learning"; Radford et al. 2019 (GPT-2).

    >>> layer = layers.learned_positions(3, cache=True)
    >>> params, state = layer.init(jax.random.key(0), jnp.zeros((1, 3, 2)))
    >>> whole, _ = layer.apply(params, state, jnp.zeros((1, 3, 2)), train=True)
    >>> first, state = layer.apply(params, state, jnp.zeros((1, 2, 2)), train=False)
    >>> last, state = layer.apply(params, state, jnp.zeros((1, 1, 2)), train=False)
    >>> bool((jnp.concatenate([first, last], 1) == whole).all()), int(state["index"])
    (True, 3)
    """
    max_length = positive_int(max_length, "learned_positions(max_length)")

    def init(key: Array, x: Spec, /) -> tuple[Params, State]:
        sequence_input("learned_positions", x)
        table = embedding_init(key, (max_length, x.shape[-1]), x.dtype)
        return {"embedding": table}, _start(cache)

    def apply(
        params: Params, state: State, x: Any, *, key: Array | None = None, train: bool
    ) -> tuple[Any, State]:
        sequence_input("learned_positions", x)
        length = x.shape[1]
        shape = (max_length, x.shape[-1])
        table = param("learned_positions", params, "embedding", shape, f"its input has shape {x.shape}")
        if train or not cache:
            check_room("learned_positions", 0, length, max_length)
            return x + table[:length], state
        index = next_index("learned_positions", state, length, max_length)
        return x + rows(table, index + jnp.arange(length, dtype=index.dtype)), {"index": index + length}

    return Layer(init, apply, "learned_positions_")


def sinusoidal_positions(*, base: float | Array = 10000.0, cache: bool = False) -> Layer:
    """Adds sines and cosines of each position, ``y_t = x_t + ops.sinusoidal(t)``.

    Shapes: x and y (batch, time, features); no parameters.

    Args:
      base: the wavelengths go from 2π to 2π·base.
      cache: whether calls with train=False go on where the last one ended; the state then holds the ``index``.

    Source: Vaswani et al. 2017, "Attention is all you need", section 3.5.

    >>> y, _ = layers.sinusoidal_positions().apply({}, {}, jnp.zeros((1, 2, 2)), train=False)
    >>> print(np.asarray(y).round(2))
    [[[0.   1.  ]
      [0.84 0.54]]]
    """

    def init(key: Array, x: Spec, /) -> tuple[Params, State]:
        sequence_input("sinusoidal_positions", x)
        return {}, _start(cache)

    def apply(
        params: Params, state: State, x: Any, *, key: Array | None = None, train: bool
    ) -> tuple[Any, State]:
        sequence_input("sinusoidal_positions", x)
        positions = jnp.arange(x.shape[1], dtype=jnp.int32)
        if cache and not train:
            index = next_index("sinusoidal_positions", state, x.shape[1])
            positions, state = index + positions, {"index": index + x.shape[1]}
        return x + ops.sinusoidal(positions, x.shape[-1], base=base, dtype=x.dtype), state

    return Layer(init, apply, "sinusoidal_positions_")


def _start(cache: bool) -> State:
    return {"index": jnp.zeros((), jnp.int32)} if cache else {}


def sequence_input(layer: str, x: Any) -> Any:
    """Returns ``x`` if it is a floating array (or spec) of three axes, raises otherwise."""
    if len(float_input(layer, x).shape) != 3:
        raise LayerError(layer, f"takes (batch, time, features), got shape {x.shape}")
    return x
