"""Updates kept within bounds: element by element, by their norm, or by their parameter's norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nnkit import tree
from nnkit.optim.leafwise import check_params, leafwise
from nnkit.optim.scalars import Scalar, as_scalar
from nnkit.optim.transform import EmptyState
from nnkit.tree import root, sum_of_squares, wide
from nnkit.types import GradientTransformation, PyTree

__all__ = [
    "adaptive_grad_clip",
    "centralize",
    "clip",
    "clip_by_block_rms",
    "clip_by_global_norm",
    "global_norm",
    "unitwise_norm",
]


def global_norm(updates: PyTree) -> Float[Array, ""]:
    """The Euclidean norm of all leaves taken as one vector, √Σ|u|² (optax's ``global_norm``).

    It has the leaves' dtype. In half precision the squares are summed in float32: the norm of
    float16 numbers above 255 is finite here and inf in optax. Its derivative at 0 is 0, not NaN.

    >>> float(optim.global_norm({"a": jnp.array([3.0]), "b": jnp.array(4.0 + 12.0j)}))
    13.0
    """
    return tree.global_norm(updates)


def clip(max_delta: Scalar) -> GradientTransformation:
    """Brings every element into [−max_delta, max_delta] (optax's ``clip``). NaN stays NaN.

    Raises:
      ValueError: for a negative or NaN max_delta.
      TypeError: at an update, for complex numbers, which have no order.

    >>> tx = optim.clip(1.0)
    >>> updates, _ = tx.update({"w": jnp.array([0.5, -3.0])}, tx.init({"w": jnp.zeros(2)}))
    >>> updates["w"].tolist()
    [0.5, -1.0]
    """
    bound = as_scalar(
        max_delta, "max_delta", "[0, inf]", "it is the largest magnitude that an element may have"
    )

    def leaf(u: Array) -> tuple[Array]:
        if jnp.iscomplexobj(u):
            raise TypeError("clip: complex numbers have no order: use clip_by_global_norm")
        return (jnp.clip(u, -bound, bound).astype(u.dtype),)

    return _stateless("clip", lambda updates, _: leafwise("clip", leaf, {"updates": updates})[0])


def clip_by_global_norm(max_norm: Scalar) -> GradientTransformation:
    """Shrinks all updates by one factor where their common norm is too large (optax's).

    ``u ← u·max_norm / ‖u‖`` where ‖u‖ > max_norm, with the norm of :func:`global_norm`. PyTorch's
    ``clip_grad_norm_`` divides by ‖u‖ + 1e-6. An inf or NaN among the updates is not repaired: with a
    NaN the norm and all updates are NaN, with an inf the others become 0, as in optax
    (see :func:`apply_if_finite`).

    Where optax differs: there max_norm 0 makes NaN of no gradient at all, max_norm inf makes NaN of an
    infinite one, and float16 numbers above 255 become 0. No element grows here, not by rounding either.

    Raises:
      ValueError: for a negative or NaN max_norm.

    Pascanu et al., 2012, https://arxiv.org/abs/1211.5063.

    By hand: the norm of (3, 4) is 5.

    >>> tx = optim.clip_by_global_norm(1.0)
    >>> updates, _ = tx.update({"a": jnp.array(3.0), "b": jnp.array(4.0)}, tx.init({"a": 0.0, "b": 0.0}))
    >>> [round(float(u), 6) for u in updates.values()]
    [0.6, 0.8]
    """
    bound = as_scalar(max_norm, "max_norm", "[0, inf]", "it is the largest norm that the updates may have")

    def clipped(updates: PyTree, _: Any) -> PyTree:
        norm = root([sum_of_squares(x) for x in jax.tree.leaves(updates)])
        factor = _shrink(norm, bound)
        leaf = lambda u: ((u * factor).astype(u.dtype),)
        return leafwise("clip_by_global_norm", leaf, {"updates": updates})[0]

    return _stateless("clip_by_global_norm", clipped)


def clip_by_block_rms(threshold: Scalar) -> GradientTransformation:
    """Shrinks every leaf whose root mean square is too large (optax's ``clip_by_block_rms``).

    ``u ← u·threshold / rms(u)`` where ``rms(u) = √(mean |u|²) > threshold``, leaf by leaf.

    Raises:
      ValueError: for a negative or NaN threshold.

    Shazeer and Stern, 2018 (Adafactor, section 6), https://arxiv.org/abs/1804.04235.

    By hand: the root mean square of (1, 7) is 5, of (1, 1) it is 1.

    >>> tx = optim.clip_by_block_rms(2.0)
    >>> grads = {"a": jnp.array([1.0, 7.0]), "b": jnp.ones(2)}
    >>> updates, _ = tx.update(grads, tx.init(grads))
    >>> [[round(x, 6) for x in u.tolist()] for u in updates.values()]
    [[0.4, 2.8], [1.0, 1.0]]
    """
    bound = as_scalar(threshold, "threshold", "[0, inf]", "it is the largest root mean square of a leaf")

    def leaf(u: Array) -> Array:
        rms = root([sum_of_squares(u) / max(u.size, 1)])
        return (u * _shrink(rms, bound)).astype(u.dtype)

    return _stateless("clip_by_block_rms", lambda updates, _: _each("clip_by_block_rms", leaf, updates))


def adaptive_grad_clip(
    clipping: Scalar, eps: Scalar = 1e-3, axis: int | tuple[int, ...] | None = None
) -> GradientTransformation:
    """Shrinks a unit's update where it is large beside the unit's parameters (optax's).

    ``u ← u·m / ‖u‖`` where ``‖u‖ ≥ m = clipping·max(‖θ‖, eps)``, with the norms of
    :func:`unitwise_norm`, one for each unit.

    Args:
      clipping: the largest ratio of the update's norm to the parameters'.
      eps: the norm that parameters are taken to have at least, so that those that start at 0 can move.
      axis: what is summed over in a unit's norm; by default it is told from the number of axes.

    Raises:
      ValueError: for a negative or NaN clipping or eps; at an update, without parameters, for trees of
        different forms, or for a leaf of more than five axes when axis is None.

    Brock et al., 2021, https://arxiv.org/abs/2102.06171.

    By hand: the update has norm 5, the parameters have norm 2, and half of that is allowed.

    >>> tx = optim.adaptive_grad_clip(0.5)
    >>> params = {"w": jnp.array([0.0, 2.0])}
    >>> updates, _ = tx.update({"w": jnp.array([3.0, 4.0])}, tx.init(params), params)
    >>> [round(x, 6) for x in updates["w"].tolist()]
    [0.6, 0.8]
    """
    ratio = as_scalar(clipping, "clipping", "[0, inf)", "it is a ratio of norms")
    least = as_scalar(eps, "eps", "[0, inf)")

    def leaf(u: Array, p: Array) -> Array:
        norm, bound = _unit_norms(u, axis), ratio * jnp.maximum(_unit_norms(p, axis), least)
        # optax bounds the divisor from below; a norm that is smaller than that is not clipped but for a
        # clipping below 1e-3.
        factor = jnp.where(norm < bound, 1, bound / jnp.maximum(norm, 1e-6))
        return (u * factor).astype(u.dtype)

    def clipped(updates: PyTree, params: PyTree | None) -> PyTree:
        if params is None:
            raise ValueError(
                "adaptive_grad_clip needs the parameters: call update(grads, opt_state, params) with params"
            )
        return _each("adaptive_grad_clip", leaf, updates, params)

    return _stateless("adaptive_grad_clip", clipped)


def unitwise_norm(x: Float[Array, "..."], axis: int | tuple[int, ...] | None = None) -> Float[Array, "..."]:
    """The norms of a parameter's units, each in place of all of the unit's elements (optax's).

    A unit is one output of a layer: by default all of a scalar or vector (also one with axes of length
    1), a column of a matrix and of the heads of attention, (in, ...), and a filter of a kernel of two
    or three spatial axes, (..., in, out). Half precision is summed in float32.

    Args:
      x: a leaf.
      axis: what to sum over in place of that. Kernels of one spatial axis need (0, 1).

    Raises:
      ValueError: for more than five axes when axis is None.

    >>> from nnkit.optim.clip import unitwise_norm
    >>> unitwise_norm(jnp.array([[3.0, 1.0], [4.0, 0.0]])).tolist()
    [[5.0, 1.0], [5.0, 1.0]]
    """
    norms = _unit_norms(x, axis)
    return jnp.broadcast_to(norms, x.shape).astype(jnp.finfo(x.dtype).dtype)


def _unit_norms(x: Array, axis: int | tuple[int, ...] | None) -> Array:
    """:func:`unitwise_norm` with the length 1 in every axis that was summed over."""
    if axis is None:
        if sum(n != 1 for n in x.shape) <= 1:
            axis = tuple(range(x.ndim))
        elif x.ndim <= 5:
            axis = (0,) if x.ndim <= 3 else tuple(range(x.ndim - 1))
        else:
            raise ValueError(
                f"a parameter of shape {x.shape} has more than five axes, of which the units are not known: "
                "say what to sum over, axis=(0, 1) for instance"
            )
    return root([sum_of_squares(x, axis, keepdims=True)])


def centralize(*, unit_axis: int = 0) -> GradientTransformation:
    """Takes off every unit's mean, u ← u − mean(u) over all other axes (optax's ``centralize``).

    Scalars and vectors stay as they are.

    Args:
      unit_axis: the axis of the units. The first one as in optax; the paper's units are the outputs,
        which are last, −1, in the kernels of nnkit and Flax.

    Raises:
      TypeError: for a unit_axis that is not an integer.

    Yong et al., 2020, https://arxiv.org/abs/2004.01461.

    >>> tx = optim.centralize()
    >>> grads = {"kernel": jnp.array([[1.0, 3.0], [2.0, 8.0]]), "bias": jnp.array([1.0, 2.0])}
    >>> updates, _ = tx.update(grads, tx.init(grads))
    >>> updates["kernel"].tolist(), updates["bias"].tolist()
    ([[-1.0, 1.0], [-3.0, 3.0]], [1.0, 2.0])
    """
    if not isinstance(unit_axis, int):
        raise TypeError(f"unit_axis must be an integer, 0 or -1 for instance, got {unit_axis!r}")

    def leaf(u: Array) -> Array:
        if u.ndim < 2 or u.size == 0:
            return u
        axes = tuple(i for i in range(u.ndim) if i != unit_axis % u.ndim)
        x = u.astype(wide(u.dtype))
        return (x - x.mean(axes, keepdims=True)).astype(u.dtype)

    return _stateless("centralize", lambda updates, _: _each("centralize", leaf, updates))


def _stateless(where: str, change: Callable[[PyTree, PyTree | None], PyTree]) -> GradientTransformation:
    """The transformation that is ``change(updates, params)``."""

    def init(params: PyTree) -> EmptyState:
        check_params(where, params)
        return EmptyState()

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **_: Any
    ) -> tuple[PyTree, PyTree]:
        with jax.numpy_dtype_promotion("standard"):  # as in leafwise
            return change(updates, params), state

    return GradientTransformation(init, update)


def _each(where: str, leaf: Callable[..., Array], updates: PyTree, params: PyTree | None = None) -> PyTree:
    """``leaf(u, p)`` of whole leaves, whose sums leafwise, being elementwise, cannot take."""
    reads = {} if params is None else {"params": params}
    # leafwise is what finds fault with the trees.
    updates = leafwise(where, lambda u, *_: (u,), {"updates": updates}, reads)[0]

    def call(u: Array | None, *p: Any) -> Any:
        return u if u is None or p == (None,) else leaf(u, *map(jnp.asarray, p))

    return jax.tree.map(call, updates, *reads.values(), is_leaf=lambda x: x is None)


def _shrink(norm: Array, bound: Scalar) -> Array:
    """``bound / norm`` where the norm is larger, else 1; NaN for a NaN.

    A factor of at most 1 lets no product grow, which the quotient u/norm times bound may by rounding.
    """
    within = norm <= bound
    return jnp.where(within, 1, bound / jnp.where(within, 1, norm))
