"""Embeddings: a table of vectors looked up by integers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from nnkit import initializers, ops
from nnkit.checks import LayerError
from nnkit.layers.lift import float_input, param, positive_int
from nnkit.types import Array, Initializer, Layer, Params, Spec, State

__all__ = ["attend", "embedding"]


def embedding(
    num_embeddings: int,
    features: int,
    *,
    embedding_init: Initializer = initializers.lecun_normal(in_axis=1, out_axis=0, truncated=False),  # noqa: B008
    dtype: Any = jnp.float32,
    padding_idx: int | None = None,
) -> Layer:
    """Row ``x`` of a learned table, ``y = E[x]``.

    Shapes: x (batch, ...) of integers, ``embedding`` E (num_embeddings, features), y (batch, ..., features).
    An id outside [0, num_embeddings) raises where its value is known; in compiled code, which cannot
    raise, its row is NaN (a negative one's too: it is not counted from the end) and it reaches no gradient.
    The same table as an output layer is :func:`attend`.

    Args:
      num_embeddings: how many ids there are.
      features: the length of a row.
      embedding_init: makes the table; by default N(0, 1/features), Flax's. PyTorch's is ``normal(1.0)``.
      dtype: of the table, and so of the output: integers have none to give.
      padding_idx: the id of padding; its row starts at 0 and looking it up gives it no gradient (PyTorch's).

    Raises:
      LayerError: for input that is not whole numbers, and for ids that the table does not have.

    Source: Flax's ``Embed``.

    >>> layer = layers.embedding(3, 2)
    >>> params = {"embedding": jnp.array([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]])}
    >>> layer.apply(params, {}, jnp.array([[2, 0]]), train=False)[0].tolist()
    [[[4.0, 5.0], [0.0, 1.0]]]
    """
    num_embeddings = positive_int(num_embeddings, "embedding(num_embeddings)")
    features = positive_int(features, "embedding(features)")
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(f"embedding(dtype=...) must be floating-point, got {jnp.dtype(dtype)}")
    if padding_idx is not None and not 0 <= padding_idx < num_embeddings:
        raise ValueError(f"embedding(padding_idx=...) must be in [0, {num_embeddings}), got {padding_idx}")

    def init(key: Array, x: Spec, /) -> tuple[Params, State]:
        _integers(x)
        table = embedding_init(key, (num_embeddings, features), dtype)
        return {"embedding": table if padding_idx is None else table.at[padding_idx].set(0)}, {}

    def apply(
        params: Params, state: State, x: Any, *, key: Array | None = None, train: bool
    ) -> tuple[Any, State]:
        x = _in_range(_integers(x), num_embeddings)
        shape = (num_embeddings, features)
        table = param("embedding", params, "embedding", shape, f"it was made as embedding{shape}")
        y = rows(table, x)
        if padding_idx is not None:
            y = jnp.where((x == padding_idx)[..., None], jax.lax.stop_gradient(y), y)
        return y, state

    return Layer(init, apply, "embedding_")


def attend(params: Params, x: Array) -> Array:
    """The product of ``x`` with each row of an embedding, ``y = x Eᵀ``: logits from a tied output matrix.

    Shapes: x (batch, ..., features), y (batch, ..., num_embeddings). It is a function of an embedding's
    parameters, which :func:`wire` gives as ``net.child.params``. Half precision is summed in float32.

    Raises:
      LayerError: where ``params`` are no embedding's, or x has another number of features.

    Source: Press & Wolf 2017, "Using the output embedding to improve language models"; Flax's ``Embed.attend``.

    >>> def forward(net, ids):
    ...     h = net.body(net.embed(ids))
    ...     return layers.attend(net.embed.params, h)
    >>> model = layers.wire(forward, embed=layers.embedding(10, 4), body=layers.dense(4))
    >>> params, state = model.init(jax.random.key(0), jnp.zeros((1, 5), jnp.int32))
    >>> model.apply(params, state, jnp.zeros((2, 5), jnp.int32), train=False)[0].shape
    (2, 5, 10)
    """
    float_input("attend", x)
    rows_of = getattr(params.get("embedding"), "shape", (0,))[0]
    table = param("attend", params, "embedding", (rows_of, x.shape[-1]), f"its input has shape {x.shape}")
    return ops.linear(x, table.T)


def rows(table: Array, ids: Array) -> Array:
    """``table[ids]``, with NaN for ids that it does not have, negative ones among them."""
    return table.at[ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def _integers(x: Any) -> Any:
    dtype = getattr(x, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
        got = type(x).__name__ if dtype is None else f"{dtype} of shape {x.shape}"
        raise LayerError("embedding", f"takes whole numbers, got {got}: write x.astype(jnp.int32)")
    return x


def _in_range(x: Any, num_embeddings: int) -> Array:
    if not isinstance(x, Tracer) and x.size:
        ids = np.asarray(x)
        for found in (ids.min(), ids.max()):
            if not 0 <= found < num_embeddings:
                raise LayerError(
                    "embedding",
                    f"got the id {found} and has a table of {num_embeddings} rows, 0 to {num_embeddings - 1}: "
                    "pass a larger num_embeddings, or map unknown ids to one of its own",
                )
    return jnp.asarray(x)
