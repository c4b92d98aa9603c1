"""Random numbers that are a function of what they are for, so that no process has to remember any."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from nnkit.checks import is_static_number
from nnkit.search.space import Flat, Space

__all__ = ["check_whole", "fill", "generator", "share", "whole_number"]


def generator(*seeds: int | str) -> np.random.Generator:
    """Random numbers that depend on all of ``seeds`` and on nothing else."""
    return np.random.default_rng([zlib.crc32(s.encode()) if isinstance(s, str) else s for s in seeds])


def share(*seeds: int | str) -> float:
    """A random number in [0, 1)."""
    return float(generator(*seeds).random())


def whole_number(*seeds: int | str) -> int:
    """A seed for another library, below 2**31."""
    return int(generator(*seeds).integers(2**31 - 1))


def fill(space: Space, given: Mapping[str, Any], value: Callable[[str], Any]) -> Flat:
    """``given`` with ``value(path)`` for each active hyper-parameter that it lacks.

    >>> space = search.as_space({"lr": search.uniform(0, 1), "seed": search.integer(1, 9)})
    >>> fill(space, {"seed": 3}, lambda path: space.dimensions[path].at(0.5))
    {'seed': 3, 'lr': 0.5}
    """
    flat = dict(given)
    for path in space.dimensions:  # a conditional's kind comes before what depends on it
        if path not in flat and path in space.active(flat):
            flat[path] = value(path)
    return flat


def check_whole(what: str, number: Any, least: int) -> None:
    """Raises unless ``number`` is a whole one from ``least`` on; ``what`` begins the message."""
    if not is_static_number(number) or number != int(number) or number < least:
        raise ValueError(f"{what} must be a whole number from {least} on, got {number!r}")
