"""What a trainer's own check says against a batch, and against which rows of it."""

from __future__ import annotations

from typing import Any

import jax

from nnkit.types import Trainer, TrainState

__all__ = ["refused", "refused_rows"]

_MOST_CHECKS = 200
"""How often a trainer's check is called to find the rows that it refuses; one call takes some milliseconds."""


def refused(trainer: Trainer, ts: TrainState, batch: Any) -> str:
    """What the trainer's check says against a batch; "" where nothing."""
    try:
        trainer.check(ts, batch)
    except (TypeError, ValueError) as error:
        return str(error)
    return ""


def refused_rows(trainer: Trainer, ts: TrainState, batch: Any, size: int | None) -> tuple[int, ...] | None:
    """The rows that are refused, by halving the batch; None where they cannot be told."""
    found: list[int] = []
    parts = [(0, size)] if size else []
    for _ in range(_MOST_CHECKS):
        if not parts:
            break
        start, end = parts.pop()
        if not refused(trainer, ts, jax.tree.map(lambda x, a=start, b=end: x[a:b], batch)):
            continue
        if end - start == 1:
            found.append(start)
        else:
            middle = (start + end) // 2
            parts += [(middle, end), (start, middle)]
    return None if parts or not found else tuple(found)
