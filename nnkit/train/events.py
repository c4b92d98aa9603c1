"""What a run tells while it runs: a few events, each with a view of where the run stands."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from nnkit.types import TrainState

__all__ = ["EVENTS", "Callback", "View", "check_callbacks"]

EVENTS = ("start", "chunk", "epoch", "checkpoint", "end")
"""The events of :func:`nnkit.train.fit`, in the order in which a run first meets them."""


@dataclasses.dataclass(frozen=True)
class View:
    """Where a run stands, as a callback sees it.

    ========== ==================================== ======================================
    event      when                                 metrics
    ========== ==================================== ======================================
    start      before the first step                {}
    chunk      after each dispatch of steps         the means over its steps
    epoch      after an epoch and its validation    the epoch's row
    checkpoint after a checkpoint was begun         the last row
    end        after the last step                  the last row
    ========== ==================================== ======================================

    Attributes:
      state: the run's state. Its buffers are used again by the next steps: copy what is to be kept.
      step: how many steps were taken.
      epoch: how many epochs are complete.
      metrics: see above.
      history: the rows of the epochs so far.
      folder: the run folder, or None.
      config: what the run was given as its configuration.
      reason: at the end, why it ended: "epochs", "max_steps", "max_time", "early stopping", "SIGTERM",
        "SIGINT" or what a callback passed to ``stop``.
      stop: ``stop("why")`` ends the run after this event.
    """

    state: TrainState
    step: int
    epoch: int
    metrics: Mapping[str, Any]
    history: list[dict[str, Any]]
    folder: Path | None
    config: Any
    reason: str | None
    stop: Callable[[str], None]


Callback: TypeAlias = Callable[[str, View], Mapping[str, Any] | None]
"""``callback(event, view)``. What it returns at an "epoch" is added to the epoch's row."""


def check_callbacks(callbacks: Any) -> tuple[Callback, ...]:
    """The callbacks as a tuple, or an error that says what was passed instead."""
    if callable(callbacks):
        callbacks = (callbacks,)
    if not isinstance(callbacks, Iterable):
        raise TypeError(
            f"callbacks must be functions of (event, view), got {type(callbacks).__name__}: pass callbacks=[f]"
        )
    found = tuple(callbacks)
    for callback in found:
        if not callable(callback):
            raise TypeError(
                f"callbacks must be functions of (event, view), got {type(callback).__name__} among them"
            )
    return found
