"""RAdam: Adam that knows how little its first estimates of the mean square are worth."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nnkit.checks import is_static_number
from nnkit.optim.adam import ScaleByAdamState, adam_state, check_averages, divided, mean_square, widened
from nnkit.optim.combine import chain
from nnkit.optim.leafwise import check_state, leafwise
from nnkit.optim.scalars import (
    Scalar,
    as_scalar,
    check_dtype,
    check_learning_rate,
    increment,
    quotient,
    total_weight,
    unbiased,
)
from nnkit.optim.transform import scale_by_learning_rate
from nnkit.types import GradientTransformation, PyTree, ScalarOrSchedule

__all__ = ["radam", "rectification", "scale_by_radam"]


def scale_by_radam(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    threshold: Scalar = 5.0,
    *,
    nesterov: bool = False,
    bias_correction_eps: bool = False,
    nu_dtype: Any = None,
) -> GradientTransformation:
    """RAdam without its learning rate (optax's ``scale_by_radam``).

    See :func:`radam` for formula, arguments and sources. The state is Adam's.

    Raises:
      ValueError: for b1 or b2 outside [0, 1), for a negative eps or eps_root, for a threshold below 4.
      TypeError: for a nu_dtype that is not floating-point.

    >>> tx = optim.scale_by_radam(b1=0.5, b2=0.75)
    >>> updates, state = tx.update({"w": jnp.array(4.0)}, tx.init({"w": jnp.array(0.0)}))
    >>> float(updates["w"]), float(state.mu["w"]), float(state.nu["w"])
    (4.0, 2.0, 4.0)
    """
    b1, b2, eps, eps_root = check_averages(b1, b2, eps, eps_root)
    why = "beneath, the rectification is the root of a negative number"
    threshold = as_scalar(threshold, "threshold", "[4, inf)", why)
    nu_dtype = check_dtype(nu_dtype, "nu_dtype")

    def init(params: PyTree) -> ScaleByAdamState:
        return adam_state("scale_by_radam", params, nu_dtype=nu_dtype)

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **_: Any
    ) -> tuple[PyTree, PyTree]:
        state = check_state("scale_by_radam", state, ScaleByAdamState)
        count = increment(state.count)
        weight, nu_hat = total_weight(b1, count), unbiased(b2, count)
        mu_hat, next_mu_hat = unbiased(b1, count), unbiased(b1, increment(count))
        known, factor = rectification(b2, count, threshold)
        added = eps / jnp.sqrt(total_weight(b2, count)) if bias_correction_eps else eps

        def leaf(g: Array, mu: Array, nu: Array) -> tuple[Array, Array, Array]:
            g, out = widened(g, nu, nu_dtype)
            mu = (1 - b1) * g + b1 * mu
            nu = mean_square(g, nu, b2)
            root = jnp.sqrt(nu_hat(nu) + eps_root) + jnp.asarray(added, nu.dtype)
            root = jnp.where(known, root, 1)
            if nesterov:
                step = quotient(b1 * next_mu_hat(mu) + (1 - b1) * mu_hat(g), root, eps, eps_root)
            else:
                step = divided(mu, weight, root, eps, eps_root)
            return (factor.astype(step.dtype) * step).astype(out), mu, nu

        averages = {"mu": state.mu, "nu": state.nu}
        updates, mu, nu = leafwise("scale_by_radam", leaf, {"updates": updates}, states=averages)
        return updates, state._replace(count=count, mu=mu, nu=nu)

    return GradientTransformation(init, update)


def radam(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    threshold: Scalar = 5.0,
    *,
    nesterov: bool = False,
    bias_correction_eps: bool = False,
    nu_dtype: Any = None,
) -> GradientTransformation:
    """RAdam (optax's ``radam``; PyTorch's ``RAdam`` by argument).

    With Adam's m̂ and v̂ at step t = 1, 2, ..., and ρ the number of gradients that v̂ is as good as::

        ρ∞ = 2 / (1 − b2) − 1                    ρ = ρ∞ − 2t·b2ᵗ / (1 − b2ᵗ)
        r = √((ρ − 4)·(ρ − 2)·ρ∞ / ((ρ∞ − 4)·(ρ∞ − 2)·ρ))
        θ ← θ − η·r·m̂ / (√(v̂ + eps_root) + eps)         where ρ ≥ threshold, else
        θ ← θ − η·m̂

    ρ is a small difference of large numbers. Written as above in float32, as in optax, with b2 = 0.999
    it is 0.02 off at the sixth step and r 0.6%; with b2 = 0.9995 the fifth step is already rectified,
    and with 0.9999 the second. Here both have the precision of the numbers that they are made of.

    Args:
      learning_rate: η, a number or a schedule.
      b1, b2, eps, eps_root, nu_dtype: see :func:`adam`.
      threshold: from which ρ on v̂ is used, at least 4. With b2 of at most 0.6 it is never reached.
      nesterov: whether m̂ is NAdam's, see :func:`nadam`.
      bias_correction_eps: whether eps is added to √v before the bias is removed,
        ``r·m̂·√(1 − b2ᵗ) / (√v + eps)``. ``radam(rate, bias_correction_eps=True)`` is PyTorch's.

    Raises:
      ValueError: for a negative rate, eps or eps_root, for b1 or b2 outside [0, 1), for a threshold
        below 4.
      TypeError: for a nu_dtype that is not floating-point; in use, for parameters that are not.

    Liu et al., 2020, https://arxiv.org/abs/1908.03265.

    By hand, with b1 = 0.5, b2 = 0.75 and the threshold 4.1: ρ∞ = 7. The first step is −0.1·4. After
    eight gradients of 4, m̂ = v̂/4 = 4, ρ = 7 − 16·0.75⁸/(1 − 0.75⁸), and −0.1·r is the step.

    >>> optimizer = optim.radam(0.1, b1=0.5, b2=0.75, eps=0.0, threshold=4.1)
    >>> params = {"w": jnp.array(1.0)}
    >>> opt_state = optimizer.init(params)
    >>> steps = []
    >>> for _ in range(8):
    ...     updates, opt_state = optimizer.update({"w": jnp.array(4.0)}, opt_state, params)
    ...     steps.append(round(float(updates["w"]), 5))
    >>> rho = 7 - 16 * 0.75**8 / (1 - 0.75**8)
    >>> steps[0], steps[7], round(-0.1 * ((rho - 4) * (rho - 2) * 7 / (3 * 5 * rho)) ** 0.5, 5)
    (-0.4, -0.05926, -0.05926)
    """
    check_learning_rate(learning_rate)
    return chain(
        scale_by_radam(
            b1,
            b2,
            eps,
            eps_root,
            threshold,
            nesterov=nesterov,
            bias_correction_eps=bias_correction_eps,
            nu_dtype=nu_dtype,
        ),
        scale_by_learning_rate(learning_rate),
    )


def rectification(b2: Scalar, count: Int[Array, ""], threshold: Scalar) -> tuple[Array, Array]:
    """Whether ρ has reached the threshold, and r, which is 1 before.

    With λ = −ln b2, ρ∞ = coth(λ/2) and ρ = ρ∞ + t − t·coth(tλ/2), where large terms cancel. With
    φ(y) = 1 − coth(y/2) + 2/y it is 1 − φ(λ) + t·φ(tλ), where none do: r is right to 2 ulp.

    >>> [round(float(x), 6) for x in rectification(0.999, jnp.int32(6), 5.0)]
    [1.0, 0.025821]
    """
    if is_static_number(b2):
        fade: Any = -math.log(b2) if b2 > 0 else math.inf
    else:
        fade = -jnp.log(b2)
    t = count.astype(jnp.result_type(float) if is_static_number(b2) else jnp.asarray(b2).dtype)
    fade = jnp.asarray(fade, t.dtype)
    longest = 2 / (1 - b2) - 1
    length = 1 - _phi(fade) + t * _phi(t * fade)
    known = length >= threshold
    # Beneath the threshold any length that has a root and a derivative.
    length = jnp.where(known, length, 5)
    ratio = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    return known, jnp.where(known, jnp.sqrt(jnp.where(known, ratio, 1)), 1)


_BERNOULLI = (1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6, -3617 / 510, 43867 / 798)


def _phi(y: Float[Array, ""]) -> Float[Array, ""]:
    """``1 − coth(y/2) + 2/y`` for y > 0; beneath 1 by its series, as there 2/y and the coth cancel.

    >>> [round(float(_phi(jnp.float32(y))), 6) for y in (1e-6, 0.5, 1.5)]
    [1.0, 0.917012, 0.7589]
    """
    small = y < 1
    x, z = jnp.where(small, y, 0.5), jnp.where(small, 2, y)
    series = jnp.zeros_like(y)
    for n, b in reversed([*enumerate(_BERNOULLI, start=1)]):
        series = series * x * x + 2 * b / math.factorial(2 * n)
    return jnp.where(small, 1 - series * x, 2 / z - 2 / jnp.expm1(z))
