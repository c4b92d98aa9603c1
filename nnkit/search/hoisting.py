"""Data that a function has from outside as arguments of what is compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import eval_jaxpr

from nnkit.types import Array, PyTree

__all__ = ["Hoisted", "hoisted"]

_LARGE = 4096  # bytes; smaller constants stay in the program, where XLA can compute with them


class Hoisted(NamedTuple):
    """A traced function without its data.

    As constants they would be copied into every program, and XLA would try to compute with them.

    Attributes:
      apply: ``apply(constants, *args)``, to be transformed and compiled.
      constants: the data, arrays.
      like: shapes and dtypes of what it returns.
    """

    apply: Callable[..., PyTree]
    constants: tuple[Any, ...]
    like: PyTree


def hoisted(
    f: Callable[..., PyTree], *args: Any, shared: dict[int, tuple[Any, Array]] | None = None
) -> Hoisted:
    """Traces ``f`` for such arguments, and takes out of it the large arrays that it closes over.

    Args:
      f: a function of pytrees.
      args: of which shapes and dtypes matter alone.
      shared: data that other programs have on the device already, filled as more is found.

    >>> data = np.ones((100, 100), "f")
    >>> program = search.hoisting.hoisted(lambda i: data[0, 0] + jnp.asarray(data)[i].sum(), 0)
    >>> [c.shape for c in program.constants], float(program.apply(program.constants, 3))
    ([(100, 100)], 101.0)
    """
    closed, like = jax.make_jaxpr(f, return_shape=True)(*args)
    large = [i for i, const in enumerate(closed.consts) if getattr(const, "nbytes", 0) >= _LARGE]
    shared = {} if shared is None else shared

    def apply(constants: Any, *args: Any) -> PyTree:
        consts = list(closed.consts)
        for i, const in zip(large, constants, strict=True):
            consts[i] = const
        return jax.tree.unflatten(
            jax.tree.structure(like), eval_jaxpr(closed.jaxpr, consts, *jax.tree.leaves(args))
        )

    return Hoisted(apply, tuple(_once(shared, closed.consts[i]) for i in large), like)


def _once(shared: dict[int, tuple[Any, Array]], const: Any) -> Array:
    """``const`` on the device; the host's array is kept, so that no other one can get its id."""
    if id(const) not in shared:
        shared[id(const)] = const, jnp.asarray(const)
    return shared[id(const)][1]
