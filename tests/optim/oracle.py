"""What the tests of optimizers share beside nnkit.testing: one optimizer beside another, on its gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnkit import optim
from nnkit.testing.trees import random_tree as parameters
from nnkit.testing.trees import rough_gradients, smooth_gradients, tree_of
from nnkit.testing.ulp import ulps

__all__ = [
    "STEPS",
    "beside",
    "check_against_optax",
    "fields_of",
    "optax_jit",
    "parameters",
    "rough_gradients",
    "scanned",
    "smooth_gradients",
    "stack",
    "trajectory",
    "tree_of",
    "ulps",
]

STEPS = 200


def stack(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *trees)


def fields_of(state: Any) -> Any:
    """The names of a state's tuples and of their fields, nested as they are."""
    if hasattr(state, "_fields"):
        return (type(state).__name__, {f: fields_of(getattr(state, f)) for f in state._fields})
    return tuple(fields_of(s) for s in state) if isinstance(state, tuple) else "a tree"


def optax_jit(f: Callable[..., Any]) -> Callable[..., Any]:
    """optax's Adam does not run under strict dtype promotion."""
    compiled = jax.jit(f)

    def call(*args: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return compiled(*args)

    return call


def beside(ours: Any, theirs: Any, params: Any, grads: list[Any]) -> tuple[Any, Any, Any, Any]:
    """Both optimizers' updates and new states, each step from optax's state, stacked over the steps."""
    update, their_update = jax.jit(ours.update), optax_jit(theirs.update)
    structure = jax.tree.structure(ours.init(params))
    state = theirs.init(params)
    results: tuple[list[Any], ...] = ([], [], [], [])
    for grad in grads:
        mine = jax.tree.unflatten(structure, jax.tree.leaves(state))
        updates, new = update(grad, mine, params)
        their_updates, state = their_update(grad, state, params)
        for kept, value in zip(results, (updates, their_updates, new, state), strict=True):
            kept.append(value)
    return tuple(stack(r) for r in results)  # pyright: ignore[reportReturnType]


def check_against_optax(
    ours: Any,
    theirs: Any,
    dtype: Any,
    *,
    steps: int = STEPS,
    max_ulps: int = 2,
    ignore: Callable[[Any], Any] | None = None,
) -> None:
    """Same start, and from every state of optax's run the same update and the same next state."""
    params, grads = parameters(dtype), rough_gradients(dtype, steps)
    assert ulps(ours.init(params), theirs.init(params)) == 0
    updates, their_updates, states, their_states = beside(ours, theirs, params, grads)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    skipped = ignore(their_states) if ignore else None
    assert ulps(updates, their_updates, skipped) <= max_ulps, "updates"
    assert ulps(states, their_states) <= max_ulps, "states"


def trajectory(tx: Any, apply_updates: Any, params: Any, grads: list[Any], jit: Any = jax.jit) -> Any:
    """Parameters and state after all the gradients, the optimizer going its own way."""

    def step(params: Any, state: Any, grad: Any) -> Any:
        updates, state = tx.update(grad, state, params)
        return apply_updates(params, updates), state

    step = jit(step)
    state = tx.init(params)
    for grad in grads:
        params, state = step(params, state, grad)
    return params, state


def scanned(tx: Any, params: Any, grads: list[Any]) -> Any:
    """The same of nnkit, in one scan."""

    def step(carry: Any, grad: Any) -> Any:
        params, state = carry
        updates, state = tx.update(grad, state, params)
        return (optim.apply_updates(params, updates), state), None

    stacked = jax.tree.map(lambda *g: jnp.stack(g), *grads)
    return jax.lax.scan(step, (params, tx.init(params)), stacked)[0]
