"""Where optimizers walk on functions of two numbers: each walk is one compiled ``lax.scan``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from nnkit import optim
from nnkit.types import GradientTransformation

__all__ = ["DECAYS", "RATES", "STRIDE", "SURFACES", "Surface", "Walk", "momentum_walks", "walk", "walks"]

RATES = np.logspace(-4, 1, 31)
"""Six to a decade; on each surface an optimizer has the one that brings it down fastest."""
STRIDE = 0.15
"""The longest step of a walk that is drawn, as a share of the picture's diagonal."""
DECAYS = (0.2, 0.7, 0.9, 0.99)
"""The lecture's momenta."""


class Surface(NamedTuple):
    """A function of a point (x, y) and how it is walked on and drawn.

    Attributes:
      f: takes an array of shape (2,).
      start: where every walk begins.
      minima: the points of the lowest value.
      steps: the length of a walk.
      x, y: the part of the plane that is drawn.
    """

    f: Callable[[Array], Array]
    start: tuple[float, float]
    minima: tuple[tuple[float, float], ...]
    steps: int
    x: tuple[float, float]
    y: tuple[float, float]


def valley(p: Float[Array, "2"]) -> Float[Array, ""]:
    """A quadratic whose curvature is 40 times larger across than along."""
    return 0.5 * (p[0] ** 2 + 40 * p[1] ** 2)


def saddle(p: Float[Array, "2"]) -> Float[Array, ""]:
    """(x² − y²)/2 near the origin, and y⁴/8 to keep the way down finite: it ends at y = ±√2, f = −½."""
    return 0.5 * (p[0] ** 2 - p[1] ** 2) + p[1] ** 4 / 8


def rosenbrock(p: Float[Array, "2"]) -> Float[Array, ""]:
    """A flat, bent valley between steep walls; Rosenbrock, 1960."""
    return (1 - p[0]) ** 2 + 100 * (p[1] - p[0] ** 2) ** 2


def beale(p: Float[Array, "2"]) -> Float[Array, ""]:
    """A plateau with a ridge along the axes; Beale, 1958."""
    return sum(
        ((value - p[0] * (1 - p[1] ** power)) ** 2 for value, power in ((1.5, 1), (2.25, 2), (2.625, 3))),
        jnp.zeros((), p.dtype),
    )


SURFACES = {
    "narrow valley": Surface(valley, (-9.0, 1.0), ((0.0, 0.0),), 60, (-10, 3), (-3, 3)),
    "saddle": Surface(saddle, (-2.0, 1e-3), ((0.0, 2**0.5), (0.0, -(2**0.5))), 60, (-2.4, 1.4), (-0.9, 2.1)),
    "Rosenbrock": Surface(rosenbrock, (-0.7, 1.9), ((1.0, 1.0),), 300, (-1.8, 1.6), (-0.5, 2.3)),
    "Beale": Surface(beale, (0.7, 1.4), ((3.0, 0.5),), 120, (-0.5, 3.9), (-1.5, 1.9)),
}


class Walk(NamedTuple):
    """One walk.

    Attributes:
      rate: the learning rate.
      points: the start and where each step led, (steps + 1, 2).
      values: the function there, less its minimum.
    """

    rate: float
    points: Float[np.ndarray, "points 2"]
    values: Float[np.ndarray, " points"]


def walk(
    f: Callable[[Array], Array], optimizer: GradientTransformation, start: Float[Array, "2"], steps: int
) -> Float[Array, "points 2"]:
    """The start and where each of ``steps`` updates leads, as one scan.

    >>> f = lambda p: 0.5 * jnp.sum(p**2)
    >>> walk(f, optim.sgd(0.5), jnp.array([8.0, 4.0]), 2).tolist()
    [[8.0, 4.0], [4.0, 2.0], [2.0, 1.0]]
    """

    def step(carry: Any, _: None) -> tuple[Any, Array]:
        point, opt_state = carry
        updates, opt_state = optimizer.update(jax.grad(f)(point), opt_state, point)
        point = optim.apply_updates(point, updates)
        return (point, opt_state), point

    _, points = jax.lax.scan(step, (start, optimizer.init(start)), None, length=steps)
    return jnp.concatenate([start[None], points])


def walks(
    surface: Surface, optimizers: dict[str, Callable[[Any], GradientTransformation]], steps: int | None = None
) -> dict[str, Walk]:
    """A walk of each optimizer, at the rate of :data:`RATES` that brings it down fastest.

    All rates are walked at once, as one program. The fastest is the one with the lowest mean of
    log(f − minimum) over the walk: that asks for an early descent and for an exact end alike, where
    the last value alone would choose the luckiest jump. Only walks that an eye can follow are
    compared, those that stay in the picture with no step longer than :data:`STRIDE` of it.
    """
    lowest, highest = np.array([surface.x, surface.y]).T
    count = surface.steps if steps is None else steps
    found = {}
    for name, make in optimizers.items():
        walked = _at_all_rates(surface.f, make, surface.minima[0], jnp.array(surface.start), count)
        # The numbers of a walk that has diverged would overflow below.
        points, values = (np.nan_to_num(np.clip(a, -1e30, 1e30), nan=1e30) for a in jax.device_get(walked))
        inside = ((points >= lowest) & (points <= highest)).all(axis=(1, 2))
        longest = np.linalg.norm(np.diff(points.astype(float), axis=1), axis=2).max(axis=1, initial=0)
        # Below float32's resolution of a height of 1 nothing is left to compare.
        heights = np.log(np.maximum(values, 1e-7)).mean(axis=1)
        best = int(
            np.lexsort((heights, ~(inside & (longest <= STRIDE * np.linalg.norm(highest - lowest)))))[0]
        )
        found[name] = Walk(float(RATES[best]), points[best], values[best])
    return found


@partial(jax.jit, static_argnums=(0, 1, 2, 4))
def _at_all_rates(
    f: Callable[[Array], Array], make: Any, minimum: tuple[float, float], start: Array, steps: int
) -> tuple[Array, Array]:
    points = jax.vmap(lambda rate: walk(f, make(rate), start, steps))(jnp.asarray(RATES, start.dtype))
    return points, _heights(f, minimum, points)


def momentum_walks(surface: Surface, rate: float, steps: int) -> dict[float, Walk]:
    """Momentum with each of :data:`DECAYS` at one rate, all at once: the decay is what is mapped over."""
    points, values = _at_all_decays(surface.f, surface.minima[0], jnp.array(surface.start), rate, steps)
    return {
        decay: Walk(rate, np.asarray(p), np.asarray(v))
        for decay, p, v in zip(DECAYS, points, values, strict=True)
    }


@partial(jax.jit, static_argnums=(0, 1, 4))
def _at_all_decays(
    f: Callable[[Array], Array], minimum: tuple[float, float], start: Array, rate: Any, steps: int
) -> tuple[Array, Array]:
    decays = jnp.array(DECAYS, start.dtype)
    points = jax.vmap(lambda decay: walk(f, optim.momentum(rate, decay), start, steps))(decays)
    return points, _heights(f, minimum, points)


def _heights(f: Callable[[Array], Array], minimum: tuple[float, float], points: Array) -> Array:
    return jax.vmap(jax.vmap(f))(points) - f(jnp.array(minimum, points.dtype))
