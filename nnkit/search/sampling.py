"""What Optuna's samplers and ours have in common: a trial's draw is a function of the seed and the study.

Optuna's samplers keep a random state in the process, so two workers with one seed draw the same points, and
a resumed study draws others than one that ran through. Here each draw has randomness of its own, made of
the seed and the trial's turn. This module imports Optuna, and is imported where a sampler is made.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Sequence
from typing import Any

import numpy as np
from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from nnkit.search.draws import share, whole_number
from nnkit.search.space import Flat, Space

__all__ = ["DrawnSampler", "FreshSampler", "on_one_thread", "relative_draw", "turn", "turn_of"]

Draw = Callable[[Study, FrozenTrial, int, Flat], Flat]
"""(study, trial, its turn, values that are given) -> the values of all active hyper-parameters by path."""


class DrawnSampler(BaseSampler):
    """A sampler of Optuna's protocol that is one function, for all hyper-parameters of a space at once."""

    def __init__(self, name: str, space: Space, seed: int, draw: Draw):
        self.name, self.space, self.seed, self.draw = name, space, seed, draw
        self._distributions = {path: d.distribution() for path, d in space.dimensions.items()}

    def __str__(self) -> str:
        return self.name

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._distributions

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        given = {
            path: self.space.dimensions[path].restored(value)
            for path, value in trial.system_attrs.get("fixed_params", {}).items()
            if path in self.space.dimensions
        }
        drawn = self.draw(study, trial, turn_of(study, trial), given)
        return {path: self.space.dimensions[path].stored(value) for path, value in drawn.items()}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        raise ValueError(
            f"the sampler {self.name!r} was made for another space, which has no {param_name!r}: "
            "make it with the space of the study"
        )


class FreshSampler(BaseSampler):
    """A sampler made anew for each trial by ``make(seed)``, so that no random state outlives a trial."""

    def __init__(self, make: Callable[[int], BaseSampler], seed: int):
        self.make, self.seed = make, seed
        # While a trial's parameters are drawn one by one, they must not all get the first random number.
        self._of_trial: dict[int, BaseSampler] = {}

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._of(study, trial).before_trial(study, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._of(study, trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._of(study, trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._of(study, trial).sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        self._of(study, trial).after_trial(study, trial, state, values)
        self._of_trial.pop(trial.number, None)

    def _of(self, study: Study, trial: FrozenTrial) -> BaseSampler:
        if trial.number not in self._of_trial:
            self._of_trial[trial.number] = self.make(whole_number(self.seed, turn_of(study, trial)))
        return self._of_trial[trial.number]


def turn_of(study: Study, trial: FrozenTrial) -> int:
    """How many trials were drawn before this one: its number, less those that were enqueued with their values."""
    return turn(study.get_trials(deepcopy=False), trial.number)


def turn(trials: Sequence[FrozenTrial], number: int) -> int:
    """:func:`turn_of` the trial with that number among ``trials``."""
    return sum(earlier.number < number and "fixed_params" not in earlier.system_attrs for earlier in trials)


def relative_draw(
    space: Space,
    make: Callable[[int], BaseSampler],
    seed: int,
    *,
    robust: bool = False,
    renumbered: bool = False,
) -> Draw:
    """The draw of a sampler of Optuna's that models hyper-parameters jointly.

    Those that every trial has are drawn together; then for each conditional those of the chosen kind, from the
    trials that had it. Before Optuna's sampler has enough trials it answers nothing, and random values are taken.

    Args:
      space: where to draw.
      make: seed -> Optuna's sampler.
      seed: of the whole search.
      robust: whether values far worse than most are brought nearer, for models of values, not of their order.
      renumbered: whether the sampler seeds itself with the trial's number, which a kill changes.
    """

    def draw(study: Study, trial: FrozenTrial, turn: int, flat: Flat) -> Flat:
        flat = dict(flat)
        if renumbered:
            trial = copy.copy(trial)
            trial.number = turn
        while group := [path for path in space.active(flat) if path not in flat]:
            distributions = {path: space.dimensions[path].distribution() for path in group}
            wanted = {path: d for path, d in distributions.items() if not d.single()}
            sampler = make(whole_number(seed, turn, group[0]))
            found = (
                sampler.sample_relative(_Seen(study, wanted, robust=robust), trial, wanted) if wanted else {}
            )
            for path in group:
                dimension = space.dimensions[path]
                known = path in found
                flat[path] = (
                    dimension.restored(found[path]) if known else dimension.at(share(seed, turn, path))
                )
        return flat

    return draw


def on_one_thread(draw: Draw) -> Draw:
    """``draw`` with PyTorch on one thread: a model of some dozen trials is matrices of some dozen rows.

    Beside other work on two cores, 26 draws took 8 s so, and 36 s with two threads.
    """
    import torch

    def drawn(study: Study, trial: FrozenTrial, turn: int, given: Flat) -> Flat:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return draw(study, trial, turn, given)
        finally:
            torch.set_num_threads(before)

    return drawn


class _Seen(Study):
    """A study of which a sampler sees the trials that have some hyper-parameters, all with finite values.

    A trial that diverged has an infinite value, which a model of the values cannot take: it becomes the
    worst finite one.
    """

    def __init__(self, study: Study, paths: Container[str], *, robust: bool):
        self.__dict__.update(study.__dict__)
        self._paths, self._robust = frozenset(paths), robust  # pyright: ignore[reportArgumentType]

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        found = [
            t for t in super()._get_trials(deepcopy, states, use_cache) if self._paths <= t.params.keys()
        ]
        sign = 1.0 if self.direction == StudyDirection.MINIMIZE else -1.0
        values = [sign * t.value for t in found if t.state == TrialState.COMPLETE and t.value is not None]
        worst = _worst(np.array([v for v in values if np.isfinite(v)]), robust=self._robust)
        return [_presented(t, sign, worst) for t in found]


def _worst(finite: np.ndarray, *, robust: bool) -> float:
    """The value from which on all are alike, where low is good."""
    if not len(finite):
        return 0.0
    if not robust:
        return float(finite.max())
    # Tukey's fence: a loss of 1e9 would leave a model of the values blind to differences of 0.1.
    low, high = np.quantile(finite, [0.25, 0.75])
    return float(min(finite.max(), high + 1.5 * (high - low)))


def _presented(trial: FrozenTrial, sign: float, worst: float) -> FrozenTrial:
    if trial.state == TrialState.RUNNING and trial.system_attrs:
        trial = copy.copy(trial)
        trial.system_attrs = {}  # where samplers note a part of what its params have in full
    elif trial.state == TrialState.COMPLETE and trial.value is not None and sign * trial.value > worst:
        trial = copy.copy(trial)
        trial.values = [sign * worst]
    return trial
