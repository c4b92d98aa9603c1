"""A convolution and its two gradients: three bilinear primitives of which each is the others' derivative.

The form ``t(x, w, y) = sum(y * conv(x, w))`` is linear in each of three arguments. Its derivative by one
of them is a bilinear function of the other two: by y the convolution, by x the gradient with respect to
the input, by w that with respect to the kernel. So the three are closed under differentiation, forward
and backward and as often as one likes, which a ``custom_vjp`` would not be; and since each is a primitive,
the algorithm is chosen when the program is lowered, by the platform it is lowered for.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching

from nnkit.ops.convolution_algorithms import FORWARD, INPUT_GRADIENT, KERNEL_GRADIENT, Algorithm
from nnkit.ops.convolution_choice import Algorithms, choose
from nnkit.ops.convolution_geometry import Geometry
from nnkit.ops.primitives import bind, by_platform
from nnkit.types import Array

__all__ = ["convolve", "input_gradient", "kernel_gradient"]


def convolve(x: Array, w: Array, geometry: Geometry, use: Algorithms) -> Array:
    """The convolution of x (batch, *sizes, in) with w (*window, in / groups, out)."""
    return bind(_forward, x, w, geometry=geometry, use=use)


def input_gradient(y: Array, w: Array, geometry: Geometry, use: Algorithms) -> Array:
    """The gradient of ``sum(y * convolve(x, w))`` with respect to x, shaped as x."""
    return bind(_input_gradient, y, w, geometry=geometry, use=use)


def kernel_gradient(x: Array, y: Array, geometry: Geometry, use: Algorithms) -> Array:
    """The gradient of ``sum(y * convolve(x, w))`` with respect to w, shaped as w."""
    return bind(_kernel_gradient, x, y, geometry=geometry, use=use)


_OPERANDS = {"forward": "xwy", "input_gradient": "ywx", "kernel_gradient": "xyw"}
"""Of x, w and y the two operands and the result, at each place."""


def _primitive(place: str, known: Mapping[str, Algorithm]) -> Primitive:
    names = _OPERANDS[place]

    def channels(a: Any, b: Any, geometry: Geometry) -> tuple[int, int]:
        of = dict(zip(names, (a, b), strict=False))
        inputs = of["x"][-1] if "x" in of else of["w"][-2] * geometry.groups
        return inputs, of["y"][-1] if "y" in of else of["w"][-1]

    def shape(a: Any, b: Any, geometry: Geometry, use: Algorithms) -> tuple[int, ...]:
        inputs, outputs = channels(a, b, geometry)
        return {
            "y": (a[0], *geometry.output, outputs),
            "x": (a[0], *geometry.sizes, inputs),
            "w": (*geometry.window, inputs // geometry.groups, outputs),
        }[names[2]]

    def on_cpu(a: Array, b: Array, geometry: Geometry, use: Algorithms) -> Array:
        name = getattr(use, place)
        if 0 in (*a.shape, *b.shape, *geometry.sizes, *geometry.output):
            name = "xla"
        elif name == "auto":
            name = choose(place, geometry, *channels(a.shape, b.shape, geometry))
        dtype = a.dtype
        if dtype in (jnp.bfloat16, jnp.float16):  # their sums are float32's
            a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return known[name](a, b, geometry).astype(dtype)

    def elsewhere(a: Array, b: Array, geometry: Geometry, use: Algorithms) -> Array:
        name = getattr(use, place)
        return known["xla" if name == "auto" else name](a, b, geometry)

    return by_platform(f"nnkit_conv_{place}", shape, on_cpu, elsewhere)


_forward = _primitive("forward", FORWARD)
_input_gradient = _primitive("input_gradient", INPUT_GRADIENT)
_kernel_gradient = _primitive("kernel_gradient", KERNEL_GRADIENT)

# The transposes: the cotangent takes the place of the output, the other operand keeps its own.
ad.defbilinear(
    _forward,
    lambda y, x, w, geometry, use: input_gradient(y, w, geometry, use),
    lambda y, x, w, geometry, use: kernel_gradient(x, y, geometry, use),
)
ad.defbilinear(
    _input_gradient,
    lambda x, y, w, geometry, use: convolve(x, w, geometry, use),
    lambda x, y, w, geometry, use: kernel_gradient(x, y, geometry, use),
)
ad.defbilinear(
    _kernel_gradient,
    lambda w, x, y, geometry, use: input_gradient(y, w, geometry, use),
    lambda w, x, y, geometry, use: convolve(x, w, geometry, use),
)


def _batched(
    args: Any, axes: Any, *, primitive: Primitive, names: str, geometry: Geometry, use: Algorithms
) -> tuple[Array, int]:
    """Maps by folding the mapped axis into one that the operands have: examples, channels or groups.

    If both operands are mapped, each member is a group of its own. If one is, then its axis goes where
    the result has it too: among the examples of x and y, or else among the channels, in x's or y's part
    of each group.
    """
    size = next(v.shape[axis] for v, axis in zip(args, axes, strict=True) if axis is not None)
    mapped = [name for name, axis in zip(names, axes, strict=False) if axis is not None]
    if len(mapped) == 2:
        where = dict.fromkeys("xwy", (-1, 1))
    elif "w" not in (mapped[0], names[2]):
        where = dict.fromkeys("xy", (0, 1))
    else:
        image = mapped[0] if names[2] == "w" else names[2]
        where = {image: (-1, geometry.groups), "w": (-2, 1) if image == "x" else (-1, geometry.groups)}
    operands = [
        v if axis is None else _fold(jnp.moveaxis(v, axis, 0), *where[name])
        for v, axis, name in zip(args, axes, names, strict=False)
    ]
    if len(mapped) == 2:
        geometry = geometry._replace(groups=geometry.groups * size)
    result = bind(primitive, *operands, geometry=geometry, use=use)
    return _unfold(result, size, *where[names[2]]), 0


def _fold(v: Array, axis: int, parts: int) -> Array:
    """The first axis of v put into ``axis`` of the others, at the front of each of that one's parts."""
    members, *shape = v.shape
    axis %= len(shape)
    split = v.reshape(members, *shape[:axis], parts, shape[axis] // parts, *shape[axis + 1 :])
    shape[axis] *= members
    return jnp.moveaxis(split, 0, axis + 1).reshape(shape)


def _unfold(v: Array, members: int, axis: int, parts: int) -> Array:
    """The inverse of :func:`_fold`."""
    shape = list(v.shape)
    axis %= len(shape)
    shape[axis] //= members
    split = v.reshape(*shape[:axis], parts, members, shape[axis] // parts, *shape[axis + 1 :])
    return jnp.moveaxis(split, axis + 1, 0).reshape(members, *shape)


for _place, _of in (
    ("forward", _forward), ("input_gradient", _input_gradient), ("kernel_gradient", _kernel_gradient)
):  # fmt: skip
    batching.primitive_batchers[_of] = functools.partial(_batched, primitive=_of, names=_OPERANDS[_place])
