"""Which layer of ours is which of theirs where nobody says: under the same name, or by order."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from nnkit.interop.dialect import Dialect, Match, Shapes, is_numbered, written_at
from nnkit.interop.forms import Form
from nnkit.interop.parts import Part

__all__ = ["by_order", "by_own_names", "tells_order"]

_Ranks = tuple[tuple[str, int], ...]


def tells_order(theirs: Shapes, dialect: Dialect) -> bool:
    """A file or a mapped tree has its names sorted: then the order means nothing."""
    return dialect.ordered and list(theirs) != sorted(theirs)


def by_own_names(
    ours: Sequence[Part], forms: Mapping[str, list[Form]], theirs: Shapes, dialect: Dialect
) -> list[Match] | None:
    """Every layer under its own path, as ``to_torch`` and ``to_flax`` write it; None if one is not there."""
    found = []
    for part in ours:
        pair = written_at(part, part.path.replace("/", dialect.separator), forms[part.path], theirs, dialect)
        if pair is None:
            return None
        if any(len(theirs[pair.keys[name]]) != len(shape) for name, shape in pair.form.shapes.items()):
            return None
        found.append(pair)
    return found


def by_order(
    ours: Sequence[Part],
    forms: Mapping[str, list[Form]],
    theirs: Shapes,
    dialect: Dialect,
    ordered: bool,
) -> tuple[list[Match], list[str]]:
    """The n-th layer with arrays of some names and ranks is theirs with arrays of the same.

    Args:
      ordered: whether the order of ``theirs`` is to be believed, rather than the numbers in their names.

    Returns:
      The pairs, and what speaks against them.
    """
    found: list[Match] = []
    problems: list[str] = []
    left = dict(theirs)
    waiting = list(ours)
    # What has arrays of a submodule's (attention's projections) first: alone they would pass for dense layers.
    for composite in (True, False):
        queues: dict[_Ranks, list[str]] = {}
        for part in tuple(waiting):
            for form in forms[part.path]:
                if _is_composite(form, dialect) != composite:
                    continue
                kind = _ranks(form.shapes)
                if kind not in queues:
                    queues[kind] = _prefixes(form, left, dialect, composite, ordered)
                    problems += [] if ordered else _unclear(queues[kind], dialect)
                if queues[kind]:
                    prefix = queues[kind].pop(0)
                    keys = {name: dialect.key(prefix, name) for name in form.shapes}
                    found.append(Match(part, prefix, form, keys))
                    waiting.remove(part)
                    for key in keys.values():
                        left.pop(key)
                    break
    problems += [f"{part}: without a counterpart" for part in waiting]
    problems += _crossed(found, dialect)
    order = {part.path: i for i, part in enumerate(ours)}
    return sorted(found, key=lambda pair: order[pair.part.path]), problems


def _ranks(shapes: Shapes) -> _Ranks:
    return tuple(sorted((name, len(shape)) for name, shape in shapes.items()))


def _is_composite(form: Form, dialect: Dialect) -> bool:
    return any(dialect.separator in name for name in form.shapes) or is_numbered(form)


def _prefixes(form: Form, theirs: Shapes, dialect: Dialect, composite: bool, ordered: bool) -> list[str]:
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
    return found if ordered else sorted(found, key=_natural)


def _natural(path: str) -> list[tuple[int, int, str]]:
    return [(1, int(t), "") if t.isdigit() else (0, 0, t) for t in re.split(r"(\d+)", path)]


def _unclear(prefixes: Sequence[str], dialect: Dialect) -> list[str]:
    """Of layers that sorting has put in order, those whose names do not count."""
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


def _crossed(found: Sequence[Match], dialect: Dialect) -> Iterable[str]:
    """Layers of one kind side by side that have the same names there, and each the name of another.

    Then either the order or the names are wrong, and only the user knows which. Numbers that begin elsewhere
    (``dense_0`` is ``dense_1``, ``dense_1`` is ``dense_2``) do not come back to where they began.
    """
    kinds: dict[_Ranks, list[tuple[list[str], list[str]]]] = defaultdict(list)
    for pair in found:
        both = pair.part.path.split("/"), pair.prefix.split(dialect.separator)
        kinds[_ranks(pair.form.shapes)].append(both)
    for pairs in kinds.values():
        for around in dict.fromkeys(tuple(path[:i]) for path, _ in pairs for i in range(len(path))):
            depth = len(around)
            within = [
                (path[depth], there) for path, there in pairs if (*path[:depth],) == around and path[depth:]
            ]
            same = _in_common([there for _, there in within])
            names: dict[str, set[str]] = defaultdict(set)
            for child, there in within:
                names[child].update(there[same : same + 1])
            cycle = _cycle({child: next(iter(there)) for child, there in names.items() if len(there) == 1})
            if cycle:
                where = f" in {'/'.join(around)!r}" if around else ""
                crossed = ", ".join(f"{here} with {there}" for here, there in cycle)
                yield f"by order{where} {crossed} would be paired, against their names"
                break


def _in_common(paths: Sequence[Sequence[str]]) -> int:
    """With how many names all paths begin."""
    differ = (i for i, names in enumerate(zip(*paths, strict=False)) if len({*names}) > 1)
    return next(differ, min(map(len, paths)))


def _cycle(step: Mapping[str, str]) -> list[tuple[str, str]]:
    """Several names of which each is led to the next, and the last to the first."""
    for start in step:
        trail = [start]
        while (name := step.get(trail[-1])) is not None and name not in trail:
            trail.append(name)
        if name == start and len(trail) > 1:
            return [(here, step[here]) for here in trail]
    return []
