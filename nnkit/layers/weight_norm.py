"""Weight normalisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from nnkit import initializers
from nnkit.checks import LayerError
from nnkit.layers.normalization import axes_of, check_epsilon
from nnkit.layers.reparametrize import as_names, checked_names, initialising, replace
from nnkit.tree import sum_of_squares
from nnkit.types import Array, Initializer, Layer, Params, Spec, State

__all__ = ["weight_norm"]


def weight_norm(
    layer: Layer,
    *,
    feature_axes: int | Sequence[int] | None = -1,
    use_scale: bool = True,
    scale_init: Initializer | Literal["norm"] = initializers.ones,
    epsilon: float | Array = 1e-12,
    names: str | Sequence[str] = ("kernel",),
) -> Layer:
    """The layer with kernels of learned length and direction, ``kernel = scale v / |v|``.

    |v| is the Euclidean norm over all axes but ``feature_axes``, sqrt(Σv² + epsilon).

    In the parameters ``{"direction": v, "scale": ...}`` stands where the layer has its kernel, so that
    weight decay by name leaves the scale alone; without a scale, v stands there itself. Inside a layer that
    stacks its parameters (``repeat``), wrap the block, not the stack.

    Args:
      layer: any layer, or a network of layers.
      feature_axes: along which each entry has its own norm and scale: the last is the outputs'
        (PyTorch: ``dim=0``); None for one norm of the whole kernel (PyTorch: ``dim=None``).
      use_scale: whether there is a learned scale; without it each norm is 1.
      scale_init: makes the scale, in the shape of the feature axes: Flax's ones, or ``"norm"``, PyTorch's,
        with which the layer starts with the kernel that it would have by itself.
      epsilon: added to the squared norm: Flax's; PyTorch has none.
      names: the name or names of the parameters that are normalised, at any depth.

    Raises:
      LayerError: where the layer has no parameter of these names, or no such axes, or stacks them
        (``repeat``); for parameters of the bare layer.

    Source: Salimans & Kingma 2016, "Weight normalization"; Flax's ``WeightNorm`` and PyTorch's
    ``torch.nn.utils.parametrizations.weight_norm``.

    >>> layer = layers.weight_norm(layers.dense(2), scale_init="norm")
    >>> params, _ = layer.init(jax.random.key(0), jnp.zeros((1, 3)))
    >>> jax.tree.map(jnp.shape, params)
    {'bias': (2,), 'kernel': {'direction': (3, 2), 'scale': (2,)}}
    """
    check_epsilon("weight_norm", epsilon)
    names = as_names(names)
    if isinstance(scale_init, str) and scale_init != "norm":
        raise ValueError(f"weight_norm(scale_init=...) must be an initializer or 'norm', got {scale_init!r}")

    def axes(v: Any) -> tuple[int, ...]:
        return (
            ()
            if feature_axes is None
            else axes_of("weight_norm", "feature_axes", feature_axes, v, "a parameter")
        )

    def squared_norm(v: Array) -> Array:
        kept = axes(v)
        return sum_of_squares(v, tuple(a for a in range(v.ndim) if a not in kept), keepdims=True)

    def init(key: Array, x: Spec, /) -> tuple[Params, State]:
        scale_key = jax.random.fold_in(key, 2**31)
        with initialising("weight_norm", names):
            params, state = layer.init(key, x)
        checked_names("weight_norm", layer, names, params)
        made = 0

        def parts(path: tuple[str, ...], v: Array) -> Any:
            nonlocal made
            if isinstance(v, Mapping):
                raise LayerError("weight_norm", f"is around a layer that normalises {'/'.join(path)} already")
            shape = tuple(v.shape[a] for a in axes(v))
            if not use_scale:
                return v
            made += 1
            if isinstance(scale_init, str):
                scale = jnp.sqrt(squared_norm(v)).reshape(shape).astype(v.dtype)
            else:
                scale = scale_init(jax.random.fold_in(scale_key, made), shape, v.dtype)
            return {"direction": v, "scale": scale}

        return replace(params, names, parts), state

    def whole(path: tuple[str, ...], part: Any) -> Array:
        if isinstance(part, Mapping) != use_scale or (use_scale and {*part} != {"direction", "scale"}):
            raise LayerError(
                "weight_norm",
                f"takes {'direction and scale' if use_scale else 'one array'} for {'/'.join(path)} and got "
                f"{sorted(part) if isinstance(part, Mapping) else 'one array'}: pass the parameters that this "
                "model's init made",
            )
        v = part["direction"] if use_scale else part
        squares = squared_norm(v)
        factor = jax.lax.rsqrt(squares + jnp.asarray(epsilon, squares.dtype))
        if use_scale:
            factor = factor * part["scale"].astype(factor.dtype).reshape(factor.shape)
        return (v.astype(factor.dtype) * factor).astype(v.dtype)

    def apply(
        params: Params, state: State, x: Any, *, key: Array | None = None, train: bool
    ) -> tuple[Any, State]:
        return layer.apply(replace(params, names, whole), state, x, key=key, train=train)

    return layer._replace(init=init, apply=apply)
