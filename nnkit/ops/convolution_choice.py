"""Which algorithm a convolution uses where."""

from __future__ import annotations

import math
from typing import NamedTuple

from nnkit.checks import unknown_name
from nnkit.ops.convolution_geometry import Geometry, extra_rows

__all__ = ["NAMES", "Algorithms", "checked", "choose", "choose_forward"]

_FORWARD = ("xla", "row", "im2col", "shift", "phases")
NAMES = {
    "forward": _FORWARD,
    "input_gradient": ("xla", "flip", *_FORWARD[1:]),
    "kernel_gradient": ("xla", "im2col", "shift", "canonical"),
}
"""The algorithms at each place, beside ``"auto"``."""

FEW = 8
"""Of fewer channels in a group, in or out, a product of matrices makes too little."""


class Algorithms(NamedTuple):
    """The algorithms of a convolution and its derivatives; ``docs/numerics.md`` says what each is.

    Attributes:
      forward: ``"xla"``, ``"row"``, ``"im2col"``, ``"shift"`` or ``"phases"``; ``"auto"`` leaves the choice
        to :func:`nnkit.ops.conv_algorithm` and the platform.
      input_gradient: ``"xla"``, ``"flip"``, or one of the others of ``forward`` with the flipped kernel.
      kernel_gradient: ``"xla"``, ``"im2col"``, ``"shift"`` or ``"canonical"``.
    """

    forward: str = "auto"
    input_gradient: str = "auto"
    kernel_gradient: str = "auto"


def checked(algorithm: str | Algorithms, geometry: Geometry | None) -> Algorithms:
    """The algorithms at all places; raises for a name that is unknown or does not suit the convolution."""
    use = Algorithms(*[algorithm] * 3) if isinstance(algorithm, str) else Algorithms(*algorithm)
    for place, name in use._asdict().items():
        if name not in ("auto", *NAMES[place]):
            raise unknown_name(f"algorithm of {place}", name, ("auto", *NAMES[place]))
        if name == "phases" and geometry is not None:
            at = geometry if place == "forward" else geometry.adjoint
            if not _has_phases(at):
                raise ValueError(
                    f"the algorithm phases of {place} takes no axis that is dilated and has strides or a "
                    f'dilated window too, got {at}: leave it to "auto"'
                )
    return use


def choose(place: str, g: Geometry, inputs: int, outputs: int) -> str:
    """The algorithm at one of the three places, on a CPU."""
    if g.is_empty or not g.spatial:
        return "xla"
    if place == "kernel_gradient":
        return _kernel_gradient(g, inputs)
    if place == "forward":
        return choose_forward(g, inputs, outputs)
    name = choose_forward(g.adjoint, outputs, inputs)
    return "flip" if name == "xla" else name


def choose_forward(g: Geometry, inputs: int, outputs: int) -> str:
    """The algorithm of a convolution from so many to so many channels."""
    if max(g.input_dilation) > 1:
        return "phases" if _has_phases(g) and g.points > 1 else "xla"
    if inputs == g.groups > 1 and g.points <= 32:
        return "shift"
    if g.points == 1:
        return "im2col"
    if min(inputs, outputs) < FEW * g.groups:
        return "xla"
    if g.spatial == 2:
        axis, more = extra_rows(g)
        if more <= g.output[axis] * g.strides[axis] / 8:
            return "row"
    return "im2col" if _shifted_bytes(g, inputs) <= 16e6 else "xla"


def _kernel_gradient(g: Geometry, inputs: int) -> str:
    if inputs == g.groups > 1:
        return "shift"
    return "im2col" if _shifted_bytes(g, inputs) <= 32e6 else "shift"


def _has_phases(g: Geometry) -> bool:
    axes = zip(g.input_dilation, g.strides, g.kernel_dilation, strict=True)
    return all(d == 1 or s == r == 1 for d, s, r in axes)


def _shifted_bytes(g: Geometry, inputs: int) -> float:
    """What the shifted inputs of one example take, of numbers of four bytes."""
    return 4.0 * math.prod(g.output) * g.points * (inputs / g.groups)
