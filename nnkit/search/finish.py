"""The end of a trial in its storage: one read, two writes, and nothing where the trial is somebody else's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import optuna

__all__ = ["finish"]


def finish(
    study: optuna.Study,
    trial: optuna.Trial,
    value: float,
    *,
    worker: str | None = None,
    pruned_at: int | None = None,
    attrs: Mapping[str, Any] | None = None,
) -> bool:
    """Writes the user attributes ``attrs`` of a running trial, and then its state and value.

    ``study.tell`` does the same with three reads more, each of six queries on a database.

    Args:
      study: Optuna's.
      trial: from ``ask``.
      value: the objective; inf for a trial that diverged.
      worker: the :class:`Lease`'s id; None where there are no other workers.
      pruned_at: after how many epochs the trial was pruned, and None of one that was not.
      attrs: in JSON's own types.

    Returns:
      whether it counts. It does not where the trial was taken from the worker, which was silent for too long,
      and somebody else has it or has told it: then nothing is changed.

    >>> import optuna
    >>> study = optuna.create_study(storage=search.open_storage())
    >>> trial = study.ask()
    >>> search.finish(study, trial, 0.5, attrs={"note": "the first"})
    True
    >>> search.finish(study, trial, 0.4)
    False
    """
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import TrialState

    if math.isnan(value):
        raise ValueError(f"trial {trial.number} cannot be told the value nan: tell inf for one that diverged")
    storage, trial_id, attrs = study._storage, trial._trial_id, dict(attrs or {})
    state = TrialState.COMPLETE if pruned_at is None else TrialState.PRUNED
    try:
        if worker is not None and not _has(storage, trial_id, worker):
            return False
        for name, content in attrs.items():
            storage.set_trial_user_attr(trial_id, name, content)
        if pruned_at is not None and math.isfinite(value):
            # TPE ranks pruned trials by it, and the dashboard shows it.
            storage.set_trial_intermediate_value(trial_id, pruned_at, value)
        _show_sampler(study, trial_id, state, value)
        storage.set_trial_state_values(trial_id, state, [value])
    except UpdateFinishedTrialError:
        # Told by this worker with the answer lost on the way, or by another one in this very moment.
        now = storage.get_trial(trial_id)
        ours = attrs if worker is None else {**attrs, "worker": worker}
        same = (now.state, now.value) == (state, value)
        return same and now.user_attrs == {**now.user_attrs, **ours}
    return True


def _has(storage: optuna.storages.BaseStorage, trial_id: int, worker: str) -> bool:
    from optuna.trial import TrialState

    from nnkit.search.beats import owner
    from nnkit.search.workers import _claim

    now = storage.get_trial(trial_id)
    # One that waits was given up, but nobody has begun it anew: the work is not lost.
    return _claim(storage, trial_id, worker) if now.state == TrialState.WAITING else owner(now) == worker


def _show_sampler(study: optuna.Study, trial_id: int, state: Any, value: float) -> None:
    """What ``study.tell`` does for a sampler that looks at each trial that has ended."""
    from optuna.samplers import BaseSampler

    sampler = study.sampler
    if type(sampler).after_trial is BaseSampler.after_trial:
        return
    try:
        sampler.after_trial(study, study._storage.get_trial(trial_id), state, [value])
    except RuntimeError as error:
        # Optuna's grid asks for the end of Optuna's own loop once it is exhausted, and here is none.
        if "Study.stop" not in str(error):
            raise
