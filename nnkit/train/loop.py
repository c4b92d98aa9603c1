"""The loop on the host that a compiled run is driven by."""

from __future__ import annotations

import contextlib
import math
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from nnkit.optim import report
from nnkit.optim.plateau import monitors
from nnkit.train import stopping as early
from nnkit.train.epochs import Means, copied, dispatch
from nnkit.train.events import Callback, View
from nnkit.train.feed import Chunk, Feed
from nnkit.train.guard import NotFiniteError, not_finite
from nnkit.train.interrupt import Wish
from nnkit.train.journal import Journal
from nnkit.train.position import Position
from nnkit.train.progress import Progress
from nnkit.types import Trainer, TrainState

__all__ = ["Loop", "Plan"]

SNAPSHOT_SECONDS = 1.0
"""How old the state grows from which a step that is not finite is looked for."""
CHECKPOINT_SECONDS = 10.0
"""How long epochs go by unsaved where no number of steps is given."""
MOST_ROLLBACKS = 5
"""After so many a run that gives inf or NaN again ends."""
_LOOKS = frozenset({"explain", "roll_back"})


class Plan(NamedTuple):
    """What a run is to do, settled before it starts.

    Attributes:
      trainer: whose steps are taken.
      feed: where the batches come from.
      epochs: when it ends.
      max_steps: when it ends, or None.
      deadline: when it ends, on ``time.monotonic``'s clock, or inf.
      validate: the validation metrics of a state; None without validation.
      rule: of early stopping, or None.
      guard: "explain", "skip", "roll_back" or None.
      callbacks: functions of (event, view).
      journal: where it is recorded, or None.
      checkpoint_every: steps from one checkpoint to the next; None for the ends of epochs.
      score: the metric by which checkpoints are compared and its mode, or None.
      keep_best: how many checkpoints are kept for their score.
      config: what callbacks are shown.
    """

    trainer: Trainer
    feed: Feed
    epochs: int
    max_steps: int | None
    deadline: float
    validate: Callable[[TrainState], Mapping[str, float]] | None
    rule: early.EarlyStopping | None
    guard: str | None
    callbacks: tuple[Callback, ...]
    journal: Journal | None
    checkpoint_every: int | None
    score: tuple[str, str] | None
    keep_best: int
    config: Any


class _RolledBack(Exception):
    """The epoch begins again from an earlier state."""


