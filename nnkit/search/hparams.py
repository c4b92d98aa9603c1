"""``Hparams``: the hyper-parameters that a training function gets, and the forms such a function may have."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from nnkit.checks import unknown_name

__all__ = ["Hparams", "MissingHparam", "adapt"]

Names = tuple[str, ...]
"""The names that lead to a hyper-parameter, from the outside in."""


class MissingHparam(KeyError, AttributeError):
    """A hyper-parameter that was asked for and that there is not."""

    def __str__(self) -> str:
        return self.args[0]


class _Record(NamedTuple):
    """What the nodes of one tree share."""

    paths: dict[Names, str]
    traced: frozenset[Names]
    absent: Mapping[Names, Mapping[str, str]]
    read: set[Names]


class Hparams(Mapping[str, Any]):
    """Hyper-parameters by name: a read-only mapping, a pytree, and a record of what was read.

    Groups and conditionals are mappings within it. Names are attributes as well. As a pytree its leaves
    are the traced numbers; static values belong to its structure.

    Args:
      values: by name, mappings for groups.
      traced: the names that lead to each traced value.
      paths: what to call each; by default the names with "/" between them.
      absent: for each conditional, what to say of names that other kinds have.

    >>> hparams = search.as_space({"lr": search.uniform(0, 1), "model": {"width": search.choice([8, 16])}}).hparams(
    ...     (("model/width", 8),), {"lr": jnp.float32(0.5)}
    ... )
    >>> float(hparams["lr"]), hparams.unread()
    (0.5, ('model/width',))
    >>> dict(**hparams.model), hparams.unread()
    ({'width': 8}, ())
    """

    __slots__ = ("_at", "_record", "_values")
    _at: Names
    _record: _Record
    _values: Mapping[str, Any]

    def __init__(
        self,
        values: Mapping[str, Any],
        *,
        traced: Collection[Names] = (),
        paths: Mapping[Names, str] | None = None,
        absent: Mapping[Names, Mapping[str, str]] | None = None,
    ):
        leaves = {names: "/".join(names) for names, _ in _leaves(values, ())}
        record = _Record(leaves | dict(paths or {}), frozenset(traced), absent or {}, set())
        _fill(self, (), values, record)

    def __getitem__(self, name: str) -> Any:
        if name not in self._values:
            raise self._missing(name)
        value, names = self._values[name], (*self._at, name)
        if isinstance(value, Mapping):
            return _fill(object.__new__(Hparams), names, value, self._record)
        self._record.read.add(names)
        return value

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self[name]

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"hyper-parameters are read-only: write {name} = ... as a variable of your own")

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __repr__(self) -> str:
        return f"Hparams({dict(self._values)})"

    def unread(self) -> tuple[str, ...]:
        """The paths of the whole tree that nobody has read so far."""
        record = self._record
        return tuple(path for names, path in record.paths.items() if names not in record.read)

    def _missing(self, name: object) -> MissingHparam:
        said = self._record.absent.get(self._at, {}).get(str(name))
        if said is not None:
            return MissingHparam(said)
        known = ["/".join((*self._at, other)) for other in self._values]
        return MissingHparam(str(unknown_name("hyper-parameter", "/".join((*self._at, str(name))), known)))


def adapt(
    train_fn: Callable[..., Any], names: Collection[str], *, folds: bool = False
) -> Callable[[Any, Hparams, Any], Any]:
    """``train_fn`` as a function of (key, hparams, fold), whichever form it has.

    It may be ``train_fn(key, hparams)``, or take the names of the space: ``train_fn(key, *, lr, width)``.
    With ``folds`` it is called with ``fold=`` too.

    Raises:
      TypeError, ValueError: for another signature; names that the space has and it does not take, or the other way
        round; a ``fold`` that it takes without folds, or does not take with them.

    >>> f = search.hparams.adapt(lambda key, *, lr: 2 * lr, ["lr"])
    >>> f(None, search.Hparams({"lr": 0.5}), None)
    1.0
    """
    try:
        parameters = list(inspect.signature(train_fn).parameters.values())
    except TypeError:
        raise TypeError(
            f"a training function is called as train_fn(key, hparams), got {train_fn!r}"
        ) from None
    except ValueError:  # a builtin's signature is not known
        parameters = [inspect.Parameter(name, _BOTH) for name in ("key", "hparams", *(["fold"] * folds))]
    _check_fold(parameters, folds)
    rest = [p for p in parameters if p.name != "fold" and p.kind not in (_ALL, _ALL_NAMED)]
    by_position = [p for p in rest if p.kind in (inspect.Parameter.POSITIONAL_ONLY, _BOTH)]
    takes_all = any(p.kind == _ALL_NAMED for p in parameters)
    if not by_position and not any(p.kind == _ALL for p in parameters):
        raise TypeError(
            "the training function takes no key: write train_fn(key, hparams), or train_fn(key, *, "
            f"{', '.join(names)})"
        )
    rest = [p for p in rest if p is not by_position[0]] if by_position else rest
    required = [p for p in rest if p.default is p.empty]
    by_name = any(p.name in names for p in rest) or any(p.kind == _NAMED for p in required)
    by_name = by_name or (takes_all and len(by_position) == 1)
    if by_name:
        _check_names(rest, names, takes_all)
        return lambda key, hparams, fold: train_fn(key, **hparams, **({"fold": fold} if folds else {}))
    if len(required) > 1 or (len(by_position) == 1 and not any(p.kind == _ALL for p in parameters)):
        raise TypeError(
            f"the training function takes ({', '.join(p.name for p in parameters)}): write train_fn(key, hparams), "
            f"or train_fn(key, *, {', '.join(names)})"
        )
    return lambda key, hparams, fold: train_fn(key, hparams, **({"fold": fold} if folds else {}))


_BOTH, _NAMED = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
_ALL, _ALL_NAMED = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD


def _check_fold(parameters: list[inspect.Parameter], folds: bool) -> None:
    fold = next((p for p in parameters if p.name == "fold" and p.kind not in (_ALL, _ALL_NAMED)), None)
    if folds and fold is None and not any(p.kind == _ALL_NAMED for p in parameters):
        raise TypeError(
            "with folds=... the training function is called with the fold's number: write "
            "train_fn(key, hparams, *, fold) and cut the data by search.fold_of"
        )
    if not folds and fold is not None and fold.default is fold.empty:
        raise TypeError("the training function takes fold: pass folds=5 to the sweep, or leave it out")


def _check_names(rest: list[inspect.Parameter], names: Collection[str], takes_all: bool) -> None:
    taken = [p.name for p in rest]
    if not takes_all:
        for name in names:
            if name not in taken:
                raise TypeError(
                    f"the space has {name!r}, which the training function does not take: "
                    f"{unknown_name('parameter', name, taken)}"
                )
    for p in rest:
        if p.default is p.empty and p.name not in names:
            raise TypeError(
                f"the training function takes {p.name!r}, which the space does not have: "
                f"{unknown_name('hyper-parameter', p.name, names)}"
            )


def _fill(node: Hparams, at: Names, values: Mapping[str, Any], record: _Record) -> Hparams:
    for name, value in (("_at", at), ("_values", values), ("_record", record)):
        object.__setattr__(node, name, value)
    return node


def _leaves(values: Mapping[str, Any], at: Names) -> Iterator[tuple[Names, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*at, name))
        else:
            yield (*at, name), value


def _flatten(node: Hparams) -> tuple[list[tuple[Any, Any]], Any]:
    children, structure, record = [], [], node._record
    for names, value in _leaves(node._values, ()):
        whole = (*node._at, *names)
        # Whoever takes it apart hands it on whole, and nobody sees what is read there.
        record.read.add(whole)
        if whole in record.traced:
            children.append((jax.tree_util.DictKey("/".join(names)), value))
            structure.append((names,))
        else:
            structure.append((names, repr(value), value))  # to jit 1, 1.0 and True would be the same
    return children, tuple(structure)


def _unflatten(structure: Any, children: Any) -> Hparams:
    values: dict[str, Any] = {}
    left = iter(children)
    for names, *static in structure:
        at = values
        for name in names[:-1]:
            at = at.setdefault(name, {})
        at[names[-1]] = static[1] if static else next(left)
    return Hparams(values, traced=[names for names, *static in structure if not static])


jax.tree_util.register_pytree_with_keys(Hparams, _flatten, _unflatten)
