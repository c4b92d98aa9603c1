"""Loss scaling: gradients of float16 networks kept within what float16 can hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nnkit.optim.combine import tolerant
from nnkit.optim.conditional import all_finite, check_count, update_if
from nnkit.optim.leafwise import check_state
from nnkit.optim.scalars import Scalar, as_scalar, increment
from nnkit.tree import wide
from nnkit.types import GradientTransformation, PyTree

__all__ = [
    "LossScaleState",
    "dynamic_loss_scale",
    "loss_scale",
    "static_loss_scale",
    "unscale",
]


class LossScaleState(NamedTuple):
    """What :func:`dynamic_loss_scale` and :func:`static_loss_scale` remember.

    Attributes:
      scale: by what the next loss is to be multiplied, float32.
      good_steps: how many steps with finite gradients there were since the scale changed or one was
        skipped, int32.
      last_finite: whether the last gradients were finite.
      total_notfinite: how many steps were skipped since the start, int32.
      inner_state: the state of the optimizer inside.
    """

    scale: Any
    good_steps: Any
    last_finite: Any
    total_notfinite: Any
    inner_state: PyTree


def dynamic_loss_scale(
    inner: GradientTransformation,
    *,
    initial_scale: Scalar = 2.0**15,
    growth_interval: int | Array = 2000,
    factor: Scalar = 2.0,
    min_scale: Scalar = 1.0,
) -> GradientTransformation:
    """``inner`` on gradients of a loss that was multiplied by a scale, which finds its own size.

    The gradients are divided by the scale S, in float32 at least. Where one is inf or NaN the step is
    skipped: the updates are zeros, the state of ``inner`` stays, and ``S <- max(S/factor, min_scale)``.
    After growth_interval steps in a row without one, ``S <- S·factor`` unless that is inf.

    :func:`loss_scale` reads S off the state. ``train.trainer`` multiplies the loss by it, reports the loss
    without it, and keeps the layers' state too where a step is skipped: running statistics of an
    overflown forward pass would be inf for good. In a loop of one's own:

        scale = optim.loss_scale(opt_state)
        grads = jax.grad(lambda params: scale * loss(params))(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)

    Put it around the whole optimizer, ``dynamic_loss_scale(chain(clip_by_global_norm(1.0), adam(1e-3)))``:
    what stands before it would see the gradients scaled, and ``apply_if_finite`` around it, which it makes
    superfluous, would keep the scale from falling. It goes into ``MultiSteps``, which then gathers
    scaled gradients, or around it. Further arguments go to ``inner``, which is not run in a skipped step.

    Args:
      inner: the optimizer, nnkit's or optax's.
      initial_scale: S at the start, positive.
      growth_interval: how many good steps make it grow, a whole number of at least 1.
      factor: by what it grows and shrinks, above 1.
      min_scale: below which it does not shrink, positive.

    Raises:
      TypeError: for an inner that is no transformation, numbers that are none.
      ValueError: for numbers outside their intervals.

    Source: Micikevicius et al. 2018, "Mixed precision training"; PyTorch's ``torch.amp.GradScaler``, whose
    scale this is call for call (growth_factor = factor, backoff_factor = 1/factor); jmp's
    ``DynamicLossScale``.

    >>> tx = optim.dynamic_loss_scale(optim.sgd(1.0), initial_scale=8.0, growth_interval=2)
    >>> state = tx.init({"w": jnp.array(0.0)})
    >>> for grad in (1.0, jnp.inf, 1.0, 1.0):
    ...     scale = optim.loss_scale(state)
    ...     updates, state = tx.update({"w": jnp.array(grad) * scale}, state)
    ...     print(float(scale), float(updates["w"]))
    8.0 -1.0
    8.0 0.0
    4.0 -1.0
    4.0 -1.0
    >>> float(optim.loss_scale(state))
    8.0
    """
    start = as_scalar(initial_scale, "initial_scale", "(0, inf)")
    interval = check_count(growth_interval, "growth_interval", 1)
    by = as_scalar(factor, "factor", "(1, inf)", "the scale grows and shrinks by it")
    least = as_scalar(min_scale, "min_scale", "(0, inf)")

    def adapt(scale: Array, good: Array, finite: Array) -> tuple[Array, Array]:
        with jax.numpy_dtype_promotion("standard"):  # traced numbers may be of other dtypes
            grow = good >= interval
            grown = (scale * by).astype(scale.dtype)
            shrunk = jnp.minimum(scale, jnp.maximum(scale / by, least)).astype(scale.dtype)
        up = jnp.where(grow & jnp.isfinite(grown), grown, scale)
        return jnp.where(finite, up, shrunk), jnp.where(grow, 0, good)

    return _scaled("dynamic_loss_scale", inner, start, adapt)


def static_loss_scale(inner: GradientTransformation, scale: Scalar) -> GradientTransformation:
    """:func:`dynamic_loss_scale` whose scale stays as it is; steps that are not finite are skipped too.

    >>> tx = optim.static_loss_scale(optim.sgd(1.0), 1024.0)
    >>> updates, _ = tx.update({"w": jnp.array(1024.0)}, tx.init({"w": jnp.array(0.0)}))
    >>> float(updates["w"])
    -1.0
    """
    start = as_scalar(scale, "scale", "(0, inf)")
    return _scaled("static_loss_scale", inner, start, lambda scale, good, finite: (scale, good))


def _scaled(
    name: str,
    inner: GradientTransformation,
    start: Any,
    adapt: Callable[[Array, Array, Array], tuple[Array, Array]],
) -> GradientTransformation:
    inner = tolerant(f"{name}: inner", inner)

    def init(params: PyTree) -> LossScaleState:
        return LossScaleState(
            scale=jnp.array(start, jnp.float32),
            good_steps=jnp.zeros([], jnp.int32),
            last_finite=jnp.array(True),
            total_notfinite=jnp.zeros([], jnp.int32),
            inner_state=inner.init(params),
        )

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, PyTree]:
        state = check_state(name, state, LossScaleState)
        updates = unscale(updates, state.scale)
        finite = all_finite(updates)
        updates, inner_state = update_if(finite, inner, updates, state.inner_state, params, extra_args)
        scale, good = adapt(state.scale, jnp.where(finite, increment(state.good_steps), 0), finite)
        skipped = increment(state.total_notfinite)
        return updates, state._replace(
            scale=scale,
            good_steps=good,
            last_finite=finite,
            total_notfinite=jnp.where(finite, state.total_notfinite, skipped),
            inner_state=inner_state,
        )

    return GradientTransformation(init, update)


def loss_scale(opt_state: PyTree) -> Float[Array, "..."] | float:
    """By what to multiply the loss before it is differentiated, read from the optimizer's state.

    Returns:
      The scale of :func:`dynamic_loss_scale` or :func:`static_loss_scale`, wherever it lies in the state,
      or 1.0 where there is none.

    Raises:
      ValueError: where other transformations come before it or stand beside it and so would get scaled
        gradients, where ``apply_if_finite`` is around it, and where there are two.

    >>> params = {"w": jnp.zeros(2)}
    >>> optim.loss_scale(optim.adam(1e-3).init(params))
    1.0
    >>> float(optim.loss_scale(optim.dynamic_loss_scale(optim.adam(1e-3)).init(params)))
    32768.0
    """
    found = _find(opt_state)
    if len(found) > 1:
        raise ValueError(f"the optimizer has {len(found)} loss scales, and a loss has one: {_AROUND}")
    return found[0] if found else 1.0


_AROUND = "put it around the whole optimizer, dynamic_loss_scale(chain(clip_by_global_norm(1.0), adam(1e-3)))"


def _find(state: Any) -> list[Any]:
    """The scales in a state, an error where others would see the gradients that are scaled by them."""
    if isinstance(state, LossScaleState):
        return [state.scale, *_find(state.inner_state)]
    fields = getattr(state, "_fields", None)
    if fields is not None and fields != ("inner_states",):
        found = [scale for part in state for scale in _find(part)]
        if found and "notfinite_count" in fields:  # nnkit's or optax's ApplyIfFiniteState
            raise ValueError(
                "apply_if_finite is around a loss scale and hides from it the gradients that are not finite, so that "
                "it never falls: put the loss scale outermost, it skips such steps itself"
            )
        return found
    by_label = fields is not None
    if by_label:
        parts = list(state[0].values())
    elif isinstance(state, Mapping):
        parts = list(state.values())
    else:
        parts = list(state) if isinstance(state, tuple | list) else []
    found = [_find(part) for part in parts]
    if any(found[1:]) or (by_label and len(found) > 1 and found[0]):
        raise ValueError(f"a loss scale is not the first to see the gradients: {_AROUND}")
    return found[0] if found else []


def unscale(grads: PyTree, scale: Any) -> PyTree:
    """The gradients divided by the scale, those of half precision in float32.

    >>> unscale({"w": jnp.array([2.0], jnp.float16)}, jnp.float32(4.0))
    {'w': Array([0.5], dtype=float32)}
    """
    return jax.tree.map(lambda g: (g := g.astype(wide(g.dtype))) / scale.astype(g.real.dtype), grads)
