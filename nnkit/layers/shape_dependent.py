"""``shape_dependent``: a layer that is chosen when the input's shape is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from nnkit.layers.children import check_child
from nnkit.layers.lift import own_name
from nnkit.types import Array, Layer, Params, Spec, State

__all__ = ["shape_dependent"]


def shape_dependent(make: Callable[[Spec], Layer], *, name: str | None = None) -> Layer:
    """The layer that ``make(spec)`` returns for the input at hand.

    ``spec`` is the input with a ``jax.ShapeDtypeStruct`` in place of each array. ``make`` is called by
    ``init`` and by every ``apply``, so what it returns may depend on the spec alone, and its parameters not
    on the batch size, which differs between them. The parameters are those of the layer it returns.

    Args:
      make: a function of the spec that returns a layer.
      name: the layer's name; by default the function's own.

    Raises:
      TypeError: where ``make`` is no function, or returns something else than a layer.

    Source: stax's ``shape_dependent``.

    >>> def bottleneck(spec):
    ...     return layers.serial(layers.dense(spec.shape[-1] // 4), layers.relu, layers.dense(spec.shape[-1]))
    >>> model = layers.serial(layers.residual(layers.shape_dependent(bottleneck)))
    >>> params, _ = model.init(jax.random.key(0), jnp.zeros((1, 16)))
    >>> params["residual_0"]["body"]["dense_0"]["kernel"].shape
    (16, 4)
    """
    if isinstance(make, Layer) or not callable(make):
        raise TypeError(f"shape_dependent takes a function of the input's spec, got {type(make).__name__}")

    def made(x: Any) -> Layer:
        layer = make(jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), x))
        check_child(f"shape_dependent({getattr(make, '__name__', 'make')})", layer)
        return layer

    def init(key: Array, x: Spec, /) -> tuple[Params, State]:
        return made(x).init(key, x)

    def apply(
        params: Params, state: State, x: Any, *, key: Array | None = None, train: bool
    ) -> tuple[Any, State]:
        return made(x).apply(params, state, x, key=key, train=train)

    return Layer(init, apply, own_name(make, "shape_dependent_") if name is None else name)
