"""A pytest plugin: a join of schedules that switches one step late, to see optax's own test fail."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import optax

from nnkit import optim


def late(schedules: Sequence[Any], boundaries: Sequence[int]) -> Any:
    """A wrong join."""
    return optim.join_schedules(schedules, [boundary + 1 for boundary in boundaries])


optax.schedules._join.join_schedules = late  # pyright: ignore[reportAttributeAccessIssue]
