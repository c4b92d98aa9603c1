"""What is kept of a trial: its hyper-parameters, seeds, history, health and origin, written in few writes."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from nnkit.search.finish import finish
from nnkit.search.score import health, score
from nnkit.train import runs
from nnkit.train.runs import plain

if TYPE_CHECKING:
    from nnkit.search.study import Study

__all__ = ["RECORD", "Trial", "configuration", "known", "tell", "tell_repeat", "trial_of"]

RECORD = "nnkit"
"""The user attribute, of a study and of a trial, that has what nnkit knows and Optuna does not."""


@dataclasses.dataclass(frozen=True, eq=False)
class Trial:
    """One trial of a study, as it was recorded. One that has not ended has no history and no values.

    Attributes:
      number: from 0 on, in the order in which trials were asked for.
      state: "complete", "pruned", "diverged" (the metric became inf or NaN), "failed", "running" or "waiting".
      hparams: nested, as the training function got them.
      params: the same by path.
      value: the mean of ``values``; for a trial that diverged inf, or -inf where a high metric is wanted.
      values: the metric of each member: (seeds,), with folds (seeds, folds).
      history: by name, (seeds, [folds,] epochs), or (seeds, [folds]) of what is no curve.
      seconds: of device time.
      health: see :func:`health`.
      seeds: one for each member.
      repeat_of: the trial of the same hyper-parameters whose numbers these are.
      device, versions, git: where and with what it was trained: see :func:`nnkit.train.runs.provenance`.
      how: "exact" or "mapped".
      stopped: after how many epochs a pruner stopped it.
      worker: who trained it.
      started, ended: by the clock of that machine.
      tested: what the test found, for the trial that was chosen.
    """

    number: int
    state: str
    hparams: dict[str, Any]
    params: dict[str, Any]
    value: float | None = None
    values: np.ndarray | None = None
    history: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    seconds: float | None = None
    health: dict[str, Any] = dataclasses.field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    repeat_of: int | None = None
    device: dict[str, Any] = dataclasses.field(default_factory=dict)
    versions: dict[str, Any] = dataclasses.field(default_factory=dict)
    git: dict[str, Any] = dataclasses.field(default_factory=dict)
    how: str | None = None
    stopped: int | None = None
    worker: str | None = None
    started: datetime | None = None
    ended: datetime | None = None
    tested: dict[str, Any] | None = None

    @property
    def finished(self) -> bool:
        return self.state not in ("running", "waiting")


def tell(
    study: Study,
    trial: Any,
    flat: Mapping[str, Any],
    finished: Any,
    *,
    provenance: Mapping[str, Any] | None = None,
    worker: str | None = None,
) -> Trial | None:
    """Writes what came of a trial: its record, and its state and value; see :func:`finish`.

    The value is the mean over seeds and folds of :func:`score`. Where that is inf or NaN the trial is
    recorded as diverged: for Optuna it is complete, with inf as the value (-inf where a high metric is
    wanted), so that a sampler learns from it.

    Args:
      study: from :func:`begin_study`.
      trial: Optuna's, from ``study.optuna.ask()``.
      flat: its hyper-parameters by path.
      finished: what the engine has for it: history, seconds, stopped, how.
      provenance: from :func:`nnkit.train.runs.provenance`, once for a process; None asks for it.
      worker: the name of the worker.

    Returns:
      What was recorded; None where the trial is no longer this worker's, because another one gave it up
      for lost: nothing is written then.

    Raises:
      ValueError: the history has no such metric.

    >>> study = search.begin_study({"lr": search.log_uniform(1e-5, 1.0)}, metric="val_loss")
    >>> trial = study.optuna.ask()
    >>> flat = study.space.suggest(trial)
    >>> finished = search.Finished(0, {"val_loss": np.array([[0.5, 0.25]])}, 0.1, stopped=None, how="exact")
    >>> told = search.tell(study, trial, flat, finished)
    >>> told.state, told.value, search.known(study, flat).number
    ('complete', 0.25, 0)
    """
    history = {name: np.asarray(a) for name, a in finished.history.items()}
    axes, stopped = study.axes, finished.stopped
    values = score(history, study.metric, study.at, study.mode, axes=axes, stopped=stopped)
    value, state = float(values.mean()), "complete" if stopped is None else "pruned"
    # A pruner stops one that diverged first of all, whatever its best epoch was.
    ends = score(history, study.metric, "last", axes=axes, stopped=stopped) if stopped is not None else values
    if not (math.isfinite(value) and np.isfinite(ends).all()):
        value, state = math.inf if study.mode == "min" else -math.inf, "diverged"
    origin = runs.provenance() if provenance is None else provenance
    found = Trial(
        number=trial.number,
        state=state,
        hparams=study.nested(flat),
        params=dict(flat),
        value=value,
        values=values,
        history=history,
        seconds=float(finished.seconds),
        health=health(history, axes=axes, stopped=stopped),
        seeds=study.seeds,
        how=finished.how,
        stopped=stopped,
        worker=worker,
        device=origin["device"],
        versions=origin["versions"],
        git=origin["git"],
    )
    return _written(study, trial, found)


def tell_repeat(
    study: Study, trial: Any, flat: Mapping[str, Any], original: Trial, *, worker: str | None = None
) -> Trial | None:
    """Writes the numbers of an earlier trial of the same hyper-parameters as those of ``trial``.

    Nothing was trained, so ``seconds`` is 0; everything else says where the numbers came from.

    >>> study = search.begin_study({"n": search.choice([1])}, metric="val_loss")
    >>> finished = search.Finished(0, {"val_loss": np.array([0.5])}, 0.1, stopped=None, how="exact")
    >>> first, second = study.optuna.ask(), study.optuna.ask()
    >>> original = search.tell(study, first, study.space.suggest(first), finished)
    >>> again = search.tell_repeat(study, second, study.space.suggest(second), original)
    >>> again.value, again.repeat_of
    (0.5, 0)
    """
    found = dataclasses.replace(
        original,
        number=trial.number,
        hparams=study.nested(flat),
        params=dict(flat),
        seconds=0.0,
        repeat_of=original.number,
        worker=worker,
        tested=None,
    )
    return _written(study, trial, found)


def known(study: Study, flat: Mapping[str, Any], *, refresh: bool = True) -> Trial | None:
    """The first trial of the study that was trained to its end with the same hyper-parameters, or None.

    Args:
      study: from :func:`begin_study`.
      flat: hyper-parameters by path; 1 and 1.0 and True are three different values.
      refresh: whether to ask the storage what other workers have finished; of the questions about one batch
        only the first need do so.

    >>> study = search.begin_study({"lr": search.log_uniform(1e-5, 1.0)}, metric="val_loss")
    >>> search.known(study, {"lr": 0.1}) is None
    True
    """
    return study.same_as(configuration(flat), refresh=refresh)


def configuration(flat: Mapping[str, Any]) -> str:
    """A text that two sets of hyper-parameters share if and only if they are the same."""
    return json.dumps(plain(dict(flat), "params"), sort_keys=True)


def _written(study: Study, trial: Any, found: Trial) -> Trial | None:
    pruned_at = found.stopped if found.state == "pruned" else None
    assert found.value is not None
    record = _record(found)
    if not finish(
        study.optuna, trial, found.value, worker=found.worker, pruned_at=pruned_at, attrs={RECORD: record}
    ):
        return None
    return study.remember(dataclasses.replace(found, started=trial.datetime_start, ended=datetime.now()))


_STATES = {
    "COMPLETE": "complete",
    "PRUNED": "pruned",
    "FAIL": "failed",
    "RUNNING": "running",
    "WAITING": "waiting",
}


_KEPT = ("seconds", "health", "repeat_of", "device", "versions", "git", "how", "stopped", "worker")
"""What a record has of a trial as it is."""


def _record(trial: Trial) -> dict[str, Any]:
    """What Optuna does not keep by itself, in JSON's own types."""
    return {
        "hparams": plain(trial.hparams, "hparams"),
        "params": plain(trial.params, "params"),
        "diverged": trial.state == "diverged",
        "seeds": list(trial.seeds),
        "values": _encoded(np.asarray(trial.values)),
        "history": {name: _encoded(a) for name, a in trial.history.items()},
        **{name: getattr(trial, name) for name in _KEPT},
    }


