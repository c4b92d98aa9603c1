"""Muon: momentum whose matrices are made orthogonal before they are stepped along."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from nnkit.optim.adam import adamw, check_weight_decay
from nnkit.optim.combine import chain
from nnkit.optim.leafwise import check_params, check_state, filled, leafwise
from nnkit.optim.masking import partition
from nnkit.optim.matrices import MuonDimensionNumbers, fans, map_matrices, numbers_by_leaf, two_axes
from nnkit.optim.newton_schulz import (
    Preconditioning,
    as_coefficients,
    check_iteration,
    orthogonalize_via_newton_schulz,
)
from nnkit.optim.scalars import Scalar, as_scalar, check_dtype, check_learning_rate, increment, unbiased
from nnkit.optim.transform import EmptyState, add_decayed_weights, scale_by_learning_rate
from nnkit.types import GradientTransformation, PyTree, ScalarOrSchedule

__all__ = ["MuonState", "muon", "scale_by_muon", "scale_by_shape"]


class MuonState(NamedTuple):
    """Muon's state.

    Attributes:
      count: how many updates there were, an int32 scalar.
      mu: the exponential average of the gradients.
      ns_coeffs: the coefficients of the iteration, (3,) or (steps, 3).
    """

    count: Any
    mu: PyTree
    ns_coeffs: Any


def scale_by_muon(
    ns_coeffs: Any = (3.4445, -4.7750, 2.0315),
    ns_steps: int = 5,
    beta: Scalar = 0.95,
    eps: Scalar = 1e-8,
    mu_dtype: Any = None,
    *,
    nesterov: bool = True,
    adaptive: bool = False,
    preconditioning: Preconditioning = "frobenius",
    weight_dimension_numbers: PyTree | Callable[[PyTree], PyTree] | None = None,
) -> GradientTransformation:
    """Muon for matrices alone, without its learning rate (optax.contrib's ``scale_by_muon``).

    See :func:`muon` for formula, arguments and sources.

    Args:
      weight_dimension_numbers: a :class:`MuonDimensionNumbers` for each parameter, as a tree shaped like
        the parameters or a prefix of them, or a function from the updates to one. None where all are
        matrices.

    Raises:
      ValueError: for a beta outside [0, 1), a negative eps, coefficients of another shape, an ns_steps
        below 1; at an update, for a parameter that is no matrix.
      TypeError: for a mu_dtype that is not floating-point.

    >>> tx = optim.scale_by_muon(ns_coeffs=(1.5, -0.5, 0.0), ns_steps=1)
    >>> params = {"kernel": jnp.zeros((2, 2))}
    >>> updates, _ = tx.update({"kernel": jnp.diag(jnp.array([3.0, 4.0]))}, tx.init(params))
    >>> [[round(v, 4) for v in row] for row in updates["kernel"].tolist()]
    [[0.792, 0.0], [0.0, 0.944]]
    """
    as_coefficients(ns_coeffs)  # an error at once, not at init
    eps = check_iteration(ns_steps, preconditioning, eps)
    beta = as_scalar(beta, "beta", "[0, 1)", "it is the decay of an average")
    mu_dtype = check_dtype(mu_dtype, "mu_dtype")

    def init(params: PyTree) -> MuonState:
        check_params("scale_by_muon", params)
        zero, mu = jnp.zeros([], jnp.int32), filled(params, dtype=mu_dtype)
        return MuonState(zero, mu, ns_coeffs=as_coefficients(ns_coeffs))

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **_: Any
    ) -> tuple[PyTree, PyTree]:
        state = check_state("scale_by_muon", state, MuonState)
        count = increment(state.count)
        mu_hat, next_mu_hat = unbiased(beta, count), unbiased(beta, increment(count))

        def leaf(g: Array, mu: Array) -> tuple[Array, Array]:
            mu = (1 - beta) * g + beta * mu
            direction = beta * next_mu_hat(mu) + (1 - beta) * mu_hat(g) if nesterov else mu_hat(mu)
            return direction, mu

        def orthogonal(numbers: MuonDimensionNumbers, x: Array, g: Array) -> Array:
            y = orthogonalize_via_newton_schulz(x, state.ns_coeffs, ns_steps, preconditioning, eps, numbers)
            y = jnp.sum(x.conj() * y) * y if adaptive else y
            return y.astype(g.dtype)

        directions, mu = leafwise("scale_by_muon", leaf, {"updates": updates}, states={"mu": state.mu})
        steps = map_matrices("scale_by_muon", orthogonal, weight_dimension_numbers, directions, updates)
        return steps, MuonState(count, mu, state.ns_coeffs)

    return GradientTransformation(init, update)


def scale_by_shape(
    weight_dimension_numbers: PyTree | Callable[[PyTree], PyTree] | None = None,
    consistent_rms: Scalar | None = None,
) -> GradientTransformation:
    """Multiplies each matrix by a number that its shape gives (the function of this name beside optax's Muon).

    With n inputs and m outputs, √max(1, m/n); with consistent_rms c it is c·√max(n, m).

    Raises:
      ValueError: for a negative consistent_rms; at an update, for a parameter that is no matrix.

    >>> tx = optim.scale_by_shape()
    >>> updates, _ = tx.update({"kernel": jnp.ones((1, 4))}, tx.init({"kernel": jnp.ones((1, 4))}))
    >>> updates["kernel"].tolist()
    [[2.0, 2.0, 2.0, 2.0]]
    """
    rms = None if consistent_rms is None else as_scalar(consistent_rms, "consistent_rms", "[0, inf)")

    def init(params: PyTree) -> EmptyState:
        check_params("scale_by_shape", params)
        return EmptyState()

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **_: Any
    ) -> tuple[PyTree, PyTree]:
        def scaled(numbers: MuonDimensionNumbers, x: Array) -> Array:
            inputs, outputs = fans(x, numbers)
            if rms is None:
                return max(1.0, outputs / max(inputs, 1)) ** 0.5 * x
            return (max(inputs, outputs) ** 0.5 * rms * x).astype(x.dtype)

        return map_matrices("scale_by_shape", scaled, weight_dimension_numbers, updates), state

    return GradientTransformation(init, update)


def muon(
    learning_rate: ScalarOrSchedule,
    ns_coeffs: Any = (3.4445, -4.7750, 2.0315),
    ns_steps: int = 5,
    beta: Scalar = 0.95,
    eps: Scalar = 1e-8,
    weight_decay: ScalarOrSchedule = 0.0,
    weight_decay_mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    mu_dtype: Any = None,
    *,
    nesterov: bool = True,
    adaptive: bool = False,
    preconditioning: Preconditioning = "frobenius",
    adam_b1: Scalar = 0.9,
    adam_b2: Scalar = 0.999,
    adam_eps_root: Scalar = 0.0,
    adam_weight_decay: ScalarOrSchedule = 0.0,
    adam_learning_rate: ScalarOrSchedule | None = None,
    muon_weight_dimension_numbers: PyTree | Callable[[PyTree], PyTree] | None = None,
    consistent_rms: Scalar | None = None,
) -> GradientTransformation:
    """Muon for the matrices, NAdamW for the rest (optax.contrib's ``muon``).

    For a matrix θ of n inputs and m outputs, with the gradient g at step t = 1, 2, ...::

        μ ← b·μ + (1 − b)·g
        μ̂ = b·μ / (1 − bᵗ⁺¹) + (1 − b)·g / (1 − bᵗ)
        θ ← θ − η·(√max(1, m/n)·orthogonal(μ̂) + λθ)

    where orthogonal(UΣVᵀ) is roughly UVᵀ, see :func:`orthogonalize_via_newton_schulz`: every direction
    of the input is learnt at one pace. Meant for the kernels between layers; the first and the last
    layer are better left to Adam, by muon_weight_dimension_numbers.

    Args:
      learning_rate: η, a number or a schedule.
      ns_coeffs: the coefficients of the iteration: (a, b, c), rows of that for each step, "standard"
        or "dion".
      ns_steps: how many steps of the iteration; with rows, there are as many as rows (optax refuses
        fewer steps than rows).
      beta: b, in [0, 1).
      eps: keeps the normalisation finite; Adam's too.
      weight_decay: λ, a number or a schedule, for the matrices.
      weight_decay_mask: which of them decay, see :func:`add_decayed_weights`.
      mu_dtype: the dtype of the averages of the gradient; the parameter's by default.
      nesterov: whether to look ahead as written above, or μ̂ = μ / (1 − bᵗ); without it the rest
        gets :func:`adamw`.
      adaptive: whether to multiply orthogonal(μ̂) by its inner product with μ̂, the sum of the singular
        values.
      preconditioning: see :func:`orthogonalize_via_newton_schulz`.
      adam_b1, adam_b2, adam_eps_root, adam_weight_decay: of :func:`nadamw` for the rest.
      adam_learning_rate: likewise; η by default.
      muon_weight_dimension_numbers: a :class:`MuonDimensionNumbers` for each parameter that is for Muon
        and None for each that is for Adam: a tree shaped like the parameters or a prefix of them, or a
        function from the parameters to one. By default arrays with two axes are for Muon.
      consistent_rms: c for steps of c·√max(n, m)·orthogonal(μ̂), whose size is Adam's with 0.2.

    Raises:
      ValueError: for a negative rate, eps or weight decay, for a beta, adam_b1 or adam_b2 outside
        [0, 1), for coefficients of another shape; at an update without parameters.
      TypeError: for a mu_dtype that is not floating-point; in use, for parameters that are not.

    Jordan, 2024, https://kellerjordan.github.io/posts/muon; Bernstein and Newhouse, 2024,
    https://arxiv.org/abs/2409.20325 (adaptive); Liu et al., 2025, https://arxiv.org/abs/2502.16982
    (consistent_rms).

    By hand, with one step of Newton's classical coefficients: μ̂ has the direction of g, whose norm is 5;
    0.6 and 0.8 become 0.792 and 0.944, times −0.1. The bias gets NAdam's −0.1·(0.9·0.1/0.19 + 1).

    >>> optimizer = optim.muon(0.1, ns_coeffs=(1.5, -0.5, 0.0), ns_steps=1)
    >>> params = {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}
    >>> grads = {"kernel": jnp.diag(jnp.array([3.0, 4.0])), "bias": jnp.ones(2)}
    >>> updates, _ = optimizer.update(grads, optimizer.init(params), params)
    >>> [round(v, 4) for v in updates["kernel"].diagonal().tolist() + updates["bias"].tolist()]
    [-0.0792, -0.0944, -0.1474, -0.1474]
    """
    check_learning_rate(learning_rate)
    weight_decay = check_weight_decay(weight_decay)
    numbers = two_axes if muon_weight_dimension_numbers is None else muon_weight_dimension_numbers

    def labels(params: PyTree) -> PyTree:
        names = ["adam" if n is None else "muon" for n in numbers_by_leaf("muon", numbers, params)]
        return jax.tree.structure(params).unflatten(names)

    of_matrices = chain(
        scale_by_muon(
            ns_coeffs,
            ns_steps,
            beta,
            eps,
            mu_dtype,
            nesterov=nesterov,
            adaptive=adaptive,
            preconditioning=preconditioning,
            weight_dimension_numbers=numbers,
        ),
        scale_by_shape(numbers, consistent_rms),
        add_decayed_weights(weight_decay, weight_decay_mask),
        scale_by_learning_rate(learning_rate),
    )
    of_the_rest = adamw(
        learning_rate if adam_learning_rate is None else adam_learning_rate,
        adam_b1,
        adam_b2,
        eps,
        adam_eps_root,
        mu_dtype,
        adam_weight_decay,
        nesterov=nesterov,
    )
    return partition({"muon": of_matrices, "adam": of_the_rest}, labels)
