"""Constructors of hyper-parameters: ranges on their scales, choices, and choices that open others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np

from nnkit.checks import is_static_number
from nnkit.search.dimension import Dimension, Value

__all__ = ["Conditional", "choice", "conditional", "integer", "log_uniform", "uniform"]


class Conditional(NamedTuple):
    """A choice of kinds, each with hyper-parameters of its own; made by :func:`conditional`."""

    options: dict[str, dict[str, Any]]

    @property
    def kind(self) -> Dimension:
        """The choice itself."""
        return choice(list(self.options))


def uniform(low: float, high: float, *, step: float | None = None, static: bool = False) -> Dimension:
    """A number between ``low`` and ``high``, both included, evenly.

    Args:
      low: the least value.
      high: the greatest; with ``step``, the last that it reaches is.
      step: the distance of the values, which are low, low + step, ...; None for all numbers between.
      static: whether a program is compiled for each value; False makes it an argument of the program.

    Raises:
      ValueError, TypeError: for a range that is empty, inverted or not finite, or a step that is not positive.

    >>> search.uniform(0, 0.5, step=0.25).grid(5)
    [0.0, 0.25, 0.5]
    """
    low, high = _range("uniform", low, high)
    if step is not None:
        high, step = _stepped("uniform", low, high, step)
    return Dimension("uniform", float(low), float(high), step=step, static=static)


def log_uniform(low: float, high: float, *, static: bool = False) -> Dimension:
    """A positive number whose logarithm lies evenly between those of ``low`` and ``high``.

    For rates, decays and other numbers of which the order of magnitude is unknown.

    Args:
      low: the least value, above 0.
      high: the greatest.
      static: as for :func:`uniform`.

    Raises:
      ValueError, TypeError: for a range that is empty, inverted, not finite or reaches 0.

    >>> search.log_uniform(1e-3, 1.0).grid(4)
    [0.001, 0.01, 0.1, 1.0]
    """
    low, high = _range("log_uniform", low, high)
    if low <= 0:
        raise ValueError(
            f"log_uniform({low}, {high}) goes through zero, where there is no logarithm: begin above it, "
            f"say at {high / 1e4 if high > 0 else 1e-4:g}, or use uniform({low}, {high})"
        )
    if not static and low < np.finfo(np.float32).tiny:
        raise ValueError(f"log_uniform({low}, {high}) begins below what float32 has: begin at 1e-37 or above")
    return Dimension("log_uniform", float(low), float(high), log=True, static=static)


def integer(low: int, high: int, *, step: int = 1, log: bool = False, static: bool = True) -> Dimension:
    """A whole number from ``low`` to ``high``, both included.

    Args:
      low: the least value.
      high: the greatest; with ``step``, the last that it reaches is.
      step: the distance of the values.
      log: whether their logarithms are drawn evenly; then ``low`` is at least 1 and ``step`` 1.
      static: a width or a number of layers shapes arrays, so a program is compiled for each value. False
        makes it an argument of the program, for numbers that are only reckoned with.

    Raises:
      ValueError, TypeError: as for :func:`uniform`; numbers that are not whole.

    >>> search.integer(16, 64, step=16).grid(10)
    [16, 32, 48, 64]
    """
    for name, number in (("low", low), ("high", high), ("step", step)):
        if not is_static_number(number) or (isinstance(number, float) and not number.is_integer()):
            raise TypeError(
                f"integer({name}=...) must be a whole number, got {number!r}: "
                "use uniform(low, high) for numbers with fractions"
            )
    low, high = _range("integer", int(low), int(high))
    if log and low < 1:
        raise ValueError(
            f"integer({low}, {high}, log=True) goes through zero, where there is no logarithm: "
            f"begin at 1, or leave out log=True"
        )
    if log and step != 1:
        raise ValueError(
            f"integer({low}, {high}, step={step}, log=True) has a step on a log scale: "
            f"leave out one of the two, or write the values as choice([...])"
        )
    if not static and max(-low, high) >= 2**31:
        raise ValueError(f"integer({low}, {high}, static=False) does not fit into int32: use uniform")
    high, step = _stepped("integer", low, high, int(step))
    return Dimension("integer", low, high, step=step, log=log, static=static)


def choice(options: Sequence[Value], *, static: bool = True) -> Dimension:
    """One of some values: strings, numbers, bools, None, or tuples of these.

    Args:
      options: the values, no two equal.
      static: whether a program is compiled for each; False only for numbers.

    Raises:
      ValueError, TypeError: for no options, equal ones, other types, or strings that are to be traced.

    >>> search.choice([(64,), (64, 64)]).grid(2)
    [(64,), (64, 64)]
    """
    if isinstance(options, str) or not isinstance(options, Sequence | np.ndarray):
        raise TypeError(f"choice takes a list of options, got {options!r}: write choice([...])")
    found = tuple(_option(option) for option in options)
    if not found:
        raise ValueError("choice([]) has no options: write what there is to choose from")
    for i, option in enumerate(found):
        for other in found[:i]:
            if option == other or str(option) == str(other):  # Optuna has a tuple as its text
                raise ValueError(f"choice has {other!r} and {option!r}, which are equal: leave one out")
    if not static:
        for option in found:
            if not is_static_number(option):
                raise TypeError(
                    f"choice([... {option!r} ...], static=False) cannot be traced: a program takes numbers "
                    f"as arguments, and {option!r} is a {type(option).__name__}; leave out static=False, and a "
                    "program is compiled for each option"
                )
    return Dimension("choice", options=found, static=static)


def conditional(options: Mapping[str, Mapping[str, Any]]) -> Conditional:
    """A choice of kinds, each of which has hyper-parameters that the others do not have.

    In a space under the name P, the training function gets ``hparams[P]["kind"]`` and beside it those
    of that kind alone. Their paths are ``P/kind`` and ``P/<kind>/<name>``.

    Args:
      options: for each kind its hyper-parameters by name, which may be none.

    Raises:
      ValueError, TypeError: for no options, or kinds that are not strings.

    >>> optimizer = search.conditional({"sgd": {"momentum": search.uniform(0, 0.99)}, "adam": {}})
    >>> list(search.as_space({"optimizer": optimizer}).dimensions)
    ['optimizer/kind', 'optimizer/sgd/momentum']
    """
    if not isinstance(options, Mapping) or not all(isinstance(inner, Mapping) for inner in options.values()):
        raise TypeError(
            f"conditional takes hyper-parameters by name for each kind, got {options!r}: "
            'write conditional({"sgd": {"momentum": uniform(0, 0.99)}, "adam": {}})'
        )
    if not options:
        raise ValueError("conditional({}) has no kinds: write what there is to choose from")
    for kind, inner in options.items():
        if not isinstance(kind, str) or not kind or "/" in kind or kind == "kind":
            raise ValueError(f"conditional has the kind {kind!r}: use a text without '/', and not 'kind'")
        if "kind" in inner:
            raise ValueError(f"the kind {kind!r} of a conditional has a hyper-parameter 'kind': rename it")
    return Conditional({kind: dict(inner) for kind, inner in options.items()})


def _range(what: str, low: Any, high: Any) -> tuple[Any, Any]:
    for name, number in (("low", low), ("high", high)):
        if not is_static_number(number):
            raise TypeError(f"{what}({name}=...) must be a number, got {number!r}")
        if not math.isfinite(number):
            raise ValueError(f"{what}({low}, {high}) is not finite: give the bounds as finite numbers")
    if low > high:
        raise ValueError(f"{what}({low}, {high}) is inverted: write {what}({high}, {low})")
    if low == high:
        raise ValueError(
            f"{what}({low}, {high}) is empty: give two bounds, or choice([{low}]) to hold it fixed"
        )
    return (low.item() if isinstance(low, np.generic) else low), (
        high.item() if isinstance(high, np.generic) else high
    )


def _stepped(what: str, low: Any, high: Any, step: Any) -> tuple[Any, Any]:
    """The last value that the step reaches, and the step."""
    if not is_static_number(step) or not math.isfinite(step) or step <= 0:
        raise ValueError(f"{what}({low}, {high}, step={step!r}) needs a step above 0")
    if step > high - low:
        raise ValueError(
            f"{what}({low}, {high}, step={step}) is empty, since the step is longer than the range: "
            "take a shorter one"
        )
    low_, step_ = Decimal(str(low)), Decimal(str(step))
    last = low_ + int((Decimal(str(high)) - low_) / step_) * step_
    return (int(last), int(step)) if what == "integer" else (float(last), float(step))


def _option(option: Any) -> Value:
    if isinstance(option, np.generic):
        option = option.item()
    if isinstance(option, tuple):
        return tuple(_option(inner) for inner in option)
    if option is None or isinstance(option, str | bool | int | float):
        if isinstance(option, float) and not math.isfinite(option):
            raise ValueError(f"choice has {option!r} among its options: use finite numbers")
        return option
    raise TypeError(
        f"choice takes strings, numbers, bools, None and tuples of them, got {option!r}: name the options, "
        "and look them up in the training function"
    )
