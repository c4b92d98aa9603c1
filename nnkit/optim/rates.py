"""The learning rate, read from an optimizer's state."""

from __future__ import annotations

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nnkit.optim.hyperparams import injected_rate, is_injected
from nnkit.optim.note import note_of
from nnkit.optim.plateau import ReduceLROnPlateauState
from nnkit.optim.transform import Rate
from nnkit.types import PyTree

__all__ = ["learning_rate"]

_HOW = "inject_hyperparams(adam)(1e-3) keeps it in the state"


def learning_rate(opt_state: PyTree) -> Float[Array, "..."] | dict[Any, Any]:
    """The learning rate that the next step uses, read from the optimizer's state alone.

    It is the product of the optimizer's learning rate, a number or a schedule at the count that the state
    has reached, or the hyper-parameter ``learning_rate`` of :func:`inject_hyperparams`, and of the
    scale of every :func:`reduce_on_plateau`, as far as the plateau knows its metric now. What
    :func:`scale` and :func:`scale_by_schedule` do beside it is not in it: before an optimizer that
    rescales they change nothing. nnkit's transformations note in their states what the rate is, beside the
    leaves and not among them; of optax's, a plateau and ``inject_hyperparams`` can be read. The state of a
    mapped population gives an array. In compiled code, read it in the function that makes the update: one
    that only reads or returns states goes on with the notes that it was first compiled for.

    Args:
      opt_state: the state of any optimizer, also within chain, masked, MultiSteps, ...

    Returns:
      A scalar; of :func:`partition` with several rates, and so of :func:`muon`, a dict of them by label.

    Raises:
      ValueError: where the state does not tell: that of a transformation without a rate, of optax's
        optimizers, of a rate that was traced (``adam(rate)`` inside ``jax.vmap`` over rates), and of a chain
        of :func:`masked` optimizers with a rate each.

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


class _OfSome:
    """The rate of a masked part."""

    def __init__(self, rate: Any):
        self.rate = rate


def _factors(state: Any, injected: bool = False) -> list[Any]:
    """What multiplies the step, None for what is not known.

    ``injected``: whether the rate has been read already. The optimizer within was built with it, and so
    may have noted it too.
    """
    fields = getattr(state, "_fields", None)
    note = note_of(state)
    if isinstance(note, Rate):
        return [note.of(state)] if not injected else [] if note.constant else [None]
    if fields == ReduceLROnPlateauState._fields:
        return [state.scale]
    if is_injected(state):
        rate = injected_rate(state)
        if rate is not None:
            return [rate, *_factors(state.inner_state, injected=True)]
        # Its rate was made of other numbers, which may have been set since.
        factors = _factors(state.inner_state)
        return [None] if factors else []
    if fields == ("inner_state",) and (factors := _factors(state.inner_state, injected)):
        return [_OfSome(_product(factors))]
    if fields == ("inner_states",):
        if injected and any(_factors(inner) for inner in state.inner_states.values()):
            return [None]
        found = {}
        for label, inner in state.inner_states.items():
            if factors := _factors(getattr(inner, "inner_state", inner), injected):
                found[label] = _product(factors)
        return [*found.values()] if len(found) == 1 else [found] * bool(found)
    children = jax.tree.leaves(state, is_leaf=lambda x: x is not state)
    if len(children) == 1 and children[0] is state:
        return []
    return [factor for child in children for factor in _factors(child, injected)]


def _product(factors: list[Any]) -> Any:
    if any(factor is None for factor in factors):
        raise ValueError(f"the learning rate was traced where the optimizer was built: {_HOW}")
    some = [factor for factor in factors if isinstance(factor, _OfSome)]
    by_label = [factor for factor in factors if isinstance(factor, dict)]
    if len(by_label) > 1 or (some and len(factors) > 1):
        raise ValueError(
            "parts of the parameters have rates of their own: read the rate of each part of the state by itself"
        )
    if some:
        return some[0].rate
    numbers = [factor for factor in factors if not isinstance(factor, dict)]
    with jax.numpy_dtype_promotion("standard"):
        product = functools.reduce(operator.mul, numbers, jnp.ones(()))
        return jax.tree.map(lambda rate: product * rate, by_label[0]) if by_label else product
