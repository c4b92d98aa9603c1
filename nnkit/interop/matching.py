"""Which layer of ours is which of theirs: as the user says, under the same name, or by order."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from nnkit.interop.dialect import Dialect, Match, Shapes, is_numbered, written_at
from nnkit.interop.forms import Form
from nnkit.interop.names import Names, check_names, heads, ignored, renamed, tells
from nnkit.interop.ordering import by_order, by_own_names, tells_order
from nnkit.interop.parts import Part

__all__ = ["invented", "match"]


def match(
    ours: Sequence[Part], theirs: Shapes, dialect: Dialect, names: Names | None, ignore: str | None
) -> list[Match]:
    """Pairs every layer of ours with one of theirs.

    What ``names`` tells goes by it. The rest goes by its own names if all of it is there under these, and
    otherwise by order.

    Raises:
      TypeError, ValueError: ``names`` or ``ignore`` is not what is meant.
      ValueError: what has no counterpart, on both sides, and what has another shape there.
    """
    check_names(names, ignore)
    ours, forms = _to_pair(ours, dialect, ignore)
    theirs = {key: shape for key, shape in theirs.items() if not ignored(ignore, key)}
    wanted = {key: shape for key, shape in theirs.items() if not re.fullmatch(dialect.left, key)}
    told = [part for part in ours if tells(names, part.path)]
    untold = [part for part in ours if not tells(names, part.path)]
    found, problems = _by_name(told, forms, wanted, dialect, names)
    problems += _unknown(ours, names)
    left = {key: shape for key, shape in wanted.items() if key not in _keys(found)}
    own = by_own_names(untold, forms, left, dialect)
    if own is None:
        own, against = by_order(untold, forms, left, dialect, tells_order(wanted, dialect))
        problems += against
    found += own
    problems += [problem for pair in found for problem in _shapes(pair, theirs)]
    problems += _twice(found)
    rest = [f"{key} {theirs[key]}" for key in wanted if key not in _keys(found)]
    if rest:
        problems.append(f"{dialect.name}'s {', '.join(rest)}: without a counterpart")
    if problems:
        raise _mismatch(dialect, problems)
    order = {part.path: i for i, part in enumerate(ours)}
    return sorted(found, key=lambda pair: order[pair.part.path])


def invented(ours: Sequence[Part], dialect: Dialect, names: Names | None, ignore: str | None) -> list[Match]:
    """The pairs where nothing of theirs is given: the likeliest form, under the names that the renaming makes."""
    check_names(names, ignore)
    ours, forms = _to_pair(ours, dialect, ignore)
    found = []
    for part in ours:
        form, prefix = forms[part.path][0], _prefix(names, part, dialect)
        if dialect.numbered and is_numbered(form) and ":" not in prefix:
            prefix = f"{prefix}:l0"
        found.append(Match(part, prefix, form, {name: dialect.key(prefix, name) for name in form.shapes}))
    problems = _unknown(ours, names) + _twice(found)
    if problems:
        raise _mismatch(dialect, problems)
    return found


def _to_pair(
    ours: Sequence[Part], dialect: Dialect, ignore: str | None
) -> tuple[list[Part], dict[str, list[Form]]]:
    """What is to be paired, and the ways in which they may write it.

    State that is ours alone, the caches of decoding and what ``probe`` records, is not.
    """
    ours = [part for part in ours if part.kind != "cache" and not ignored(ignore, part.path)]
    forms = {part.path: dialect.forms(part) for part in ours}
    foreign = [f"{part}: nothing that {dialect.name} has" for part in ours if not forms[part.path]]
    if foreign:
        raise _mismatch(dialect, foreign)
    return ours, forms


def _prefix(names: Names | None, part: Part, dialect: Dialect) -> str:
    return renamed(names, part.path).replace("/", dialect.separator)


def _by_name(
    ours: Sequence[Part],
    forms: Mapping[str, list[Form]],
    theirs: Shapes,
    dialect: Dialect,
    names: Names | None,
) -> tuple[list[Match], list[str]]:
    found, problems = [], []
    for part in ours:
        prefix = _prefix(names, part, dialect)
        pair = written_at(part, prefix, forms[part.path], theirs, dialect)
        if pair is None:
            shapes = forms[part.path][0].shapes
            looked = ", ".join(f"{dialect.key(prefix, name)} {shape}" for name, shape in shapes.items())
            problems.append(f"{part}: without a counterpart, looked for {looked}")
        else:
            found.append(pair)
    return found, problems


def _unknown(ours: Sequence[Part], names: Names | None) -> list[str]:
    """Paths in a dict of names of which the model has nothing."""
    if not isinstance(names, Mapping):
        return []
    known = {"", *(head for part in ours for head in heads(part.path))}
    return [
        f"names has {name!r}, which is no layer with arrays of the model"
        for name in names
        if name not in known
    ]


def _keys(found: Iterable[Match]) -> set[str]:
    return {key for pair in found for key in pair.keys.values()}


def _twice(found: Sequence[Match]) -> list[str]:
    users = defaultdict(list)
    for pair in found:
        for key in pair.keys.values():
            users[key].append(repr(pair.part.path))
    return [f"{key} goes to {' and '.join(paths)}" for key, paths in users.items() if len(paths) > 1]


def _shapes(pair: Match, theirs: Shapes) -> Iterable[str]:
    for name, shape in pair.form.shapes.items():
        key = pair.keys[name]
        if tuple(theirs[key]) != tuple(shape):
            yield f"{pair.part} needs {key} of shape {tuple(shape)}, and it is {tuple(theirs[key])}"


def _mismatch(dialect: Dialect, problems: Sequence[str], most: int = 12) -> ValueError:
    more = [f"and {len(problems) - most} more"] if len(problems) > most else []
    return ValueError(
        f"the model and the arrays of {dialect.name} do not match:\n  "
        + "\n  ".join([*problems[:most], *more])
        + "\npass names={path here: name there} for the layers that differ, and ignore=... for what is to be left out"
    )
