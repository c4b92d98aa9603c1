"""What the tests of optimizers share: rough gradients, distances in ulp, one optimizer beside another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnkit import optim

STEPS = 200


def tree_of(make: Callable[[int, tuple[int, ...]], Any]) -> Any:
    """A tree with nested, scalar, empty and None leaves; ``make(i, shape)`` gives the leaves.

    Several leaves matter: of a tree with one leaf XLA compiles optax's Adam with rounded reciprocals
    in place of divisions, up to 5 ulp from what it makes of optax's Adam on a larger tree.
    """
    return {
        "dense_0": {"kernel": make(0, (3, 67)), "bias": make(1, (129,))},
        "more": [make(2, ()), {"empty": make(3, (0, 4)), "none": None}],
    }


def rough_gradients(dtype: Any, steps: int = STEPS, seed: int = 0) -> list[Any]:
    """Gradients over eight decades, with zeros, sparsity, sign flips, 1e-20 and 1e20 (where it fits)."""
    rng = np.random.default_rng(seed)
    huge, decades = (1e4, 2) if dtype == jnp.float16 else (1e20, 4)

    def make(step: int, i: int, shape: tuple[int, ...]) -> jax.Array:
        g = rng.normal(size=shape) * 10.0 ** rng.uniform(-decades, decades, size=shape)
        flat = np.asarray(g).reshape(-1)
        if i == 1:
            flat[:20] = 0.0
            flat[20:40] = 1e-20
            flat[40:60] = huge
            flat[60:80] = 3.0 * (-1) ** step
            flat[80:100] *= rng.random(20) < 0.1
            flat[100:120] = 1e-3 if step < 50 else 0.0
        return jnp.asarray(flat.reshape(shape), dtype)

    return [tree_of(lambda i, shape, step=step: make(step, i, shape)) for step in range(steps)]


def smooth_gradients(dtype: Any, steps: int = STEPS, seed: int = 0) -> list[Any]:
    """Gradients of one size, some of which keep their sign and some not."""
    rng = np.random.default_rng(seed)
    return [tree_of(lambda i, shape: jnp.asarray(rng.normal(size=shape) + i, dtype)) for _ in range(steps)]


def parameters(dtype: Any, seed: int = 1) -> Any:
    rng = np.random.default_rng(seed)
    return tree_of(lambda i, shape: jnp.asarray(rng.normal(size=shape), dtype))


def stack(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *trees)


def ulps(a: Any, b: Any, ignore: Any = None) -> int:
    """The largest number of floats that lie between two trees' numbers; NaN equals NaN.

    ``ignore`` is a list of boolean arrays, one a leaf: where not to look.
    """
    worst = 0
    a, b = jax.tree.leaves(a), jax.tree.leaves(b)
    ignore = ignore or [False] * len(a)
    for x, y, skipped in zip(a, b, ignore, strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape) == (y.dtype, y.shape), (x.dtype, y.dtype, x.shape, y.shape)
        if jnp.issubdtype(x.dtype, jnp.inexact):
            looked_at = ~np.broadcast_to(skipped, x.shape)
            both = np.isnan(x) & np.isnan(y)
            assert not ((np.isnan(x) ^ np.isnan(y)) & looked_at).any(), "NaN on one side only"
            distance = np.where(looked_at & ~both, np.abs(_ordered(x) - _ordered(y)), 0)
        else:
            np.testing.assert_array_equal(x, y)  # a count or a flag is right or wrong
            continue
        worst = max(worst, int(distance.max(initial=0)))
    return worst


def _ordered(x: np.ndarray) -> np.ndarray:
    """The floats' bits as integers in the floats' order, 0 and -0 together."""
    bits = np.ascontiguousarray(x).view(f"i{x.dtype.itemsize}").astype(np.int64).reshape(x.shape)
    magnitude = bits & np.int64((1 << (8 * x.dtype.itemsize - 1)) - 1)
    return np.where(bits < 0, -magnitude, magnitude)


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
