"""NAdam and NAdamW: Adam with Nesterov's momentum, in optax's form and in PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from nnkit.optim.adam import check_averages, check_weight_decay, mean_square, scale_by_adam, widened
from nnkit.optim.combine import chain
from nnkit.optim.leafwise import check_params, check_state, filled, leafwise
from nnkit.optim.scalars import (
    Scalar,
    as_scalar,
    check_dtype,
    check_learning_rate,
    increment,
    quotient,
    unbiased,
)
from nnkit.optim.transform import add_decayed_weights, scale_by_learning_rate
from nnkit.types import GradientTransformation, PyTree, ScalarOrSchedule

__all__ = ["ScaleByNadamState", "nadam", "nadamw", "scale_by_nadam"]


class ScaleByNadamState(NamedTuple):
    """The state of NAdam with a momentum schedule.

    Attributes:
      count: how many updates there were, an int32 scalar.
      mu: the exponential average of the gradients.
      nu: the exponential average of their squares.
      mu_product: the product of the momenta so far.
    """

    count: Any
    mu: PyTree
    nu: PyTree
    mu_product: Any


def scale_by_nadam(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: Any = None,
    *,
    momentum_decay: Scalar = 4e-3,
    nu_dtype: Any = None,
) -> GradientTransformation:
    """PyTorch's NAdam without its learning rate: a momentum that grows from b1/2 to b1.

    See :func:`nadam` for formula, arguments and sources. What optax calls NAdam is
    ``scale_by_adam(nesterov=True)``, the limit of this for a large momentum_decay.

    Raises:
      ValueError: for b1 or b2 outside [0, 1), for a negative eps, eps_root or momentum_decay.
      TypeError: for a mu_dtype or nu_dtype that is not floating-point.

    By hand, with a constant momentum of b1/2 = 0.25: m = 2, m̂ = 0.25·2/(1 − 0.25²) + 0.75·4/(1 − 0.25),
    v̂ = 16.

    >>> tx = optim.scale_by_nadam(b1=0.5, b2=0.75, eps=0.0, momentum_decay=0.0)
    >>> updates, state = tx.update({"w": jnp.array(4.0)}, tx.init({"w": jnp.array(0.0)}))
    >>> round(float(updates["w"]), 6), round((0.5 / 0.9375 + 3 / 0.75) / 4, 6), float(state.mu_product)
    (1.133333, 1.133333, 0.25)
    """
    b1, b2, eps, eps_root = check_averages(b1, b2, eps, eps_root)
    psi = as_scalar(momentum_decay, "momentum_decay", "[0, inf)")
    mu_dtype, nu_dtype = check_dtype(mu_dtype, "mu_dtype"), check_dtype(nu_dtype, "nu_dtype")

    def momentum(count: Array, like: Array) -> Array:
        return b1 * (1 - 0.5 * 0.96 ** (count.astype(like.dtype) * psi))

    def init(params: PyTree) -> ScaleByNadamState:
        check_params("scale_by_nadam", params)
        mu, nu = filled(params, dtype=mu_dtype), filled(params, dtype=nu_dtype)
        return ScaleByNadamState(jnp.zeros([], jnp.int32), mu, nu, mu_product=jnp.ones([]))

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **_: Any
    ) -> tuple[PyTree, PyTree]:
        state = check_state("scale_by_nadam", state, ScaleByNadamState)
        count = increment(state.count)
        now, following = (momentum(c, state.mu_product) for c in (count, increment(count)))
        product = (state.mu_product * now).astype(state.mu_product.dtype)
        of_mean, of_gradient = following / (1 - product * following), (1 - now) / (1 - product)
        nu_hat = unbiased(b2, count)

        def leaf(g: Array, mu: Array, nu: Array) -> tuple[Array, Array, Array]:
            g, out = widened(g, nu, nu_dtype)
            mu = (1 - b1) * g + b1 * mu
            nu = mean_square(g, nu, b2)
            step = of_mean.astype(mu.dtype) * mu + of_gradient.astype(g.dtype) * g
            root = jnp.sqrt(nu_hat(nu) + eps_root) + eps
            return quotient(step, root, eps, eps_root).astype(out), mu, nu

        averages = {"mu": state.mu, "nu": state.nu}
        updates, mu, nu = leafwise("scale_by_nadam", leaf, {"updates": updates}, states=averages)
        return updates, ScaleByNadamState(count, mu, nu, product)

    return GradientTransformation(init, update)


def nadam(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: Any = None,
    *,
    nesterov: bool = True,
    nu_dtype: Any = None,
    momentum_decay: Scalar | None = None,
) -> GradientTransformation:
    """NAdam, Adam with Nesterov's momentum (optax's ``nadam``; PyTorch's ``NAdam`` by argument).

    Adam's m, v and v̂, and at step t = 1, 2, ...::

        m̂ = b1·m / (1 − b1ᵗ⁺¹) + (1 − b1)·g / (1 − b1ᵗ)
        θ ← θ − η·m̂ / (√(v̂ + eps_root) + eps)

    With a momentum_decay ψ, as in PyTorch, b1 is replaced in m̂, but not in m, by a schedule::

        μₜ = b1·(1 − 0.96^(t·ψ) / 2)
        m̂ = μₜ₊₁·m / (1 − μ₁···μₜ₊₁) + (1 − μₜ)·g / (1 − μ₁···μₜ)

    Args:
      learning_rate: η, a number or a schedule.
      b1, b2, eps, eps_root, mu_dtype, nu_dtype: see :func:`adam`.
      nesterov: False makes it :func:`adam`.
      momentum_decay: ψ; None for optax's form. PyTorch's default is 4e-3:
        ``nadam(rate, momentum_decay=4e-3)``.

    Raises:
      ValueError: as :func:`adam`; for a negative momentum_decay, or one without nesterov.

    Dozat, 2016, https://openreview.net/pdf?id=OM0jvwB8jIp57ZJjtNEZ.

    By hand, with b1 = 0.5 and b2 = 0.75: the gradient 4 gives m = 2, m̂ = 0.5·2/0.75 + 0.5·4/0.5 and
    v̂ = 16, a step of −0.1·(16/3)/4.

    >>> optimizer = optim.nadam(0.1, b1=0.5, b2=0.75, eps=0.0)
    >>> params = {"w": jnp.array(1.0)}
    >>> updates, _ = optimizer.update({"w": jnp.array(4.0)}, optimizer.init(params), params)
    >>> round(float(updates["w"]), 6)
    -0.133333
    """
    check_learning_rate(learning_rate)
    return chain(
        _direction(b1, b2, eps, eps_root, mu_dtype, nesterov, nu_dtype, momentum_decay),
        scale_by_learning_rate(learning_rate),
    )


def nadamw(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: Any = None,
    weight_decay: ScalarOrSchedule = 1e-4,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    *,
    nesterov: bool = True,
    nu_dtype: Any = None,
    momentum_decay: Scalar | None = None,
) -> GradientTransformation:
    """NAdam with decoupled weight decay (optax's ``nadamw``).

    ``θ ← θ − η·(m̂ / (√(v̂ + eps_root) + eps) + λθ)``, all else as in :func:`nadam`. PyTorch's
    ``NAdam(decoupled_weight_decay=True)`` is ``nadamw(rate, momentum_decay=4e-3)``.

    Args:
      learning_rate: η, a number or a schedule.
      b1, b2, eps, eps_root, mu_dtype, nu_dtype: see :func:`adam`.
      weight_decay, mask: see :func:`adamw`; without a mask biases decay too.
      nesterov, momentum_decay: see :func:`nadam`.

    Raises:
      ValueError: as :func:`nadam`; for a negative weight_decay; at an update without parameters.

    Dozat, 2016, https://openreview.net/pdf?id=OM0jvwB8jIp57ZJjtNEZ; Loshchilov and Hutter, 2019,
    https://arxiv.org/abs/1711.05101.

    By hand: NAdam's step as above, and −0.1·0.5·2 where the parameter decays.

    >>> optimizer = optim.nadamw(0.1, 0.5, 0.75, 0.0, weight_decay=0.5, mask=tree.decayed)
    >>> params = {"kernel": jnp.array(2.0), "bias": jnp.array(2.0)}
    >>> grads = {"kernel": jnp.array(4.0), "bias": jnp.array(4.0)}
    >>> updates, _ = optimizer.update(grads, optimizer.init(params), params)
    >>> round(float(updates["kernel"]), 6), round(float(updates["bias"]), 6)
    (-0.233333, -0.133333)
    """
    check_learning_rate(learning_rate)
    weight_decay = check_weight_decay(weight_decay)
    return chain(
        _direction(b1, b2, eps, eps_root, mu_dtype, nesterov, nu_dtype, momentum_decay),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )


def _direction(
    b1: Any,
    b2: Any,
    eps: Any,
    eps_root: Any,
    mu_dtype: Any,
    nesterov: bool,
    nu_dtype: Any,
    momentum_decay: Any,
) -> GradientTransformation:
    if momentum_decay is None:
        return scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov, nu_dtype=nu_dtype)
    if not nesterov:
        raise ValueError("momentum_decay needs nesterov=True: it is the schedule of Nesterov's momentum")
    return scale_by_nadam(b1, b2, eps, eps_root, mu_dtype, momentum_decay=momentum_decay, nu_dtype=nu_dtype)
