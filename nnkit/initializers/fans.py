"""How many inputs and outputs a kernel joins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

__all__ = ["Axes", "axes_of", "fans", "fans_for"]

Axes: TypeAlias = int | Sequence[int]


def fans(
    shape: Sequence[int], in_axis: Axes = -2, out_axis: Axes = -1, batch_axis: Axes = (), groups: int = 1
) -> tuple[int, int]:
    """How many inputs one output of a kernel sums over, and how many outputs one input reaches.

    fan_in = Π in · Π window and fan_out = Π out · Π window / groups. The window is every axis not named;
    ``batch_axis`` holds independent kernels and counts for neither.

    ================================================  ===========================  ====================
    kernel                                            arguments                    fan_in, fan_out
    ================================================  ===========================  ====================
    dense (in, out)                                                                in, out
    convolution (*window, in // groups, out)          groups=groups                Πw·in/g, Πw·out/g
    attention, to heads (d_model, heads, head_dim)    in_axis=0, out_axis=(1, 2)   d, h·k
    attention, from heads (heads, head_dim, d_model)  in_axis=(0, 1), out_axis=2   h·k, d
    embedding (vocabulary, features)                  in_axis=1, out_axis=0        features, vocabulary
    ================================================  ===========================  ====================

    JAX and PyTorch leave ``groups`` out: their fan_in of a grouped kernel is this one, their fan_out is
    ``groups`` times as large. PyTorch's transposed kernels are (in, out, *window), which exchanges its
    two fans. Strides count nowhere. Flax writes the embedding's axes as ``out_axis=0`` alone; that names
    axis 0 twice and makes both fans the number of features.

    Raises ValueError for an axis that the shape lacks or that is named twice, and for outputs that do
    not divide into ``groups``.

    >>> fans((3, 3, 16, 64), groups=4)
    (144, 144)
    >>> fans((512, 8, 64), in_axis=0, out_axis=(1, 2))
    (512, 512)
    """
    return fans_for("fans", tuple(shape), in_axis, out_axis, batch_axis, groups)


def fans_for(what, shape, in_axis, out_axis, batch_axis, groups) -> tuple[int, int]:
    ins = axes_of(what, "in_axis", in_axis, shape)
    outs = axes_of(what, "out_axis", out_axis, shape)
    named = (*ins, *outs, *axes_of(what, "batch_axis", batch_axis, shape))
    if len(set(named)) < len(named):
        raise ValueError(
            f"{what}: in_axis={in_axis}, out_axis={out_axis} and batch_axis={batch_axis} name an axis of "
            f"{shape} twice; for an embedding write in_axis=1, out_axis=0"
        )
    n_in, n_out = math.prod(shape[i] for i in ins), math.prod(shape[i] for i in outs)
    if not isinstance(groups, int) or groups < 1 or n_out % groups:
        raise ValueError(f"{what}: groups={groups!r} must be a positive int that divides the {n_out} outputs")
    window = math.prod(size for i, size in enumerate(shape) if i not in named)
    return n_in * window, n_out // groups * window


def axes_of(what, argument, axes, shape) -> tuple[int, ...]:
    """``axes`` as a tuple, counted from the front."""
    axes = (axes,) if isinstance(axes, int) else tuple(axes)
    for axis in axes:
        if not -len(shape) <= axis < len(shape):
            raise ValueError(
                f"{what}: shape {shape} has no axis {argument}={axis}: a kernel is (..., in, out). Start "
                "biases with zeros and scales with ones, or name the axes that the shape has"
            )
    return tuple(axis % len(shape) for axis in axes)
