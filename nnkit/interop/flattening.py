"""Where a PyTorch model has its features in another order than nnkit: behind a flatten of an image.

An image (height, width, channels) flattens to features in another order than PyTorch's (channels, height,
width). So the rows of a dense layer's kernel behind it must be permuted, and the scales of a normalisation in
between. It is found by following the arrays from call to call of a traced model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from nnkit.layers.children import Visit
from nnkit.types import Layer

__all__ = ["Layout", "Layouts", "Shape", "factory", "first_array"]

Shape: TypeAlias = tuple[int, ...]

# Layers before which, or behind which, PyTorch has the channels on axis 1, whatever the number of axes.
_SPATIAL = (
    "conv", "conv_transpose", "conv_layer", "depthwise_conv", "separable_conv", "batch_norm", "group_norm",
    "instance_norm", "resize", "upsample", "pixel_shuffle", "max_pool", "avg_pool", "min_pool",
)  # fmt: skip
# Layers whose output (batch, time, features) has the features last in PyTorch too.
_SEQUENCE = (
    "dense", "embedding", "multi_head_attention", "transformer_block", "layer_norm", "rms_norm", "patch_embed",
    "lstm", "gru", "simple_rnn", "recurrent",
)  # fmt: skip


class Layout(NamedTuple):
    """What PyTorch's counterpart of an array looks like.

    Attributes:
      spatial: whether the channels are on axis 1 instead of last.
      flat: the shape, channels last, from which its last axis was flattened; () where that cannot be told;
        None where both sides have the features in the same order.
    """

    spatial: bool = False
    flat: Shape | None = None


class Layouts:
    """The layouts of all arrays that go in or out of a layer."""

    def __init__(self, visits: Sequence[Visit], told: Mapping[str, Sequence[int] | None]):
        self._visits, self._told = visits, dict(told)
        self._used: set[str] = set()
        # By identity: the arrays are tracers, which ``visits`` keeps alive.
        self._known: dict[int, Layout] = {}
        self._images: list[Any] = []
        self._last = Layout()
        names = [visit.path.split("/") for visit in visits]
        self._combinators = {"/".join(path[:i]) for path in names for i in range(1, len(path))}
        for visit in visits:
            if visit.path == "":
                for array in _arrays(visit.x):
                    self._note(array, Layout(spatial=array.ndim >= 4))
        for visit in visits:
            self._follow(visit)

    def of(self, visit: Visit, path: str) -> Layout:
        """The layout of a layer's input, from which the order of its parameters follows.

        Raises:
          ValueError: where it cannot be told, and it matters.
        """
        x = first_array(visit.x)
        if path in self._told:
            self._used.add(path)
            shape = self._told[path]
            if shape is not None and math.prod(shape) != x.shape[-1]:
                raise ValueError(
                    f"flattened[{path!r}] is {tuple(shape)}, which are {math.prod(shape)} features, and its input "
                    f"has {x.shape[-1]}"
                )
            return Layout(flat=None if shape is None else tuple(shape))
        layout = self._known[id(x)]
        if layout.flat == ():
            raise ValueError(
                f"{path!r} has {x.shape[-1]} input features, and they may be those of a flattened image, which "
                f"PyTorch has in another order: pass flattened={{{path!r}: (height, width, channels)}}, or None "
                "in place of the shape where the order is the same"
            )
        return layout

    def check_all_used(self) -> None:
        unknown = sorted(set(self._told) - self._used)
        if unknown:
            raise ValueError(f"flattened names {unknown}, which are no layers with parameters of this model")

    def _note(self, array: Any, layout: Layout) -> None:
        if id(array) not in self._known:
            self._known[id(array)] = layout
            if array.ndim == 3:
                self._last = layout
            if layout.spatial and math.prod(array.shape[1:-1]) > 1 and array.shape[-1] > 1:
                self._images.append(array)

    def _guess(self, array: Any) -> Layout:
        """The layout of what an operation in a combinator made, of which no layer was told.

        Features may be a flattened image's where they are as many as several pixels of one that was there.
        Where they are as many as the last one's channels, they are taken for its mean. An array of three axes
        is like the last one of three.
        """
        if array.ndim == 3:
            return Layout(spatial=self._last.spatial)
        n = array.shape[-1] if array.shape else 1
        if array.ndim != 2 or not self._images or n == self._images[-1].shape[-1]:
            return Layout(spatial=array.ndim >= 4)
        several = any(n > image.shape[-1] and n % image.shape[-1] == 0 for image in self._images)
        return Layout(flat=() if several else None)

    def _follow(self, visit: Visit) -> None:
        """Notes the layout of a layer's output, unless a layer inside has made it."""
        x = first_array(visit.x)
        if x is None:
            return
        for array in _arrays(visit.x):
            self._note(array, self._guess(array))
        given = [self._known[id(array)] for array in _arrays(visit.x)]
        for y in _arrays(visit.y):
            self._note(y, self._output(visit, x, y, given))

    def _output(self, visit: Visit, x: Any, y: Any, given: list[Layout]) -> Layout:
        plain = not jax.tree.leaves((visit.params, visit.state))
        several = plain or visit.path in self._combinators
        before = given[0]
        if any(layout.flat is not None for layout in given):
            if len(given) == 1 and y.shape == x.shape and (plain or _elementwise(visit, x)):
                return before
            # A layer that mixes the features gives them in the order of its kernel; a sum or a concatenation
            # may hold both orders.
            return Layout(flat=() if several else None)
        if y.ndim == 2:
            image = before.spatial and x.ndim > 2 and math.prod(x.shape[1:-1]) > 1 and x.shape[-1] > 1
            if plain and image and y.size == x.size:
                return Layout(flat=_order(visit.layer, x))
            return self._guess(y) if several and x.ndim > 2 else Layout()
        if y.ndim == 3:
            kind = factory(visit.layer)
            if kind in _SPATIAL or kind in _SEQUENCE:
                return Layout(spatial=kind in _SPATIAL)
            return self._guess(y) if visit.path in self._combinators else Layout(before.spatial)
        return Layout(spatial=y.ndim > 3)


def _order(layer: Layer, x: Any) -> Shape | None:
    """What a function that makes features of an image does with their order, found by doing it."""
    numbers = np.arange(math.prod(x.shape[1:]), dtype=np.float32).reshape(1, *x.shape[1:])
    features = np.asarray(layer.apply({}, {}, jnp.asarray(numbers), train=False)[0])
    if np.array_equal(features, numbers.reshape(1, -1)):
        return tuple(x.shape[1:])
    return None if np.array_equal(features, np.moveaxis(numbers, -1, 1).reshape(1, -1)) else ()


def _elementwise(visit: Visit, x: Any) -> bool:
    return all(leaf.shape in ((), x.shape[-1:]) for leaf in jax.tree.leaves((visit.params, visit.state)))


def factory(layer: Layer) -> str:
    """The function that made the layer; its name would say so too, but for ``named``, which replaces it."""
    own = layer.name.removesuffix("_")
    return own if own in (*_SPATIAL, *_SEQUENCE) else getattr(layer.init, "__qualname__", "").split(".")[0]


def _arrays(x: Any) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(x) if hasattr(leaf, "shape")]


def first_array(x: Any) -> Any:
    """The array of an input that may be a tuple of an array and more."""
    return next(iter(_arrays(x)), None)
