"""Adam and AdamW: steps scaled by running estimates of the gradient's mean and mean square."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from nnkit.optim.combine import chain
from nnkit.optim.leafwise import abs_sq, check_params, check_state, filled, leafwise
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
from nnkit.optim.transform import add_decayed_weights, scale_by_learning_rate
from nnkit.types import GradientTransformation, PyTree, ScalarOrSchedule

__all__ = [
    "ScaleByAdamState",
    "adam",
    "adam_state",
    "adamw",
    "check_averages",
    "check_weight_decay",
    "divided",
    "mean_square",
    "scale_by_adam",
    "widened",
]


class ScaleByAdamState(NamedTuple):
    """Adam's running estimates.

    Attributes:
      count: how many updates there were, an int32 scalar.
      mu: the exponential average of the gradients.
      nu: the exponential average of their squares.
    """

    count: Any
    mu: PyTree
    nu: PyTree


def scale_by_adam(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: Any = None,
    *,
    nesterov: bool = False,
    bias_correction: bool = True,
    nu_dtype: Any = None,
) -> GradientTransformation:
    """Adam without its learning rate (optax's ``scale_by_adam``).

    See :func:`adam` for formula, arguments and sources.

    Raises:
      ValueError: for b1 or b2 outside [0, 1), for a negative eps or eps_root.
      TypeError: for a mu_dtype or nu_dtype that is not floating-point.

    >>> tx = optim.scale_by_adam(b1=0.5, b2=0.75, eps=0.0)
    >>> state = tx.init({"w": jnp.array(0.0)})
    >>> for grad in (4.0, -2.0):
    ...     updates, state = tx.update({"w": jnp.array(grad)}, state)
    ...     print(round(float(updates["w"]), 6), float(state[1]["w"]), float(state[2]["w"]))
    1.0 2.0 4.0
    0.0 0.0 4.0
    """
    b1, b2, eps, eps_root = check_averages(b1, b2, eps, eps_root)
    mu_dtype, nu_dtype = check_dtype(mu_dtype, "mu_dtype"), check_dtype(nu_dtype, "nu_dtype")

    def init(params: PyTree) -> ScaleByAdamState:
        return adam_state("scale_by_adam", params, mu_dtype, nu_dtype)

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **_: Any
    ) -> tuple[PyTree, PyTree]:
        state = check_state("scale_by_adam", state, ScaleByAdamState)
        count = increment(state.count)
        weight = total_weight(b1, count)
        hat = unbiased if bias_correction else lambda *_: lambda x: x
        mu_hat, next_mu_hat, nu_hat = hat(b1, count), hat(b1, increment(count)), hat(b2, count)

        def leaf(g: Array, mu: Array, nu: Array) -> tuple[Array, Array, Array]:
            g, out = widened(g, nu, nu_dtype)
            mu = (1 - b1) * g + b1 * mu
            nu = mean_square(g, nu, b2)
            root = jnp.sqrt(nu_hat(nu) + eps_root) + eps
            if nesterov:
                step = quotient(b1 * next_mu_hat(mu) + (1 - b1) * mu_hat(g), root, eps, eps_root)
            elif bias_correction:
                step = divided(mu, weight, root, eps, eps_root)
            else:
                step = quotient(mu, root, eps, eps_root)
            return step.astype(out), mu, nu

        averages = {"mu": state.mu, "nu": state.nu}
        updates, mu, nu = leafwise("scale_by_adam", leaf, {"updates": updates}, states=averages)
        return updates, state._replace(count=count, mu=mu, nu=nu)

    return GradientTransformation(init, update)


def adam(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: Any = None,
    *,
    nesterov: bool = False,
    bias_correction: bool = True,
    nu_dtype: Any = None,
) -> GradientTransformation:
    """Adam (optax's ``adam``, the same as PyTorch's ``Adam``).

    With the gradient g at step t = 1, 2, ...::

        m ← b1·m + (1 − b1)·g                    m̂ = m / (1 − b1ᵗ)
        v ← b2·v + (1 − b2)·g²                   v̂ = v / (1 − b2ᵗ)
        θ ← θ − η·m̂ / (√(v̂ + eps_root) + eps)

    Args:
      learning_rate: η, a number or a schedule.
      b1: decay of the average of the gradients, in [0, 1).
      b2: decay of the average of their squares, in [0, 1).
      eps: keeps the step finite where v̂ is near 0. At 0, a parameter that has never had a gradient
        stays where it is (optax gives NaN).
      eps_root: the same inside the root, for derivatives through the update.
      mu_dtype: the dtype of m; the parameter's by default.
      nesterov: Dozat's NAdam, ``m̂ = b1·m / (1 − b1ᵗ⁺¹) + (1 − b1)·g / (1 − b1ᵗ)``.
      bias_correction: whether to divide by 1 − bᵗ. ``adam(rate, eps=0.0, bias_correction=False)`` is the
        form of the lecture.
      nu_dtype: the dtype of v; the parameter's by default. With float32 on bfloat16 parameters all is
        computed in float32 and so is the update, so that nothing is rounded before it reaches the
        parameters. (With mu_dtype alone the update is rounded to the parameter's dtype.)

    Raises:
      ValueError: for a negative rate, eps or eps_root, for b1 or b2 outside [0, 1).
      TypeError: for a mu_dtype or nu_dtype that is not floating-point; in use, for parameters that are not.

    Kingma and Ba, 2014, https://arxiv.org/abs/1412.6980; Dozat, 2016,
    https://openreview.net/pdf?id=OM0jvwB8jIp57ZJjtNEZ.

    By hand, with b1 = 0.5 and b2 = 0.75: the first gradient 4 gives m̂ = 2/0.5, v̂ = 4/0.25, a step of
    −0.1·4/√16; the second, −1, gives m = 0.5, m̂ = 0.5/0.75, v = 3.25, v̂ = 3.25/0.4375.

    >>> optimizer = optim.adam(0.1, b1=0.5, b2=0.75, eps=0.0)
    >>> params = {"w": jnp.array(1.0)}
    >>> opt_state = optimizer.init(params)
    >>> for grad in (4.0, -1.0):
    ...     updates, opt_state = optimizer.update({"w": jnp.array(grad)}, opt_state, params)
    ...     print(round(float(updates["w"]), 6))
    -0.1
    -0.02446
    >>> round(-0.1 * (0.5 / 0.75) / (3.25 / 0.4375) ** 0.5, 6)
    -0.02446
    """
    check_learning_rate(learning_rate)
    return chain(
        scale_by_adam(
            b1,
            b2,
            eps,
            eps_root,
            mu_dtype,
            nesterov=nesterov,
            bias_correction=bias_correction,
            nu_dtype=nu_dtype,
        ),
        scale_by_learning_rate(learning_rate),
    )


def adamw(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: Any = None,
    weight_decay: ScalarOrSchedule = 1e-4,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    *,
    nesterov: bool = False,
    nu_dtype: Any = None,
) -> GradientTransformation:
    """Adam with decoupled weight decay (optax's ``adamw``; PyTorch's ``AdamW`` with weight_decay=0.01).

    ``θ ← θ − η·(m̂ / (√(v̂ + eps_root) + eps) + λθ)``, all else as in :func:`adam`.

    Without a mask everything decays, biases and normalisation scales too. That is seldom wanted, and
    ``mask=nnkit.tree.decayed`` leaves them alone. It is not the default because then the same call
    would train another network than optax's, and because what is a bias is told by its name, which
    only the user of another layer library can vouch for.

    Args:
      learning_rate: η, a number or a schedule.
      b1, b2, eps, eps_root, mu_dtype, nesterov, nu_dtype: see :func:`adam`.
      weight_decay: λ, a number or a schedule. It is multiplied by the learning rate, as in PyTorch.
      mask: which parameters decay, see :func:`add_decayed_weights`.

    Raises:
      ValueError: as :func:`adam`; for a negative weight_decay; at an update without parameters.

    Loshchilov and Hutter, 2019, https://arxiv.org/abs/1711.05101.

    By hand: the first step of Adam is −η for a positive gradient, and −η·λ·θ = −0.1·0.5·2 comes to it.

    >>> optimizer = optim.adamw(0.1, 0.5, 0.75, 0.0, weight_decay=0.5, mask=tree.decayed)
    >>> params = {"kernel": jnp.array(2.0), "bias": jnp.array(2.0)}
    >>> grads = {"kernel": jnp.array(3.0), "bias": jnp.array(3.0)}
    >>> updates, _ = optimizer.update(grads, optimizer.init(params), params)
    >>> round(float(updates["kernel"]), 6), round(float(updates["bias"]), 6)
    (-0.2, -0.1)
    """
    check_learning_rate(learning_rate)
    weight_decay = check_weight_decay(weight_decay)
    return chain(
        scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov, nu_dtype=nu_dtype),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )


def adam_state(where: str, params: PyTree, mu_dtype: Any = None, nu_dtype: Any = None) -> ScaleByAdamState:
    """The state at the start of Adam and of those with a state like it."""
    check_params(where, params)
    mu, nu = filled(params, dtype=mu_dtype), filled(params, dtype=nu_dtype)
    return ScaleByAdamState(count=jnp.zeros([], jnp.int32), mu=mu, nu=nu)


def check_averages(b1: Any, b2: Any, eps: Any = 0.0, eps_root: Any = 0.0) -> tuple[Any, Any, Any, Any]:
    """The numbers that Adam and its relatives share, each in its range."""
    why = "it is the decay of an average"
    return (
        as_scalar(b1, "b1", "[0, 1)", why),
        as_scalar(b2, "b2", "[0, 1)", why),
        as_scalar(eps, "eps", "[0, inf)"),
        as_scalar(eps_root, "eps_root", "[0, inf)"),
    )


def check_weight_decay(value: Any) -> Any:
    """A decoupled weight decay: a schedule as it is, a number in [0, inf)."""
    return value if callable(value) else as_scalar(value, "weight_decay", "[0, inf)")


def widened(g: Array, nu: Array, nu_dtype: Any) -> tuple[Array, Any]:
    """The gradient in the dtype to compute in, and the dtype of the update.

    Squares and sums are taken in the wider of the gradient's dtype and an explicit nu_dtype: g² of a
    bfloat16 g has lost half of what a float32 average could hold.
    """
    if nu_dtype is None:
        return g, nu.dtype
    g = g.astype(jnp.promote_types(g.dtype, nu_dtype))
    return g, g.dtype


def mean_square(g: Array, nu: Array, b2: Scalar) -> Array:
    """``(1 − b2)·|g|² + b2·ν``; real for a real ν, which an explicit nu_dtype may make it."""
    square = abs_sq(g) if jnp.iscomplexobj(nu) else abs_sq(g).real
    return (1 - b2) * square + b2 * nu


def divided(mu: Array, weight: Array, root: Array, *added: Scalar) -> Array:
    """``mu / weight / root``, and 0 where that is 0/0; ``added`` as for :func:`quotient`."""
    weight = weight.astype(mu.dtype)
    if jnp.finfo(mu.dtype).bits >= 32:
        # The denominators multiplied first: one division less, and what XLA makes of optax's two. In 16
        # bits, where XLA does not, each rounding shows.
        return quotient(mu, weight * root, *added)
    return quotient(mu / weight, root, *added)
