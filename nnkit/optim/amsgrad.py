"""AMSGrad: Adam whose step sizes never grow again."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from nnkit.optim.adam import check_averages, divided, mean_square, widened
from nnkit.optim.combine import chain
from nnkit.optim.leafwise import check_params, check_state, filled, leafwise
from nnkit.optim.scalars import (
    Scalar,
    check_dtype,
    check_learning_rate,
    increment,
    quotient,
    total_weight,
    unbiased,
)
from nnkit.optim.transform import scale_by_learning_rate
from nnkit.types import GradientTransformation, PyTree, ScalarOrSchedule

__all__ = ["ScaleByAmsgradState", "amsgrad", "scale_by_amsgrad"]


class ScaleByAmsgradState(NamedTuple):
    """AMSGrad's running estimates.

    Attributes:
      count: how many updates there were, an int32 scalar.
      mu: the exponential average of the gradients.
      nu: the exponential average of their squares.
      nu_max: the largest that nu has been.
    """

    count: Any
    mu: PyTree
    nu: PyTree
    nu_max: PyTree


def scale_by_amsgrad(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: Any = None,
    bias_correction_mu: bool = True,
    bias_correction_nu: bool = True,
    *,
    correct_after_max: bool = False,
    nu_dtype: Any = None,
) -> GradientTransformation:
    """AMSGrad without its learning rate (optax's ``scale_by_amsgrad``).

    See :func:`amsgrad` for formula, arguments and sources.

    Raises:
      ValueError: for b1 or b2 outside [0, 1), for a negative eps or eps_root, for correct_after_max
        without bias_correction_nu.
      TypeError: for a mu_dtype or nu_dtype that is not floating-point.

    >>> tx = optim.scale_by_amsgrad(b1=0.0, b2=0.75, eps=0.0, bias_correction_nu=False)
    >>> state = tx.init({"w": jnp.array(0.0)})
    >>> for grad in (4.0, 0.0):
    ...     updates, state = tx.update({"w": jnp.array(grad)}, state)
    ...     print(float(updates["w"]), float(state.nu["w"]), float(state.nu_max["w"]))
    2.0 4.0 4.0
    0.0 3.0 4.0
    """
    b1, b2, eps, eps_root = check_averages(b1, b2, eps, eps_root)
    mu_dtype, nu_dtype = check_dtype(mu_dtype, "mu_dtype"), check_dtype(nu_dtype, "nu_dtype")
    if correct_after_max and not bias_correction_nu:
        raise ValueError("correct_after_max needs bias_correction_nu=True: it says when nu is corrected")

    def init(params: PyTree) -> ScaleByAmsgradState:
        check_params("scale_by_amsgrad", params)
        return ScaleByAmsgradState(
            count=jnp.zeros([], jnp.int32),
            mu=filled(params, dtype=mu_dtype),
            nu=filled(params, dtype=nu_dtype),
            nu_max=filled(params, dtype=nu_dtype),
        )

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **_: Any
    ) -> tuple[PyTree, PyTree]:
        state = check_state("scale_by_amsgrad", state, ScaleByAmsgradState)
        count = increment(state.count)
        weight, nu_hat = total_weight(b1, count), unbiased(b2, count)
        before = nu_hat if bias_correction_nu and not correct_after_max else lambda x: x
        after = nu_hat if correct_after_max else lambda x: x

        def leaf(g: Array, mu: Array, nu: Array, nu_max: Array) -> tuple[Array, ...]:
            g, out = widened(g, nu, nu_dtype)
            mu = (1 - b1) * g + b1 * mu
            nu = mean_square(g, nu, b2)
            nu_max = jnp.maximum(nu_max, before(nu))
            root = jnp.sqrt(after(nu_max) + eps_root) + eps
            if bias_correction_mu:
                step = divided(mu, weight, root, eps, eps_root)
            else:
                step = quotient(mu, root, eps, eps_root)
            return step.astype(out), mu, nu, nu_max

        averages = {"mu": state.mu, "nu": state.nu, "nu_max": state.nu_max}
        updates, mu, nu, nu_max = leafwise("scale_by_amsgrad", leaf, {"updates": updates}, states=averages)
        return updates, ScaleByAmsgradState(count, mu, nu, nu_max)

    return GradientTransformation(init, update)


def amsgrad(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: Any = None,
    bias_correction_mu: bool = True,
    bias_correction_nu: bool = True,
    *,
    correct_after_max: bool = False,
    nu_dtype: Any = None,
) -> GradientTransformation:
    """AMSGrad (optax's ``amsgrad``; PyTorch's ``Adam(amsgrad=True)`` by argument).

    With the gradient g at step t = 1, 2, ...::

        m ← b1·m + (1 − b1)·g                    m̂ = m / (1 − b1ᵗ)
        v ← b2·v + (1 − b2)·g²                   v̂ ← max(v̂, v / (1 − b2ᵗ))
        θ ← θ − η·m̂ / (√(v̂ + eps_root) + eps)

    Args:
      learning_rate: η, a number or a schedule.
      b1, b2, eps, eps_root, mu_dtype, nu_dtype: see :func:`adam`; nu_dtype is v̂'s too.
      bias_correction_mu: whether to divide m by 1 − b1ᵗ.
      bias_correction_nu: whether to divide v by 1 − b2ᵗ. The paper does neither.
      correct_after_max: whether the maximum is that of v itself, and is divided by 1 − b2ᵗ where it is
        used. ``amsgrad(rate, correct_after_max=True)`` is PyTorch's; early steps are the larger for it.

    Raises:
      ValueError: for a negative rate, eps or eps_root, for b1 or b2 outside [0, 1), for
        correct_after_max without bias_correction_nu.
      TypeError: for a mu_dtype or nu_dtype that is not floating-point; in use, for parameters that are not.

    Reddi, Kale and Kumar, 2018, https://openreview.net/forum?id=ryQu7f-RZ.

    By hand, with b1 = 0.5 and b2 = 0.75: the first gradient 4 gives m̂ = 2/0.5, v̂ = 4/0.25, a step of
    −0.1·4/√16; the second, −1, gives m̂ = 0.5/0.75 and v / (1 − b2²) = 3.25/0.4375, so v̂ stays at 16.

    >>> optimizer = optim.amsgrad(0.1, b1=0.5, b2=0.75, eps=0.0)
    >>> params = {"w": jnp.array(1.0)}
    >>> opt_state = optimizer.init(params)
    >>> for grad in (4.0, -1.0):
    ...     updates, opt_state = optimizer.update({"w": jnp.array(grad)}, opt_state, params)
    ...     print(round(float(updates["w"]), 6))
    -0.1
    -0.016667
    """
    check_learning_rate(learning_rate)
    return chain(
        scale_by_amsgrad(
            b1,
            b2,
            eps,
            eps_root,
            mu_dtype,
            bias_correction_mu,
            bias_correction_nu,
            correct_after_max=correct_after_max,
            nu_dtype=nu_dtype,
        ),
        scale_by_learning_rate(learning_rate),
    )
