"""Primitives whose algorithm depends on the platform that a program is lowered for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import mlir

from nnkit.types import Array

__all__ = ["bind", "by_platform"]


def by_platform(
    name: str,
    shape: Callable[..., tuple[int, ...]],
    on_cpu: Callable[..., Array],
    elsewhere: Callable[..., Array],
) -> Primitive:
    """A primitive without derivatives yet, of operands of one dtype, which is the result's too.

    Neither ``jax.default_backend()`` nor a look at an array tells where a traced program will run; the
    lowering knows, also where one program is lowered for several platforms.

    Args:
      name: of the primitive in a jaxpr.
      shape: the result's, from the operands' shapes and the static arguments, passed by name.
      on_cpu: what to compute on a CPU, from the operands and the static arguments, passed by name.
      elsewhere: likewise on all other platforms.
    """
    primitive = Primitive(name)

    def abstract(*operands: Any, **static: Any) -> Any:
        return operands[0].update(shape=shape(*(a.shape for a in operands), **static), weak_type=False)

    def eager(*operands: Array, **static: Any) -> Array:
        return _compiled(primitive, tuple(static.items()))(*operands)

    primitive.def_impl(eager)
    primitive.def_abstract_eval(abstract)
    for platform, compute in (("cpu", on_cpu), (None, elsewhere)):
        mlir.register_lowering(primitive, mlir.lower_fun(compute, multiple_results=False), platform=platform)
    return primitive


@functools.lru_cache(maxsize=1024)
def _compiled(primitive: Primitive, static: tuple[tuple[str, Any], ...]) -> Callable[..., Array]:
    return jax.jit(functools.partial(primitive.bind, **dict(static)))


def bind(primitive: Primitive, *operands: Array, **static: Any) -> Array:
    """Applies the primitive; under ``shard_map`` all operands are made to vary over the same mesh axes."""
    has = [jax.typeof(a).mat.varying for a in operands]
    return primitive.bind(*_alike(operands, has), **static)


def _alike(operands: Sequence[Array], has: Sequence[frozenset[Any]]) -> list[Array]:
    union = frozenset().union(*has)
    return [
        a if axes == union else lax.pcast(a, tuple(union - axes), to="varying")
        for a, axes in zip(operands, has, strict=True)
    ]
