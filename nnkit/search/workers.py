"""Many workers on one study: who has which trial, and what becomes of the trials of one that died.

A trial keeps its number whatever happens to those that train it. It waits, or one worker has it, or it was
told; the storage makes each of these steps in one piece:

    created by a worker ───────────┐
                                   v
    waiting ──── claimed ────> running ──── told ────> complete or pruned
       ^                           │
       └── released, or reclaimed ─┘
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from nnkit.search.beats import Beats, owner, worker_name

if TYPE_CHECKING:
    import optuna

__all__ = ["Lease", "counted"]


class Lease:
    """A worker's share in a study: trials that it has, as long as it is seen to live.

    Any number of workers, on any number of machines, may hold one on the same study. Each beats every
    ``interval`` seconds and watches the others. What a dead one had is waiting again after ``grace`` seconds
    of silence, under its own number and with its parameters; at once where its process was on this machine.

    A worker that was only slow, or cut off, goes on undisturbed: if another one has its trial by then, what it
    tells is refused (:func:`finish` says so) and the other one's counts.

    Args:
      study: Optuna's, on a storage of :func:`nnkit.search.open_storage` (which is patient with its server, and
        makes claims atomic on SQLite).
      interval: seconds between two beats; each is one write.
      grace: seconds of silence after which a worker is dead; at least three intervals.

    >>> import optuna
    >>> study = optuna.create_study(storage=search.open_storage())
    >>> with search.Lease(study) as lease:
    ...     while not lease.finished(4):
    ...         found = lease.reclaim()
    ...         for trial in lease.ask(4, batch=3):
    ...             x = trial.suggest_float("x", 0, 1)
    ...             assert search.finish(study, trial, x, worker=lease.id)
    >>> [trial.number for trial in search.counted(study)]
    [0, 1, 2, 3]
    """

    def __init__(self, study: optuna.Study, *, interval: float = 10.0, grace: float = 60.0):
        if not 0 < interval < math.inf or not 3 * interval <= grace < math.inf:
            raise ValueError(
                f"Lease needs interval > 0 and grace >= 3 * interval, got interval={interval} and grace={grace}: a "
                "worker may miss a beat or two before it is taken for dead"
            )
        self.study, self.id = study, worker_name()
        self._storage, self._study_id = study._storage, study._study_id
        self._beats = Beats(study, self.id, interval, grace)
        self._pause = min(1.0, interval / 2)
        self._held: set[int] = set()

    def __enter__(self) -> Lease:
        self._beats.start()
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        # Where an error is on its way, one that comes of it (the storage is gone) must not hide it.
        with contextlib.suppress(Exception) if kind is not None else contextlib.nullcontext():
            try:
                self.release([trial._trial_id for trial in self._trials() if self._has(trial)])
            finally:
                self._beats.stop()

    def ask(
        self, target: int, batch: int, *, then: Callable[[optuna.Trial], object] | None = None
    ) -> list[optuna.Trial]:
        """Up to ``batch`` trials to train: of those that wait, or new ones where none does.

        Never both: what an adaptive sampler draws for new ones depends on the results that are there, and those
        of the trials that wait are to be among them.

        Of all trials that are not failed the first ``target`` are the study's, by number, however many workers
        ask at once: numbers are given one after the other, so whoever sees its own number sees all before
        it. A trial beyond them goes back to waiting, for a larger target.

        Args:
          target: how many trials the study shall have.
          batch: how many this worker takes at most.
          then: called with each trial before the next one is made, to suggest its parameters: Optuna's samplers
            draw for the next one with these in sight.

        Returns:
          the trials, fewer or none where the others have what is left: see :meth:`finished`.
        """
        from optuna import Trial, create_trial
        from optuna.trial import TrialState

        first = _first(self._trials(), target)
        mine: list[int] = []
        for trial in first:
            if len(mine) < batch and self._take(trial):
                mine.append(trial._trial_id)
        for _ in range(0 if mine else min(batch, target - len(first))):
            # In one piece with its owner: a worker that dies between the two would leave it to nobody.
            new = create_trial(state=TrialState.RUNNING, user_attrs={"worker": self.id})
            mine.append(self._storage.create_new_trial(self._study_id, new))
        self._held.update(mine)
        within = {trial._trial_id for trial in _first(self._trials(), target)}
        given: list[optuna.Trial] = []
        for trial_id in mine:
            if trial_id not in within:
                self._put_back(trial_id, self.id)
                continue
            # As Study.ask does: samplers keep what they have seen of the study for one trial.
            self.study._thread_local.cached_all_trials = None
            given.append(Trial(self.study, trial_id))
            if then is not None:
                then(given[-1])
        return given

    def reclaim(self) -> list[int]:
        """Puts the running trials of dead workers back to waiting; returns their numbers.

        Dead is a worker that was silent for longer than the grace as seen from here, or that has ended, or
        whose process on this machine is gone; and a running trial without an owner that anybody knows is
        given up after the same grace. Clocks of two machines are never compared.
        """
        running = [trial for trial in self._beats.look() if trial.state.name == "RUNNING"]
        abandoned = [trial for trial in running if self._beats.is_abandoned(trial)]
        return [trial.number for trial in abandoned if self._put_back(trial._trial_id, owner(trial))]

    def release(self, trials: Iterable[optuna.Trial | int]) -> None:
        """Puts ``trials`` back to waiting that were asked here and not told; by trial or by Optuna's id."""
        for trial in list(trials):
            self._put_back(trial if isinstance(trial, int) else trial._trial_id, self.id)

    def finished(self, target: int) -> bool:
        """Whether ``target`` trials were told, by whomever."""
        return len(counted(self.study)) >= target

    def pause(self) -> None:
        """Waits a moment: what there is to do is done by others, any of whom may die."""
        threading.Event().wait(self._pause)

    def _trials(self) -> list[optuna.trial.FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def _has(self, trial: optuna.trial.FrozenTrial) -> bool:
        return trial.state.name == "RUNNING" and owner(trial) == self.id

    def _take(self, trial: optuna.trial.FrozenTrial) -> bool:
        if trial.state.name == "WAITING":
            return _claim(self._storage, trial._trial_id, self.id)
        # Made by a call whose answer was lost with the connection.
        return self._has(trial) and trial._trial_id not in self._held

    def _put_back(self, trial_id: int, had: str | None) -> bool:
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        self._held.discard(trial_id)
        try:
            # Once more, as another one may have done the same, and a third may have it by now.
            trial = self._storage.get_trial(trial_id)
            if trial.state != TrialState.RUNNING or owner(trial) != had:
                return False
            # In this order: it must not wait with the name of a dead owner, or the next one's claim would be
            # taken for the dead one's before it has put its own name there.
            self._storage.set_trial_user_attr(trial_id, "worker", None)
            self._storage.set_trial_state_values(trial_id, TrialState.WAITING)
        except UpdateFinishedTrialError:
            return False  # It was slow and not dead, and has told.
        return True


def counted(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """The trials of ``study`` that were told, complete or pruned, by number."""
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state.name in ("COMPLETE", "PRUNED")]


def _first(trials: list[optuna.trial.FrozenTrial], target: int) -> list[optuna.trial.FrozenTrial]:
    return [trial for trial in trials if trial.state.name != "FAIL"][:target]


def _claim(storage: optuna.storages.BaseStorage, trial_id: int, worker: str) -> bool:
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import TrialState

    try:
        if not storage.set_trial_state_values(trial_id, TrialState.RUNNING):
            return False
        storage.set_trial_user_attr(trial_id, "worker", worker)
    except UpdateFinishedTrialError:
        return False
    return True
