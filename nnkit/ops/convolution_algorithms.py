"""Ways to compute a convolution and its two gradients: plain functions, equal but for rounding.

All take operands of one dtype and a :class:`Geometry`: x (batch, \\*sizes, in), the kernel w (\\*window,
in / groups, out) and y (batch, \\*output, out). Which is used where is ``convolution_choice.py``'s matter.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from nnkit.ops.convolution_choice import choose_forward
from nnkit.ops.convolution_geometry import Geometry, extra_rows
from nnkit.types import Array

__all__ = ["FORWARD", "INPUT_GRADIENT", "KERNEL_GRADIENT", "Algorithm"]

Algorithm = Callable[[Array, Array, Geometry], Array]

CHUNK_BYTES = 5_000_000
"""How large the shifted copies of a few examples may be: they should not leave the cache between the
copying and the product (measured from 1 to 40 MB: flat between 2 and 6)."""


def forward_xla(x: Array, w: Array, g: Geometry) -> Array:
    """XLA's own convolution."""
    return _xla(x, w, g)


def forward_row(x: Array, w: Array, g: Geometry) -> Array:
    """XLA's own convolution of a few rows more than asked for, which are cut off.

    XLA for CPUs has two implementations. The one that it prefers, YNNPACK's, runs on one thread; Eigen's
    runs on all, and is taken where the output is larger than the input along some axis.
    """
    axis, more = extra_rows(g)
    padding = [(low, high + more * (i == axis)) for i, (low, high) in enumerate(g.padding)]
    y = _xla(x, w, g._replace(padding=tuple(padding)))
    return lax.slice_in_dim(y, 0, g.output[axis], axis=axis + 1)


def forward_im2col(x: Array, w: Array, g: Geometry) -> Array:
    """What the window sees at each place as a row of a matrix, times the kernel as a matrix."""
    rows = w.reshape(-1, w.shape[-1])

    def convolve(x: Array) -> Array:
        return _dot(jnp.concatenate([v for _, v in _shifts(_padded(x, g), g)], -1), rows)

    return _mapped(convolve, x, _chunk_size(x, g))


