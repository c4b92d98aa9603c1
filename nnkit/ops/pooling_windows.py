"""How the windows of a pool lie on an array, and pooling on a CPU: plain functions of arrays.

XLA's gradient of a maximum over windows searches each window one element at a time, and that of a sum
slides a window over its cotangent; here both are element-wise, which a CPU does many times as fast.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nnkit.types import Array

__all__ = ["Windows", "largest", "lowest", "pick", "place", "spread", "total"]

AT_ONCE = 16
"""Up to how many elements of a window are compared at once; more are reduced axis by axis."""

LONGEST = 64
"""Up to which length of a window, along any axis; the gradients of longer ones are XLA's."""


class Windows(NamedTuple):
    """The windows on the spatial axes of an array (batch, \\*spatial, channels); a tuple for each axis."""

    window: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]

    def output(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """How many windows there are along each axis."""
        return tuple(
            max(0, (n + low + high - k) // s + 1)
            for n, k, s, (low, high) in zip(sizes, self.window, self.strides, self.padding, strict=True)
        )

    @property
    def reach(self) -> tuple[int, ...]:
        """Over how many blocks of ``strides`` elements a window reaches, along each axis."""
        return tuple(-(-k // s) for k, s in zip(self.window, self.strides, strict=True))

    @property
    def axes(self) -> list[Windows]:
        """Windows of one axis each, the last axis first, which reduced in turn reduce these."""
        along = range(len(self.window))

        def one(axis: int) -> Windows:
            return Windows(
                tuple(k if i == axis else 1 for i, k in enumerate(self.window)),
                tuple(s if i == axis else 1 for i, s in enumerate(self.strides)),
                tuple(p if i == axis else (0, 0) for i, p in enumerate(self.padding)),
            )

        return [
            one(i)
            for i in reversed(along)
            if (self.window[i], self.strides[i], self.padding[i]) != (1, 1, (0, 0))
        ]


def lowest(dtype: Any) -> np.ndarray:
    """What no element is smaller than."""
    if jnp.issubdtype(dtype, jnp.inexact):
        return np.asarray(-np.inf, dtype)
    return np.asarray(np.iinfo(dtype).min, dtype)


def largest(x: Array, windows: Windows) -> Array:
    """The largest element of each window.

    By XLA's own loop: it is as fast as element-wise maxima of slices, and its result is computed once
    where XLA would compute those anew within each operation that uses them.
    """
    return _reduced(x, lowest(x.dtype), lax.max, windows)


def pick(t: Array, x: Array, windows: Windows) -> Array:
    """The element of t that stands where the first largest element of x does, for each window."""
    if not _is_fast(x, windows):
        return jax.jvp(lambda x: largest(x, windows), (x,), (t,))[1]
    for stage in _stages(windows):
        elements = _elements(x, stage, lowest(x.dtype))
        y = functools.reduce(jnp.maximum, elements)
        candidates = _elements(t, stage, np.zeros((), t.dtype))
        picked = candidates[-1]
        for element, candidate in zip(elements[-2::-1], candidates[-2::-1], strict=True):
            picked = jnp.where(_is_it(element, y), candidate, picked)
        t, x = picked, y
    return t


def place(t: Array, x: Array, windows: Windows) -> Array:
    """Each element of t put where the first largest element of x in its window is: pick's transpose."""
    if not _is_fast(x, windows):
        return jax.vjp(lambda x: largest(x, windows), x)[1](t)[0]
    stages, inputs = _stages(windows), [x]
    for stage in stages[:-1]:
        inputs.append(largest(inputs[-1], stage))
    for stage, x in zip(stages[::-1], inputs[::-1], strict=True):
        t = _place(t, x, stage)
    return t


def total(x: Array, windows: Windows) -> Array:
    """The sum of each window."""
    return _reduced(x, np.zeros((), x.dtype), lax.add, windows)


def _reduced(x: Array, start: np.ndarray, f: Callable[..., Array], windows: Windows) -> Array:
    # XLA's gradients know no negative padding.
    cut = [(min(low, 0), min(high, 0), 0) for low, high in windows.padding]
    x = lax.pad(x, start[()], [(0, 0, 0), *cut, (0, 0, 0)])
    padding = [(0, 0), *((max(low, 0), max(high, 0)) for low, high in windows.padding), (0, 0)]
    window, strides = (1, *windows.window, 1), (1, *windows.strides, 1)
    return lax.reduce_window(x, start[()], f, window, strides, padding)


def spread(t: Array, windows: Windows, sizes: tuple[int, ...]) -> Array:
    """Each element of t given to all of its window, and added where windows overlap: total's transpose."""
    if 0 in t.shape:
        return jnp.zeros((t.shape[0], *sizes, t.shape[-1]), t.dtype)
    stages = [windows] if max(windows.reach) == 1 else windows.axes
    before = [sizes]
    for stage in stages[:-1]:
        before.append(stage.output(before[-1]))
    for stage, target in zip(stages[::-1], before[::-1], strict=True):
        t = _spread(t, stage, target)
    return t


def _is_fast(x: Array, windows: Windows) -> bool:
    """Whether comparing element by element is worth its program, which grows with the window."""
    return max(windows.window) <= LONGEST and 0 not in (*x.shape, *windows.output(x.shape[1:-1]))


def _stages(windows: Windows) -> list[Windows]:
    """Maxima of few elements are found at once, those of more axis by axis.

    The first of several equal maxima in the window's order is also the first in the first row that has
    one, so the gradient goes to the same place either way.
    """
    return [windows] if math.prod(windows.window) <= AT_ONCE else windows.axes


def _elements(x: Array, windows: Windows, fill: np.ndarray) -> list[Array]:
    """For each place in the window, in its order, the elements there of all windows."""
    padding = [(low, high, 0) for low, high in windows.padding]
    output, strides = windows.output(x.shape[1:-1]), (1, *windows.strides, 1)
    x = lax.pad(x, fill[()], [(0, 0, 0), *padding, (0, 0, 0)])

    def at(start: tuple[int, ...]) -> Array:
        stop = [a + (m - 1) * s + 1 for a, m, s in zip(start, output, windows.strides, strict=True)]
        return lax.slice(x, (0, *start, 0), (x.shape[0], *stop, x.shape[-1]), strides)

    return [at(start) for start in itertools.product(*map(range, windows.window))]


def _is_it(x: Array, y: Array) -> Array:
    """Whether x is the maximum y; that is NaN where any element is."""
    return (x == y) | (x != x)


def _place(t: Array, x: Array, windows: Windows) -> Array:
    """Places by the number of the largest element in its window.

    Numbers count in whole blocks of ``strides`` elements, so that an element knows its own from its place
    in its block and from how many blocks before it the window begins.
    """
    elements = _elements(x, windows, lowest(x.dtype))
    y = functools.reduce(jnp.maximum, elements)
    widths = [r * s for r, s in zip(windows.reach, windows.strides, strict=True)]
    weights = [math.prod(widths[i + 1 :]) for i in range(len(widths))]
    number = np.asarray(list(np.ndindex(*windows.window))) @ np.asarray(weights)
    dtype = np.int8 if math.prod(widths) < 128 else np.int32
    chosen = jnp.full(y.shape, number[-1], dtype)
    for element, n in zip(elements[-2::-1], number[-2::-1], strict=True):
        chosen = jnp.where(_is_it(element, y), dtype(n), chosen)
    t, chosen, zero = _by_block(t), _by_block(chosen), np.zeros((), t.dtype)[()]

    def to_blocks(before: tuple[int, ...]) -> Array:
        own = np.zeros((), int)
        for axis, (s, weight, blocks) in enumerate(zip(windows.strides, weights, before, strict=True)):
            own = own + _along(np.arange(s) + blocks * s, axis, windows) * weight
        return jnp.where(chosen == own.astype(dtype), t, zero)

    return _from_blocks(to_blocks, x.shape[1:-1], windows)


def _spread(t: Array, windows: Windows, sizes: Sequence[int]) -> Array:
    t, zero = _by_block(t), np.zeros((), t.dtype)[()]

    def to_blocks(before: tuple[int, ...]) -> Array:
        inside = np.ones((), bool)
        for axis, (k, s, blocks) in enumerate(zip(windows.window, windows.strides, before, strict=True)):
            inside = inside & (_along(np.arange(s) + blocks * s, axis, windows) < k)
        return jnp.where(inside, t, zero)

    return _from_blocks(to_blocks, sizes, windows)


def _by_block(y: Array) -> Array:
    """(batch, m, 1, n, 1, ..., channels): room for the elements of a block behind each spatial axis."""
    return y.reshape(y.shape[0], *itertools.chain(*((m, 1) for m in y.shape[1:-1])), y.shape[-1])


def _along(values: np.ndarray, axis: int, windows: Windows) -> np.ndarray:
    """Values along the axis of the elements of a block, to be broadcast with :func:`_by_block`."""
    shape = [1] * (2 * len(windows.window) + 2)
    shape[2 * axis + 2] = len(values)
    return values.reshape(shape)


def _from_blocks(
    to_blocks: Callable[[tuple[int, ...]], Array], sizes: Sequence[int], windows: Windows
) -> Array:
    """What windows give to the blocks that they reach, added up and cut to ``sizes``.

    ``to_blocks(before)`` is what each window gives to the block so many behind its first, by axis.
    """
    given = []
    for before in itertools.product(*map(range, windows.reach)):
        blocks = to_blocks(before)
        room = [((b, r - 1 - b, 0), (0, 0, 0)) for b, r in zip(before, windows.reach, strict=True)]
        padding = [(0, 0, 0), *itertools.chain(*room), (0, 0, 0)]
        given.append(lax.pad(blocks, np.zeros((), blocks.dtype)[()], padding))
    whole = functools.reduce(jnp.add, given)
    merged = [m * s for m, s in zip(whole.shape[1:-1:2], whole.shape[2:-1:2], strict=True)]
    cut = [(-low, n + low - m, 0) for n, m, (low, _) in zip(sizes, merged, windows.padding, strict=True)]
    whole = whole.reshape(whole.shape[0], *merged, whole.shape[-1])
    return lax.pad(whole, np.zeros((), whole.dtype)[()], [(0, 0, 0), *cut, (0, 0, 0)])
