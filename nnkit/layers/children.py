"""How a combinator runs its children: their names, parameters, state, keys and errors.

Every combinator goes through :class:`Children`, so this is the one place in which layer state is
threaded, child keys are derived and an error learns the path it arose at.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nnkit.checks import LayerError, check_key
from nnkit.types import Array, Layer, Params, Spec, State

__all__ = [
    "Added",
    "Children",
    "Visit",
    "Window",
    "check_child",
    "floating",
    "inferring",
    "is_inferring",
    "merge",
    "name_children",
    "visiting",
]


class Visit(NamedTuple):
    """One call of one child, as an observer sees it.

    Attributes:
      path: where the child stands, ``encoder/dense_0``.
      layer: the child.
      x: its input.
      y: its output.
      params: its parameters.
      state: its state after the call.
      number: how many calls there were at this path before.
    """

    path: str
    layer: Layer
    x: Any
    y: Any
    params: Params
    state: State
    number: int = 0


_Visitor = Callable[[Visit], None]
Added = Mapping[tuple[str, int], Sequence[Array]]
"""By path and number of the call there: what is added to the floating leaves of the child's output."""


class _Observer(NamedTuple):
    """Who is told of the calls, what is added to their outputs, and how many there were at each path."""

    visitor: _Visitor
    added: Added
    calls: Counter[str]

    def output(self, path: str, y: Any) -> Any:
        """The child's output with what is to be added to it."""
        added = self.added.get((path, self.calls[path]))
        if added is None:
            return y
        leaves, structure = jax.tree.flatten(y)
        rest = iter(added)
        return structure.unflatten([leaf + next(rest) if floating(leaf) else leaf for leaf in leaves])

    def tell(self, path: str, layer: Layer, x: Any, y: Any, params: Params, state: State) -> None:
        self.visitor(Visit(path, layer, x, y, params, state, self.calls[path]))
        self.calls[path] += 1


_observer: ContextVar[_Observer | None] = ContextVar("_observer", default=None)
_path: ContextVar[tuple[str, ...]] = ContextVar("_path", default=())


@contextlib.contextmanager
def visiting(visitor: _Visitor, added: Added | None = None) -> Iterator[None]:
    """While it lasts, each child's call is told to ``visitor`` when it returns (at trace time).

    ``added`` holds arrays to add to outputs before anything uses them: zeros, with respect to which to
    differentiate. Of a child that runs in a loop, its outputs and what is added to them are stacked.
    """
    tokens = _observer.set(_Observer(visitor, added or {}, Counter())), _path.set(())
    try:
        yield
    finally:
        _observer.reset(tokens[0])
        _path.reset(tokens[1])


class Window:
    """A function that calls children, so that it may be transformed and a visitor outside still sees them.

    A visitor keeps what it is told, and that must not be a tracer of a ``lax.scan`` or a
    ``jax.checkpoint`` within the model. So :meth:`run` returns what is to be seen, and :meth:`tell`
    tells it outside. The parameters and the state that are told are those outside, by path: stacked ones
    of a loop, uncast ones of a policy. Without a visitor all of it is nothing.

        window = Window(lambda params, state, x: layer.apply(params, state, x, train=train))
        (y, state), seen = jax.checkpoint(window.run)(window.added, params, state, x)
        window.tell(seen, params, state)
    """

    def __init__(self, function: Callable[..., Any]):
        self._function, self._outside, self._path = function, _observer.get(), _path.get()
        self._calls: list[tuple[str, Layer]] = []

    @property
    def added(self) -> Added:
        """What :meth:`run` takes first, an argument like the others (a scanned one of a loop)."""
        if self._outside is None:
            return {}
        inside = "".join(f"{name}/" for name in self._path)
        return {call: a for call, a in self._outside.added.items() if call[0].startswith(inside)}

    def run(self, added: Added, *args: Any) -> tuple[Any, list[tuple[Any, Any]]]:
        """The function's result, and the inputs and outputs that :meth:`tell` takes."""
        if self._outside is None:
            return self._function(*args), []
        visits: list[Visit] = []
        token = _observer.set(_Observer(visits.append, added, self._outside.calls.copy()))
        try:
            result = self._function(*args)
        finally:
            _observer.reset(token)
        self._calls = [(visit.path, visit.layer) for visit in visits]
        return result, [(visit.x, visit.y) for visit in visits]

    def tell(self, seen: Sequence[tuple[Any, Any]], params: Params, state: State) -> None:
        """Tells the visitor outside what was seen; ``state`` is the one after the call."""
        for (path, layer), (x, y) in zip(self._calls, seen, strict=True):
            assert self._outside is not None
            names = path.split("/")[len(self._path) :]
            self._outside.tell(path, layer, x, y, _at(params, names), _at(state, names))