def forward_shift(x: Array, w: Array, g: Geometry) -> Array:
    """For each element of the window the shifted input times that element's matrix, added up."""
    if w.shape[-2] > 1:
        return functools.reduce(jnp.add, (_dot(v, w[k]) for k, v in _shifts(_padded(x, g), g)))

    def convolve(x: Array) -> Array:  # every output channel sees one input channel
        shifts = _shifts(_padded(x, g), g)
        return functools.reduce(jnp.add, (_spread(v, g, w.shape[-1]) * w[(*k, 0)] for k, v in shifts))

    # In a loop, since XLA would compute these sums anew within each operation that uses the result.
    n = x.shape[0]
    return _mapped(convolve, x, n if _of_any_size(n) else min(_chunk_size(x, g), -(-n // 2)))


def forward_phases(x: Array, w: Array, g: Geometry, then: Algorithm) -> Array:
    """For an input that is dilated: one convolution for each of the output's places modulo the dilation.

    Each meets its own part of the kernel's elements, and none of the zeros between the input's.
    """
    steps = [-(-m // d) for m, d in zip(g.output, g.input_dilation, strict=True)]

    def phase(at: tuple[int, ...]) -> Array:
        taps, padding = [], []
        axes = zip(
            at,
            g.input_dilation,
            g.sizes,
            g.window,
            g.strides,
            g.kernel_dilation,
            g.padding,
            steps,
            strict=True,
        )
        for a, d, n, k, s, r, (low, _), t in axes:
            first = (low - a) % d
            taps.append(slice(first, None, d))
            before, count = (low - a - first) // d, len(range(first, k, d))
            padding.append((before, (t - 1) * s + (count - 1) * r + 1 - n - before))
        part = w[tuple(taps)]
        if part.size == 0:
            return jnp.zeros((x.shape[0], *steps, w.shape[-1]), x.dtype)
        ones = (1,) * g.spatial
        return then(x, part, g._replace(window=part.shape[:-2], padding=tuple(padding), input_dilation=ones))

    y = _interleaved(phase, g.input_dilation)
    return lax.slice(y, (0,) * y.ndim, (x.shape[0], *g.output, w.shape[-1]))


def input_gradient_xla(y: Array, w: Array, g: Geometry) -> Array:
    """XLA's transpose of its own convolution."""
    x = jax.ShapeDtypeStruct((y.shape[0], *g.sizes, w.shape[-2] * g.groups), y.dtype)
    return jax.linear_transpose(lambda x: _xla(x, w, g), x)(y)[0]


def kernel_gradient_xla(x: Array, y: Array, g: Geometry) -> Array:
    """XLA's transpose of its own convolution."""
    w = jax.ShapeDtypeStruct((*g.window, x.shape[-1] // g.groups, y.shape[-1]), x.dtype)
    return jax.linear_transpose(lambda w: _xla(x, w, g), w)(y)[0]


def kernel_gradient_shift(x: Array, y: Array, g: Geometry) -> Array:
    """For each element of the window the shifted input times y, summed over examples and places."""
    inputs, outputs = x.shape[-1], y.shape[-1]

    def gradient(x: Array, y: Array) -> Array:
        shifts = [v for _, v in _shifts(_padded(x, g), g)]
        if inputs == g.groups:
            return jnp.stack([(_spread(v, g, outputs) * y).sum(range(y.ndim - 1)) for v in shifts])
        across = _across(y)
        return jnp.stack([_dot(across, v.reshape(-1, inputs)).T for v in shifts])

    total = _summed(gradient, (x, y), _chunk_size(x, g) if inputs == g.groups else x.shape[0])
    return total.reshape(*g.window, inputs // g.groups, outputs)


def kernel_gradient_im2col(x: Array, y: Array, g: Geometry) -> Array:
    """The shifted inputs side by side, transposed, times y: one product for a few examples at a time.

    A product that sums over the first axis of both its operands is several times slower on a CPU than
    one that sums over the last of one and the first of the other, so one operand is transposed before.
    """
    inputs, outputs = x.shape[-1], y.shape[-1]
    unbroken = g.strides[-1] == 1 and g.output[-1] >= 8  # the copies' runs, with the last axis innermost
    transpose_x = inputs <= outputs and (g.points == 1 or unbroken)

    def gradient(x: Array, y: Array) -> Array:
        if transpose_x and g.points == 1:
            ((_, seen),) = _shifts(_padded(x, g), g)
            return _dot(_across(seen), y.reshape(-1, outputs))
        if transpose_x:
            x = _padded(lax.optimization_barrier(jnp.moveaxis(x, -1, 0)), g, axis=2)
            rows = jnp.stack([v for _, v in _shifts(x, g, axis=2)]).reshape(g.points * inputs, -1)
            return _dot(rows, y.reshape(-1, outputs))
        columns = jnp.concatenate([v for _, v in _shifts(_padded(x, g), g)], -1)
        return _dot(_across(y), columns.reshape(-1, g.points * inputs))

    total = _summed(gradient, (x, y), _chunk_size(x, g))
    if not transpose_x:
        total = total.T
    return total.reshape(*g.window, inputs, outputs)


def kernel_gradient_canonical(x: Array, y: Array, g: Geometry) -> Array:
    """A convolution of x with y for a window, channels for examples and examples for channels.

    This is also how XLA writes it, but within a loop it then chooses layouts for which it has no fast
    kernel; the barriers keep it to the layout that it has one for.
    """
    x = lax.optimization_barrier(jnp.moveaxis(x, (-1, 0), (0, -1)))
    y = lax.optimization_barrier(jnp.moveaxis(y, 0, -2))
    padding = tuple(
        (low, r - 1 + (m - 1) * s + 1 - n - low)
        for n, m, (low, _), r, s in zip(g.dilated, g.output, g.padding, g.reach, g.strides, strict=True)
    )
    turned = g._replace(
        window=g.output, padding=padding, strides=g.kernel_dilation, kernel_dilation=g.strides
    )
    return jnp.moveaxis(lax.optimization_barrier(_xla(x, y, turned)), 0, -2)


def _xla(x: Array, w: Array, g: Geometry) -> Array:
    """XLA's convolution. Where elements are cut off before an axis and zeros put behind it, it reads beyond its
    input on a CPU (seen in JAX 0.10.2), as do its gradients where more is put before than the window
    reaches over: then the input is padded by itself."""
    if any(not 0 <= low < reach for (low, _), reach in zip(g.padding, g.reach, strict=True)):
        x, ones = _padded(x, g), (1,) * g.spatial
        g = g._replace(sizes=x.shape[1:-1], padding=((0, 0),) * g.spatial, input_dilation=ones)
    axes = "".join(chr(ord("a") + i) for i in range(g.spatial))
    numbers = lax.conv_dimension_numbers(x.shape, w.shape, (f"N{axes}C", f"{axes}IO", f"N{axes}C"))
    return lax.conv_general_dilated(
        x, w, g.strides, g.padding, g.input_dilation, g.kernel_dilation, numbers, g.groups
    )


def _by_group(algorithm: Algorithm) -> Algorithm:
    """The groups one after the other, for algorithms that know of one.

    The last axis of a kernel as of x and y is that of the groups and what is in them.
    """

    def split(v: Array, groups: int) -> Array:
        return jnp.moveaxis(v.reshape(*v.shape[:-1], groups, v.shape[-1] // groups), -2, 0)

    def one_by_one(a: Array, b: Array, g: Geometry) -> Array:
        if g.groups == 1:
            return algorithm(a, b, g)
        each = lax.map(
            lambda group: algorithm(group[0], group[1], g._replace(groups=1)),
            (split(a, g.groups), split(b, g.groups)),
        )
        joined = jnp.moveaxis(each, 0, -2)
        return joined.reshape(*joined.shape[:-2], -1)

    return one_by_one


def _with_flipped_kernel(algorithm: Algorithm) -> Algorithm:
    """The gradient with respect to the input as the adjoint's forward convolution."""
    return lambda y, w, g: algorithm(y, _flipped(w, g), g.adjoint)


def _undilated(algorithm: Algorithm) -> Algorithm:
    """A kernel gradient without the zeros of a dilated input: with x and y in each other's place."""

    def exchanged(x: Array, y: Array, g: Geometry) -> Array:
        if max(g.input_dilation) > 1 == max(g.strides):
            return _flipped(algorithm(y, x, g.adjoint), g)
        return algorithm(x, y, g)

    return exchanged


def _phases(x: Array, w: Array, g: Geometry) -> Array:
    """Each phase by the algorithm that suits it."""
    return forward_phases(
        x, w, g, lambda x, w, g: FORWARD[choose_forward(g, x.shape[-1], w.shape[-1])](x, w, g)
    )


def _shift(x: Array, w: Array, g: Geometry) -> Array:
    return (forward_shift if w.shape[-2] == 1 else _by_group(forward_shift))(x, w, g)


def _kernel_shift(x: Array, y: Array, g: Geometry) -> Array:
    one_each = x.shape[-1] == g.groups
    return (kernel_gradient_shift if one_each else _by_group(kernel_gradient_shift))(x, y, g)


FORWARD: dict[str, Algorithm] = {
    "xla": forward_xla,
    "row": _by_group(forward_row),
    "im2col": _by_group(forward_im2col),
    "shift": _shift,
    "phases": _by_group(_phases),
}
INPUT_GRADIENT: dict[str, Algorithm] = {
    **{name: _with_flipped_kernel(algorithm) for name, algorithm in FORWARD.items()},
    "flip": _with_flipped_kernel(forward_xla),
    "xla": input_gradient_xla,
}
KERNEL_GRADIENT: dict[str, Algorithm] = {
    "xla": kernel_gradient_xla,
    "shift": _undilated(_kernel_shift),
    "im2col": _undilated(_by_group(kernel_gradient_im2col)),
    "canonical": _undilated(_by_group(kernel_gradient_canonical)),
}


def _chunk_size(x: Array, g: Geometry) -> int:
    """How many examples' shifted inputs are made at once; so that none are left over, if that can be."""
    n = x.shape[0]
    if g.points == 1 or _of_any_size(n):  # nothing is copied
        return n
    per_example = math.prod(g.output) * g.points * x.shape[-1] * x.dtype.itemsize
    most = max(1, min(n, CHUNK_BYTES // max(per_example, 1)))
    return next((size for size in range(most, most // 2, -1) if n % size == 0), most)


def _of_any_size(n: object) -> bool:
    """Whether a batch has jax.export's symbolic size, which cannot be compared and so not cut into chunks."""
    return not isinstance(n, int)


def _mapped(f: Callable[[Array], Array], x: Array, size: int) -> Array:
    """f of so many examples at a time."""
    if size >= x.shape[0]:
        return f(x)
    (whole,), rest = _chunks((x,), size)
    y = lax.map(f, whole)
    return jnp.concatenate([y.reshape(-1, *y.shape[2:]), *map(f, rest)])


def _summed(f: Callable[[Array, Array], Array], arrays: tuple[Array, Array], size: int) -> Array:
    """The sum of f over so many examples at a time."""
    whole, rest = _chunks(arrays, size)
    total = f(*(_chunk(v, 0) for v in whole))
    if rest:
        total = total + f(*rest)

    def add(i: Array, total: Array) -> Array:
        return total + f(*(_chunk(v, i) for v in whole))

    return lax.fori_loop(1, whole[0].shape[0], add, total)


def _chunks(arrays: Sequence[Array], size: int) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """The arrays as (chunks, size, ...), and what is left over, which may be ()."""
    n = arrays[0].shape[0]
    full = n - n % size
    whole = tuple(v[:full].reshape(full // size, size, *v.shape[1:]) for v in arrays)
    return whole, tuple(v[full:] for v in arrays) if full < n else ()


def _chunk(v: Array, i: Array | int) -> Array:
    return lax.dynamic_index_in_dim(v, i, keepdims=False)


def _padded(x: Array, g: Geometry, axis: int = 1) -> Array:
    """x dilated and padded; its spatial axes begin at ``axis``."""
    spatial = [(low, high, d - 1) for (low, high), d in zip(g.padding, g.input_dilation, strict=True)]
    around = [(0, 0, 0)]
    return lax.pad(x, jnp.zeros((), x.dtype), around * axis + spatial + around * (x.ndim - axis - g.spatial))


def _shifts(x: Array, g: Geometry, axis: int = 1) -> Iterator[tuple[tuple[int, ...], Array]]:
    """For each element of the window, its index and what it meets of the padded x at all places."""
    before, behind = x.shape[:axis], x.shape[axis + g.spatial :]
    for k in itertools.product(*map(range, g.window)):
        start = [i * r for i, r in zip(k, g.kernel_dilation, strict=True)]
        stop = [a + (m - 1) * s + 1 for a, m, s in zip(start, g.output, g.strides, strict=True)]
        yield (
            k,
            lax.slice(
                x,
                (*(0 for _ in before), *start, *(0 for _ in behind)),
                (*before, *stop, *behind),
                (*(1 for _ in before), *g.strides, *(1 for _ in behind)),
            ),
        )


def _interleaved(phase: Callable[[tuple[int, ...]], Array], dilation: tuple[int, ...]) -> Array:
    """(batch, \\*d m, channels) of the phases (batch, \\*m, channels): element a + d t is phase a's t."""

    def stacked(at: tuple[int, ...]) -> Array:
        if len(at) == len(dilation):
            return phase(at)
        parts = [stacked((*at, a)) for a in range(dilation[len(at)])]
        if len(parts) == 1:
            return parts[0]
        axis = len(at) + 1
        merged = jnp.stack(parts, axis + 1)
        return merged.reshape(*merged.shape[:axis], -1, *merged.shape[axis + 2 :])

    return stacked(())


def _flipped(w: Array, g: Geometry) -> Array:
    """The kernel of the adjoint: reversed in space, inputs and outputs exchanged within each group."""
    w = lax.rev(w, tuple(range(g.spatial)))
    w = w.reshape(*g.window, w.shape[-2], g.groups, w.shape[-1] // g.groups)
    return jnp.swapaxes(w, -3, -1).reshape(*g.window, w.shape[-1], -1)


def _dot(x: Array, w: Array) -> Array:
    return lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())))


def _across(y: Array) -> Array:
    """(channels, all else), written out: XLA would otherwise put the transpose into the product."""
    return lax.optimization_barrier(y.reshape(-1, y.shape[-1]).T)


def _spread(x: Array, g: Geometry, outputs: int) -> Array:
    """One channel for each group, repeated for each of the group's outputs."""
    return x if outputs == g.groups or g.groups == 1 else jnp.repeat(x, outputs // g.groups, -1)
