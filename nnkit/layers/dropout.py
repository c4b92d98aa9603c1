"""Dropout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from nnkit.checks import LayerError, check_key, check_probability, is_static_number
from nnkit.layers.lift import float_input
from nnkit.modes import draws
from nnkit.types import Array, Layer, Params, Spec, State

__all__ = ["dropout", "dropping", "inverse", "keep_mask", "noisy"]


def dropout(
    rate: float | Array, *, scale_at: Literal["train", "test"] = "train", broadcast_dims: Sequence[int] = ()
) -> Layer:
    """Sets each element to 0 with probability ``rate`` while training.

    With keep probability q = 1 - rate and a mask m of independent Bernoulli(q) draws:

    - ``scale_at="train"`` (inverted dropout, as Flax and PyTorch): training y = m x / q, test y = x.
    - ``scale_at="test"`` (the lecture's, and the paper's): training y = m x, test y = q x.

    Args:
      rate: the probability of dropping, in [0, 1); may be a traced scalar.
      scale_at: when the expectation is put right.
      broadcast_dims: the axes of x along which one draw stands for all (Flax's): with (1,), an element
        of a sequence (batch, time, channels) is dropped at all times or at none.

    Raises:
      ValueError: for a rate outside [0, 1).
      LayerError: without a key when train=True; for axes that x has not.

    Source: Srivastava et al. 2014, "Dropout: a simple way to prevent neural networks from
    overfitting".

    >>> layer = layers.dropout(0.5)
    >>> y, _ = layer.apply({}, {}, jnp.ones((2, 4)), key=jax.random.key(0), train=True)
    >>> sorted(set(y.ravel().tolist()))
    [0.0, 2.0]
    >>> bool((layer.apply({}, {}, jnp.ones((2, 4)), train=False)[0] == 1).all())
    True
    """
    if scale_at not in ("train", "test"):
        raise ValueError(f"dropout(scale_at=...) must be 'train' or 'test', got {scale_at!r}")

    def drawn(x: Array) -> tuple[int, ...]:
        wrong = [d for d in broadcast_dims if not -x.ndim <= d < x.ndim]
        if wrong:
            raise LayerError("dropout", f"has broadcast_dims={wrong} for input of shape {x.shape}")
        shared = {d % x.ndim for d in broadcast_dims}
        return tuple(1 if a in shared else n for a, n in enumerate(x.shape))

    return dropping("dropout", rate, drawn, scale_at)


def dropping(
    kind: str,
    rate: float | Array,
    drawn: Callable[[Array], tuple[int, ...]],
    scale_at: Literal["train", "test"] = "train",
) -> Layer:
    """Dropout whose mask has the shape ``drawn(x)`` and broadcasts to x; ``kind`` is its name in errors."""

    def testing(x: Array) -> Array:
        return x if scale_at == "train" else x * jnp.asarray(1 - rate, x.dtype)

    def training(key: Array, x: Array) -> Array:
        if scale_at == "train":
            x = x * inverse(1 - rate).astype(x.dtype)
        return jnp.where(keep_mask(key, rate, drawn(x)), x, jnp.zeros((), x.dtype))

    check_probability(rate, f"{kind}(rate)")
    return noisy(kind, training, testing, off=is_static_number(rate) and float(rate) == 0.0)


def noisy(
    kind: str,
    training: Callable[[Array, Array], Array],
    testing: Callable[[Array], Array] = lambda x: x,
    *,
    off: bool = False,
    samples: bool = True,
) -> Layer:
    """A layer without parameters that draws random numbers in training.

    Args:
      kind: its name in errors.
      training: ``training(key, x)`` is the output when train=True; the key has been checked.
      testing: ``testing(x)`` is the output otherwise.
      off: whether it is the identity in both modes, and needs no key.
      samples: whether it draws in the mode of Monte-Carlo dropout too.
    """

    def init(key: Array, x: Spec, /) -> tuple[Params, State]:
        float_input(kind, x)
        return {}, {}

    def apply(
        params: Params, state: State, x: Any, *, key: Array | None = None, train: bool
    ) -> tuple[Any, State]:
        float_input(kind, x)
        if off:
            return x, state
        if not (draws(train) if samples else train):
            return testing(x), state
        if key is None:
            raise LayerError(kind, "needs a key when train=True: pass apply(..., key=key)")
        check_key(key, f"{kind}.apply")
        return training(key, x), state

    return Layer(init, apply, f"{kind}_")


def inverse(keep: float | Array) -> Array:
    """1/keep, and 0 with derivative 0 where keep is 0: a traced rate may be 1, when nothing is kept."""
    keep = jnp.asarray(keep)
    some = keep > 0
    return jnp.where(some, 1 / jnp.where(some, keep, 1), 0)


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
