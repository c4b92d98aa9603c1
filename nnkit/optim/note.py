"""States that say what they are the state of: named tuples that carry a note beside their fields.

A schedule's state is a count, a plateau's a few numbers. To read the learning rate off a state, or to
tell a state a new metric, one must also know the schedule or the rule. A note carries it: not as a
leaf, so that states look, index, map, scan, stack and save as optax's do.
"""

from __future__ import annotations

import copy
import functools
import pickle
import sys
from typing import Any, TypeVar

import jax
import numpy as np

__all__ = ["attach", "note_of", "with_note"]

State = TypeVar("State", bound=tuple[Any, ...])


def with_note(state_class: type[State], *, compare: bool = False) -> type[State]:
    """A subclass of a NamedTuple that can carry a note; a decorator, or a call for another's class.

    Instances have the fields, the name and the paths of ``state_class``, and ``note``, None until
    :func:`attach` sets it. ``_replace``, copies and every map over the tree keep it. An update attaches
    its own note again, so that a state which came from elsewhere gets the right one. Of the note itself

    - what is not an array (a function, a number, a name) is static: part of the tree's structure;
    - arrays are leaves of the state: what may be traced belongs there. A traced array that hides in a
      function is of no use, and an error when called, once its transformation has ended.

    Args:
      state_class: a NamedTuple.
      compare: whether states with different static notes differ in structure. By default all notes
        are equal: states of two optimizers stack, and one may go on where the other stood, in the same
        compiled loop. The price: one compiled function of the state that *reads* notes, say
        ``jax.jit(report)``, goes on with the note that it was first compiled for when it is called
        with the state of another optimizer. With True it is compiled again, by ``==``.

    A note that cannot be pickled (a lambda) is None after pickling; the next update restores it.

    >>> from typing import NamedTuple
    >>> @with_note
    ... class CountState(NamedTuple):
    ...     count: Any
    >>> state = attach(CountState(count=jnp.int32(3)), lambda step: 0.5**step)
    >>> state = jax.tree.map(lambda x: x + 1, state)._replace(count=2)
    >>> state, note_of(state)(state.count), jax.tree.leaves(state)
    (CountState(count=2), 0.25, [2])
    """
    fields = getattr(state_class, "_fields", None)
    if not (isinstance(state_class, type) and issubclass(state_class, tuple) and fields is not None):
        raise TypeError(f"with_note takes a class made with NamedTuple, got {state_class!r}")
    if "note" in fields:
        raise ValueError(f"{state_class.__name__} has a field called note already: give it another name")
    return _noted_class(state_class, compare)


def attach(state: State, note: Any) -> State:
    """``state`` with another note; a state of a class without notes, optax's say, as it is.

    >>> attach((1, 2), "a note")
    (1, 2)
    """
    if not isinstance(state, _Noted):
        return state
    leaves, structure = jax.tree.flatten(note)
    static = _Static(structure, tuple(None if _is_array(x) else x for x in leaves), state._compare)
    arrays: Any = None
    if any(map(_is_array, leaves)):
        arrays = structure.unflatten([x if _is_array(x) else None for x in leaves])
    return _with(tuple.__new__(type(state), tuple(state)), static, arrays)


def note_of(state: Any) -> Any:
    """The note of a state, or None where it has none.

    >>> note_of((1, 2)) is None
    True
    """
    return state.note if isinstance(state, _Noted) else None


class _Static:
    """The static part of a note: its structure, and the leaves that are not arrays."""

    __slots__ = ("compare", "structure", "values")

    def __init__(self, structure: Any, values: tuple[Any, ...], compare: bool):
        self.structure, self.values, self.compare = structure, values, compare

    def __eq__(self, other: Any) -> bool:
        if not isinstance(other, _Static):
            return NotImplemented
        if self is other or not (self.compare or other.compare):
            return True
        return self.structure == other.structure and self.values == other.values

    def __hash__(self) -> int:
        return 0

    def __repr__(self) -> str:  # what a tree's structure, and so an error about it, shows
        return f"note={self.structure.unflatten([... if x is None else x for x in self.values])!r}"


_NO_NOTE = _Static(jax.tree.structure(None), (), False)


class _Noted(tuple):
    """What :func:`with_note` adds to a NamedTuple."""

    _static: _Static = _NO_NOTE
    _arrays: Any = None
    _compare: bool
    _base: Any

    @property
    def note(self) -> Any:
        static = self._static
        if self._arrays is None:
            return static.structure.unflatten(static.values)
        arrays = static.structure.flatten_up_to(self._arrays)
        both = zip(static.values, arrays, strict=True)
        return static.structure.unflatten([x if array is None else array for x, array in both])

    def _replace(self, **fields: Any) -> Any:
        return _with(self._base._replace(self, **fields), self._static, self._arrays)

    __replace__ = _replace

    def __copy__(self) -> Any:
        return self._replace()

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The name leads to this class where with_note was a decorator, and to its base elsewhere.
        found: Any = sys.modules.get(type(self).__module__)
        for name in type(self).__qualname__.split("."):
            found = getattr(found, name, None)
        cls = type(self) if found is type(self) else self._base
        return _rebuild, (cls, self._compare, tuple(self), _picklable(self.note))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        values, arrays = copy.deepcopy((tuple(self), self._arrays), memo)
        return _with(tuple.__new__(type(self), values), self._static, arrays)


@functools.cache  # so that unpickled states are of the class that they were of
def _noted_class(state_class: Any, compare: bool) -> Any:
    body = {
        "__module__": state_class.__module__,
        "__qualname__": state_class.__qualname__,
        "__doc__": state_class.__doc__,
        "_base": state_class,
        "_compare": compare,
    }
    noted: Any = type(state_class.__name__, (_Noted, state_class), body)
    keys = [jax.tree_util.GetAttrKey(name) for name in (*state_class._fields, "note")]

    def flatten(state: Any) -> tuple[Any, Any]:
        return (*state, state._arrays), state._static

    def flatten_with_keys(state: Any) -> tuple[Any, Any]:
        return tuple(zip(keys, (*state, state._arrays), strict=True)), state._static

    def unflatten(static: Any, children: Any) -> Any:
        *values, arrays = children
        return _with(tuple.__new__(noted, values), static, arrays)

    jax.tree_util.register_pytree_with_keys(noted, flatten_with_keys, unflatten, flatten)
    return noted


def _rebuild(cls: Any, compare: bool, values: tuple[Any, ...], note: Any) -> Any:
    noted = cls if issubclass(cls, _Noted) else _noted_class(cls, compare)
    state = tuple.__new__(noted, values)
    return state if note is None else attach(state, note)


def _picklable(note: Any) -> Any:
    """``note``, or None where pickle refuses it, for which it has an exception of every kind."""
    try:
        pickle.dumps(note)
    except Exception:
        return None
    return note


def _with(state: Any, static: _Static, arrays: Any) -> Any:
    state._static, state._arrays = static, arrays
    return state


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray)
