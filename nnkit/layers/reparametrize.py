"""How a wrapper computes some of a layer's parameters from others: which ones, by name."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

from nnkit.checks import LayerError
from nnkit.types import Params

__all__ = ["as_names", "check_unstacked", "checked_names", "initialising", "named", "replace"]


def as_names(names: str | Sequence[str]) -> tuple[str, ...]:
    """One name as a tuple of it, which it would otherwise be of its letters."""
    return (names,) if isinstance(names, str) else tuple(names)


def replace(params: Params, names: Sequence[str], f: Callable[[tuple[str, ...], Any], Any]) -> dict[str, Any]:
    """The tree with ``f(path, value)`` in place of each value that is called one of ``names``, at any depth.

    A value is an array or what :func:`weight_norm` makes of one. A layer may be called as a parameter is.

    >>> from nnkit.layers.reparametrize import replace
    >>> replace({"dense_0": {"kernel": 2, "bias": 3}}, ["kernel"], lambda path, value: "/".join(path))
    {'dense_0': {'kernel': 'dense_0/kernel', 'bias': 3}}
    """

    def walk(tree: Any, path: tuple[str, ...]) -> Any:
        if path and path[-1] in names and _is_parameter(tree):
            return f(path, tree)
        if isinstance(tree, Mapping):
            return {name: walk(value, (*path, name)) for name, value in tree.items()}
        return tree

    return walk(params, ())


def _is_parameter(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return True
    return {*value} == {"direction", "scale"} and not any(isinstance(v, Mapping) for v in value.values())


def named(params: Params, names: Sequence[str], f: Callable[[tuple[str, ...], Any], Any]) -> dict[str, Any]:
    """The tree of ``f(path, value)`` for the values called one of ``names``, without the others.

    >>> from nnkit.layers.reparametrize import named
    >>> named({"dense_0": {"kernel": 2, "bias": 3}, "relu_0": {}}, ["kernel"], lambda path, value: value + 1)
    {'dense_0': {'kernel': 3}}
    """
    found: dict[str, Any] = {}

    def keep(path: tuple[str, ...], value: Any) -> None:
        tree = found
        for name in path[:-1]:
            tree = tree.setdefault(name, {})
        tree[path[-1]] = f(path, value)

    replace(params, names, keep)
    return found


def checked_names(kind: str, layer: Any, names: Sequence[str], params: Params) -> None:
    """Raises unless each of ``names`` is the name of a parameter among ``params``, which ``layer`` made."""
    found: set[str] = set()

    def walk(tree: Any) -> None:
        if isinstance(tree, Mapping):
            found.update(name for name, value in tree.items() if not isinstance(value, Mapping))
            for value in tree.values():
                walk(value)

    walk(params)
    missing = [name for name in names if name not in found]
    if missing:
        raise LayerError(
            kind,
            f"finds no parameter called {missing[0]!r} in {layer.name.rstrip('_')}, only {sorted(found)}: "
            f"write {kind}(..., names=[...])",
        )


_outside: ContextVar[tuple[tuple[str, tuple[str, ...]], ...]] = ContextVar("_outside", default=())


@contextlib.contextmanager
def initialising(kind: str, names: Sequence[str]) -> Iterator[None]:
    """While it lasts, layers that stack parameters know what ``kind`` will do to those called ``names``."""
    token = _outside.set((*_outside.get(), (kind, tuple(names))))
    try:
        yield
    finally:
        _outside.reset(token)


def check_unstacked(owner: str, params: Params) -> None:
    """Raises where a wrapper outside would take one of ``params``, which ``owner`` has stacked, as one matrix."""
    for kind, names in _outside.get():
        found: list[tuple[str, ...]] = []
        replace(params, names, lambda path, _, found=found: found.append(path))
        if found:
            raise LayerError(
                owner,
                f"stacks the {'/'.join(found[0])} of all its repetitions in one array, which {kind} around it would "
                f"take as one: wrap the block, not the stack, {owner}({kind}(block), n)",
            )
