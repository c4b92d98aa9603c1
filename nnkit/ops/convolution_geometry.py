"""What a convolution's algorithms need to know of it: its static facts, and those of its adjoint."""

from __future__ import annotations

import math
from typing import NamedTuple

__all__ = ["Geometry", "extra_rows"]


class Geometry(NamedTuple):
    """All static facts of a convolution but its numbers of examples and channels; a tuple for each axis.

    Attributes:
      sizes: the spatial sizes of the input.
      window: those of the kernel.
      strides: between the places of the window.
      padding: zeros put (elements cut, where negative) before and after each spatial axis.
      input_dilation: the input's elements are moved this far apart, with zeros between.
      kernel_dilation: likewise the kernel's.
      groups: into how many the channels are divided; each convolves on its own.
    """

    sizes: tuple[int, ...]
    window: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    input_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    groups: int = 1

    @property
    def reach(self) -> tuple[int, ...]:
        """How many elements the dilated window spans."""
        return tuple((k - 1) * r + 1 for k, r in zip(self.window, self.kernel_dilation, strict=True))

    @property
    def dilated(self) -> tuple[int, ...]:
        """The sizes of the dilated input, before padding."""
        return tuple(_dilated(n, d) for n, d in zip(self.sizes, self.input_dilation, strict=True))

    @property
    def output(self) -> tuple[int, ...]:
        """The spatial sizes of the output."""
        return tuple(
            max(0, (n + low + high - reach) // s + 1)
            for n, (low, high), reach, s in zip(
                self.dilated, self.padding, self.reach, self.strides, strict=True
            )
        )

    @property
    def adjoint(self) -> Geometry:
        """The convolution with the flipped kernel that is the gradient with respect to the input.

        Strides and input dilation change places: what one skips the other fills with zeros.
        """
        padding = tuple(
            (reach - 1 - low, n - _dilated(m, s) + low)
            for n, m, (low, _), reach, s in zip(
                self.dilated, self.output, self.padding, self.reach, self.strides, strict=True
            )
        )
        return self._replace(
            sizes=self.output, strides=self.input_dilation, padding=padding, input_dilation=self.strides
        )

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to sum, so that all algorithms but XLA's would have to make exceptions."""
        return 0 in (*self.sizes, *self.output, *self.window)

    @property
    def points(self) -> int:
        """How many elements the window has."""
        return math.prod(self.window)

    @property
    def spatial(self) -> int:
        """How many spatial axes there are."""
        return len(self.sizes)


def extra_rows(g: Geometry) -> tuple[int, int]:
    """The axis along which the output becomes larger than the input by the fewest, and how many, elements
    of padding.
    """
    missing = [max(0, n + 1 - m) for n, m in zip(g.sizes, g.output, strict=True)]
    axis = min(range(g.spatial), key=lambda i: missing[i] / g.output[i])
    return axis, missing[axis] * g.strides[axis]


def _dilated(n: int, by: int) -> int:
    return (n - 1) * by + 1 if n else 0