class Loop:
    """One run: the state, what was settled of it, and what is still being computed."""

    def __init__(self, plan: Plan, position: Position, bar: Progress, wish: Wish):
        self.plan, self.bar, self.wish = plan, bar, wish
        self.reason: str | None = None
        self._start_from(position)
        self._saved, self._saved_at = self.step, time.monotonic()
        self._snapshot, self._snapshot_at = None, time.monotonic()
        if plan.guard in _LOOKS:
            self._snapshot = self._position(apart=True)

    def _start_from(self, position: Position) -> None:
        self.ts = position.ts._replace(stopping=())
        self.stopping = position.ts.stopping
        self.step = int(position.ts.step)
        self.means = Means(position.sums)
        self.rows = list(position.rows)
        self.rate_scale, self.rollbacks = position.rate_scale, position.rollbacks
        self._waiting: tuple[Chunk, Any, Any] | None = None
        self._last: dict[str, float] = {}
        self._begun = time.perf_counter()

    @property
    def state(self) -> TrainState:
        """The state with what early stopping remembers."""
        return self.ts._replace(stopping=self.stopping)

    def _position(self, *, apart: bool = False) -> Position:
        state = copied(self.state) if apart else self.state
        return Position(state, dict(self.means.sums), list(self.rows), self.rate_scale, self.rollbacks)

    def run(self) -> tuple[TrainState, list[dict[str, Any]]]:
        """Goes on to the end, and returns the state and the history."""
        try:
            self._run()
        except NotFiniteError:
            raise  # the state is not worth saving
        except Exception as error:
            self._rescue(error)
            raise
        rule, state = self.plan.rule, self.state
        return (state if rule is None else early.restored(rule, self.stopping, state)), self.rows

    def _run(self) -> None:
        self._tell("start", {})
        if self.means.sums and self.step % self.plan.feed.steps == 0:
            self._end_epoch()  # an error came between the epoch's last step and its row
        while self._end_reached() is None:
            try:
                self._epoch()
            except _RolledBack:
                continue
        self.reason = self._end_reached()
        self._save()
        self._end_part()
        if self.wish.signal is not None:
            self._interrupted()
        self._tell("end", self.rows[-1] if self.rows else {})

    def _end_reached(self) -> str | None:
        plan = self.plan
        if self.reason is not None:
            return self.reason
        if plan.rule is not None and bool(self.stopping.stopped):
            return "early stopping"
        if plan.max_steps is not None and self.step >= plan.max_steps:
            return "max_steps"
        if self.step >= plan.epochs * plan.feed.steps:
            return "epochs"
        return "max_time" if time.monotonic() >= plan.deadline else None

    def _epoch(self) -> None:
        """The steps that are left of an epoch, or as many as there may be."""
        plan = self.plan
        epoch, at = divmod(self.step, plan.feed.steps)
        for chunk in plan.feed.chunks(self.ts.key, epoch, at):
            if plan.max_steps is not None:
                chunk = chunk._replace(steps=min(chunk.steps, plan.max_steps - self.step))
            self.ts, metrics, finite = dispatch(plan.trainer, self.ts, chunk, rate_scale=self.rate_scale)
            self.step += chunk.steps
            before, self._waiting = self._waiting, (chunk, metrics, finite)
            if before is not None:
                self._settle(*before)  # one behind, so that the device is never idle
            at += chunk.steps
            if self._between(at == plan.feed.steps):
                break
        self._settle_all()
        if at == plan.feed.steps:
            self._end_epoch()

    def _settle_all(self) -> None:
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            self._settle(*waiting)

    def _settle(self, chunk: Chunk, metrics: Any, finite: Any) -> None:
        """Takes in what a dispatch computed, once it has."""
        if self.plan.guard in _LOOKS and not bool(finite):
            self._not_finite()
        loss = self.means.add(chunk, metrics)
        self.bar.advance(chunk.steps, loss)
        if self.plan.callbacks:
            of_chunk = Means()
            of_chunk.add(chunk, metrics)
            self._last = of_chunk.values()

    def _between(self, at_end: bool) -> bool:
        """What is due after a dispatch; whether the epoch is to be left."""
        plan, now = self.plan, time.monotonic()
        due = plan.checkpoint_every is not None and self._every_passed()
        # A clock must not decide what a run goes back to, only what is replayed to explain its end.
        old = plan.guard == "explain" and now - self._snapshot_at > SNAPSHOT_SECONDS
        if self.plan.callbacks or due or old or self.wish.signal is not None:
            self._settle_all()
        if self.plan.callbacks:
            self._tell("chunk", self._last)
        if old:
            self._snapshot, self._snapshot_at = self._position(apart=True), now
        if at_end:
            return False  # the end of an epoch is saved with its row
        if due:
            self._save()
        if self.wish.signal is not None:
            self._interrupted()
        return self._end_reached() is not None

    def _every_passed(self) -> bool:
        every = self.plan.checkpoint_every
        return every is not None and self.step // every > self._saved // every

    def _end_epoch(self) -> None:
        plan = self.plan
        means = self.means.values()
        if plan.validate is not None:
            means |= {f"val_{name}": value for name, value in plan.validate(self.ts).items()}
        self.ts = self.ts._replace(opt_state=report(self.ts.opt_state, means))
        if plan.rule is not None:
            self.stopping = early.update(plan.rule, self.stopping, self.ts, means)
        self.means = Means()
        self._add_row(self.step // plan.feed.steps, means)
        self._begun = time.perf_counter()
        if plan.guard == "roll_back" or (plan.guard == "explain" and monitors(self.ts.opt_state)):
            # A replay of steps does not repeat what the optimizer was told between them.
            self._snapshot, self._snapshot_at = self._position(apart=True), time.monotonic()
        if plan.checkpoint_every is None:
            due = time.monotonic() - self._saved_at > CHECKPOINT_SECONDS
        else:
            due = self._every_passed()
        if due or self._is_best():
            self._save()
        if self.wish.signal is not None:
            self._interrupted()

    def _end_part(self) -> None:
        """The row of an epoch that the run's end left incomplete; no rule takes it into account."""
        if not self.means.sums:
            return
        means = self.means.values()
        if self.plan.validate is not None:
            means |= {f"val_{name}": value for name, value in self.plan.validate(self.ts).items()}
        self._add_row(self.step // self.plan.feed.steps + 1, means)

    def _add_row(self, epoch: int, means: Mapping[str, Any]) -> None:
        row = {"epoch": epoch, "step": self.step, **means, "seconds": time.perf_counter() - self._begun}
        self.rows.append(row)
        self.bar.epoch(row)
        self._tell("epoch", row)
        if self.plan.journal is not None:
            self.plan.journal.append(self.rows[-1])

    def _is_best(self) -> bool:
        """Whether the last row is among those with the best scores, whose checkpoints are kept."""
        if self.plan.score is None:
            return False
        name, mode = self.plan.score
        sign = 1 if mode == "min" else -1
        *before, last = (sign * float(row.get(name, math.nan)) for row in self.rows)
        better = sum(value <= last for value in before)  # NaN is not
        return not math.isnan(last) and better < self.plan.keep_best

    def _save(self) -> None:
        journal = self.plan.journal
        if journal is None or self._saved == self.step:
            return
        at_end_of_epoch = not self.means.sums and self.rows
        score = (
            float(self.rows[-1].get(self.plan.score[0], math.nan))
            if self.plan.score and at_end_of_epoch
            else None
        )
        journal.save(self._position(), score=score)
        self._saved, self._saved_at = self.step, time.monotonic()
        self._tell("checkpoint", self.rows[-1] if self.rows else {})

    def _rescue(self, error: Exception) -> None:
        """Saves what there is of a run that an error ends."""
        journal = self.plan.journal
        if journal is None:
            return
        try:
            with contextlib.suppress(_RolledBack):
                self._settle_all()
            if self._saved != self.step:
                journal.save(self._position(), score=None)
            journal.close()
        except Exception as second:
            error.add_note(f"the run at step {self.step} could not be saved: {second}")
        else:
            if self.step > 0:
                error.add_note(f"the run is saved at step {self.step}: {_go_on(journal)}")

    def _interrupted(self) -> None:
        """Saves, and ends as the signal asks. Without a run folder signals are not caught."""
        journal, signal = self.plan.journal, self.wish.signal
        assert journal is not None
        assert signal is not None
        self._save()
        journal.close()
        self.reason = signal.name
        self._tell("end", self.rows[-1] if self.rows else {})
        message = f"{signal.name}: the run is saved at step {self.step}; {_go_on(journal)}"
        print(message, file=sys.stderr)
        self.wish.grant(message)

    def _not_finite(self) -> None:
        """Goes back to the last good state, or says where it went wrong."""
        assert self._snapshot is not None
        if self.plan.guard == "roll_back" and self.rollbacks < MOST_ROLLBACKS:
            scale, rollbacks = (self.rate_scale or 1.0) / 2, self.rollbacks + 1
            self._start_from(self._snapshot._replace(ts=copied(self._snapshot.ts)))
            self.rate_scale, self.rollbacks, self._saved = scale, rollbacks, -1
            warnings.warn(
                f"a loss or parameter became inf or NaN: back at step {self.step}, with {scale:g} of the rate",
                stacklevel=2,
            )
            if self.plan.journal is not None:
                self.plan.journal.show(self.rows)
            raise _RolledBack
        raise not_finite(
            self.plan.trainer, self._snapshot.ts, self.plan.feed, self.rate_scale, until=self.step
        )

    def _tell(self, event: str, metrics: Mapping[str, Any]) -> None:
        if not self.plan.callbacks:
            return
        for callback in self.plan.callbacks:
            view = View(
                state=self.state,
                step=self.step,
                epoch=self.step // self.plan.feed.steps,
                metrics=metrics,
                history=self.rows,
                folder=None if self.plan.journal is None else self.plan.journal.folder,
                config=self.plan.config,
                reason=self.reason,
                stop=self._stop,
            )
            try:
                more = callback(event, view)
            except Exception as error:
                error.add_note(
                    f"raised by the callback {getattr(callback, '__name__', callback)!r} at {event!r}"
                )
                raise
            if event == "epoch" and more is not None:
                self.rows[-1].update(_columns(more, self.rows[-1], callback))

    def _stop(self, reason: str) -> None:
        self.reason = str(reason)


def _columns(more: Any, row: Mapping[str, Any], callback: Callback) -> dict[str, Any]:
    """What a callback adds to a row, if it can be written there."""
    who = f"the callback {getattr(callback, '__name__', callback)!r}"
    if not isinstance(more, Mapping):
        raise TypeError(
            f"{who} returned a {type(more).__name__} at 'epoch': return a dict of numbers, or None"
        )
    for name, value in more.items():
        if not isinstance(name, str) or not name or not name.isprintable():
            raise ValueError(f"{who} returned {name!r} as the name of a metric: use printable text")
        if name in row:
            raise ValueError(f"{who} returned {name!r}, which the row has already: choose another name")
        if value is not None and (isinstance(value, str) or np.shape(value) != ()):
            raise TypeError(f"{who} returned {name}={value!r}: a row has one number under each name")
    # Numbers of Python's, which a checkpoint keeps.
    return {name: value if value is None else np.asarray(value).item() for name, value in more.items()}


def _go_on(journal: Journal) -> str:
    return f"go on with fit(..., run_dir={str(journal.folder)!r}, resume=True)"
