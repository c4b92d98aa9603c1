"""Lion: steps of one size, in the direction of an average's sign."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from nnkit.optim.adam import check_averages, check_weight_decay
from nnkit.optim.combine import chain
from nnkit.optim.leafwise import check_params, check_state, filled, leafwise
from nnkit.optim.scalars import Scalar, as_scalar, check_dtype, check_learning_rate, increment
from nnkit.optim.transform import add_decayed_weights, scale_by_learning_rate
from nnkit.types import GradientTransformation, PyTree, ScalarOrSchedule

__all__ = ["ScaleByLionState", "lion", "scale_by_lion"]


class ScaleByLionState(NamedTuple):
    """How many updates there were (count, an int32 scalar) and the average of the gradients (mu)."""

    count: Any
    mu: PyTree


def scale_by_lion(
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    mu_dtype: Any = None,
    *,
    mode: Literal["hard", "smooth", "refined"] = "hard",
    smooth_beta: Scalar = 1.0,
) -> GradientTransformation:
    """Lion without its learning rate (optax's ``scale_by_lion``).

    With ``c = b1·m + (1 − b1)·g`` the update is sign(c), or what ``mode`` puts in its place.

    Args:
      b1, b2, mu_dtype: see :func:`lion`.
      mode: "hard" for sign(c); "smooth" for tanh(smooth_beta·c); "refined" for c cut off at −1 and 1.
      smooth_beta: how steep the tanh is.

    Raises:
      ValueError: for b1 or b2 outside [0, 1), for another mode, for a negative smooth_beta.
      TypeError: for a mu_dtype that is not floating-point.

    >>> for mode in ("hard", "smooth", "refined"):
    ...     tx = optim.scale_by_lion(b1=0.5, mode=mode)
    ...     updates, _ = tx.update({"w": jnp.array([0.5, -4.0])}, tx.init({"w": jnp.zeros(2)}))
    ...     print([round(u, 4) for u in updates["w"].tolist()])
    [1.0, -1.0]
    [0.2449, -0.964]
    [0.25, -1.0]
    """
    b1, b2, _, _ = check_averages(b1, b2)
    mu_dtype = check_dtype(mu_dtype, "mu_dtype")
    steepness = as_scalar(smooth_beta, "smooth_beta", "[0, inf)")
    if mode not in ("hard", "smooth", "refined"):
        raise ValueError(f"mode must be 'hard', 'smooth' or 'refined', got {mode!r}")

    def init(params: PyTree) -> ScaleByLionState:
        check_params("scale_by_lion", params)
        return ScaleByLionState(count=jnp.zeros([], jnp.int32), mu=filled(params, dtype=mu_dtype))

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **_: Any
    ) -> tuple[PyTree, PyTree]:
        state = check_state("scale_by_lion", state, ScaleByLionState)

        def leaf(g: Array, mu: Array) -> tuple[Array, Array]:
            out = mu.dtype if mu_dtype is None else g.dtype
            c = (1 - b1) * g + b1 * mu
            if mode == "hard":
                step = jnp.sign(c)
            elif mode == "smooth":
                step = jnp.tanh(steepness * c)
            else:
                step = jnp.where(jnp.abs(c) < 1, c, jnp.sign(c))
            return step.astype(out), (1 - b2) * g + b2 * mu

        updates, mu = leafwise("scale_by_lion", leaf, {"updates": updates}, states={"mu": state.mu})
        return updates, ScaleByLionState(count=increment(state.count), mu=mu)

    return GradientTransformation(init, update)


def lion(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    mu_dtype: Any = None,
    weight_decay: ScalarOrSchedule = 1e-3,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
) -> GradientTransformation:
    """Lion (optax's ``lion``).

    ``θ ← θ − η·(sign(b1·m + (1 − b1)·g) + λθ), m ← b2·m + (1 − b2)·g``. Every number moves by η, so a
    good rate is 3 to 10 times smaller than Adam's, and a good weight decay as much larger.

    Args:
      learning_rate: η, a number or a schedule.
      b1: how much of the average goes into a step, in [0, 1).
      b2: decay of the average, in [0, 1).
      mu_dtype: the dtype of m; the parameter's by default.
      weight_decay: λ, a number or a schedule; it is multiplied by the learning rate.
      mask: which parameters decay, see :func:`add_decayed_weights`; without one biases decay too.

    Raises:
      ValueError: for a negative rate or weight_decay, for b1 or b2 outside [0, 1); at an update without
        parameters.
      TypeError: for a mu_dtype that is not floating-point; in use, for parameters that are not.

    Chen et al., 2023, https://arxiv.org/abs/2302.06675.

    By hand, with b1 = b2 = 0.5 and no decay: the gradient 4 gives a step of −0.1 and m = 2; then −1 gives
    sign(0.5·2 − 0.5·1), −0.1 again, and m = 0.5; then −1 gives sign(0.5·0.5 − 0.5·1).

    >>> optimizer = optim.lion(0.1, b1=0.5, b2=0.5, weight_decay=0.0)
    >>> params = {"w": jnp.array(1.0)}
    >>> opt_state = optimizer.init(params)
    >>> for grad in (4.0, -1.0, -1.0):
    ...     updates, opt_state = optimizer.update({"w": jnp.array(grad)}, opt_state, params)
    ...     print(round(float(updates["w"]), 6))
    -0.1
    -0.1
    0.1
    """
    check_learning_rate(learning_rate)
    weight_decay = check_weight_decay(weight_decay)
    return chain(
        scale_by_lion(b1, b2, mu_dtype),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )
