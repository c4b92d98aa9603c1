"""What batch, layer, group, instance and RMS normalisation share: masks, scale and bias, and the layer itself."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnkit.checks import LayerError, is_static_number
from nnkit.layers.children import is_inferring
from nnkit.layers.lift import float_input, param
from nnkit.ops.normalize import normalize
from nnkit.tree import wide
from nnkit.types import Array, Initializer, Layer, Params, Spec, State

__all__ = ["Affine", "axes_of", "bound_axis", "check_epsilon", "normalization", "split", "usable"]


class Affine(NamedTuple):
    """The learned scale and bias behind a normalisation: which there are, and how they begin."""

    use_scale: bool
    use_bias: bool
    scale_init: Initializer
    bias_init: Initializer

    def init(self, key: Array, shape: tuple[int, ...], dtype: Any) -> dict[str, Any]:
        bias_key = jax.random.fold_in(key, 1)
        params: dict[str, Any] = {}
        if self.use_scale:
            params["scale"] = self.scale_init(key, shape, dtype)
        if self.use_bias:
            params["bias"] = self.bias_init(bias_key, shape, dtype)
        return params

    def read(self, kind: str, params: Params, x: Any, axes: tuple[int, ...]) -> tuple[Array, Array]:
        """Scale and bias of the axes of x that are the features, with length 1 along the others."""
        shape, why = tuple(x.shape[a] for a in axes), f"its input has shape {x.shape}"
        spread = tuple(n if a in axes else 1 for a, n in enumerate(x.shape))
        none = (1,) * x.ndim
        scale = param(kind, params, "scale", shape, why).reshape(spread) if self.use_scale else jnp.ones(none)
        bias = param(kind, params, "bias", shape, why).reshape(spread) if self.use_bias else jnp.zeros(none)
        return scale.astype(wide(x.dtype)), bias.astype(wide(x.dtype))


def normalization(
    kind: str,
    reduced: Callable[[Any], tuple[int, ...]],
    features: Callable[[Any], tuple[int, ...]],
    affine: Affine,
    *,
    epsilon: float | Array,
    centred: bool = True,
    groups: Callable[[Any], int] | None = None,
    axis_name: Hashable | None = None,
) -> Layer:
    """A normalisation without state: by the moments over ``reduced(x)``, in training and at test time.

    Args:
      kind: the layer's name in errors.
      reduced: the axes over which the moments go.
      features: the axes along which scale and bias differ.
      affine: the scale and bias.
      epsilon: added to the variance.
      centred: whether the mean is subtracted.
      groups: into how many groups the last axis is cut; its rest is then reduced and must be in ``reduced``.
      axis_name: the name of a mapped axis over whose members the moments go too.
    """
    check_epsilon(kind, epsilon)

    def init(key: Array, x: Spec, /) -> tuple[Params, State]:
        x, _ = split(kind, x)
        reduced(x)
        if groups is not None:
            groups(x)
        return affine.init(key, tuple(x.shape[a] for a in features(x)), wide(x.dtype)), {}

    def apply(
        params: Params, state: State, x: Any, *, key: Array | None = None, train: bool
    ) -> tuple[Any, State]:
        x, mask = split(kind, x)
        axes = reduced(x)
        scale, bias = affine.read(kind, params, x, features(x))
        axis = bound_axis(kind, axis_name)
        wide_x, where = usable(x, mask)
        if groups is not None:
            g = groups(x)
            axes = (*axes[:-1], x.ndim)
            wide_x, scale, bias, where = (_cut(a, g) for a in (wide_x, scale, bias, where))
        y, _, _ = normalize(
            wide_x, scale, bias, axes, epsilon=epsilon, where=where, centred=centred, axis_name=axis
        )
        return y.reshape(x.shape).astype(x.dtype), state

    return Layer(init, apply, f"{kind}_")


def _cut(a: Any, groups: int) -> Any:
    """The last axis as (groups, channels of a group), or as (1, 1) where it broadcasts."""
    if a is None:
        return None
    return a.reshape(*a.shape[:-1], *((1, 1) if a.shape[-1] == 1 else (groups, -1)))


def split(kind: str, x: Any) -> tuple[Any, Any]:
    """x and its mask from x or (x, mask): of arrays or of specs; the mask is None where there is none."""
    mask = None
    if isinstance(x, tuple | list):
        if len(x) != 2:
            raise LayerError(kind, f"takes x or (x, mask), got a {type(x).__name__} of {len(x)}")
        x, mask = x
    float_input(kind, x)
    if isinstance(x, np.ndarray):
        x = jnp.asarray(x)  # in the dtype that JAX has for it
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise LayerError(kind, f"takes real input, got {x.dtype}: normalise x.real and x.imag apart")
    shape = getattr(mask, "shape", ())
    if mask is not None and getattr(mask, "dtype", None) != jnp.bool_:
        got = getattr(mask, "dtype", type(mask).__name__)
        raise LayerError(kind, f"takes a boolean mask, True where an entry counts, got {got}: write mask > 0")
    if mask is not None and (
        len(shape) > len(x.shape) or any(m not in (1, n) for m, n in zip(shape, x.shape, strict=False))
    ):
        raise LayerError(
            kind,
            f"got a mask of shape {shape} for input of shape {x.shape}: its axes are those of x from the first "
            "on, each as long or of length 1, as in (batch,), (batch, time) or (batch, 1, channels)",
        )
    return x, mask


def usable(x: Array, mask: Any) -> tuple[Array, Array | None]:
    """x in float32 at least, and the mask with as many axes as x."""
    x = x.astype(wide(x.dtype))
    if mask is None:
        return x, None
    where = jnp.asarray(mask)
    where = where.reshape(where.shape + (1,) * (x.ndim - where.ndim))
    # Padding may hold anything: a NaN there would reach the gradient of scale as 0·NaN.
    return jnp.where(where | jnp.isfinite(x), x, 0), where


def axes_of(
    kind: str, argument: str, axes: int | Sequence[int], x: Any, what: str = "input"
) -> tuple[int, ...]:
    """The axes of x that an argument names, in order and not negative."""
    listed = (axes,) if isinstance(axes, int) else tuple(axes)
    ndim = len(x.shape)
    if not listed or any(not -ndim <= a < ndim for a in listed):
        raise LayerError(kind, f"has {argument}={axes} for {what} of shape {x.shape}: name axes that it has")
    found = tuple(sorted({a % ndim for a in listed}))
    if len(found) < len(listed):
        raise LayerError(kind, f"has {argument}={axes}, which names one of {ndim} axes twice")
    return found


def check_epsilon(kind: str, epsilon: Any) -> None:
    """Raises where ``epsilon`` is a plain number and negative."""
    if is_static_number(epsilon) and not epsilon >= 0:
        raise ValueError(f"{kind}(epsilon=...) must not be negative, got {epsilon}")


def bound_axis(kind: str, axis_name: Hashable | None) -> Hashable | None:
    """``axis_name``, raising where it is not the name of a mapped axis around this call.

    None where ``init`` asks for shapes only, which the members of the axis have in common.
    """
    if axis_name is None or is_inferring():
        return None
    try:
        jax.lax.axis_size(axis_name)
    except NameError:
        raise LayerError(
            kind,
            f"has axis_name={axis_name!r} and is not inside an axis of that name: call it in "
            f"jax.vmap(..., axis_name={axis_name!r}) or jax.shard_map, or leave axis_name out",
        ) from None
    return axis_name
