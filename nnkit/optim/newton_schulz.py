"""The orthogonal matrix nearest to a given one, by matrix products alone."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from nnkit.optim.matrices import MuonDimensionNumbers, axes, fans
from nnkit.optim.scalars import Scalar, as_scalar, quotient
from nnkit.tree import root, sum_of_squares

__all__ = [
    "COEFFICIENTS",
    "Preconditioning",
    "as_coefficients",
    "check_iteration",
    "orthogonalize_via_newton_schulz",
]

COEFFICIENTS: dict[str, Any] = {
    "standard": (3.4445, -4.7750, 2.0315),
    "dion": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
}
"""Polynomials by name: Jordan's, for every step, and Dion's, one for each of five steps."""

Preconditioning: TypeAlias = Literal["frobenius", "spectral", "aol", "schatten"]


def orthogonalize_via_newton_schulz(
    x: Float[Array, "..."],
    ns_coeffs: Float[Array, "..."],
    ns_steps: int = 5,
    preconditioning: Preconditioning = "frobenius",
    eps: Scalar = 1e-8,
    dimension_numbers: MuonDimensionNumbers | None = None,
) -> Float[Array, "..."]:
    """A matrix with the singular vectors of ``x`` and singular values near 1.

    ``X ← X / ‖X‖``, then so many times ``X ← a·X + (b·A + c·A²)·X`` with ``A = X·Xᴴ``, which acts as
    the polynomial a·σ + b·σ³ + c·σ⁵ on the singular values. In five steps "standard" takes everything
    between 0.01 and 1 to between 0.68 and 1.14, "dion" to between 0.97 and 1.04; neither goes to 1.

    Args:
      x: a matrix, or an array with ``dimension_numbers``.
      ns_coeffs: (a, b, c) for every step, or one such row for each step.
      ns_steps: how many steps; with rows, there are as many as rows.
      preconditioning: what brings the singular values into [0, 1]: the Frobenius norm; the largest
        singular value ("spectral", exact and slow); almost orthogonal rows ("aol"); or the fourth
        Schatten norm. The last two use the first step's A and save about one step.
      eps: keeps the division by the norm finite; a matrix of zeros stays one.
      dimension_numbers: how to read ``x`` as matrices.

    Raises:
      ValueError: for an ``x`` that is no matrix, without dimension_numbers; for axes that are not there
        or in both groups.

    Jordan, 2024, https://kellerjordan.github.io/posts/muon; Boissin et al., 2025,
    https://arxiv.org/abs/2512.04632 (aol); Grishina et al., 2025, https://arxiv.org/abs/2506.10935
    (schatten).

    By hand, one step of Newton's classical (1.5, −0.5, 0): the norm is 5, and 0.6 and 0.8 become
    1.5·0.6 − 0.5·0.6³ and 1.5·0.8 − 0.5·0.8³.

    >>> x = jnp.array([[3.0, 0.0], [0.0, 4.0]])
    >>> y = orthogonalize_via_newton_schulz(x, jnp.array([1.5, -0.5, 0.0]), 1, eps=0.0)
    >>> [[round(v, 4) for v in row] for row in y.tolist()]
    [[0.792, 0.0], [0.0, 0.944]]
    """
    reduction, output = axes(x, dimension_numbers)
    batch = tuple(i for i in range(x.ndim) if i not in reduction + output)
    order = batch + reduction + output
    ordered = x.transpose(order)
    fan_in, fan_out = fans(x, dimension_numbers)
    matrices = ordered.reshape(-1 if x.size else 0, fan_in, fan_out)
    rows = list(ns_coeffs.astype(x.dtype)) if ns_coeffs.ndim == 2 else [ns_coeffs.astype(x.dtype)] * ns_steps

    def one(m: Array) -> Array:
        # p(Xᵀ) = p(X)ᵀ, and the products are the smaller for fewer rows.
        flipped = m.shape[0] > m.shape[1]
        m = _iterated(m.T if flipped else m, rows, preconditioning, eps)
        return m.T if flipped else m

    with jax.numpy_dtype_promotion("standard"):  # as in leafwise
        result = jax.vmap(one)(matrices) if x.size else matrices
    return result.reshape(ordered.shape).transpose(np.argsort(order))


def as_coefficients(ns_coeffs: Any) -> Array:
    """``ns_coeffs``, or those of this name, as a new array (3,) or (steps, 3), which may be donated.

    >>> as_coefficients("dion").shape
    (5, 3)
    >>> as_coefficients("newton")
    Traceback (most recent call last):
    ValueError: ns_coeffs must be 'standard', 'dion' or numbers (a, b, c), got 'newton'
    """
    if isinstance(ns_coeffs, str):
        if ns_coeffs not in COEFFICIENTS:
            known = ", ".join(map(repr, COEFFICIENTS))
            raise ValueError(f"ns_coeffs must be {known} or numbers (a, b, c), got {ns_coeffs!r}")
        ns_coeffs = COEFFICIENTS[ns_coeffs]
    try:
        coefficients = jnp.array(ns_coeffs, jnp.result_type(float))
    except (TypeError, ValueError):
        raise TypeError(f"ns_coeffs must be numbers (a, b, c) or rows of them, got {ns_coeffs!r}") from None
    if coefficients.ndim not in (1, 2) or coefficients.shape[-1] != 3 or not coefficients.size:
        raise ValueError(
            f"ns_coeffs must be (a, b, c) or rows of that, got the shape {coefficients.shape}: "
            "pass 'standard' for Muon's own"
        )
    return coefficients


def check_iteration(ns_steps: Any, preconditioning: Any, eps: Any) -> Any:
    """``eps`` as a number; raises for what :func:`orthogonalize_via_newton_schulz` cannot use."""
    if isinstance(ns_steps, bool) or not isinstance(ns_steps, int | np.integer) or ns_steps < 1:
        raise ValueError(f"ns_steps must be a positive integer, got {ns_steps!r}")
    if preconditioning not in get_args(Preconditioning):
        known = ", ".join(map(repr, get_args(Preconditioning)))
        raise ValueError(f"preconditioning must be one of {known}, got {preconditioning!r}")
    return as_scalar(eps, "eps", "[0, inf)")


def _iterated(m: Array, rows: list[Array], preconditioning: Preconditioning, eps: Scalar) -> Array:
    if preconditioning == "frobenius":
        m = quotient(m, (root([sum_of_squares(m)]) + eps).astype(m.dtype), eps)
    elif preconditioning == "spectral":
        largest = jnp.linalg.norm(m.astype(jnp.promote_types(m.dtype, jnp.float32)), ord=2)
        m = quotient(m, (largest + eps).astype(m.dtype), eps)
    gram = m @ m.T.conj()
    if preconditioning in ("aol", "schatten"):
        size = jnp.abs(gram).sum(axis=-1) if preconditioning == "aol" else root([sum_of_squares(gram)])[None]
        least = max(1e-8, float(jnp.finfo(m.dtype).tiny))
        s = jax.lax.rsqrt(jnp.maximum(size.astype(gram.real.dtype), least)).astype(m.dtype)[:, None]
        m, gram = m * s, gram * s * s.T if preconditioning == "aol" else gram * (s * s)
    for i, (a, b, c) in enumerate(rows):
        if i:
            gram = m @ m.T.conj()
        m = a * m + (b * gram + c * gram @ gram) @ m
    return m
