"""Adadelta: steps in the units of the parameters, without a learning rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from nnkit.optim.adam import check_weight_decay
from nnkit.optim.combine import chain
from nnkit.optim.leafwise import abs_sq, check_params, check_state, filled, leafwise
from nnkit.optim.scalars import Scalar, as_scalar, check_learning_rate, quotient
from nnkit.optim.transform import add_decayed_weights, scale_by_learning_rate
from nnkit.types import GradientTransformation, PyTree, ScalarOrSchedule

__all__ = ["ScaleByAdaDeltaState", "adadelta", "scale_by_adadelta"]


class ScaleByAdaDeltaState(NamedTuple):
    """The exponential averages of the squared gradients (e_g) and of the squared steps (e_x)."""

    e_g: PyTree
    e_x: PyTree


def scale_by_adadelta(rho: Scalar = 0.9, eps: Scalar = 1e-6) -> GradientTransformation:
    """Adadelta's step, before its sign is changed (optax's ``scale_by_adadelta``).

    See :func:`adadelta` for formula, arguments and sources.

    Raises:
      ValueError: for a rho outside [0, 1), for a negative eps.

    >>> tx = optim.scale_by_adadelta(rho=0.75, eps=5.0)
    >>> updates, state = tx.update({"w": jnp.array(4.0)}, tx.init({"w": jnp.array(0.0)}))
    >>> round(float(updates["w"]), 6), float(state.e_g["w"])  # 4·√(5/9)
    (2.981424, 4.0)
    """
    rho = as_scalar(rho, "rho", "[0, 1)", "it is the decay of an average")
    eps = as_scalar(eps, "eps", "[0, inf)")

    def init(params: PyTree) -> ScaleByAdaDeltaState:
        check_params("scale_by_adadelta", params)
        return ScaleByAdaDeltaState(e_g=filled(params), e_x=filled(params))

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **_: Any
    ) -> tuple[PyTree, PyTree]:
        state = check_state("scale_by_adadelta", state, ScaleByAdaDeltaState)

        def leaf(g: Array, e_g: Array, e_x: Array) -> tuple[Array, Array, Array]:
            out = e_g.dtype
            e_g = (1 - rho) * abs_sq(g) + rho * e_g
            step = quotient(jnp.sqrt(e_x + eps), jnp.sqrt(e_g + eps), eps) * g
            return step.astype(out), e_g, (1 - rho) * abs_sq(step) + rho * e_x

        averages = {"e_g": state.e_g, "e_x": state.e_x}
        updates, e_g, e_x = leafwise("scale_by_adadelta", leaf, {"updates": updates}, states=averages)
        return updates, ScaleByAdaDeltaState(e_g=e_g, e_x=e_x)

    return GradientTransformation(init, update)


def adadelta(
    learning_rate: ScalarOrSchedule | None = None,
    rho: Scalar = 0.9,
    eps: Scalar = 1e-6,
    weight_decay: ScalarOrSchedule = 0.0,
    weight_decay_mask: PyTree | Callable[[PyTree], PyTree] | None = None,
) -> GradientTransformation:
    """Adadelta (optax's ``adadelta``; PyTorch's ``Adadelta`` with a learning_rate of 1).

    With the gradient g::

        g ← g + λθ
        s ← ρ·s + (1 − ρ)·g²
        x = g·√(r + eps) / √(s + eps)
        r ← ρ·r + (1 − ρ)·x²
        θ ← θ − η·x

    Args:
      learning_rate: η, a number or a schedule. None is 1, as in the paper (there optax adds x to the
        parameters and climbs).
      rho: ρ, decay of both averages, in [0, 1).
      eps: what the first steps are made of, as r starts at 0; large values start faster.
      weight_decay: λ, a number or a schedule; it goes through the averages, as in PyTorch.
      weight_decay_mask: which parameters decay, see :func:`add_decayed_weights`.

    Raises:
      ValueError: for a negative rate, eps or weight_decay, for a rho outside [0, 1); at an update
        without parameters.
      TypeError: in use, for parameters that are not floating-point.

    Zeiler, 2012, https://arxiv.org/abs/1212.5701.

    By hand, with ρ = 0.75 and eps = 5: the gradient 4 gives s = 4, a step of −4·√5/√9 and
    r = 0.25·16·5/9; then the gradient 2 gives s = 0.75·4 + 0.25·4 and a step of −2·√(20/9 + 5)/√9.

    >>> optimizer = optim.adadelta(rho=0.75, eps=5.0)
    >>> params = {"w": jnp.array(1.0)}
    >>> opt_state = optimizer.init(params)
    >>> for grad in (4.0, 2.0):
    ...     updates, opt_state = optimizer.update({"w": jnp.array(grad)}, opt_state, params)
    ...     print(round(float(updates["w"]), 5))
    -2.98142
    -1.79161
    >>> round(-4 * 5**0.5 / 3, 5), round(-2 * (20 / 9 + 5) ** 0.5 / 3, 5)
    (-2.98142, -1.79161)
    """
    rate = 1.0 if learning_rate is None else check_learning_rate(learning_rate)
    weight_decay = check_weight_decay(weight_decay)
    return chain(
        add_decayed_weights(weight_decay, weight_decay_mask),
        scale_by_adadelta(rho, eps),
        scale_by_learning_rate(rate),
    )
