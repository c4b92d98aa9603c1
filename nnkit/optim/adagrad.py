"""AdaGrad: steps scaled by the root of the sum of all squared gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from nnkit.optim.combine import chain
from nnkit.optim.leafwise import abs_sq, check_params, check_state, filled, leafwise
from nnkit.optim.scalars import Scalar, as_scalar, check_learning_rate
from nnkit.optim.transform import scale_by_learning_rate
from nnkit.types import GradientTransformation, PyTree, ScalarOrSchedule

__all__ = ["ScaleByRssState", "adagrad", "scale_by_rss"]


class ScaleByRssState(NamedTuple):
    """The sum of the squared gradients so far."""

    sum_of_squares: PyTree


def scale_by_rss(
    initial_accumulator_value: Scalar = 0.1, eps: Scalar = 1e-7, *, eps_in_sqrt: bool = True
) -> GradientTransformation:
    """AdaGrad without its learning rate (optax's ``scale_by_rss``).

    See :func:`adagrad` for formula, arguments and sources.

    Raises:
      ValueError: for a negative initial_accumulator_value or eps.

    >>> tx = optim.scale_by_rss(initial_accumulator_value=0.0, eps=0.0)
    >>> updates, state = tx.update({"w": jnp.array(-3.0)}, tx.init({"w": jnp.array(0.0)}))
    >>> float(updates["w"]), float(state.sum_of_squares["w"])
    (-1.0, 9.0)
    """
    initial = as_scalar(initial_accumulator_value, "initial_accumulator_value", "[0, inf)")
    eps = as_scalar(eps, "eps", "[0, inf)")

    def init(params: PyTree) -> ScaleByRssState:
        check_params("scale_by_rss", params)
        return ScaleByRssState(sum_of_squares=filled(params, initial))

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **_: Any
    ) -> tuple[PyTree, PyTree]:
        state = check_state("scale_by_rss", state, ScaleByRssState)

        def leaf(g: Array, total: Array) -> tuple[Array, Array]:
            out = total.dtype
            total = abs_sq(g) + total
            # Where nothing has come in yet the step is 0 whatever eps is, as in optax. Both selects are
            # needed: a derivative of 1/√0 that is multiplied by 0 would still be NaN.
            some = total > 0
            root_of = jnp.where(some, total, 1)
            if eps_in_sqrt:
                u = jnp.where(some, lax.rsqrt(root_of + eps), 0) * g
            else:
                u = jnp.where(some, g / (jnp.sqrt(root_of) + eps), 0)
            return u.astype(out), total

        sums = {"sum_of_squares": state.sum_of_squares}
        updates, new = leafwise("scale_by_rss", leaf, {"updates": updates}, states=sums)
        return updates, state._replace(sum_of_squares=new)

    return GradientTransformation(init, update)


def adagrad(
    learning_rate: ScalarOrSchedule,
    initial_accumulator_value: Scalar = 0.1,
    eps: Scalar = 1e-7,
    *,
    eps_in_sqrt: bool = True,
) -> GradientTransformation:
    """AdaGrad (optax's ``adagrad``).

    ``s ← s + g², θ ← θ − η·g / √(s + eps)``, with s = initial_accumulator_value at the start and no
    step where s = 0.

    Args:
      learning_rate: η, a number or a schedule.
      initial_accumulator_value: where s starts.
      eps: keeps the step finite where s is near 0.
      eps_in_sqrt: whether eps is inside the root, or outside, ``g / (√s + eps)``.

    PyTorch's is ``adagrad(rate, initial_accumulator_value=0.0, eps=1e-10, eps_in_sqrt=False)``, the
    lecture's ``adagrad(rate, initial_accumulator_value=0.0, eps=0.0)``.

    Raises:
      ValueError: for a negative rate, initial_accumulator_value or eps.

    Duchi, Hazan and Singer, 2011, https://jmlr.org/papers/v12/duchi11a.html.

    By hand, in the lecture's form: s = 9, a step of −0.1·3/3; then s = 9 + 16, a step of −0.1·4/5.

    >>> optimizer = optim.adagrad(0.1, initial_accumulator_value=0.0, eps=0.0)
    >>> params = {"w": jnp.array(1.0)}
    >>> opt_state = optimizer.init(params)
    >>> for grad in (3.0, 4.0):
    ...     updates, opt_state = optimizer.update({"w": jnp.array(grad)}, opt_state, params)
    ...     print(round(float(updates["w"]), 6))
    -0.1
    -0.08
    """
    check_learning_rate(learning_rate)
    return chain(
        scale_by_rss(initial_accumulator_value, eps, eps_in_sqrt=eps_in_sqrt),
        scale_by_learning_rate(learning_rate),
    )