def _at(tree: Any, names: Sequence[str]) -> Any:
    """The part of a nested dict at a path; a child that has none left no trace."""
    for name in names:
        tree = tree.get(name, {})
    return tree


def floating(leaf: Any) -> bool:
    """Whether it is an array with derivatives."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)


_memory: ContextVar[dict[Any, Any] | None] = ContextVar("_memory", default=None)


@contextlib.contextmanager
def inferring() -> Iterator[None]:
    """While it lasts, layers are traced for the shapes of their outputs alone.

    Numbers of parameters do not matter then, so each child's ``init`` is traced once for each kind of input:
    without that memory a network of nested layers would trace its innermost one 2^depth times.
    """
    memory = _memory.get()
    token = _memory.set({} if memory is None else memory)
    try:
        yield
    finally:
        _memory.reset(token)


def is_inferring() -> bool:
    """Whether only shapes are wanted: then no axis of a mesh need be there, and no batch be large enough."""
    return _memory.get() is not None


def _remembered(memory: dict[Any, Any], init: Any, key: Array, x: Spec) -> tuple[Params, State]:
    leaves, structure = jax.tree.flatten(x)
    at = init, structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
    if at not in memory:
        memory[at] = jax.eval_shape(init, key, x)
    if any(jnp.issubdtype(leaf.dtype, jax.dtypes.extended) for leaf in jax.tree.leaves(memory[at])):
        return init(key, x)  # a key in the state cannot be made of zeros
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), memory[at])


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

    def init(self, name: str, key: Array, x: Spec, position: int | Array) -> tuple[Params, State]:
        """The child's own ``init`` under ``fold_in(key, position)``."""
        check_key(key, f"{self.owner}.init")
        key, memory = jax.random.fold_in(key, position), _memory.get()
        with _inside(name, "initialising"):
            init = self.layers[name].init
            return init(key, x) if memory is None else _remembered(memory, init, key, x)

    def apply(
        self,
        name: str,
        params: Params,
        state: State,
        x: Any,
        *,
        key: Array | None,
        train: bool,
        position: int | Array,
    ) -> tuple[Any, State]:
        """The child's own ``apply`` on its part of the trees, under ``fold_in(key, position)``."""
        layer = self.layers[name]
        child_params, child_state = params.get(name, {}), state.get(name, {})
        child_key = None if key is None else jax.random.fold_in(key, position)
        with _inside(name, "applying"):
            y, child_state = layer.apply(child_params, child_state, x, key=child_key, train=train)
            observer = _observer.get()
            if observer is not None:
                path = "/".join(_path.get())
                y = observer.output(path, y)
                observer.tell(path, layer, x, y, child_params, child_state)
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
        check_child(owner, layer)
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


def check_child(owner: str, layer: Any) -> None:
    if isinstance(layer, Layer):
        return
    what = getattr(layer, "__name__", type(layer).__name__)
    if callable(layer) and getattr(layer, "__module__", "").startswith("nnkit.layers"):
        raise TypeError(f"{owner} got the function {what}: call it, as in {what}(...), to have the layer")
    if callable(layer):
        raise TypeError(f"{owner} got the function {what}: lift it to a layer with stateless({what})")
    raise TypeError(f"{owner} takes layers and got {what} ({layer!r})")
