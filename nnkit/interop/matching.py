"""Which layer of ours is which of theirs: by a renaming of paths, or by order."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from nnkit.interop.flattening import Shape
from nnkit.interop.forms import Form
from nnkit.interop.parts import Part

__all__ = ["Dialect", "Match", "Names", "invented", "match"]

Names: TypeAlias = Mapping[str, str] | Callable[[str], str] | Sequence[tuple[str, str]]
"""From a path of ours to theirs: a dict, in which a path also stands for all beneath it; a function; or rules
``(regular expression, replacement)``, each applied to the result of the one before."""

Shapes: TypeAlias = Mapping[str, Shape]


class Dialect(NamedTuple):
    """What distinguishes one library's names from another's.

    Attributes:
      name: of the library.
      separator: between the names of a path.
      forms: the ways in which it writes a layer.
      ordered: whether the order of its arrays is that in which the layers were made.
      numbered: whether a name may end in the number of a layer, as PyTorch's ``weight_ih_l0``.
      left: which of its arrays nothing corresponds to, and need not.
    """

    name: str
    separator: str
    forms: Callable[[Part], list[Form]]
    ordered: bool
    numbered: bool = False
    left: str = r"(?!)"

    def key(self, prefix: str, name: str) -> str:
        """The full name of an array of the layer ``prefix``; ``rnn:l1`` is the layer 1 within ``rnn``."""
        base, _, number = prefix.partition(":")
        full = f"{base}{self.separator}{name}" if base else name
        return f"{full}_{number}" if number else full

    def prefix(self, key: str, name: str) -> str | None:
        """The layer whose array ``name`` is called ``key``, if one may be."""
        number = r"(?:_(l\d+(?:_reverse)?))?" if self.numbered else "()"
        found = re.fullmatch(rf"(?:(.+){re.escape(self.separator)})?{re.escape(name)}{number}", key)
        if found is None:
            return None
        base, layer = found.groups()
        return f"{base or ''}:{layer}" if layer else base or ""


class Match(NamedTuple):
    """A layer of ours, its name there, and how it is written there.

    Attributes:
      part: ours.
      prefix: theirs.
      form: how it is written.
      keys: full names of its arrays, by their names within the layer.
    """

    part: Part
    prefix: str
    form: Form
    keys: dict[str, str]


def match(
    ours: Sequence[Part], theirs: Shapes, dialect: Dialect, names: Names | None, ignore: str | None
) -> list[Match]:
    """Pairs every layer of ours with one of theirs.

    Raises:
      ValueError: what has no counterpart, on both sides, and what has another shape there.
    """
    ours, forms = _to_pair(ours, dialect, ignore)
    theirs = {key: shape for key, shape in theirs.items() if not _ignored(ignore, key)}
    wanted = {key: shape for key, shape in theirs.items() if not re.fullmatch(dialect.left, key)}
    if names is None:
        found, problems = _by_order(ours, forms, wanted, dialect)
    else:
        found, problems = _by_name(ours, forms, wanted, dialect, names)
    taken = {key for pair in found for key in pair.keys.values()}
    problems += [problem for pair in found for problem in _shapes(pair, theirs)]
    problems += _twice(found)
    rest = [f"{key} {theirs[key]}" for key in wanted if key not in taken]
    if rest:
        problems.append(f"{dialect.name}'s {', '.join(rest)}: without a counterpart")
    if problems:
        raise _mismatch(dialect, problems)
    return found


def invented(ours: Sequence[Part], dialect: Dialect, names: Names | None, ignore: str | None) -> list[Match]:
    """The pairs where nothing of theirs is given: the likeliest form, under the names that the renaming makes."""
    ours, forms = _to_pair(ours, dialect, ignore)
    found = []
    for part in ours:
        form, prefix = forms[part.path][0], _prefix(names, part, dialect)
        if dialect.numbered and _is_numbered(form) and ":" not in prefix:
            prefix = f"{prefix}:l0"
        found.append(Match(part, prefix, form, {name: dialect.key(prefix, name) for name in form.shapes}))
    problems = _twice(found)
    if problems:
        raise _mismatch(dialect, problems)
    return found


def _renamed(names: Names | None, path: str) -> str:
    """What a renaming makes of a path."""
    if names is None:
        return path
    if isinstance(names, Mapping):
        parts = path.split("/") if path else []
        for i in range(len(parts), -1, -1):
            if (head := "/".join(parts[:i])) in names:
                return "/".join([*filter(None, [names[head]]), *parts[i:]])
        return path
    if callable(names):
        return names(path)
    for pattern, replacement in names:
        path = re.sub(pattern, replacement, path)
    return path


def _to_pair(
    ours: Sequence[Part], dialect: Dialect, ignore: str | None
) -> tuple[list[Part], dict[str, list[Form]]]:
    """What is to be paired, and the ways in which they may write it.

    State that is ours alone, the caches of decoding and what ``probe`` records, is not.
    """
    ours = [part for part in ours if part.kind != "cache" and not _ignored(ignore, part.path)]
    forms = {part.path: dialect.forms(part) for part in ours}
    foreign = [f"{part}: nothing that {dialect.name} has" for part in ours if not forms[part.path]]
    if foreign:
        raise _mismatch(dialect, foreign)
    return ours, forms


def _ignored(ignore: str | None, name: str) -> bool:
    return ignore is not None and re.fullmatch(ignore, name) is not None


def _prefix(names: Names | None, part: Part, dialect: Dialect) -> str:
    return _renamed(names, part.path).replace("/", dialect.separator)


def _is_numbered(form: Form) -> bool:
    return "weight_ih" in form.shapes


def _by_name(
    ours: Sequence[Part], forms: Mapping[str, list[Form]], theirs: Shapes, dialect: Dialect, names: Names
) -> tuple[list[Match], list[str]]:
    found, problems = [], []
    if isinstance(names, Mapping):
        paths = [f"{part.path}/" for part in ours]
        unknown = [name for name in names if name and not any(path.startswith(f"{name}/") for path in paths)]
        problems += [f"names has {name!r}, which is no layer with arrays of the model" for name in unknown]
    for part in ours:
        prefix = _prefix(names, part, dialect)
        pair = _written_at(part, prefix, forms[part.path], theirs, dialect)
        if pair is None:
            shapes = forms[part.path][0].shapes
            looked = ", ".join(f"{dialect.key(prefix, name)} {shape}" for name, shape in shapes.items())
            problems.append(f"{part}: without a counterpart, looked for {looked}")
        else:
            found.append(pair)
    return found, problems


def _written_at(part: Part, prefix: str, forms: list[Form], theirs: Shapes, dialect: Dialect) -> Match | None:
    for form in forms:
        numbered = [f"{prefix}:l0"] if dialect.numbered and ":" not in prefix else []
        for p in (prefix, *numbered):
            keys = {name: dialect.key(p, name) for name in form.shapes}
            if all(key in theirs for key in keys.values()):
                return Match(part, p, form, keys)
        if len(form.shapes) == 1 and prefix in theirs:  # an array that is an attribute of its own there
            return Match(part, prefix, form, dict.fromkeys(form.shapes, prefix))
    return None


def _by_order(
    ours: Sequence[Part], forms: Mapping[str, list[Form]], theirs: Shapes, dialect: Dialect
) -> tuple[list[Match], list[str]]:
    """The n-th layer with arrays of some names and ranks is theirs with arrays of the same."""
    found: list[Match] = []
    problems: list[str] = []
    left = dict(theirs)
    waiting = list(ours)
    # What has arrays of a submodule's (attention's projections) first: alone they would pass for dense layers.
    for composite in (True, False):
        queues: dict[tuple[tuple[str, int], ...], list[str]] = {}
        for part in tuple(waiting):
            for form in forms[part.path]:
                if _is_composite(form, dialect) != composite:
                    continue
                kind = _ranks(form.shapes)
                if kind not in queues:
                    queues[kind] = _prefixes(form, left, dialect, composite)
                    problems += _unclear(queues[kind], dialect, theirs)
                if queues[kind]:
                    prefix = queues[kind].pop(0)
                    keys = {name: dialect.key(prefix, name) for name in form.shapes}
                    found.append(Match(part, prefix, form, keys))
                    waiting.remove(part)
                    for key in keys.values():
                        left.pop(key)
                    break
    problems += [f"{part}: without a counterpart" for part in waiting]
    order = {part.path: i for i, part in enumerate(ours)}
    return sorted(found, key=lambda pair: order[pair.part.path]), problems


def _ranks(shapes: Shapes) -> tuple[tuple[str, int], ...]:
    return tuple(sorted((name, len(shape)) for name, shape in shapes.items()))


def _is_composite(form: Form, dialect: Dialect) -> bool:
    return any(dialect.separator in name for name in form.shapes) or _is_numbered(form)


def _prefixes(form: Form, theirs: Shapes, dialect: Dialect, composite: bool) -> list[str]:
    """Their layers that are written so, in order."""
    ranks = {name: len(shape) for name, shape in form.shapes.items()}
    first = next(iter(ranks))
    candidates = dict.fromkeys(p for key in theirs if (p := dialect.prefix(key, first)) is not None)
    groups: dict[str, set[str]] = defaultdict(set)
    for key in theirs:
        groups[key.rpartition(dialect.separator)[0]].add(key)
    found = []
    for prefix in candidates:
        keys = {dialect.key(prefix, name): rank for name, rank in ranks.items()}
        fits = all(key in theirs and len(theirs[key]) == rank for key, rank in keys.items())
        if fits and (composite or groups[prefix] == keys.keys()):
            found.append(prefix)
    return found if _tells_order(theirs, dialect) else sorted(found, key=_natural)


def _tells_order(theirs: Shapes, dialect: Dialect) -> bool:
    """A file or a mapped tree has its names sorted: then the order means nothing."""
    return dialect.ordered and list(theirs) != sorted(theirs)


def _natural(path: str) -> list[tuple[int, int, str]]:
    return [(1, int(t), "") if t.isdigit() else (0, 0, t) for t in re.split(r"(\d+)", path)]


def _unclear(prefixes: Sequence[str], dialect: Dialect, theirs: Shapes) -> list[str]:
    """Of layers that sorting has put in order, those whose names do not count."""
    if _tells_order(theirs, dialect):
        return []
    siblings: dict[str, dict[str, None]] = defaultdict(dict)
    for prefix in prefixes:
        names = prefix.split(dialect.separator)
        for i, name in enumerate(names):
            siblings[dialect.separator.join(names[:i])][name] = None
    for around, children in siblings.items():
        if len({re.sub(r"\d+", "#", name) for name in children}) > 1:
            where = f" in {around!r}" if around else ""
            return [
                f"which of {', '.join(children)}{where} comes first is not in the names, which are sorted"
            ]
    return []


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
