"""What the schedules share: steps and numbers of steps, and shares of them that are exact at the ends."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from nnkit.checks import is_static_number
from nnkit.optim.scalars import Scalar, as_scalar
from nnkit.types import Schedule

__all__ = ["as_boundaries", "as_steps", "cosine_share", "in_int32", "mix", "of_step", "share"]


def of_step(value: Callable[[Any], Any]) -> Schedule:
    """A function of the step as a schedule: its whole numbers and fractions mix, as in optax.

    >>> half = of_step(lambda step: 0.5 * step)
    >>> with jax.numpy_dtype_promotion("strict"):
    ...     float(half(jnp.int32(3)))
    1.5
    """

    @functools.wraps(value)
    def schedule(count: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return value(_as_count(count))

    return schedule


def as_steps(value: Any, name: str, interval: str = "[0, inf)", why: str = "it counts steps") -> Any:
    """A number of steps, through :func:`as_scalar`; a whole one beyond int32 as a float.

    >>> as_steps(-1, "decay_steps")
    Traceback (most recent call last):
    ValueError: decay_steps must be in [0, inf), got -1: it counts steps
    """
    return in_int32(as_scalar(value, name, interval, why))


def as_boundaries(values: Any, name: str, example: str) -> list[Any]:
    """Steps in increasing order, from 0 on, or an error that names the argument.

    >>> as_boundaries([3, 2], "boundaries", "[2, 3]")
    Traceback (most recent call last):
    ValueError: boundaries must increase, got 2 after 3: write boundaries=[2, 3]
    """
    try:
        values = list(values)
    except TypeError:
        raise TypeError(f"{name} must be a list of steps, got {values!r}: write {name}={example}") from None
    steps = [as_steps(x, f"{name}[{i}]") for i, x in enumerate(values)]
    for before, after in itertools.pairwise(steps):
        if is_static_number(before) and is_static_number(after) and not before < after:
            raise ValueError(f"{name} must increase, got {after} after {before}: write {name}={example}")
    return steps


def share(part: Any, whole: Scalar) -> Float[Array, "..."]:
    """``part / whole`` within [0, 1]: exactly 0 from 0 down, exactly 1 from ``whole`` up.

    Compiled, a division by a constant is a product with its reciprocal, and 47/47 is 0.99999994.

    >>> jax.jit(lambda x: share(x, 47))(jnp.array([-1, 0, 47, 48])).tolist()
    [0.0, 0.0, 1.0, 1.0]
    >>> share(0, 0).item()
    1.0
    """
    # Times 1.0, for float64 where that is on: int32 divided by a plain number is float32 even there.
    inside = jnp.clip(part, 0, whole) * 1.0
    positive = whole if is_static_number(whole) and whole > 0 else jnp.where(whole > 0, whole, 1)
    return jnp.where(part >= whole, 1.0, inside / positive)


def cosine_share(part: Any, whole: Scalar) -> Float[Array, "..."]:
    """(1 − cos(π·part/whole))/2 within [0, 1], to the last digits where it is small, too.

    >>> [round(float(cosine_share(part, 4)), 3) for part in range(5)]
    [0.0, 0.146, 0.5, 0.854, 1.0]
    """
    return jnp.square(jnp.sin(np.pi / 2 * share(part, whole)))


def mix(start: Scalar, end: Scalar, weight: Array) -> Float[Array, "..."]:
    """From ``start`` where the weight is 0 to ``end`` where it is 1, exact at both.

    >>> mix(0.1, 0.3, jnp.array([0.0, 0.5, 1.0])).tolist()
    [0.10000000149011612, 0.20000000298023224, 0.30000001192092896]
    """
    return start * (1 - weight) + end * weight


def _as_count(count: Any) -> Any:
    """A step as a plain number or an array of signed integers, whose differences do not wrap."""
    if isinstance(count, np.integer):
        count = int(count)
    elif hasattr(count, "dtype") and jnp.issubdtype(count.dtype, jnp.integer) and count.dtype.itemsize < 8:
        count = jnp.asarray(count, jnp.int32)
    return in_int32(count)


def in_int32(value: Any) -> Any:
    """A plain whole number that int32 cannot hold as a float, everything else as it is.

    >>> in_int32(10**6), in_int32(10**10)
    (1000000, 10000000000.0)
    """
    if isinstance(value, int | np.integer) and not -(2**31) <= value < 2**31:
        return float(value)
    return value
