"""The learning rate, read from an optimizer's state."""

from __future__ import annotations

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nnkit.optim.hyperparams import injected_rate
from nnkit.optim.note import note_of
from nnkit.optim.plateau import ReduceLROnPlateauState
from nnkit.optim.transform import Rate
from nnkit.types import PyTree

__all__ = ["learning_rate"]

_HOW = "inject_hyperparams(adam)(1e-3) keeps it in the state"


def learning_rate(opt_state: PyTree) -> Float[Array, "..."] | dict[Any, Any]:
    """The learning rate that the next step uses, read from the optimizer's state alone.

    It is the product of all that scales the step: constant rates and schedules (at the count that the
    state has reached), rates in the state (:func:`inject_hyperparams`) and the scale of every
    :func:`reduce_on_plateau`, as far as the plateau knows its metric now. nnkit's transformations note
    in their states what the rate is, beside the leaves and not among them; of optax's, a plateau and
    ``inject_hyperparams`` can be read. It may be called in compiled code; the state of a mapped
    population gives an array.

    Args:
      opt_state: the state of any optimizer, also within chain, masked, MultiSteps, ...

    Returns:
      A scalar; of :func:`partition` with several rates a dict of them by label.

    Raises:
      ValueError: where the state does not tell: that of a transformation without a rate, of optax's
        optimizers, and of a rate that was traced (``adam(rate)`` inside ``jax.vmap`` over rates).

    >>> optimizer = optim.adam(optim.exponential_decay(0.1, transition_steps=1, decay_rate=0.5))
    >>> params = {"w": jnp.array(1.0)}
    >>> opt_state = optimizer.init(params)
    >>> for _ in range(2):
    ...     _, opt_state = optimizer.update(params, opt_state, params)
    >>> round(float(optim.learning_rate(opt_state)), 6)
    0.025
    """
    factors = _factors(opt_state)
    if not factors:
        raise ValueError(f"the optimizer's state tells no learning rate: {_HOW}")
    return _product(factors)


def _factors(state: Any, injected: bool = False) -> list[Any]:
    """What multiplies the step, None for what is not known.

    ``injected``: whether the rate has been read already. The optimizer within was built with it, and so
    may have noted it too.
    """
    fields = getattr(state, "_fields", None)
    note = note_of(state)
    if isinstance(note, Rate):
        return [] if injected else [note.of(state)]
    if fields == ReduceLROnPlateauState._fields:
        return [state.scale]
    if fields is not None and "hyperparams" in fields and "inner_state" in fields:
        rate = injected_rate(state)
        return ([] if rate is None else [rate]) + _factors(state.inner_state, rate is not None or injected)
    if fields == ("inner_states",):
        found = {}
        for label, inner in state.inner_states.items():
            if factors := _factors(inner, injected):
                found[label] = _product(factors)
        return [*found.values()] if len(found) == 1 else [found] * bool(found)
    children = jax.tree.leaves(state, is_leaf=lambda x: x is not state)
    if len(children) == 1 and children[0] is state:
        return []
    return [factor for child in children for factor in _factors(child, injected)]


def _product(factors: list[Any]) -> Any:
    if any(factor is None for factor in factors):
        raise ValueError(f"the learning rate was traced where the optimizer was built: {_HOW}")
    by_label = [factor for factor in factors if isinstance(factor, dict)]
    if len(by_label) > 1:
        raise ValueError("the state has several partitions: read the rate of each by itself")
    numbers = [factor for factor in factors if not isinstance(factor, dict)]
    with jax.numpy_dtype_promotion("standard"):
        product = functools.reduce(operator.mul, numbers, jnp.ones(()))
        return {k: product * rate for k, rate in by_label[0].items()} if by_label else product
