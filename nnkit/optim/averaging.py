"""Averages: of updates inside an optimizer, and of parameters beside it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from nnkit.optim.conditional import check_count
from nnkit.optim.leafwise import check_params, check_state, filled, leafwise
from nnkit.optim.scalars import Scalar, as_scalar, check_dtype, increment, unbiased
from nnkit.tree import path_str
from nnkit.types import GradientTransformation, PyTree

__all__ = ["EmaState", "ema", "incremental_update", "periodic_update"]


class EmaState(NamedTuple):
    """The running average of the updates.

    Attributes:
      count: how many updates there were, an int32 scalar.
      ema: their exponential average, as it is before its bias to 0 is removed.
    """

    count: Any
    ema: PyTree


def ema(decay: Scalar, debias: bool = True, accumulator_dtype: Any = None) -> GradientTransformation:
    """The exponential average of the updates, m ← β·m + (1 − β)·u (optax's ``ema``).

    The update is m / (1 − βᵗ), or m without debias. :func:`trace` sums in place of averaging.

    Args:
      decay: β, in [0, 1).
      debias: whether to divide by the weights' sum, which takes away that m starts at 0.
      accumulator_dtype: the dtype of m; the parameter's by default.

    Raises:
      ValueError: for a decay outside [0, 1).
      TypeError: for an accumulator_dtype that is not floating-point.

    By hand: m = 0.5·4, over 1 − 0.5; then m = 0.5·2 + 0.5·1, over 1 − 0.25.

    >>> tx = optim.ema(0.5)
    >>> state = tx.init({"w": jnp.array(0.0)})
    >>> for u in (4.0, 1.0):
    ...     updates, state = tx.update({"w": jnp.array(u)}, state)
    ...     print(float(updates["w"]), float(state.ema["w"]))
    4.0 2.0
    2.0 1.5
    """
    beta = as_scalar(decay, "decay", "[0, 1)", "it is the decay of an average")
    accumulator_dtype = check_dtype(accumulator_dtype, "accumulator_dtype")

    def init(params: PyTree) -> EmaState:
        check_params("ema", params)
        return EmaState(count=jnp.zeros([], jnp.int32), ema=filled(params, dtype=accumulator_dtype))

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **_: Any
    ) -> tuple[PyTree, PyTree]:
        state = check_state("ema", state, EmaState)
        count = increment(state.count)
        correct = unbiased(beta, count) if debias else lambda m: m

        def leaf(u: Array, m: Array) -> tuple[Array, Array]:
            out = m.dtype if accumulator_dtype is None else u.dtype
            m = (1 - beta) * u + beta * m
            return correct(m).astype(out), m

        averaged, new = leafwise("ema", leaf, {"updates": updates}, states={"ema": state.ema})
        return averaged, state._replace(count=count, ema=new)

    return GradientTransformation(init, update)


def incremental_update(new_tensors: PyTree, old_tensors: PyTree, step_size: Scalar) -> PyTree:
    """A step towards new values, s·new + (1 − s)·old (optax's ``incremental_update``).

    Called after every step with the parameters it keeps their exponential average (Polyak's in the
    wider sense), whose decay is 1 − s. It has the dtypes of the old values; one without a new value
    (None) stays, where optax gives None.

    Args:
      new_tensors: the parameters.
      old_tensors: their average.
      step_size: s, in [0, 1].

    Raises:
      ValueError: for a step_size outside [0, 1], or where the trees or the shapes differ.
      TypeError: for leaves that are not floating-point.

    Polyak and Juditsky, 1992, https://doi.org/10.1137/0330046.

    >>> average = optim.incremental_update({"w": jnp.array(4.0)}, {"w": jnp.array(0.0)}, 0.25)
    >>> float(average["w"])
    1.0
    """
    s = as_scalar(step_size, "step_size", "[0, 1]", "it is the part of the way to go")

    def leaf(new: Array | None, old: Any) -> tuple[Any]:
        if new is None or old is None:
            return (old,)
        return ((s * new + (1.0 - s) * old).astype(old.dtype),)

    trees = {"new_tensors": new_tensors}, {"old_tensors": old_tensors}
    return leafwise("incremental_update", leaf, *trees, none=True)[0]


def periodic_update(
    new_tensors: PyTree, old_tensors: PyTree, steps: Int[Array, ""] | int, update_period: Int[Array, ""] | int
) -> PyTree:
    """The new values where the step is a multiple of the period, else the old (optax's).

    Args:
      new_tensors: the parameters, of any dtypes.
      old_tensors: their copy of some steps ago, of the same form and dtypes.
      steps: the number of the step.
      update_period: after how many steps to copy, at least 1.

    Raises:
      ValueError: for an update_period below 1, or where the trees, shapes or dtypes differ.

    Mnih et al., 2015, https://doi.org/10.1038/nature14236.

    >>> new, old = {"w": jnp.array(2.0)}, {"w": jnp.array(1.0)}
    >>> [float(optim.periodic_update(new, old, step, 2)["w"]) for step in range(4)]
    [2.0, 1.0, 2.0, 1.0]
    """
    period = check_count(update_period, "update_period", 1)
    left, right = (jax.tree.map(_described, tree) for tree in (new_tensors, old_tensors))
    if jax.tree.structure(left) != jax.tree.structure(right):
        raise ValueError(
            "periodic_update: new_tensors and old_tensors must be trees of one form, got "
            f"{jax.tree.structure(left)} and {jax.tree.structure(right)}"
        )
    for (path, new), old in zip(
        jax.tree_util.tree_leaves_with_path(left), jax.tree.leaves(right), strict=True
    ):
        if new != old:
            raise ValueError(
                f"periodic_update: new_tensors has {new} at {path_str(path) or 'the root'}, old_tensors has {old}"
            )
    with jax.numpy_dtype_promotion("standard"):  # a period of another integer dtype than the steps
        now = jnp.mod(steps, period) == 0
    return jax.lax.cond(now, lambda: new_tensors, lambda: old_tensors)


def _described(x: Any) -> str:
    x = jnp.asarray(x)
    return f"{x.dtype}{list(x.shape)}"
