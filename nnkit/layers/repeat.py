"""``repeat``: one block many times, with parameters of its own each time, compiled once."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from nnkit.checks import LayerError
from nnkit.layers.children import Children, Window, merge, name_children
from nnkit.layers.lift import positive_int
from nnkit.layers.reparametrize import check_unstacked
from nnkit.types import Array, Layer, Params, Spec, State

__all__ = ["repeat"]


def repeat(block: Layer, n: int, *, unroll: int | bool = 1) -> Layer:
    """A block applied n times, each time with its own parameters: ``y = f_n(...f_2(f_1(x)))``.

    The same numbers as ``serial`` of n such blocks, initial parameters and random draws included, but the
    block is traced and compiled once however large n is: it is scanned over parameters and state whose
    leaves have a leading axis n. ``jax.tree.map(lambda a: a[i], params["block"])`` are those of the i-th
    block. Initialisers do not see that axis. :func:`observe` gives stacked outputs, (n, batch, ...). To
    keep the memory for the backward pass down, repeat :func:`remat` of the block.

    Args:
      block: a layer whose output has the shape and dtype of its input.
      n: how many times, at least 1.
      unroll: how many repetitions go into one turn of the loop, or True for all of them: compiled code
        grows by as much, and XLA can fuse from one repetition into the next.

    Raises:
      LayerError: where the block does not give what it takes; inside ``weight_norm`` or ``spectral_norm``,
        which are for the block.

    Source: Flax's ``nn.scan`` over layers.

    >>> model = layers.repeat(layers.serial(layers.dense(4), layers.tanh), 12)
    >>> params, state = model.init(jax.random.key(0), jnp.zeros((1, 4)))
    >>> {path: leaf.shape for path, leaf in tree.flatten(params).items()}
    {'block/dense_0/bias': (12, 4), 'block/dense_0/kernel': (12, 4, 4)}
    >>> model.apply(params, state, jnp.ones((5, 4)), train=False)[0].shape
    (5, 4)
    """
    n = positive_int(n, "repeat(n=...)")
    if not isinstance(unroll, bool):
        unroll = positive_int(unroll, "repeat(unroll=...)")
    name = "block" if isinstance(block, Layer) and block.name.endswith("_") else getattr(block, "name", "")
    children = Children("repeat", name_children("repeat", (), {name: block}))

    def init(key: Array, x: Spec, /) -> tuple[Params, State]:
        params, state = jax.vmap(lambda i: children.init(name, key, x, i))(_positions(n))
        check_unstacked("repeat", {name: params})
        trees: tuple[dict[str, Any], dict[str, Any]] = {}, {}
        merge(name, params, trees[0])
        merge(name, state, trees[1])
        return trees

    def apply(
        params: Params, state: State, x: Any, *, key: Array | None = None, train: bool
    ) -> tuple[Any, State]:
        children.check(params, state, key)
        _check_length(n, params, state)

        def one(x: Any, params: Params, state: State, i: Array) -> tuple[Any, State]:
            y, child = children.apply(name, params, state, x, key=key, train=train, position=i)
            _check_same(x, y)
            new_state: dict[str, Any] = {}
            merge(name, child, new_state)
            return y, new_state

        window = Window(one)

        def turn(x: Any, each: Any) -> tuple[Any, Any]:
            added, *of_block = each
            (y, state), seen = window.run(added, x, *of_block)
            return y, (state, seen)

        over = window.added, params, state, _positions(n)
        y, (state, seen) = jax.lax.scan(turn, x, over, length=n, unroll=unroll)
        window.tell(seen, params, state)
        return y, state

    return Layer(init, apply, "repeat_")


def _positions(n: int) -> Array:
    """What is folded into the key, in the dtype that ``fold_in`` takes."""
    return jnp.arange(n, dtype=jnp.uint32)


def _check_length(n: int, params: Params, state: State) -> None:
    for leaf in jax.tree.leaves((params, state)):
        if jnp.shape(leaf)[:1] != (n,):
            raise LayerError(
                "repeat",
                f"repeats its block {n} times and got a parameter or state of shape {jnp.shape(leaf)}: each has a "
                f"leading axis of length {n}",
            )


def _check_same(x: Any, y: Any) -> None:
    taken, given = (jax.tree.map(lambda a: f"{jnp.result_type(a)}{jnp.shape(a)}", tree) for tree in (x, y))
    if taken != given:
        raise LayerError(
            "repeat", f"needs a block that gives what it takes, and it takes {taken} and gives {given}"
        )
