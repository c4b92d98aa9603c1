"""Adamax and AdamaxW: Adam with a running maximum of the gradient's size in place of the mean square."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from nnkit.optim.adam import (
    ScaleByAdamState,
    adam_state,
    check_averages,
    check_weight_decay,
    divided,
    widened,
)
from nnkit.optim.combine import chain
from nnkit.optim.leafwise import check_state, leafwise
from nnkit.optim.scalars import Scalar, check_dtype, check_learning_rate, increment, total_weight
from nnkit.optim.transform import add_decayed_weights, scale_by_learning_rate
from nnkit.types import GradientTransformation, PyTree, ScalarOrSchedule

__all__ = ["adamax", "adamaxw", "scale_by_adamax"]


def scale_by_adamax(
    b1: Scalar = 0.9, b2: Scalar = 0.999, eps: Scalar = 1e-8, *, nu_dtype: Any = None
) -> GradientTransformation:
    """Adamax without its learning rate (optax's ``scale_by_adamax``).

    See :func:`adamax` for formula, arguments and sources. The state is Adam's, with u in ``nu``.

    Raises:
      ValueError: for b1 or b2 outside [0, 1), for a negative eps.
      TypeError: for a nu_dtype that is not floating-point.

    >>> tx = optim.scale_by_adamax(b1=0.5, b2=0.75, eps=0.0)
    >>> state = tx.init({"w": jnp.array(0.0)})
    >>> for grad in (4.0, -2.0):
    ...     updates, state = tx.update({"w": jnp.array(grad)}, state)
    ...     print(float(updates["w"]), float(state.mu["w"]), float(state.nu["w"]))
    1.0 2.0 4.0
    0.0 0.0 3.0
    """
    b1, b2, eps, _ = check_averages(b1, b2, eps)
    nu_dtype = check_dtype(nu_dtype, "nu_dtype")

    def init(params: PyTree) -> ScaleByAdamState:
        return adam_state("scale_by_adamax", params, nu_dtype=nu_dtype)

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **_: Any
    ) -> tuple[PyTree, PyTree]:
        state = check_state("scale_by_adamax", state, ScaleByAdamState)
        count = increment(state.count)
        weight = total_weight(b1, count)

        def leaf(g: Array, mu: Array, nu: Array) -> tuple[Array, Array, Array]:
            g, out = widened(g, nu, nu_dtype)
            mu = (1 - b1) * g + b1 * mu
            # Of complex parameters nu is complex too, with nothing in its imaginary part.
            nu = jnp.maximum(jnp.abs(g) + eps, b2 * nu.real)
            return divided(mu, weight, nu, eps).astype(out), mu, nu

        averages = {"mu": state.mu, "nu": state.nu}
        updates, mu, nu = leafwise("scale_by_adamax", leaf, {"updates": updates}, states=averages)
        return updates, state._replace(count=count, mu=mu, nu=nu)

    return GradientTransformation(init, update)


def adamax(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    *,
    nu_dtype: Any = None,
) -> GradientTransformation:
    """Adamax (optax's ``adamax``, the same as PyTorch's ``Adamax``).

    With the gradient g at step t = 1, 2, ...::

        m ← b1·m + (1 − b1)·g
        u ← max(b2·u, |g| + eps)
        θ ← θ − η·m / ((1 − b1ᵗ)·u)

    u needs no correction: a maximum is not biased to where it starts.

    Args:
      learning_rate: η, a number or a schedule.
      b1: decay of the average of the gradients, in [0, 1).
      b2: decay of the maximum of their sizes, in [0, 1).
      eps: keeps the step finite where u is near 0. At 0, a parameter that has never had a gradient
        stays where it is (optax gives NaN).
      nu_dtype: the dtype of u; the parameter's by default, see :func:`adam`.

    Raises:
      ValueError: for a negative rate or eps, for b1 or b2 outside [0, 1).
      TypeError: for a nu_dtype that is not floating-point; in use, for parameters that are not.

    Kingma and Ba, 2014, section 7.1, https://arxiv.org/abs/1412.6980.

    By hand, with b1 = 0.5 and b2 = 0.75: the first gradient 4 gives m = 2, u = 4, a step of
    −0.1·(2/0.5)/4; the second, −1, gives m = 0.5, u = max(3, 1), a step of −0.1·(0.5/0.75)/3.

    >>> optimizer = optim.adamax(0.1, b1=0.5, b2=0.75, eps=0.0)
    >>> params = {"w": jnp.array(1.0)}
    >>> opt_state = optimizer.init(params)
    >>> for grad in (4.0, -1.0):
    ...     updates, opt_state = optimizer.update({"w": jnp.array(grad)}, opt_state, params)
    ...     print(round(float(updates["w"]), 6))
    -0.1
    -0.022222
    """
    check_learning_rate(learning_rate)
    return chain(
        scale_by_adamax(b1, b2, eps, nu_dtype=nu_dtype),
        scale_by_learning_rate(learning_rate),
    )


def adamaxw(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: ScalarOrSchedule = 1e-4,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    *,
    nu_dtype: Any = None,
) -> GradientTransformation:
    """Adamax with decoupled weight decay (optax's ``adamaxw``).

    ``θ ← θ − η·(m / ((1 − b1ᵗ)·u) + λθ)``, all else as in :func:`adamax`.

    Args:
      learning_rate: η, a number or a schedule.
      b1, b2, eps, nu_dtype: see :func:`adamax`.
      weight_decay, mask: see :func:`adamw`; without a mask biases decay too.

    Raises:
      ValueError: as :func:`adamax`; for a negative weight_decay; at an update without parameters.

    Kingma and Ba, 2014, https://arxiv.org/abs/1412.6980; Loshchilov and Hutter, 2019,
    https://arxiv.org/abs/1711.05101.

    By hand: the first step is −η for a positive gradient, and −η·λ·θ = −0.1·0.5·2 comes to it.

    >>> optimizer = optim.adamaxw(0.1, 0.5, 0.75, 0.0, weight_decay=0.5, mask=tree.decayed)
    >>> params = {"kernel": jnp.array(2.0), "bias": jnp.array(2.0)}
    >>> grads = {"kernel": jnp.array(3.0), "bias": jnp.array(3.0)}
    >>> updates, _ = optimizer.update(grads, optimizer.init(params), params)
    >>> round(float(updates["kernel"]), 6), round(float(updates["bias"]), 6)
    (-0.2, -0.1)
    """
    check_learning_rate(learning_rate)
    weight_decay = check_weight_decay(weight_decay)
    return chain(
        scale_by_adamax(b1, b2, eps, nu_dtype=nu_dtype),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )
