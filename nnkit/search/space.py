"""``Space``: the hyper-parameters of a search by path, in the forms that its parts need."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from nnkit.checks import unknown_name
from nnkit.search.dimension import Dimension, Value
from nnkit.search.dimensions import Conditional, conditional
from nnkit.search.hparams import Hparams

__all__ = ["Space", "as_space", "space_of"]

Flat = dict[str, Value]
"""The values of one trial by path, those that are active alone."""


class Space:
    """Hyper-parameters by name, flat or nested; made by :func:`as_space`, immutable.

    A path is the names from the outside in: ``lr``, ``model/width``. Of a conditional at P the choice is
    ``P/kind``, and ``P/sgd/momentum`` is active where the kind is "sgd".

    >>> space = search.as_space({
    ...     "lr": search.log_uniform(1e-5, 1.0),
    ...     "optimizer": search.conditional({"sgd": {"momentum": search.uniform(0, 0.99)}, "adam": {}}),
    ... })
    >>> space.nested({"lr": 0.1, "optimizer/kind": "sgd", "optimizer/sgd/momentum": 0.9})
    {'lr': 0.1, 'optimizer': {'kind': 'sgd', 'momentum': 0.9}}
    >>> space.split({"lr": 0.1, "optimizer/kind": "adam"})
    ((('optimizer/kind', 'adam'),), {'lr': 0.1})
    """

    __slots__ = ("_rows", "_tree", "dimensions")
    dimensions: Mapping[str, Dimension]
    """All hyper-parameters by path, in the order in which they were written."""

    def __init__(self, tree: Mapping[str, Any]):
        rows = {row.path: row for row in _rows(tree, "", ())}
        for name, value in (
            ("_tree", _frozen(tree)),
            ("_rows", rows),
            ("dimensions", MappingProxyType({path: row.dimension for path, row in rows.items()})),
        ):
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("a Space is immutable: make another with as_space({...})")

    @property
    def names(self) -> tuple[str, ...]:
        """The names on the outermost level, which a training function can take as keywords."""
        return tuple(self._tree)

    def suggest(self, trial: Any) -> Flat:
        """Asks an Optuna trial for the value of each active hyper-parameter."""
        flat: Flat = {}
        for path, row in self._rows.items():
            if row.active(flat):
                flat[path] = row.dimension.restored(_suggested(trial, path, row.dimension))
        return flat

    def active(self, flat: Mapping[str, Any]) -> tuple[str, ...]:
        """The paths that there are for a trial with these kinds."""
        return tuple(path for path, row in self._rows.items() if row.active(flat))

    def check(self, flat: Mapping[str, Any]) -> Flat:
        """``flat`` with values of the right types in the space's order, or an error that names the path.

        Raises:
          ValueError, TypeError: for a value that is missing, unknown, not active, out of its range or of
            another type.
        """
        found: Flat = {}
        for path in self.active(flat):
            if path not in flat:
                raise ValueError(f"no value for {path!r}, which is {self.dimensions[path]}")
            found[path] = self.dimensions[path].check(flat[path], f"{path!r}")
        for path in flat:
            if path not in self.dimensions:
                raise unknown_name("hyper-parameter", path, self.dimensions)
            if path not in found:
                of = " and ".join(f"{name!r} is {kind!r}" for name, kind in self._rows[path].when)
                raise ValueError(f"{path!r} has a value, and is there only where {of}: leave it out")
        return found

    def nested(self, flat: Mapping[str, Any]) -> dict[str, Any]:
        """The values as a training function sees them."""
        return _nested(self._tree, "", flat)

    def split(self, flat: Mapping[str, Any]) -> tuple[tuple[tuple[str, Value], ...], dict[str, Any]]:
        """The static values, hashable, by which trials are grouped into programs, and the traced ones."""
        static = tuple((path, value) for path, value in flat.items() if self.dimensions[path].static)
        return static, {path: value for path, value in flat.items() if not self.dimensions[path].static}

    def hparams(self, static: Any, traced: Mapping[str, Any]) -> Hparams:
        """What a training function gets: the static values as they are, the traced ones as arrays."""
        values = {**dict(static), **traced}
        rows = self._rows
        return Hparams(
            self.nested(values),
            traced=[rows[path].seen for path in traced],
            paths={rows[path].seen: path for path in values},
            absent=self._absent(dict(static)),
        )

    def spec(self) -> dict[str, Any]:
        """The space in JSON's own types, by path; :func:`space_of` reads it."""
        return {path: row.spec() for path, row in self._rows.items()}

    def difference(self, spec: Mapping[str, Any]) -> str | None:
        """In what the space of ``spec`` differs from this one, in words; None where they are the same.

        >>> space = search.as_space({"lr": search.log_uniform(1e-5, 1.0)})
        >>> space.difference(search.as_space({"lr": search.log_uniform(1e-3, 1.0)}).spec())
        "'lr' is log_uniform(0.001, 1.0) there and log_uniform(1e-05, 1.0) here"
        """
        there, here = space_of(spec), self.spec()
        said = []
        for path in dict.fromkeys([*there.dimensions, *here]):
            if path not in here:
                said.append(f"{path!r} is there and not here")
            elif path not in there.dimensions:
                said.append(f"{path!r} is here and not there")
            elif _text(there.spec()[path]) != _text(here[path]):
                said.append(_differing(path, there._rows[path], self._rows[path]))
        return "; ".join(said) or None

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Space) and _text(self.spec()) == _text(other.spec())

    def __hash__(self) -> int:
        return hash(tuple(sorted(self.dimensions)))

    def __repr__(self) -> str:
        return f"Space({', '.join(f'{path}={dimension}' for path, dimension in self.dimensions.items())})"

    def _absent(self, static: Mapping[str, Any]) -> dict[tuple[str, ...], dict[str, str]]:
        """For each conditional, the names that other kinds have, and where they would be."""
        absent: dict[tuple[str, ...], dict[str, str]] = {}
        for path, row in self._rows.items():
            if row.when and not row.active(static) and row.conditional is not None:
                at, kind = row.when[-1]
                absent.setdefault(row.conditional, {})[row.seen[len(row.conditional)]] = (
                    f"{path!r} is there only where {at!r} is {kind!r}, and here it is {static.get(at)!r}"
                )
        return absent


def as_space(space: Mapping[str, Any] | Space) -> Space:
    """A :class:`Space` of hyper-parameters by name; values are dimensions, conditionals or mappings of these.

    Raises:
      ValueError, TypeError: for an empty space, names that are no identifiers, or values that are none of
        these.

    >>> space = search.as_space({"lr": search.log_uniform(1e-5, 1.0), "model": {"width": search.choice([8, 16])}})
    >>> list(space.dimensions)
    ['lr', 'model/width']
    """
    if isinstance(space, Space):
        return space
    if not isinstance(space, Mapping):
        raise TypeError(f"a space is a mapping from names to dimensions, got {type(space).__name__}")
    return Space(space)


def space_of(spec: Mapping[str, Mapping[str, Any]]) -> Space:
    """The space whose :meth:`Space.spec` this is."""
    tree: dict[str, Any] = {}
    opened: dict[str, dict[str, Any]] = {}  # the kinds of each conditional
    for path, row in spec.items():
        at, where, rest = "", tree, path.split("/")
        while len(rest) > 1 and not (row.get("conditional") and len(rest) == 2):
            name, *rest = rest
            at = f"{at}{name}/"
            if at in opened:
                kind, *rest = rest
                at, where = f"{at}{kind}/", opened[at][kind]
            else:
                where = where.setdefault(name, {})
        if row.get("conditional"):
            opened[f"{at}{rest[0]}/"] = where[rest[0]] = {kind: {} for kind in row["options"]}
            continue
        where[rest[0]] = Dimension.from_spec(row)
    return Space(_closed(tree, "", opened))


