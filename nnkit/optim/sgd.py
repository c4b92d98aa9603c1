"""Gradient descent, plain, with momentum, and with Nesterov's."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from jaxtyping import Array

from nnkit.optim.combine import chain
from nnkit.optim.leafwise import check_params, check_state, filled, leafwise
from nnkit.optim.scalars import Scalar, as_scalar, check_dtype, check_learning_rate
from nnkit.optim.transform import identity, scale_by_learning_rate
from nnkit.types import GradientTransformation, PyTree, ScalarOrSchedule

__all__ = ["TraceState", "look_ahead", "momentum", "nesterov", "sgd", "trace"]


class TraceState(NamedTuple):
    """The decaying sum of past updates: the velocity."""

    trace: PyTree


def trace(decay: Scalar, nesterov: bool = False, accumulator_dtype: Any = None) -> GradientTransformation:
    """A decaying sum of the updates, t ← u + μ·t (optax's ``trace``).

    The update is t, or with Nesterov u + μ·t.

    Args:
      decay: μ, in [-1, 1]; 1 sums without forgetting.
      nesterov: whether the update looks one decay ahead.
      accumulator_dtype: the dtype of t; the parameter's by default.

    Raises:
      ValueError: for a decay outside [-1, 1].
      TypeError: for an accumulator_dtype that is not floating-point.

    By hand, t = 1, then 1 + 0.5·1; with Nesterov 1 + 0.5·1, then 1 + 0.5·1.5.

    >>> for tx in (optim.trace(0.5), optim.trace(0.5, nesterov=True)):
    ...     state = tx.init({"w": jnp.array(0.0)})
    ...     first, state = tx.update({"w": jnp.array(1.0)}, state)
    ...     second, state = tx.update({"w": jnp.array(1.0)}, state)
    ...     print(float(first["w"]), float(second["w"]))
    1.0 1.5
    1.5 1.75
    """
    mu = as_scalar(decay, "decay", "[-1, 1]", "beyond, the sum grows without bound")
    accumulator_dtype = check_dtype(accumulator_dtype, "accumulator_dtype")

    def init(params: PyTree) -> TraceState:
        check_params("trace", params)
        return TraceState(trace=filled(params, dtype=accumulator_dtype))

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **_: Any
    ) -> tuple[PyTree, PyTree]:
        state = check_state("trace", state, TraceState)

        def leaf(u: Array, t: Array) -> tuple[Array, Array]:
            out = t.dtype if accumulator_dtype is None else u.dtype
            t = u + mu * t
            u = u + mu * t if nesterov else t
            return u.astype(out), t

        updates, new = leafwise("trace", leaf, {"updates": updates}, states={"trace": state.trace})
        return updates, state._replace(trace=new)

    return GradientTransformation(init, update)


def sgd(
    learning_rate: ScalarOrSchedule,
    momentum: Scalar | None = None,
    nesterov: bool = False,
    accumulator_dtype: Any = None,
) -> GradientTransformation:
    """Gradient descent (optax's and PyTorch's ``sgd``).

    ``θ ← θ − η·g``; with momentum ``v ← μ·v + g, θ ← θ − η·v``; with Nesterov's
    ``v ← μ·v + g, θ ← θ − η·(g + μ·v)``. The learning rate is outside the velocity, so a new rate
    acts on all that has been gathered; :func:`momentum` has it inside. PyTorch's ``weight_decay`` is
    ``chain(add_decayed_weights(weight_decay), sgd(...))``.

    Args:
      learning_rate: η, a number or a schedule.
      momentum: μ, in (-1, 1); None for none.
      nesterov: whether to use Nesterov's.
      accumulator_dtype: the dtype of v; the parameter's by default.

    Raises:
      ValueError: for a negative rate, or a momentum outside (-1, 1).

    Sutskever et al., 2013, http://proceedings.mlr.press/v28/sutskever13.pdf.

    By hand: v = 2, a step of −0.1·2; then v = 0.5·2 + 2, a step of −0.1·3.

    >>> optimizer = optim.sgd(0.1, momentum=0.5)
    >>> params = {"w": jnp.array(1.0)}
    >>> opt_state = optimizer.init(params)
    >>> for _ in range(2):
    ...     updates, opt_state = optimizer.update({"w": jnp.array(2.0)}, opt_state, params)
    ...     print(round(float(updates["w"]), 6))
    -0.2
    -0.3
    """
    check_learning_rate(learning_rate)
    if momentum is None:
        return chain(identity(), scale_by_learning_rate(learning_rate))
    decay = check_momentum(momentum, "momentum")
    return chain(trace(decay, nesterov, accumulator_dtype), scale_by_learning_rate(learning_rate))


def momentum(
    learning_rate: ScalarOrSchedule, decay: Scalar = 0.9, accumulator_dtype: Any = None
) -> GradientTransformation:
    """Momentum as the lecture (and Keras) has it: the learning rate inside the velocity.

    ``ρ ← μ·ρ − η·g, θ ← θ + ρ``. While η is constant this is ``sgd(learning_rate, momentum=decay)``;
    under a schedule the two part, because here every gradient keeps the rate of its own step.

    Args:
      learning_rate: η, a number or a schedule.
      decay: μ, in (-1, 1).
      accumulator_dtype: the dtype of ρ; the parameter's by default.

    Raises:
      ValueError: for a negative rate, or a decay outside (-1, 1).

    By hand, with the rate 1 at the first step and 0.1 at the second: ρ = −1·2, then 0.5·(−2) − 0.1·2.

    >>> optimizer = optim.momentum(lambda step: jnp.where(step == 0, 1.0, 0.1), decay=0.5)
    >>> params = {"w": jnp.array(1.0)}
    >>> opt_state = optimizer.init(params)
    >>> for _ in range(2):
    ...     updates, opt_state = optimizer.update({"w": jnp.array(2.0)}, opt_state, params)
    ...     print(round(float(updates["w"]), 6))
    -2.0
    -1.2
    """
    decay = check_momentum(decay, "decay")
    return chain(scale_by_learning_rate(learning_rate), trace(decay, False, accumulator_dtype))


def nesterov(
    learning_rate: ScalarOrSchedule, decay: Scalar = 0.9, accumulator_dtype: Any = None
) -> GradientTransformation:
    """Nesterov's momentum as the lecture has it, for gradients taken where the parameters are.

    The lecture takes the gradient at the look-ahead point: ``ρ ← μ·ρ − η·∇f(θ + μ·ρ), θ ← θ + ρ``.
    Here the parameters *are* that point, θ̃ = θ + μ·ρ, so the update fits any training loop:
    ``ρ ← μ·ρ − η·∇f(θ̃), θ̃ ← θ̃ + μ·ρ − η·∇f(θ̃)``. It is the same trajectory, under a schedule too:
    the lecture's θ is ``look_ahead(params, opt_state, -decay)``. To write the lecture's loop as it
    stands, use :func:`momentum` and take the gradient at ``look_ahead(params, opt_state, decay)``.

    Args:
      learning_rate: η, a number or a schedule. At a constant rate this is
        ``sgd(learning_rate, momentum=decay, nesterov=True)``.
      decay: μ, in (-1, 1).
      accumulator_dtype: the dtype of ρ; the parameter's by default.

    Raises:
      ValueError: for a negative rate, or a decay outside (-1, 1).

    Nesterov, 1983; Sutskever et al., 2013, http://proceedings.mlr.press/v28/sutskever13.pdf.

    By hand: ρ = −0.1·2, a step of 0.5·(−0.2) − 0.2; then ρ = 0.5·(−0.2) − 0.2, a step of 0.5·(−0.3) − 0.2.

    >>> optimizer = optim.nesterov(0.1, decay=0.5)
    >>> params = {"w": jnp.array(1.0)}
    >>> opt_state = optimizer.init(params)
    >>> for _ in range(2):
    ...     updates, opt_state = optimizer.update({"w": jnp.array(2.0)}, opt_state, params)
    ...     print(round(float(updates["w"]), 6))
    -0.3
    -0.35
    """
    decay = check_momentum(decay, "decay")
    return chain(scale_by_learning_rate(learning_rate), trace(decay, True, accumulator_dtype))


def look_ahead(params: PyTree, opt_state: PyTree, decay: Scalar) -> PyTree:
    """The point to which the velocity alone would carry the parameters, θ + μ·ρ.

    Args:
      params: θ.
      opt_state: the state of :func:`momentum` or :func:`nesterov`, also inside a chain.
      decay: μ; with a minus sign the way back.

    Raises:
      ValueError: for a state that holds no velocity, or several.

    >>> optimizer = optim.momentum(0.1, decay=0.5)
    >>> params = {"w": jnp.array(1.0)}
    >>> opt_state = optimizer.init(params)
    >>> for _ in range(2):  # the lecture's Nesterov on f(w) = w²
    ...     grads = jax.grad(lambda p: p["w"] ** 2)(optim.look_ahead(params, opt_state, 0.5))
    ...     updates, opt_state = optimizer.update(grads, opt_state, params)
    ...     params = jax.tree.map(jnp.add, params, updates)
    ...     print(round(float(params["w"]), 6))
    0.8
    0.56
    """
    mu = as_scalar(decay, "decay")
    found = [part for part in jax.tree.leaves(opt_state, is_leaf=_is_velocity) if _is_velocity(part)]
    if len(found) != 1:
        raise ValueError(
            f"look_ahead needs a state with one velocity and got one with {len(found)}: pass the state of "
            "momentum or nesterov"
        )

    def leaf(p: Array, t: Array | None) -> tuple[Array]:
        if t is None:
            return (p,)
        return ((p + mu * t).astype(p.dtype),)

    return leafwise("look_ahead", leaf, {"params": params}, {"trace": found[0].trace})[0]


def check_momentum(value: Any, name: str) -> Any:
    """The decay of a velocity, in (-1, 1)."""
    return as_scalar(value, name, "(-1, 1)", "it is the part of the velocity that is kept")


def _is_velocity(part: Any) -> bool:
    return getattr(part, "_fields", None) == TraceState._fields
