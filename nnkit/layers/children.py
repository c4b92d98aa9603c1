"""How a combinator runs its children: their names, parameters, state, keys and errors.

Every combinator goes through :class:`Children`, so this is the one place in which layer state is
threaded, child keys are derived and an error learns the path it arose at.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax

from nnkit.checks import LayerError, check_key
from nnkit.types import Array, Layer, Params, Spec, State

__all__ = ["Children", "Visit", "name_children", "visiting"]


class Visit(NamedTuple):
    """One call of one child, as an observer sees it.

    Attributes:
      path: where the child stands, ``encoder/dense_0``.
      layer: the child.
      x: its input.
      y: its output.
      params: its parameters.
      state: its state after the call.
    """

    path: str
    layer: Layer
    x: Any
    y: Any
    params: Params
    state: State


_Visitor = Callable[[Visit], None]
_visitor: ContextVar[_Visitor | None] = ContextVar("_visitor", default=None)
_path: ContextVar[tuple[str, ...]] = ContextVar("_path", default=())


@contextlib.contextmanager
def visiting(visitor: _Visitor) -> Iterator[None]:
    """While it lasts, each child's call is told to ``visitor`` when it returns (at trace time)."""
    tokens = _visitor.set(visitor), _path.set(())
    try:
        yield
    finally:
        _visitor.reset(tokens[0])
        _path.reset(tokens[1])


@contextlib.contextmanager
def _inside(name: str, doing: str) -> Iterator[None]:
    """Runs a child: profilers see its name, and an error raised in it says where it was."""
    token = _path.set((*_path.get(), name))
    try:
        with jax.named_scope(name):
            yield
    except LayerError as error:
        raise error.within(name) from error.__cause__
    except Exception as error:
        note = f"while {doing} layer "
        notes: list[str] = getattr(error, "__notes__", [])
        inner = [n for n in notes if n.startswith(note)]
        if inner:
            notes[notes.index(inner[0])] = f"{note}{name}/{inner[0].removeprefix(note)}"
        else:
            error.add_note(f"{note}{name}")
        raise
    finally:
        _path.reset(token)


class Children:
    """The children of one combinator, by name and in order."""

    def __init__(self, owner: str, layers: Mapping[str, Layer]):
        self.owner, self.layers = owner, dict(layers)

    def init(self, name: str, key: Array, x: Spec, position: int) -> tuple[Params, State]:
        """The child's own ``init`` under ``fold_in(key, position)``."""
        check_key(key, f"{self.owner}.init")
        with _inside(name, "initialising"):
            return self.layers[name].init(jax.random.fold_in(key, position), x)

    def apply(
        self,
        name: str,
        params: Params,
        state: State,
        x: Any,
        *,
        key: Array | None,
        train: bool,
        position: int,
    ) -> tuple[Any, State]:
        """The child's own ``apply`` on its part of the trees, under ``fold_in(key, position)``."""
        layer = self.layers[name]
        child_params, child_state = params.get(name, {}), state.get(name, {})
        child_key = None if key is None else jax.random.fold_in(key, position)
        with _inside(name, "applying"):
            y, child_state = layer.apply(child_params, child_state, x, key=child_key, train=train)
            visitor = _visitor.get()
            if visitor is not None:
                visitor(Visit("/".join(_path.get()), layer, x, y, child_params, child_state))
        return y, child_state

    def check(self, params: Any, state: Any, key: Array | None) -> None:
        """Raises where the trees cannot be this combinator's, or the key is no key."""
        for what, tree in (("parameters", params), ("state", state)):
            if not isinstance(tree, Mapping):
                raise LayerError(
                    self.owner,
                    f"takes {what} as a dict and got {type(tree).__name__}: pass what init returned",
                )
            unknown = [name for name in tree if name not in self.layers]
            if unknown:
                raise LayerError(
                    self.owner,
                    f"got {what} of another model: {unknown} where its children are {list(self.layers)}",
                )
        if key is not None:
            check_key(key, f"{self.owner}.apply")


def merge(name: str, part: Params, into: dict[str, Any]) -> None:
    """Puts a child's part into its parent's tree; a child that has none leaves no trace."""
    if part:
        into[name] = part


def name_children(owner: str, layers: Sequence[Any], named: Mapping[str, Any]) -> dict[str, Layer]:
    """Gives each child its name: its own, or its kind and a count (``dense_0``, ``dense_1``)."""
    children: dict[str, Layer] = {}
    counts: dict[str, int] = {}
    for name, layer in [*((None, layer) for layer in layers), *named.items()]:
        _check_child(owner, layer)
        if name is None:
            name = layer.name
            if name.endswith("_"):
                kind = name
                name = f"{kind}{counts.get(kind, 0)}"
                counts[kind] = counts.get(kind, 0) + 1
        if not name or "/" in name:
            raise ValueError(f"{owner}: a child's name must be non-empty and without '/', got {name!r}")
        if name in children:
            raise ValueError(
                f"{owner}: two children are called {name!r}: give one another name with named(...)"
            )
        children[name] = layer
    return children


def _check_child(owner: str, layer: Any) -> None:
    if isinstance(layer, Layer):
        return
    what = getattr(layer, "__name__", type(layer).__name__)
    if callable(layer) and getattr(layer, "__module__", "").startswith("nnkit.layers"):
        raise TypeError(f"{owner} got the function {what}: call it, as in {what}(...), to have the layer")
    if callable(layer):
        raise TypeError(f"{owner} got the function {what}: lift it to a layer with stateless({what})")
    raise TypeError(f"{owner} takes layers and got {what} ({layer!r})")
