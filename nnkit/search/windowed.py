"""``CoarseToFine``: the search of :func:`coarse_to_fine` as a sampler of Optuna's protocol."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from optuna import Study
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from nnkit.search.coarse_to_fine import Rules, Tried, Window, moved, point, whole
from nnkit.search.dimension import Dimension, Value
from nnkit.search.sampling import DrawnSampler
from nnkit.search.sampling import turn as turn_among
from nnkit.search.space import Flat, Space

__all__ = ["CoarseToFine", "Round"]

_KEY = "nnkit:coarse-to-fine"
"""Under which each trial has the round and the window that it was drawn from."""


class Round(NamedTuple):
    """The trials that were drawn from one window."""

    number: int
    window: dict[str, tuple[Value, ...]]
    """By path: the least and the greatest value of a range, the options of a choice."""
    trials: list[int]
    """Their numbers."""


class CoarseToFine(DrawnSampler):
    """Made by :func:`coarse_to_fine`; all its state is the study's."""

    def __init__(self, space: Space, rules: Rules):
        super().__init__("coarse-to-fine", space, rules.seed, self._point)
        self.rules = rules
        self.batch = rules.points
        """How many trials are best asked together: a round, none of which could learn from another."""

    def window(self, study: Any) -> dict[str, tuple[Value, ...]]:
        """The window from which the next trial of ``study``, ours or Optuna's, is drawn, as in :class:`Round`."""
        study = getattr(study, "optuna", study)
        return self._values(self._current(study, study.get_trials(deepcopy=False))[1])

    def windows(self, study: Any) -> list[Round]:
        """The rounds of ``study`` so far, from the first on."""
        rounds: dict[int, Round] = {}
        for trial in getattr(study, "optuna", study).get_trials(deepcopy=False):
            if _KEY in trial.system_attrs:
                number, window = _noted(trial)
                rounds.setdefault(number, Round(number, self._values(window), [])).trials.append(trial.number)
        return [rounds[number] for number in sorted(rounds)]

    def _point(self, study: Study, trial: FrozenTrial, turn: int, given: Flat) -> Flat:
        earlier = [t for t in study.get_trials(deepcopy=False) if t.number < trial.number]
        if _KEY in trial.system_attrs:  # it was asked for by a process that died at this point
            at, window = _noted(trial)
        else:
            at, window = self._current(study, earlier)
            note = {"round": at, "window": window}
            # As Optuna's own samplers note what they need; the trial that a sampler sees has no method for it.
            study._storage.set_trial_system_attr(trial._trial_id, _KEY, note)
        first = min(
            (t.number for t in earlier if _KEY in t.system_attrs and _noted(t)[0] == at), default=None
        )
        index = 0 if first is None else turn - turn_among(earlier, first)
        return point(self.space, window, self.rules, at, index, turn, given)

    def _current(self, study: Study, trials: list[FrozenTrial]) -> tuple[int, Window]:
        """The round of the next point, and its window."""
        noted = {t.number: _noted(t) for t in trials if _KEY in t.system_attrs}
        if not noted:
            return 0, whole(self.space)
        at = max(number for number, _ in noted.values())
        of_round = [t for t in trials if t.number in noted and noted[t.number][0] == at]
        # Workers that begin a round at the same time may differ in what they have seen; the first one counts.
        window = noted[of_round[0].number][1]
        # One that was enqueued is no point of the round: each part of each scale is to have one.
        drawn = {t.number for t in trials if t.number in noted and "fixed_params" not in t.system_attrs}
        if sum(t.state.is_finished() for t in of_round if t.number in drawn) < self.rules.points:
            return at, window
        sign = 1.0 if study.direction == StudyDirection.MINIMIZE else -1.0
        tried = [
            Tried(self._flat(t), _score(t, sign), noted[t.number][1] if t.number in drawn else None)
            for t in trials
            if t.state.is_finished()
        ]
        return at + 1, moved(self.space, window, tried, self.rules)

    def _flat(self, trial: FrozenTrial) -> Flat:
        known = self.space.dimensions
        return {path: known[path].restored(v) for path, v in trial.params.items() if path in known}

    def _values(self, window: Window) -> dict[str, tuple[Value, ...]]:
        return {path: _ends(self.space.dimensions[path], side) for path, side in window.items()}


def _ends(dimension: Dimension, side: tuple[float, ...]) -> tuple[Value, ...]:
    if dimension.options is not None:
        return tuple(dimension.options[int(place)] for place in side)
    return tuple(dimension.at(end) for end in side)


def _noted(trial: FrozenTrial) -> tuple[int, Window]:
    note = trial.system_attrs[_KEY]
    return note["round"], {path: tuple(side) for path, side in note["window"].items()}


def _score(trial: FrozenTrial, sign: float) -> float | None:
    if trial.state != TrialState.COMPLETE or trial.value is None or not math.isfinite(trial.value):
        return None
    return sign * trial.value
