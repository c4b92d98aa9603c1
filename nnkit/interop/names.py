"""What a user says of which layer is which: renamings of paths, and what is to be left out."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

__all__ = ["Names", "check_names", "heads", "ignored", "renamed", "tells"]

Names: TypeAlias = Mapping[str, str] | Callable[[str], str] | Sequence[tuple[str, str]]
"""From a path of ours to theirs: a dict, in which a path also stands for all beneath it; a function; or rules
``(regular expression, replacement)``, each applied to the result of the one before."""


def check_names(names: Names | None, ignore: str | None) -> None:
    """Refuses arguments of other kinds, and rules that are no regular expressions."""
    if ignore is not None:
        if not isinstance(ignore, str):
            raise TypeError(f"ignore is a regular expression, got {ignore!r}: join several with '|'")
        _check_rule("ignore", ignore, "")
    if names is None or callable(names):
        return
    if isinstance(names, str) or not isinstance(names, (Mapping, Sequence)):
        raise TypeError(
            f"names is a dict {{path here: name there}}, a function or a list of (regular expression, replacement), "
            f"got {names!r}"
        )
    if isinstance(names, Mapping):
        wrong = [f"{here!r}: {there!r}" for here, there in names.items() if not _are_strings(here, there)]
        if wrong:
            raise TypeError(f"names maps paths to names, both of them strings, got {', '.join(wrong)}")
        return
    for rule in names:
        if not isinstance(rule, (tuple, list)) or len(rule) != 2 or not _are_strings(*rule):
            raise TypeError(f"names has the rule {rule!r}: write (regular expression, replacement)")
        _check_rule("names", *rule)


def _are_strings(*values: object) -> bool:
    return all(isinstance(value, str) for value in values)


def _check_rule(argument: str, pattern: str, replacement: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{argument} has {pattern!r}, which is no regular expression: {error}") from None
    try:
        re.sub(pattern, replacement, "")
    except (re.error, IndexError) as error:
        raise ValueError(f"{argument} cannot replace {pattern!r} by {replacement!r}: {error}") from None


def renamed(names: Names | None, path: str) -> str:
    """What a renaming makes of a path."""
    if names is None:
        return path
    if isinstance(names, Mapping):
        for head in heads(path):
            if head in names:
                rest = path.removeprefix(head).removeprefix("/")
                return "/".join(filter(None, [names[head], rest]))
        return path
    if callable(names):
        name = names(path)
        if not isinstance(name, str):
            raise TypeError(f"names gives {name!r} for {path!r}, not a string")
        return name
    for pattern, replacement in names:
        path = re.sub(pattern, replacement, path)
    return path


def tells(names: Names | None, path: str) -> bool:
    """Whether a renaming says what a path is there: of a dict, whether it has it or what it lies in."""
    if names is None:
        return False
    return not isinstance(names, Mapping) or any(head in names for head in heads(path))


def heads(path: str) -> list[str]:
    """A path and what it lies in, outwards: ``a/b``, ``a`` and the whole model, which is empty."""
    parts = path.split("/") if path else []
    return ["/".join(parts[:i]) for i in range(len(parts), -1, -1)]


def ignored(ignore: str | None, name: str) -> bool:
    return ignore is not None and re.fullmatch(ignore, name) is not None
