"""LAMB: Adam's steps, each in proportion to the size of what it changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nnkit.optim.adam import check_weight_decay, scale_by_adam
from nnkit.optim.combine import chain
from nnkit.optim.leafwise import check_params, leafwise
from nnkit.optim.scalars import Scalar, as_scalar, check_learning_rate
from nnkit.optim.transform import EmptyState, add_decayed_weights, scale_by_learning_rate
from nnkit.tree import sum_of_squares
from nnkit.types import GradientTransformation, PyTree, ScalarOrSchedule

__all__ = ["lamb", "scale_by_trust_ratio"]


def scale_by_trust_ratio(
    min_norm: Scalar = 0.0, trust_coefficient: Scalar = 1.0, eps: Scalar = 0.0
) -> GradientTransformation:
    """Makes each update as long as its parameter, u ← c·‖θ‖/(‖u‖ + eps)·u (optax's ``scale_by_trust_ratio``).

    The norms are those of each leaf by itself. Where one of them is 0 the update stays as it is.

    Args:
      min_norm: what smaller norms are raised to.
      trust_coefficient: c.
      eps: keeps the ratio finite where the update is near 0.

    Norms of half-precision leaves are taken in float32: in float16 the square of 256 overflows.

    Raises:
      ValueError: for a negative min_norm, trust_coefficient or eps; at an update without parameters.

    By hand: ‖u‖ = 5, ‖θ‖ = 10.

    >>> tx = optim.scale_by_trust_ratio()
    >>> params = {"w": jnp.array([6.0, 8.0])}
    >>> updates, _ = tx.update({"w": jnp.array([3.0, -4.0])}, tx.init(params), params)
    >>> updates["w"].tolist()
    [6.0, -8.0]
    """
    least = as_scalar(min_norm, "min_norm", "[0, inf)")
    coefficient = as_scalar(trust_coefficient, "trust_coefficient", "[0, inf)")
    eps = as_scalar(eps, "eps", "[0, inf)")

    def init(params: PyTree) -> EmptyState:
        check_params("scale_by_trust_ratio", params)
        return EmptyState()

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **_: Any
    ) -> tuple[PyTree, PyTree]:
        if params is None:
            raise ValueError(
                "scale_by_trust_ratio needs the parameters: call update(grads, opt_state, params) with params"
            )

        def leaf(u: Any, p: Any) -> Array | None:
            if u is None:
                return None
            of_parameter, of_update = _norm(p, least), _norm(u, least)
            known = (of_parameter != 0) & (of_update != 0)
            # Both selects are needed: a derivative of x/0 that is multiplied by 0 would still be NaN.
            ratio = coefficient * of_parameter / (jnp.where(known, of_update, 1) + eps)
            u = jnp.asarray(u)
            return u * jnp.where(known, ratio, 1).astype(u.dtype)

        # Only to find fault with the trees: a norm is not elementwise, and this computes nothing.
        leafwise("scale_by_trust_ratio", lambda u, p: (u,), {"updates": updates}, {"params": params})
        with jax.numpy_dtype_promotion("standard"):  # as in leafwise
            return jax.tree.map(leaf, updates, params, is_leaf=lambda x: x is None), state

    return GradientTransformation(init, update)


def lamb(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-6,
    eps_root: Scalar = 0.0,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    *,
    nu_dtype: Any = None,
) -> GradientTransformation:
    """LAMB (optax's ``lamb``), for very large batches.

    With Adam's m̂ and v̂, for each leaf θ of the parameters::

        u = m̂ / (√(v̂ + eps_root) + eps) + λθ
        θ ← θ − η·‖θ‖/‖u‖·u

    A leaf that is all zeros, a fresh bias for instance, takes the step −η·u.

    Args:
      learning_rate: η, a number or a schedule.
      b1, b2, eps, eps_root, nu_dtype: see :func:`adam`.
      weight_decay: λ, a number or a schedule.
      mask: which parameters decay, see :func:`add_decayed_weights`; without one biases decay too.

    Raises:
      ValueError: for a negative rate, eps, eps_root or weight_decay, for b1 or b2 outside [0, 1); at an
        update without parameters.
      TypeError: for a nu_dtype that is not floating-point; in use, for parameters that are not.

    You et al., 2020, https://arxiv.org/abs/1904.00962.

    By hand: Adam's first step is the gradient's sign, (1, −1), of the norm √2, and ‖θ‖ = 5.

    >>> optimizer = optim.lamb(0.1, b1=0.5, b2=0.75, eps=0.0)
    >>> params = {"w": jnp.array([3.0, 4.0])}
    >>> updates, _ = optimizer.update({"w": jnp.array([2.0, -7.0])}, optimizer.init(params), params)
    >>> [round(u, 6) for u in updates["w"].tolist()], round(0.1 * 5 / 2**0.5, 6)
    ([-0.353553, 0.353553], 0.353553)
    """
    check_learning_rate(learning_rate)
    weight_decay = check_weight_decay(weight_decay)
    return chain(
        scale_by_adam(b1, b2, eps, eps_root, nu_dtype=nu_dtype),
        add_decayed_weights(weight_decay, mask),
        scale_by_trust_ratio(),
        scale_by_learning_rate(learning_rate),
    )


def _norm(x: Any, least: Scalar) -> Float[Array, ""]:
    """``max(‖x‖, least)``, in float32 at least, with the derivative 0 where that is ``least``."""
    squares = sum_of_squares(x)
    low = jnp.sqrt(jax.lax.stop_gradient(squares)) <= least
    return jnp.where(low, least, jnp.sqrt(jnp.where(low, 1, squares)))
