"""What layers that slide a window share: sizes for each axis, padding, and the checks of both.

An input is (batch, *spatial, channels). A size is one number, which then holds for every spatial
axis, or a tuple with one for each, which fixes how many spatial axes the input has.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from nnkit.checks import LayerError, unknown_name
from nnkit.layers.lift import float_input, positive_int
from nnkit.types import Array

__all__ = [
    "Padding",
    "PaddingPairs",
    "Size",
    "blocks",
    "check_fits",
    "dilated",
    "each",
    "explicit_padding",
    "known_padding",
    "pad_by_mode",
    "padding_pairs",
    "size",
    "spatial_axes",
]

Size: TypeAlias = int | Sequence[int]
"""One number for all spatial axes, or one for each."""
Padding: TypeAlias = str | int | Sequence[int | tuple[int, int]]
"""A name, one number for every side, or for each axis a number or a pair (before, after)."""
PaddingPairs: TypeAlias = tuple[tuple[int, int], ...]

_AXES = {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}


def size(layer: str, argument: str, value: Size) -> int | tuple[int, ...]:
    """``value`` as an int or a tuple of ints, all at least 1; raises while the layer is built."""
    what = f"{layer}({argument}=...)"
    if not isinstance(value, Sequence) or isinstance(value, str):
        return positive_int(value, what)
    if not value:
        raise ValueError(f"{what} must have a number for each spatial axis, got {value!r}")
    return tuple(positive_int(one, what) for one in value)


def spatial_axes(layer: str, x: Any, *sizes: int | tuple[int | None, ...] | None) -> int:
    """How many spatial axes ``x`` has, raising where it is not (batch, *spatial, channels).

    Args:
      layer: the layer's kind, for the error.
      x: an array or a spec.
      sizes: what the layer was given; the first tuple among them says how many axes there must be.
    """
    float_input(layer, x)
    wanted = next((len(given) for given in sizes if isinstance(given, tuple)), None)
    n = x.ndim - 2
    if n >= 1 and wanted in (None, n):
        if 0 in x.shape[1:-1]:
            raise LayerError(layer, f"takes spatial axes that are not empty, got shape {x.shape}")
        return n
    form = ", ".join(("batch", *_AXES.get(wanted or 0, ("*spatial",)), "channels"))
    text = f"takes ({form}), got shape {x.shape}: "
    if x.ndim == 2 + (wanted or 1) - 1:
        raise LayerError(layer, text + "add a channel axis with x[..., None], or a batch axis with x[None]")
    if wanted is not None and n > wanted:
        raise LayerError(
            layer, text + f"give sizes for {n} spatial axes, or map over the others with jax.vmap"
        )
    raise LayerError(layer, text + "reshape it to have these axes")


def each(layer: str, argument: str, value: int | tuple[int, ...], n: int) -> tuple[int, ...]:
    """``value`` for each of ``n`` spatial axes."""
    if isinstance(value, int):
        return (value,) * n
    if len(value) != n:
        raise LayerError(
            layer, f"has {argument}={value} where there are {n} spatial axes: give one number, or {n}"
        )
    return value


def dilated(window: Iterable[int], dilation: Iterable[int]) -> tuple[int, ...]:
    """How far each window reaches: d(k - 1) + 1."""
    return tuple(d * (k - 1) + 1 for k, d in zip(window, dilation, strict=True))


def known_padding(layer: str, padding: Padding, names: Sequence[str]) -> str | int | tuple[Any, ...]:
    """``padding`` as one of ``names``, an int, or a tuple of pairs; raises while the layer is built."""
    what = f"{layer}(padding=...)"
    if isinstance(padding, str):
        if padding.upper() in names:
            return padding.upper()
        error = unknown_name("padding", padding.upper(), names)
        raise ValueError(f"{what}: {error}, a number, or a pair of numbers for each spatial axis")
    if isinstance(padding, Sequence):
        return tuple(_pair(what, one) for one in padding)
    return _pair(what, padding)[0]


def _pair(what: str, value: Any) -> tuple[int, int]:
    pair: Any = tuple(value) if isinstance(value, Sequence) else (value, value)
    whole = all(hasattr(p, "__index__") and not isinstance(p, bool | jax.Array) for p in pair)
    if not whole or len(pair) != 2:
        raise TypeError(f"{what} takes a name, a number, or for each axis (before, after); got {value!r}")
    if min(pair) < 0:
        raise ValueError(f"{what} must not be negative, got {value!r}: cut the input instead")
    return pair[0].__index__(), pair[1].__index__()


def explicit_padding(layer: str, padding: int | tuple[Any, ...], n: int) -> PaddingPairs:
    """Padding given in numbers as a pair for each of ``n`` axes."""
    if isinstance(padding, int):
        return ((padding, padding),) * n
    if len(padding) != n:
        raise LayerError(
            layer,
            f"has padding={padding} where there are {n} spatial axes: give one number, or a pair for each",
        )
    return padding


def padding_pairs(
    layer: str,
    padding: str | int | tuple[Any, ...],
    sizes: Sequence[int],
    window: Sequence[int],
    strides: Sequence[int],
) -> PaddingPairs:
    """The padding before and after each spatial axis, for a ``window`` that is dilated already.

    With n the axis' size, k the window's and s the stride: SAME pads max((⌈n/s⌉ - 1)s + k - n, 0) in
    all, the odd one after (SAME_LOWER: before); VALID none; CAUSAL k - 1 before.
    """
    if not isinstance(padding, str):
        return explicit_padding(layer, padding, len(sizes))
    if padding == "CAUSAL":
        if len(sizes) != 1:
            raise LayerError(
                layer,
                f"has padding='CAUSAL', which is for one spatial axis, and its input has {len(sizes)}: "
                "pass pairs, as in padding=((2, 0), (1, 1))",
            )
        return ((window[0] - 1, 0),)
    return tuple((lo, hi) for lo, hi in jax.lax.padtype_to_pads(sizes, window, strides, padding))


def pad_by_mode(x: Array, window: Sequence[int], mode: str) -> Array:
    """``x`` with (k - 1)//2 and k//2 elements more at each spatial axis, copied from the array itself.

    Where the strides are 1 the output then has the input's size. This is Flax's for CIRCULAR
    (``mode="wrap"``) and REFLECT, and PyTorch's for odd windows under ``padding=k // 2``.
    """
    return jnp.pad(x, [(0, 0), *(((k - 1) // 2, k // 2) for k in window), (0, 0)], mode=mode)


def blocks(x: Array, block: Sequence[int]) -> Array:
    """Each spatial axis n as (n // b, b): (batch, n₁ // b₁, b₁, n₂ // b₂, b₂, ..., channels)."""
    cut = [size for n, b in zip(x.shape[1:-1], block, strict=True) for size in (n // b, b)]
    return x.reshape(x.shape[0], *cut, x.shape[-1])


def check_fits(
    layer: str, shape: tuple[int, ...], sizes: Sequence[int], window: Sequence[int], padding: PaddingPairs
) -> None:
    """Raises where a window is larger than the padded input."""
    names = _AXES.get(len(sizes), tuple(f"axis {i + 1}" for i in range(len(sizes))))
    for axis, n, k, (lo, hi) in zip(names, sizes, window, padding, strict=True):
        if n + lo + hi < k:
            raise LayerError(
                layer,
                f"has a window of {k} over a {axis} of {n} with {lo} + {hi} of padding (input of shape "
                f"{shape}): take a smaller window or fewer strided layers before it, or pad with 'SAME'",
            )
