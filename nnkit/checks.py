"""Checks of what a user passes in, and the wording of what is raised.

A message names the argument and the layer's path, what arrived, and what to write instead. All
checks here look at Python values, shapes and dtypes only, so they cost nothing in compiled code.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

__all__ = ["LayerError", "check_key", "check_probability", "is_static_number", "unknown_name"]


class LayerError(ValueError):
    """An error that knows in which layer it arose.

    A layer raises it with its own name; each combinator on the way out puts the child's name in
    front, so the text ends up with the whole path: ``encoder/dropout_1 needs a key ...``.
    """

    def __init__(self, layer: str, message: str, path: tuple[str, ...] = ()):
        self.layer, self.message, self.path = layer, message, path
        where = "/".join(path) if path else layer.rstrip("_")
        super().__init__(f"{where} {message}")

    def __reduce__(self) -> tuple[Any, ...]:
        return LayerError, (self.layer, self.message, self.path)

    def within(self, child: str) -> LayerError:
        """The same error, seen from one combinator further out."""
        return LayerError(self.layer, self.message, (child, *self.path))


def check_key(key: Any, what: str) -> None:
    """Raises unless ``key`` is one typed PRNG key; ``what`` begins the message."""
    dtype = getattr(key, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        if key.shape != ():
            raise ValueError(
                f"{what} takes one key and got an array of keys of shape {key.shape}: pass one of "
                "them, or map over them with jax.vmap"
            )
        return
    if dtype == np.uint32 and getattr(key, "shape", None) == (2,):
        raise TypeError(
            f"{what} got an old-style uint32 key: make it with jax.random.key(seed), or convert "
            "it with jax.random.wrap_key_data(key)"
        )
    if isinstance(key, int | np.integer):
        raise TypeError(f"{what} got the number {key} for a key: pass jax.random.key({key})")
    raise TypeError(f"{what} needs a PRNG key and got {type(key).__name__}: pass jax.random.key(seed)")


def is_static_number(value: Any) -> bool:
    """Whether ``value`` can be compared in Python: a number and not a traced array."""
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def check_probability(value: Any, what: str) -> None:
    """Raises unless ``value`` is in [0, 1) or traced; ``what`` names the argument."""
    if isinstance(value, Tracer):
        return
    if isinstance(value, jax.Array) and value.shape == ():
        value = value.item()
    if not is_static_number(value):
        raise TypeError(f"{what} must be a number in [0, 1), got {value!r}")
    if math.isnan(value) or not 0 <= value < 1:
        raise ValueError(f"{what} must be in [0, 1), got {value}: it is the probability of dropping")


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """The error for a name that is not among ``known``, with the nearest ones.

    >>> print(unknown_name("model", "mpl", ["mlp", "cnn"]))
    unknown model 'mpl'; did you mean 'mlp'? Known: cnn, mlp
    """
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=2, cutoff=0.5)
    hint = f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else "."
    return ValueError(f"unknown {kind} {name!r}{hint} Known: {', '.join(known)}")
