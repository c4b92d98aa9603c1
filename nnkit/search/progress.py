"""What a sweep shows while it runs: one line on a terminal, nothing elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from nnkit.search.boundary import boundary_warnings
from nnkit.search.records import Trial
from nnkit.search.study import Study

__all__ = ["Callback", "View", "line"]


class View(NamedTuple):
    """What a callback of :func:`sweep` sees.

    Attributes:
      study: the record.
      trial: the one that was just told; None for other events.
      target: how many trials were asked for.
      done: how many of the study's are finished, those of other workers included as far as they are known.
      running: how many this worker has begun and not finished.
      choice: how trials are run, in a sentence.
      seconds: since the sweep began.
    """

    study: Study
    trial: Trial | None
    target: int
    done: int
    running: int
    choice: str
    seconds: float


Callback = Callable[[str, View], Any]
"""Called with "start", then "batch" before each batch is run, "trial" after each trial, and "end"."""


def line(show: bool | None) -> Callback | None:
    """The callback that writes the line.

    Args:
      show: True, False, or None for "on a terminal".
    """
    if show is False or (show is None and not sys.stderr.isatty()):
        return None
    return _Line()


class _Line:
    """Writes at most ten times a second, so that it costs nothing beside trials of milliseconds."""

    def __init__(self) -> None:
        self._best: Trial | None = None
        self._written, self._width, self._begun_with = 0.0, 0, 0

    def __call__(self, event: str, view: View) -> None:
        if event == "start":
            print(view.choice, file=sys.stderr)
            self._begun_with = view.done
            self._best = next(iter(view.study.top(1)), None)
        if event == "trial" and view.trial is not None:
            self._take(view.trial, view.study.mode)
        if event == "end" or time.monotonic() - self._written > 0.1:
            self._written = time.monotonic()
            text = self._text(view)
            end = "\n" if event == "end" else ""
            print(f"\r{text:<{self._width}}", end=end, file=sys.stderr, flush=True)
            self._width = len(text)
        if event == "end" and self._best is not None:
            for warning in boundary_warnings(view.study):
                print(warning, file=sys.stderr)

    def _take(self, trial: Trial, mode: str) -> None:
        if trial.state != "complete" or trial.value is None:
            return
        sign = 1 if mode == "min" else -1
        if self._best is None or self._best.value is None or sign * trial.value < sign * self._best.value:
            self._best = trial

    def _text(self, view: View) -> str:
        parts = [f"trial {view.done}/{view.target}"]
        if self._best is not None:
            parts.append(f"best {view.study.metric} {self._best.value:.4g} (trial {self._best.number})")
        parts.append(f"{view.seconds:.0f} s")
        here = view.done - self._begun_with
        if here > 0 and view.done < view.target:
            parts.append(f"{(view.target - view.done) * view.seconds / here:.0f} s left")
        return ", ".join(parts)
