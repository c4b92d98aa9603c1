"""``parse_space``: a space written as one line of text, for the command line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from nnkit.checks import unknown_name
from nnkit.search.dimension import Dimension, Value
from nnkit.search.dimensions import choice, conditional, integer, log_uniform, uniform
from nnkit.search.space import Space, as_space

__all__ = ["parse_space"]


def parse_space(text: str) -> Space:
    """A space from text: names, "=", and what each may be, with commas between them.

    ========================================  ==========================================================
    ``lr=log:1e-5:1``                         ``log_uniform(1e-5, 1)``
    ``rate=uniform:0:0.5``, ``...:0.1``       ``uniform(0, 0.5)``, with ``step=0.1``
    ``width=int:16:256``, ``...:16:log``      ``integer(16, 256)``, with ``step=16``, with ``log=True``
    ``kind=adam|sgd``, ``hidden=64|128x64``   ``choice(["adam", "sgd"])``, ``choice([64, (128, 64)])``
    ``opt=sgd{mu=uniform:0:1}|adam{}``        ``conditional({"sgd": {"mu": uniform(0, 1)}, "adam": {}})``
    ``model/width=32|64``                     the group ``model`` with ``width`` in it
    ========================================  ==========================================================

    Options are read as whole numbers, numbers, ``true``, ``false``, ``none`` and otherwise as text. At the
    end ``:static`` or ``:traced`` says whether a program is compiled for each value.

    Raises:
      ValueError, TypeError: for text that cannot be read, which is quoted; and as the dimensions do.

    >>> search.parse_space("lr=log:1e-5:1,width=int:16:256:log,optimizer=adam|sgd")
    Space(lr=log_uniform(1e-05, 1.0), width=integer(16, 256, log=True), optimizer=choice(['adam', 'sgd']))
    """
    return as_space(_tree(text))


def _tree(text: str) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for item in _parts(text, ","):
        name, equals, written = (part.strip() for part in item.partition("="))
        if not equals or not name or not written:
            raise ValueError(f"{item.strip()!r} is no hyper-parameter: write name=log:1e-5:1 or name=a|b")
        *groups, last = name.split("/")
        at = tree
        for group in groups:
            at = at.setdefault(group, {})
            if not isinstance(at, dict):
                raise ValueError(f"{name!r} is within {group!r}, which is a hyper-parameter itself")
        if last in at:
            raise ValueError(f"{name!r} is written twice: leave one out")
        try:
            at[last] = _dimension(written)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{name}={written}: {error}") from None
    return tree


def _dimension(text: str) -> Any:
    options = [part.strip() for part in _parts(text, "|")]
    if any("{" in option for option in options):
        return conditional(dict(_kind(option) for option in options))
    head, *rest = (part.strip() for part in text.split(":"))
    static = _STATIC[rest.pop()] if rest and rest[-1] in _STATIC else None
    more = {} if static is None else {"static": static}
    if head in _RANGES and len(options) == 1:
        return _RANGES[head](rest, more)
    if rest and len(options) == 1:
        raise unknown_name("scale", head, _RANGES)
    if static is not None:
        options[-1] = options[-1].rpartition(":")[0].strip()
    return choice([_value(option) for option in options], **more)


def _log(numbers: list[str], more: dict[str, Any]) -> Dimension:
    _check_count(numbers, 2, 2, "log:LOW:HIGH")
    return log_uniform(*map(_number, numbers), **more)


def _uniform(numbers: list[str], more: dict[str, Any]) -> Dimension:
    _check_count(numbers, 2, 3, "uniform:LOW:HIGH or uniform:LOW:HIGH:STEP")
    low, high, *step = map(_number, numbers)
    return uniform(low, high, step=step[0] if step else None, **more)


def _integer(numbers: list[str], more: dict[str, Any]) -> Dimension:
    _check_count(numbers, 2, 3, "int:LOW:HIGH, int:LOW:HIGH:STEP or int:LOW:HIGH:log")
    log = numbers[-1] == "log"
    low, high, *step = map(_number, numbers[:2] if log else numbers)
    return integer(low, high, step=step[0] if step else 1, log=log, **more)  # type: ignore[arg-type]


_RANGES = {"log": _log, "uniform": _uniform, "int": _integer}
_STATIC = {"static": True, "traced": False}
_WORDS: dict[str, Value] = {"true": True, "false": False, "none": None}


def _kind(text: str) -> tuple[str, dict[str, Any]]:
    name, brace, inner = text.partition("{")
    if brace and not inner.endswith("}"):
        raise ValueError(f"{text!r} has a brace that is not closed at its end")
    return name.strip(), _tree(inner[:-1]) if inner[:-1].strip() else {}


def _check_count(numbers: list[str], least: int, most: int, form: str) -> None:
    if not least <= len(numbers) <= most:
        raise ValueError(f"{len(numbers)} numbers where {form} is meant")


def _number(text: str) -> int | float:
    value = _value(text)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{text!r} is no number")
    return value


def _value(text: str) -> Value:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if re.fullmatch(r"\d+(x\d+)*(x)?", text) and "x" in text:
        return tuple(int(part) for part in text.split("x") if part)
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            pass
    return text


def _parts(text: str, separator: str) -> Iterator[str]:
    """``text`` cut at the separators that are outside of braces."""
    depth, start = 0, 0
    for i, letter in enumerate(text):
        depth += (letter == "{") - (letter == "}")
        if depth < 0:
            raise ValueError(f"{text!r} closes a brace that is not open")
        if letter == separator and not depth:
            yield text[start:i]
            start = i + 1
    if depth:
        raise ValueError(f"{text!r} has a brace that is not closed")
    yield text[start:]
