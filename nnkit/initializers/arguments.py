"""What the initializers share: their arguments checked, and the key of those that draw."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Float

from nnkit.checks import check_key, is_static_number
from nnkit.types import Initializer

__all__ = ["Scalar", "check_scale", "checked", "drawn"]

Scalar: TypeAlias = float | Float[Array, ""]


def drawn(what: str, draw: Callable[..., Array]) -> Initializer:
    """``draw(key, shape, dtype)`` behind the checks of what it is called with."""

    def init(key, shape, dtype=jnp.float32):
        check_key(key, what)
        return draw(key, checked(what, shape, dtype), dtype)

    return init


def checked(what, shape, dtype) -> tuple[int, ...]:
    """``shape`` as a tuple, where ``dtype`` is one that a parameter can have."""
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{what} needs a floating-point dtype and got {jnp.dtype(dtype).name}: parameters are "
            "differentiated, pass jnp.float32 or jnp.bfloat16"
        )
    return (shape,) if isinstance(shape, int) else tuple(shape)


def check_scale(what, argument, value) -> None:
    if is_static_number(value):
        if not 0 <= value < math.inf:
            raise ValueError(f"{what} needs a finite {argument} of at least 0, got {argument}={value}")
    elif not hasattr(value, "dtype"):
        raise TypeError(f"{what} needs a number for {argument}, got {argument}={value!r}")
