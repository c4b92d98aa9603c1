"""``probe``: statistics of a layer's activations, recorded in its state while it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nnkit.checks import LayerError, unknown_name
from nnkit.layers.children import check_child
from nnkit.tree import wide
from nnkit.types import Array, Layer, Params, Spec, State

__all__ = ["STATISTICS", "probe"]

STATISTICS: dict[str, Callable[[Array], Array]] = {
    "mean": jnp.mean,
    "std": jnp.std,
    "zeros": lambda y: jnp.mean((y == 0).astype(y.dtype)),
    "max_abs": lambda y: jnp.max(jnp.abs(y)),
}
"""Mean, standard deviation, the fraction of zeros and the largest magnitude, over all elements."""

_KEY = "probe"


def probe(
    layer: Layer,
    *,
    statistics: Sequence[str] | Mapping[str, Callable[[Array], Array]] = ("mean", "std", "zeros", "max_abs"),
) -> Layer:
    """The same layer, which also records statistics of its output into its state.

    They are those of the last call with ``train=True`` (at first 0), in float32 at least, and stand in the
    state at the layer's path as ``probe``: ``tree.flatten(state)["dense_0/probe/std"]``. Paths of
    parameters stay. No gradient goes through them. They are part of the state, so they go through ``jit``,
    ``scan`` and ``vmap`` (a number for each member) and into checkpoints, and
    ``probe(identity)`` records what passes between two layers. Inside :func:`repeat` there is one for each
    repetition.

    Args:
      layer: a layer whose output is one floating-point array.
      statistics: names among mean, std, zeros and max_abs, or a dict of functions of the output, each with
        one array whose shape does not depend on the batch size.

    Raises:
      ValueError: for a name that is not among them.
      LayerError: for an output that is not one array, and a statistic whose shape changes.

    >>> model = layers.serial(layers.dense(3), layers.probe(layers.relu, statistics=("zeros",)))
    >>> params, state = model.init(jax.random.key(0), jnp.zeros((1, 2)))
    >>> _, state = model.apply(params, state, -jnp.ones((4, 2)), train=True)
    >>> list(tree.flatten(state))
    ['relu_0/probe/zeros']
    """
    check_child(_KEY, layer)
    functions = _functions(statistics)

    def record(y: Any) -> dict[str, Array]:
        if not hasattr(y, "dtype") or not jnp.issubdtype(y.dtype, jnp.floating):
            what = getattr(y, "dtype", type(y).__name__)
            raise LayerError(_KEY, f"is around a layer whose output is one floating-point array, got {what}")
        y = jax.lax.stop_gradient(y).astype(wide(y.dtype))
        return {name: jnp.asarray(f(y)) for name, f in functions.items()}

    def init(key: Array, x: Spec, /) -> tuple[Params, State]:
        params, state = layer.init(key, x)
        if _KEY in state:
            raise LayerError(_KEY, "is around a layer that has a state called 'probe': one probe is enough")

        def first(params: Params, state: State, x: Any, key: Array) -> dict[str, Array]:
            return record(layer.apply(params, state, x, key=key, train=False)[0])

        seen = jax.eval_shape(first, params, state, x, key)
        return params, {**state, _KEY: {name: jnp.zeros(s.shape, s.dtype) for name, s in seen.items()}}

    def apply(
        params: Params, state: State, x: Any, *, key: Array | None = None, train: bool
    ) -> tuple[Any, State]:
        if _KEY not in state:
            raise LayerError(_KEY, f"has no 'probe' among {sorted(state)}: pass the state that its init made")
        inner = {name: part for name, part in state.items() if name != _KEY}
        y, inner = layer.apply(params, inner, x, key=key, train=train)
        return y, {**inner, _KEY: _checked(record(y), state[_KEY]) if train else state[_KEY]}

    return layer._replace(init=init, apply=apply)


def _functions(statistics: Any) -> dict[str, Callable[[Array], Array]]:
    if isinstance(statistics, Mapping):
        wrong = [name for name, f in statistics.items() if not callable(f)]
        if wrong:
            raise TypeError(f"probe(statistics=...) must be a dict of functions, {wrong} are none")
        return dict(statistics)
    names = [statistics] if isinstance(statistics, str) else list(statistics)
    for name in names:
        if name not in STATISTICS:
            raise unknown_name("statistic", name, STATISTICS)
    return {name: STATISTICS[name] for name in names}


def _checked(new: dict[str, Array], old: State) -> dict[str, Array]:
    result = {}
    for name, value in new.items():
        if name not in old or value.shape != old[name].shape:
            had = f"shape {old[name].shape}" if name in old else "nothing"
            raise LayerError(
                _KEY,
                f"got the statistic {name!r} of shape {value.shape} and has {had} in its state: it must not depend "
                "on the batch size",
            )
        result[name] = value.astype(old[name].dtype)
    return result