def trial_of(study: Study, frozen: Any, tested: dict[str, Any] | None = None) -> Trial:
    """The trial that Optuna's ``frozen`` one is the record of."""
    known: dict[str, Any] = {
        "number": frozen.number,
        "state": _STATES[frozen.state.name],
        "value": frozen.value,
        "started": frozen.datetime_start,
        "ended": frozen.datetime_complete,
        "tested": tested,
    }
    record = frozen.user_attrs.get(RECORD)
    # A worker that dies between its two writes leaves the record of a trial that was not told.
    if record is None or known["state"] not in ("complete", "pruned"):
        stored = frozen.params or frozen.system_attrs.get("fixed_params", {})
        params = {path: study.space.dimensions[path].restored(value) for path, value in stored.items()}
        whole = set(study.space.active(params)) <= params.keys()
        hparams = study.nested(params) if whole else {}
        return Trial(hparams=hparams, params=params, worker=frozen.user_attrs.get("worker"), **known)
    if record["diverged"]:
        known["state"] = "diverged"
    return Trial(
        hparams=_tuples(record["hparams"]),
        params=_tuples(record["params"]),
        seeds=tuple(record["seeds"]),
        values=_decoded(record["values"]),
        history={name: _decoded(a) for name, a in record["history"].items()},
        **{name: record[name] for name in _KEPT},
        **known,
    )


def _encoded(array: np.ndarray) -> dict[str, Any]:
    """An array in JSON, to the bit: a float as the float64 of the same value, NaN and inf by name."""
    values = array.astype(np.float64) if array.dtype.kind not in "iub" else array
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        nested = np.where(np.isfinite(values), values.astype(object), values.astype(str)).tolist()
    else:
        nested = values.tolist()
    return {"dtype": array.dtype.name, "values": nested}


def _decoded(encoded: Mapping[str, Any]) -> np.ndarray:
    dtype = np.dtype(encoded["dtype"])
    # Through float64, which has the value exactly: numpy reads the names of NaN and inf, ml_dtypes do not.
    return np.asarray(encoded["values"], dtype=dtype if dtype.kind in "iub" else np.float64).astype(dtype)


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were: a hyper-parameter is never a list."""
    if isinstance(value, Mapping):
        return {name: _tuples(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_tuples(item) for item in value)
    return value
