"""RMSProp: steps scaled by the root of a running mean of squared gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from nnkit.optim.combine import chain
from nnkit.optim.leafwise import abs_sq, check_params, check_state, filled, leafwise
from nnkit.optim.scalars import (
    Scalar,
    as_scalar,
    check_learning_rate,
    increment,
    inverse,
    inverse_root,
    quotient,
    unbiased,
)
from nnkit.optim.sgd import check_momentum, trace
from nnkit.optim.transform import identity, scale_by_learning_rate
from nnkit.types import GradientTransformation, PyTree, ScalarOrSchedule

__all__ = [
    "ScaleByRStdDevState",
    "ScaleByRStdDevWithCountState",
    "ScaleByRmsState",
    "ScaleByRmsWithCountState",
    "rmsprop",
    "scale_by_rms",
    "scale_by_stddev",
]


class ScaleByRmsState(NamedTuple):
    """The exponential average of the squared gradients."""

    nu: PyTree


class ScaleByRmsWithCountState(NamedTuple):
    """The same with the number of updates (count, an int32 scalar), for the bias correction."""

    count: Any
    nu: PyTree


class ScaleByRStdDevState(NamedTuple):
    """The exponential averages of the gradients (mu) and of their squares (nu)."""

    mu: PyTree
    nu: PyTree


class ScaleByRStdDevWithCountState(NamedTuple):
    """The same with the number of updates (count, an int32 scalar), for the bias correction."""

    count: Any
    mu: PyTree
    nu: PyTree


def scale_by_rms(
    decay: Scalar = 0.9,
    eps: Scalar = 1e-8,
    initial_scale: Scalar = 0.0,
    eps_in_sqrt: bool = True,
    bias_correction: bool = False,
) -> GradientTransformation:
    """RMSProp without its learning rate (optax's ``scale_by_rms``).

    See :func:`rmsprop` for formula, arguments and sources.

    Raises:
      ValueError: for a decay outside [0, 1), for a negative eps or initial_scale.

    >>> tx = optim.scale_by_rms(decay=0.75, eps=0.0)
    >>> updates, state = tx.update({"w": jnp.array(4.0)}, tx.init({"w": jnp.array(0.0)}))
    >>> float(updates["w"]), float(state.nu["w"])
    (2.0, 4.0)
    """
    decay, eps, initial = _checked(decay, eps, initial_scale)

    def init(params: PyTree) -> PyTree:
        check_params("scale_by_rms", params)
        nu = filled(params, initial)
        if bias_correction:
            return ScaleByRmsWithCountState(count=jnp.zeros([], jnp.int32), nu=nu)
        return ScaleByRmsState(nu=nu)

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **_: Any
    ) -> tuple[PyTree, PyTree]:
        state, hat = _advanced("scale_by_rms", state, decay, bias_correction, *_RMS)

        def leaf(g: Array, nu: Array) -> tuple[Array, Array]:
            out = nu.dtype
            nu = (1 - decay) * abs_sq(g) + decay * nu
            return _over_root(g, hat(nu), eps, eps_in_sqrt).astype(out), nu

        updates, nu = leafwise("scale_by_rms", leaf, {"updates": updates}, states={"nu": state.nu})
        return updates, state._replace(nu=nu)

    return GradientTransformation(init, update)


def scale_by_stddev(
    decay: Scalar = 0.9,
    eps: Scalar = 1e-8,
    initial_scale: Scalar = 0.0,
    eps_in_sqrt: bool = True,
    bias_correction: bool = False,
) -> GradientTransformation:
    """Centered RMSProp without its learning rate (optax's ``scale_by_stddev``).

    See :func:`rmsprop` for formula, arguments and sources.

    Raises:
      ValueError: for a decay outside [0, 1), for a negative eps or initial_scale.

    >>> tx = optim.scale_by_stddev(decay=0.5, eps=0.0)
    >>> updates, state = tx.update({"w": jnp.array(4.0)}, tx.init({"w": jnp.array(0.0)}))
    >>> float(updates["w"]), float(state.mu["w"]), float(state.nu["w"])
    (2.0, 2.0, 8.0)
    """
    decay, eps, initial = _checked(decay, eps, initial_scale)

    def init(params: PyTree) -> PyTree:
        check_params("scale_by_stddev", params)
        mu, nu = filled(params), filled(params, initial)
        if bias_correction:
            return ScaleByRStdDevWithCountState(count=jnp.zeros([], jnp.int32), mu=mu, nu=nu)
        return ScaleByRStdDevState(mu=mu, nu=nu)

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **_: Any
    ) -> tuple[PyTree, PyTree]:
        state, hat = _advanced("scale_by_stddev", state, decay, bias_correction, *_STDDEV)

        def leaf(g: Array, mu: Array, nu: Array) -> tuple[Array, Array, Array]:
            out = nu.dtype
            mu = (1 - decay) * g + decay * mu
            nu = (1 - decay) * abs_sq(g) + decay * nu
            variance = hat(nu) - abs_sq(hat(mu))
            if not jnp.iscomplexobj(variance):
                # A steady gradient leaves rounding noise, whose root may be NaN.
                variance = jnp.maximum(variance, 0)
            return _over_root(g, variance, eps, eps_in_sqrt).astype(out), mu, nu

        averages = {"mu": state.mu, "nu": state.nu}
        updates, mu, nu = leafwise("scale_by_stddev", leaf, {"updates": updates}, states=averages)
        return updates, state._replace(mu=mu, nu=nu)

    return GradientTransformation(init, update)


def rmsprop(
    learning_rate: ScalarOrSchedule,
    decay: Scalar = 0.9,
    eps: Scalar = 1e-8,
    initial_scale: Scalar = 0.0,
    eps_in_sqrt: bool = True,
    centered: bool = False,
    momentum: Scalar | None = None,
    nesterov: bool = False,
    bias_correction: bool = False,
    *,
    learning_rate_in_momentum: bool = True,
) -> GradientTransformation:
    """RMSProp (optax's ``rmsprop``).

    ``v ← b·v + (1 − b)·g², θ ← θ − η·g / √(v + eps)``. Centered, v is replaced under the root by
    ``v − m²`` with ``m ← b·m + (1 − b)·g``. With momentum ``ρ ← μ·ρ − η·g / √(v + eps), θ ← θ + ρ``.

    Args:
      learning_rate: η, a number or a schedule.
      decay: b, in [0, 1).
      eps: keeps the step finite where v is near 0. At 0, a parameter that has never had a gradient
        stays where it is (optax gives NaN).
      initial_scale: where v starts.
      eps_in_sqrt: whether eps is inside the root, or outside, ``g / (√v + eps)``.
      centered: whether to divide by the standard deviation. The variance is kept from falling
        below 0 by rounding, where optax and PyTorch give NaN.
      momentum: μ, in (-1, 1); None for none.
      nesterov: whether the momentum is Nesterov's.
      bias_correction: whether to divide v (and m) by 1 − bᵗ.
      learning_rate_in_momentum: whether ρ gathers scaled steps, as in optax and Keras, or η is
        outside, ``ρ ← μ·ρ + g / √(v + eps), θ ← θ − η·ρ``, as in PyTorch.

    PyTorch's is ``rmsprop(rate, decay=0.99, eps_in_sqrt=False, learning_rate_in_momentum=False)``, the
    lecture's ``rmsprop(rate, eps=0.0)``.

    Raises:
      ValueError: for a negative rate, eps or initial_scale, for a decay or momentum out of range.

    Hinton, 2012, https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf; Graves,
    2013, https://arxiv.org/abs/1308.0850 (centered).

    By hand, in the lecture's form: v = 0.25·16, a step of −0.1·4/2; then v = 0.75·4 + 0.25·1, a step of
    −0.1·1/√3.25.

    >>> optimizer = optim.rmsprop(0.1, decay=0.75, eps=0.0)
    >>> params = {"w": jnp.array(1.0)}
    >>> opt_state = optimizer.init(params)
    >>> for grad in (4.0, 1.0):
    ...     updates, opt_state = optimizer.update({"w": jnp.array(grad)}, opt_state, params)
    ...     print(round(float(updates["w"]), 6))
    -0.2
    -0.05547
    """
    check_learning_rate(learning_rate)
    scaled = (scale_by_stddev if centered else scale_by_rms)(
        decay, eps, initial_scale, eps_in_sqrt, bias_correction
    )
    rate = scale_by_learning_rate(learning_rate)
    if momentum is None:
        return chain(scaled, rate, identity())
    velocity = trace(check_momentum(momentum, "momentum"), nesterov)
    return chain(scaled, rate, velocity) if learning_rate_in_momentum else chain(scaled, velocity, rate)


_RMS = ScaleByRmsState, ScaleByRmsWithCountState
_STDDEV = ScaleByRStdDevState, ScaleByRStdDevWithCountState


def _checked(decay: Any, eps: Any, initial_scale: Any) -> tuple[Any, Any, Any]:
    return (
        as_scalar(decay, "decay", "[0, 1)", "it is the decay of an average"),
        as_scalar(eps, "eps", "[0, inf)"),
        as_scalar(initial_scale, "initial_scale", "[0, inf)"),
    )


def _advanced(
    where: str, state: PyTree, decay: Scalar, bias_correction: bool, plain: Any, counted: Any
) -> tuple[Any, Any]:
    """The state with the next count if it has one, and what removes the averages' bias."""
    state = check_state(where, state, counted if bias_correction else plain)
    if not bias_correction:
        return state, lambda x: x
    state = state._replace(count=increment(state.count))
    return state, unbiased(decay, state.count)


def _over_root(g: Array, square: Array, eps: Scalar, eps_in_sqrt: bool) -> Array:
    """g / √(square + eps), or g / (√square + eps)."""
    if eps_in_sqrt:
        return inverse_root(square + eps, eps) * g
    root = jnp.sqrt(square) + eps
    if root.dtype == jnp.float16:  # 1/1e-5 overflows
        return quotient(g, root, eps)
    return inverse(root, eps) * g