class _Row(NamedTuple):
    path: str
    seen: tuple[str, ...]
    """The names as the training function sees them, without kinds."""
    dimension: Dimension
    when: tuple[tuple[str, str], ...]
    """Which choices must be which kinds for it to be active."""
    conditional: tuple[str, ...] | None
    """The names of the conditional it belongs to, as the training function sees them."""
    is_kind: bool

    def active(self, flat: Mapping[str, Any]) -> bool:
        return all(flat.get(path) == kind for path, kind in self.when)

    def spec(self) -> dict[str, Any]:
        return {**self.dimension.spec(), **({"conditional": True} if self.is_kind else {})}


def _rows(
    tree: Any,
    at: str,
    when: tuple[tuple[str, str], ...],
    seen: tuple[str, ...] = (),
    inside: tuple[str, ...] | None = None,
) -> Iterator[_Row]:
    if not tree and inside is None:
        where = f"the space at {at.rstrip('/')!r}" if at else "the space"
        raise ValueError(f"{where} is empty: write what is searched, say {{'lr': log_uniform(1e-5, 1.0)}}")
    for name, value in tree.items():
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(
                f"the space has the name {name!r}: names are identifiers of Python, such as 'lr'; "
                "groups are mappings within the mapping"
            )
        path, names = at + name, (*seen, name)
        if isinstance(value, Dimension):
            yield _Row(path, names, value, when, inside, False)
        elif isinstance(value, Conditional):
            yield _Row(f"{path}/kind", (*names, "kind"), value.kind, when, inside, True)
            for kind, inner in value.options.items():
                yield from _rows(inner, f"{path}/{kind}/", (*when, (f"{path}/kind", kind)), names, names)
        elif isinstance(value, Mapping):
            yield from _rows(value, f"{path}/", when, names, None if inside is None else inside)
        else:
            raise TypeError(
                f"the space has {value!r} at {path!r}: write uniform, log_uniform, integer, choice or "
                "conditional; what is not searched does not belong into the space"
            )


def _frozen(tree: Any) -> Any:
    if isinstance(tree, Conditional):
        return Conditional({kind: _frozen(inner) for kind, inner in tree.options.items()})
    return {k: _frozen(v) for k, v in tree.items()} if isinstance(tree, Mapping) else tree


def _closed(tree: Any, at: str, opened: Mapping[str, Any]) -> Any:
    """The tree with conditionals where their kinds were collected."""
    if isinstance(tree, Dimension):
        return tree
    closed = {}
    for name, value in tree.items():
        path = f"{at}{name}/"
        if path in opened:
            kinds = {kind: _closed(inner, f"{path}{kind}/", opened) for kind, inner in value.items()}
            closed[name] = conditional(kinds)
        else:
            closed[name] = _closed(value, path, opened)
    return closed


def _nested(tree: Mapping[str, Any], at: str, flat: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Dimension):
            found[name] = flat[at + name]
        elif isinstance(value, Conditional):
            kind = flat[f"{at}{name}/kind"]
            found[name] = {"kind": kind, **_nested(value.options[kind], f"{at}{name}/{kind}/", flat)}
        else:
            found[name] = _nested(value, f"{at}{name}/", flat)
    return found


def _suggested(trial: Any, path: str, dimension: Dimension) -> Any:
    if dimension.options is not None:
        return trial.suggest_categorical(path, [dimension.stored(option) for option in dimension.options])
    if dimension.kind == "integer":
        return trial.suggest_int(path, dimension.low, dimension.high, step=dimension.step, log=dimension.log)
    return trial.suggest_float(path, dimension.low, dimension.high, step=dimension.step, log=dimension.log)


def _text(spec: Any) -> str:
    """By which specs are compared: to Python 1, 1.0 and True are equal."""
    return json.dumps(spec)


def _differing(path: str, there: _Row, here: _Row) -> str:
    if str(there.dimension) != str(here.dimension):
        return f"{path!r} is {there.dimension} there and {here.dimension} here"
    if there.dimension.static != here.dimension.static:
        words = {True: "static", False: "traced"}
        return f"{path!r} is {words[there.dimension.static]} there and {words[here.dimension.static]} here"
    return f"{path!r} is a conditional in one and a choice in the other"
