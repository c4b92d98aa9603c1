"""What is seen of a search while it runs: a table on a terminal, lines elsewhere."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from nnkit.search.records import Trial
from nnkit.search.study import Study

__all__ = ["Board", "watched"]

ROWS = 10
_LINE_EVERY = 10.0
"""Seconds from one line of progress to the next, where no trial is better than all before."""


class Board:
    """The trials of a study as far as this worker knows them: what to show of them, and how long it will take.

    Args:
      study: whose trials they are.
      title: what the table is called.
      target: how many there are to be.
      max_time: after how many seconds this worker ends; None for never.
    """

    def __init__(self, study: Study, title: str, target: int, max_time: float | None = None):
        self.study, self.title, self.target, self.max_time = study, title, target, max_time
        self.trials: dict[int, Trial] = {}
        self.running = 0
        self._begun = self._looked = time.monotonic()
        self._looking = 0.0
        self._before: int | None = None
        self._first: tuple[float, int] | None = None
        self.look()
        self._before = self.done

    def look(self) -> None:
        """Reads the study: what other workers have done."""
        begun = time.monotonic()
        self.add(self.study.trials)
        self._looked = time.monotonic()
        self._looking = self._looked - begun

    def add(self, trials: Iterable[Trial]) -> None:
        """Takes trials in, in the place of what was known of them."""
        # A new mapping each time: the table is drawn by a thread of its own.
        self.trials = self.trials | {trial.number: trial for trial in trials}
        if self._first is None and self._before is not None and self.done > self._before:
            self._first = time.monotonic(), self.done

    def keep_up(self) -> None:
        """Reads the study again where that costs little beside the training that went on since."""
        if time.monotonic() - self._looked > 1 + 20 * self._looking:
            self.look()

    @property
    def done(self) -> int:
        """How many trials have ended and count."""
        return sum(trial.finished and trial.state != "failed" for trial in self.trials.values())

    @property
    def top(self) -> list[Trial]:
        """The best trials, the best first; none that diverged, was stopped early or repeats another."""
        sign = 1 if self.study.mode == "min" else -1
        ended = [t for t in self.trials.values() if t.state == "complete" and t.repeat_of is None]
        return sorted(ended, key=lambda t: (sign * (t.value or 0.0), t.number))[:ROWS]

    def left(self) -> float | None:
        """The seconds that this will take at the speed so far; None where nothing is known of it."""
        now, left = time.monotonic(), None
        # From the first trial on, before which is the compilation.
        if self._first is not None and self.done > self._first[1]:
            left = (now - self._first[0]) / (self.done - self._first[1]) * max(self.target - self.done, 0)
        if self.max_time is None:
            return left
        allowed = max(self.max_time - (now - self._begun), 0.0)
        return allowed if left is None else min(left, allowed)

    def counts(self) -> str:
        """How many trials have ended, and how."""
        states = Counter(trial.state for trial in self.trials.values())
        parts = [f"{self.done} of {self.target} done"]
        parts += [f"{states[name]} {name}" for name in ("diverged", "pruned", "failed") if states[name]]
        return ", ".join(parts)

    def status(self) -> str:
        """The same with those that run, and the time left."""
        parts = [self.counts()]
        if self.running:
            parts.append(f"{self.running} running")
        if self.done < self.target and (left := self.left()) is not None:
            parts.append(f"{_clock(left)} left")
        return ", ".join(parts)

    def rendered(self) -> Any:
        """The best trials and the line below them, for rich."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        top = self.top
        names = [*dict.fromkeys(name for trial in top for name in trial.params)]
        table = Table(title=Text(self.title), title_justify="left")
        for name in ("trial", self.study.metric, *names):
            table.add_column(Text(name), justify="right")
        for trial in top:
            values = [_shown(trial.params[name]) if name in trial.params else "" for name in names]
            table.add_row(*(Text(cell) for cell in (str(trial.number), _value(trial), *values)))
        return Group(table, Text(self.status()))


@contextmanager
def watched(board: Board) -> Iterator[Any]:
    """A callback for :func:`nnkit.search.sweep` that shows the board: as a table that changes, or by lines."""
    from rich.console import Console
    from rich.live import Live

    console = Console()
    if not console.is_terminal:
        yield _Lines(board, console)
        return
    with Live(console=console, refresh_per_second=4, get_renderable=board.rendered):
        yield _Watch(board, console)


class _Watch:
    """Takes in what the sweep tells."""

    def __init__(self, board: Board, console: Any):
        self.board, self._console = board, console

    def __call__(self, event: str, view: Any) -> None:
        board = self.board
        board.running = view.running
        if event == "start":
            self._say(view.choice)
        if view.trial is not None:
            board.add([view.trial])
        board.keep_up()

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class _Lines(_Watch):
    """As :class:`_Watch`, with a line where a trial is the best so far, and one now and then."""

    def __init__(self, board: Board, console: Any):
        super().__init__(board, console)
        self._best: int | None = None
        self._said = -math.inf

    def __call__(self, event: str, view: Any) -> None:
        super().__call__(event, view)
        board, now = self.board, time.monotonic()
        if event == "trial" and board.top and board.top[0].number != self._best:
            self._best = board.top[0].number
            self._say(f"{_in_a_line(board.top[0], board.study.metric)}; {board.status()}")
            self._said = now
        elif event == "end" or (event == "trial" and now - self._said > _LINE_EVERY):
            self._say(board.status())
            self._said = now


def _in_a_line(trial: Trial, metric: str) -> str:
    params = ", ".join(f"{name} {_shown(value)}" for name, value in trial.params.items())
    return f"trial {trial.number}: {metric} {_value(trial)} ({params})"


def _shown(value: Any) -> str:
    """A hyper-parameter's value in few letters."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _value(trial: Trial) -> str:
    if trial.value is None or trial.values is None:
        return ""
    spread = f" ± {trial.values.std(ddof=1):.2g}" if trial.values.size > 1 else ""
    return f"{trial.value:.5g}{spread}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
