"""Dropout."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from nnkit.checks import LayerError, check_key, check_probability, is_static_number
from nnkit.layers.lift import float_input
from nnkit.types import Array, Layer, Params, Spec, State

__all__ = ["dropout", "keep_mask"]


def dropout(rate: float | Array, *, scale_at: Literal["train", "test"] = "train") -> Layer:
    """Sets each element to 0 with probability ``rate`` while training.

    With keep probability q = 1 - rate and a mask m of independent Bernoulli(q) draws:

    - ``scale_at="train"`` (inverted dropout, as Flax and PyTorch): training y = m x / q, test y = x.
    - ``scale_at="test"`` (the lecture's, and the paper's): training y = m x, test y = q x.

    Args:
      rate: the probability of dropping, in [0, 1); may be a traced scalar.
      scale_at: when the expectation is put right.

    Raises:
      ValueError: for a rate outside [0, 1).
      LayerError: without a key when train=True.

    Source: Srivastava et al. 2014, "Dropout: a simple way to prevent neural networks from
    overfitting".

    >>> layer = layers.dropout(0.5)
    >>> y, _ = layer.apply({}, {}, jnp.ones((2, 4)), key=jax.random.key(0), train=True)
    >>> sorted(set(y.ravel().tolist()))
    [0.0, 2.0]
    >>> bool((layer.apply({}, {}, jnp.ones((2, 4)), train=False)[0] == 1).all())
    True
    """
    check_probability(rate, "dropout(rate)")
    if scale_at not in ("train", "test"):
        raise ValueError(f"dropout(scale_at=...) must be 'train' or 'test', got {scale_at!r}")
    off = is_static_number(rate) and float(rate) == 0.0

    def init(key: Array, x: Spec, /) -> tuple[Params, State]:
        return {}, {}

    def apply(
        params: Params, state: State, x: Any, *, key: Array | None = None, train: bool
    ) -> tuple[Any, State]:
        float_input("dropout", x)
        keep = jnp.asarray(1 - rate, x.dtype)
        if not train:
            return (x if off or scale_at == "train" else x * keep), state
        if off:
            return x, state
        if key is None:
            raise LayerError("dropout", "needs a key when train=True: pass apply(..., key=key)")
        check_key(key, "dropout.apply")
        if scale_at == "train":
            # A traced rate may be 1: nothing is kept, and 1/0 would turn the gradient into NaN.
            x = x * jnp.where(keep > 0, 1 / jnp.where(keep > 0, keep, 1), 0)
        return jnp.where(keep_mask(key, rate, x.shape), x, jnp.zeros((), x.dtype)), state

    return Layer(init, apply, "dropout_")


def keep_mask(key: Array, rate: float | Array, shape: tuple[int, ...]) -> Array:
    """Independent bools that are False with probability ``rate``.

    Random bits are half the cost of dropout on a CPU, so as few are drawn for each element as the
    rate can be written in exactly: 1 for 1/2, 2 for multiples of 1/4, then 4, 8 and 16, else 32 (the
    rate is then met to 2⁻³³, or to float32's precision where it is traced).

    >>> abs(float(keep_mask(jax.random.key(0), 0.25, (1000, 8)).mean()) - 0.75) < 0.02
    True
    """
    bits = next(
        (b for b in (1, 2, 4, 8, 16) if is_static_number(rate) and float(rate * 2**b).is_integer()), 32
    )
    if bits == 32:
        return jax.random.bits(key, shape, jnp.uint32) >= _threshold(rate)
    # Whole words are drawn and cut up: jax.random.bits(..., uint8) throws three quarters away.
    per_word = 32 // bits
    *batch, last = shape or (1,)
    words = jax.random.bits(key, (*batch, -(-last // per_word)), jnp.uint32)
    parts = (words[..., None] >> (bits * jnp.arange(per_word, dtype=jnp.uint32))) & jnp.uint32(2**bits - 1)
    parts = parts.reshape(*batch, words.shape[-1] * per_word)[..., :last]
    return (parts >= jnp.uint32(round(rate * 2**bits))).reshape(shape)


def _threshold(rate: float | Array) -> Array:
    if is_static_number(rate):
        return jnp.asarray(min(round(rate * 2**32), 2**32 - 1), jnp.uint32)
    # 2³² - 2⁸ is the largest float32 that fits uint32; it stands for a rate of 1.
    return jnp.clip(jnp.asarray(rate, jnp.float32) * 2.0**32, 0, 2.0**32 - 2.0**8).astype(jnp.uint32)
