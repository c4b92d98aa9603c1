"""Updates that are made only where they are fit to be: finite ones, or none at all."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool

from nnkit.optim.combine import tolerant
from nnkit.optim.leafwise import check_params, check_state, leafwise
from nnkit.optim.scalars import increment
from nnkit.optim.transform import EmptyState
from nnkit.types import GradientTransformation, PyTree

__all__ = [
    "ApplyIfFiniteState",
    "ZeroNansState",
    "all_finite",
    "apply_if_finite",
    "check_count",
    "of_dtype",
    "set_to_zero",
    "update_if",
    "zero_nans",
]


class ZeroNansState(NamedTuple):
    """Where the last updates had a NaN: found_nan, a tree like the parameters of bool scalars."""

    found_nan: PyTree


class ApplyIfFiniteState(NamedTuple):
    """What :func:`apply_if_finite` has seen.

    Attributes:
      notfinite_count: how many updates in a row, up to the last one, had an inf or a NaN.
      last_finite: whether the last one had none.
      total_notfinite: how many had one since the start.
      inner_state: the state of the transformation inside.
    """

    notfinite_count: Any
    last_finite: Any
    total_notfinite: Any
    inner_state: PyTree


def set_to_zero() -> GradientTransformation:
    """Zeros in place of all updates, of whatever they are (optax's ``set_to_zero``).

    With :func:`partition` or :func:`masked` it keeps parameters as they are. Compiled, what their
    gradients cost is saved too.

    >>> tx = optim.set_to_zero()
    >>> updates, _ = tx.update({"w": jnp.array([1.0, jnp.nan])}, tx.init({"w": jnp.zeros(2)}))
    >>> updates["w"].tolist()
    [0.0, 0.0]
    """

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **_: Any
    ) -> tuple[PyTree, PyTree]:
        return jax.tree.map(jnp.zeros_like, updates), state

    return GradientTransformation(lambda params: EmptyState(), update)


def zero_nans() -> GradientTransformation:
    """0 for every NaN; an inf stays (optax's ``zero_nans``).

    The state says of each parameter whether its last update had a NaN.

    >>> tx = optim.zero_nans()
    >>> grads = {"a": jnp.array([1.0, jnp.nan]), "b": jnp.array([jnp.inf])}
    >>> updates, state = tx.update(grads, tx.init(grads))
    >>> updates["a"].tolist(), updates["b"].tolist()
    ([1.0, 0.0], [inf])
    >>> {name: bool(found) for name, found in state.found_nan.items()}
    {'a': True, 'b': False}
    """

    def init(params: PyTree) -> ZeroNansState:
        check_params("zero_nans", params)
        return ZeroNansState(found_nan=jax.tree.map(lambda _: jnp.array(False), params))

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **_: Any
    ) -> tuple[PyTree, PyTree]:
        state = check_state("zero_nans", state, ZeroNansState)
        cleaned = leafwise("zero_nans", lambda u: (jnp.where(jnp.isnan(u), 0, u),), {"updates": updates})[0]

        def found(old: Any, u: Any) -> Any:
            return jnp.zeros_like(old) if u is None else jnp.isnan(u).any()

        try:
            new = jax.tree.map(found, state.found_nan, updates)
        except ValueError:
            raise ValueError(
                "zero_nans: updates and state must be trees of one form, got "
                f"{jax.tree.structure(updates)} and {jax.tree.structure(state.found_nan)}"
            ) from None
        return cleaned, state._replace(found_nan=new)

    return GradientTransformation(init, update)


def apply_if_finite(inner: GradientTransformation, max_consecutive_errors: Any) -> GradientTransformation:
    """``inner``, but for updates with an inf or a NaN, which are dropped (optax's ``apply_if_finite``).

    A dropped update becomes zeros, and the state of ``inner`` stays. After max_consecutive_errors of
    them in a row the next is let through, whatever it does. Further arguments go to ``inner``.

    Args:
      inner: a transformation or a whole optimizer, nnkit's or optax's.
      max_consecutive_errors: how many in a row are dropped, a whole number of at least 0.

    Raises:
      TypeError: for an inner that is no transformation, a max_consecutive_errors that is no whole number.
      ValueError: for a negative max_consecutive_errors.

    >>> tx = optim.apply_if_finite(optim.scale(-0.5), max_consecutive_errors=1)
    >>> state = tx.init({"w": jnp.array(0.0)})
    >>> for grad in (4.0, jnp.inf, jnp.inf):
    ...     updates, state = tx.update({"w": jnp.array(grad)}, state)
    ...     print(float(updates["w"]), int(state.notfinite_count))
    -2.0 0
    0.0 1
    -inf 2
    """
    inner = tolerant("apply_if_finite: inner", inner)
    most = check_count(max_consecutive_errors, "max_consecutive_errors", 0)

    def init(params: PyTree) -> ApplyIfFiniteState:
        return ApplyIfFiniteState(
            notfinite_count=jnp.zeros([], jnp.int32),
            last_finite=jnp.array(True),
            total_notfinite=jnp.zeros([], jnp.int32),
            inner_state=inner.init(params),
        )

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, PyTree]:
        state = check_state("apply_if_finite", state, ApplyIfFiniteState)
        finite = all_finite(updates)
        in_a_row = jnp.where(finite, 0, increment(state.notfinite_count))
        with jax.numpy_dtype_promotion("standard"):  # a traced number may be of another integer dtype
            accept = finite | (in_a_row > most)
        updates, inner_state = update_if(accept, inner, updates, state.inner_state, params, extra_args)
        total = state.total_notfinite
        return updates, state._replace(
            notfinite_count=in_a_row,
            last_finite=finite,
            total_notfinite=jnp.where(finite, total, increment(total)),
            inner_state=inner_state,
        )

    return GradientTransformation(init, update)


def all_finite(updates: PyTree) -> Bool[Array, ""]:
    """Whether there is no inf and no NaN among them.

    >>> bool(all_finite({"w": jnp.array([1.0, jnp.nan])}))
    False
    """
    finite = jnp.array(True)
    for u in jax.tree.leaves(updates):
        finite &= jnp.isfinite(u).all()
    return finite


def update_if(
    condition: Bool[Array, ""],
    transform: GradientTransformation,
    updates: PyTree,
    state: PyTree,
    params: PyTree | None,
    extra_args: dict[str, Any],
) -> tuple[PyTree, PyTree]:
    """What ``transform`` makes of the updates, or zeros and the state as it was.

    Only the one that is called for is computed, so the numbers of the other, NaN perhaps, are nowhere.
    The state keeps its dtypes.

    >>> tx = optim.trace(0.5)
    >>> state = tx.init(jnp.zeros(1))
    >>> update_if(jnp.array(False), tx, jnp.ones(1), state, None, {})
    (Array([0.], dtype=float32), TraceState(trace=Array([0.], dtype=float32)))
    """

    def transformed() -> tuple[PyTree, PyTree]:
        new_updates, new_state = transform.update(updates, state, params, **extra_args)
        return jax.tree.map(jnp.asarray, new_updates), jax.tree.map(of_dtype, new_state, state)

    shapes, _ = jax.eval_shape(transformed)

    def untouched() -> tuple[PyTree, PyTree]:
        if jax.tree.structure(shapes) == jax.tree.structure(updates):
            # From the updates, so that inside shard_map the zeros vary over the axes that those vary over.
            zeros = jax.tree.map(
                lambda x, u: jnp.zeros_like(u, dtype=x.dtype, shape=x.shape), shapes, updates
            )
        else:
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return zeros, jax.tree.map(of_dtype, state, state)

    return lax.cond(condition, transformed, untouched)


def of_dtype(x: Any, like: Any) -> Array:
    """``x`` as an array of the dtype that ``like`` has, for good; PRNG keys as they are.

    >>> of_dtype(1, jnp.array(2.0))
    Array(1., dtype=float32)
    """
    x = jnp.asarray(x)
    return (
        x
        if jnp.issubdtype(x.dtype, jax.dtypes.extended)
        else lax.convert_element_type(x, jnp.result_type(like))
    )


def check_count(value: Any, name: str, least: int) -> Any:
    """``value``, or an error unless it is a whole number of at least ``least``, or a traced one.

    >>> check_count(0, "k", 1)
    Traceback (most recent call last):
    ValueError: k must be at least 1, got 0
    """
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
        return int(value)
    whole = isinstance(value, jax.Array | np.ndarray) and jnp.issubdtype(value.dtype, jnp.integer)
    if not whole or jnp.shape(value) != ():
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    return value
