"""``Study``: the record of a search, made or joined by any number of workers, and what is read from it."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nnkit.checks import unknown_name
from nnkit.search.joining import agree, make
from nnkit.search.records import RECORD, Trial, configuration, trial_of
from nnkit.search.space import Space, as_space, space_of
from nnkit.search.storage import open_storage, require_optuna, shown

if TYPE_CHECKING:
    import optuna

__all__ = ["FILE", "Study", "begin_study", "open_study"]

FILE = "study.db"
"""The SQLite file in a run folder."""

NAME = "search"
"""The name of a study that was not given one."""


class Study:
    """The trials of a search, and what was asked of it; from :func:`sweep` or :func:`open_study`.

    It reads what is in the storage at the moment, so it also follows a search that others carry on.
    ``optuna`` is Optuna's study, for its own tools.

    >>> study = search.begin_study({"lr": search.log_uniform(1e-5, 1.0)}, metric="val_loss", mode="min")
    >>> study.name, study.metric, study.seeds, len(study.trials)
    ('search', 'val_loss', (0,), 0)
    """

    def __init__(self, study: optuna.Study, folder: Path | None, where: str):
        asked = study.user_attrs[RECORD]
        self.optuna = study
        self.folder = folder
        self.where = where
        self.space_spec: dict[str, Any] = asked["space"]
        self.space: Space = space_of(asked["space"])
        self.metric: str = asked["metric"]
        self.mode: Literal["min", "max"] = asked["mode"]
        self.at: Literal["last", "best"] = asked["at"]
        self.seeds: tuple[int, ...] = tuple(asked["seeds"])
        self.folds: int | None = asked["folds"]
        self.sampler: str = asked["sampler"]
        self._ended: dict[int, Trial] = {}
        self._first: dict[str, int] = {}

    @property
    def name(self) -> str:
        return self.optuna.study_name

    @property
    def axes(self) -> int:
        """How many axes number the members of a trial: seeds, and with folds those."""
        return 1 if self.folds is None else 2

    @property
    def trials(self) -> list[Trial]:
        """All trials in the order of their numbers, those that run or failed included."""
        found = [self._trial(frozen) for frozen in self._frozen()]
        tested = self._tested()
        return [
            dataclasses.replace(trial, tested=tested[trial.number]) if trial.number in tested else trial
            for trial in found
        ]

    @property
    def best(self) -> Trial:
        """The complete trial with the best value, of equal ones the first; never one that diverged.

        Raises:
          ValueError: there is none.
        """
        top = self.top(1)
        if not top:
            counts = Counter(trial.state for trial in self.trials)
            there = ", ".join(f"{n} {state}" for state, n in counts.items()) or "no trials"
            raise ValueError(f"the study {self.name!r} has no trial with a finite {self.metric} yet: {there}")
        return top[0]

    def top(self, k: int) -> list[Trial]:
        """The ``k`` best trials that are complete, best first; repeats of another one are left out."""
        sign = 1 if self.mode == "min" else -1
        done = [
            t for t in self.trials if t.state == "complete" and t.repeat_of is None and t.value is not None
        ]
        return sorted(done, key=lambda t: (sign * (t.value or 0.0), t.number))[:k]

    def nested(self, flat: Mapping[str, Any]) -> dict[str, Any]:
        """Hyper-parameters by path as the training function sees them."""
        return self.space.nested(flat)

    def table(self) -> list[dict[str, Any]]:
        """A row for each trial, of numbers, strings and, for curves, nested lists: see :func:`export`."""
        from nnkit.search.export import rows_of

        return rows_of(self.trials)

    def export(self, path: str | os.PathLike[str]) -> Path:
        """Writes :meth:`table` to a .csv or .parquet file: see :func:`write_table`."""
        from nnkit.search.export import write_table

        return write_table(path, self.table())

    def same_as(self, configured: str, *, refresh: bool) -> Trial | None:
        """The first trial with these hyper-parameters that was trained to its end: see :func:`known`."""
        if configured not in self._first and refresh:
            for frozen in self._frozen():
                self._trial(frozen)
        number = self._first.get(configured)
        return None if number is None else self._ended[number]

    def remember(self, trial: Trial) -> Trial:
        """Keeps a trial that has ended, which never changes any more."""
        self._ended[trial.number] = trial
        if trial.state in ("complete", "diverged") and trial.repeat_of is None and trial.values is not None:
            key = configuration(trial.params)
            self._first[key] = min(trial.number, self._first.get(key, trial.number))
        return trial

    def _frozen(self) -> list[Any]:
        return self.optuna.get_trials(deepcopy=False)

    def _trial(self, frozen: Any) -> Trial:
        known = self._ended.get(frozen.number)
        if known is not None:
            return known
        trial = trial_of(self, frozen)
        return self.remember(trial) if trial.finished else trial

    def _tested(self) -> dict[int, dict[str, Any]]:
        """By trial what the latest test of it found."""
        tests = [value for key, value in self.optuna.user_attrs.items() if key.startswith("test:")]
        return {test["trial"]: test["numbers"] for test in sorted(tests, key=lambda test: test["when"])}

    def __repr__(self) -> str:
        return f"Study({self.name!r}, {self.mode} of {self.metric}, in {self.where})"


def begin_study(
    space: Space | Mapping[str, Any],
    *,
    metric: str,
    mode: Literal["min", "max"] = "min",
    at: Literal["last", "best"] = "last",
    seeds: Sequence[int] = (0,),
    folds: int | None = None,
    sampler: str = "random",
    run_dir: str | os.PathLike[str] | None = None,
    storage: Any = None,
    name: str | None = None,
) -> Study:
    """Makes a study, or joins the one of that name if it was asked the same.

    Any number of workers may call it at the same moment.

    Args:
      space: see :func:`as_space`.
      metric: the name in the history by which trials are judged.
      mode: "min" or "max".
      at: the value of a trial is the metric of its "last" trained epoch, or of its "best".
      seeds: those of every trial.
      folds: of a cross-validation, or None.
      sampler: the name of the sampler, for the record; another one may go on with a study.
      run_dir: the folder of the search, made where it is not there.
      storage: see :func:`open_storage`; by default a SQLite file in ``run_dir``, and without one memory.
      name: by default "search".

    Raises:
      ValueError: the study exists and differs: the message says in what.
      ConnectionError, OSError, ImportError: as :func:`open_storage`.

    >>> study = search.begin_study({"lr": search.log_uniform(1e-5, 1.0)}, metric="val_loss", seeds=(0, 1))
    >>> study, study.trials
    (Study('search', min of val_loss, in memory), [])
    """
    optuna = require_optuna()
    space = as_space(space)
    for value, options, what in ((mode, ("min", "max"), "mode"), (at, ("last", "best"), "at")):
        if value not in options:
            raise unknown_name(what, value, options)
    folder, spec = _place(run_dir, storage)
    opened = open_storage(spec)
    asked = {
        "space": space.spec(),
        "metric": metric,
        "mode": mode,
        "at": at,
        "seeds": [int(seed) for seed in seeds],
        "folds": folds,
        "sampler": sampler,
    }
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    name = NAME if name is None else name
    made = make(opened, name, mode)
    study = optuna.load_study(
        study_name=name,
        storage=opened,
        sampler=optuna.samplers.RandomSampler(),
        pruner=optuna.pruners.NopPruner(),
    )
    agree(study, space, asked, made=made, where=shown(spec))
    return Study(study, folder, shown(spec))


def open_study(
    run_dir: str | os.PathLike[str] | None = None, *, storage: Any = None, name: str | None = None
) -> Study:
    """The study that is in a run folder or a storage.

    Args:
      run_dir: the folder that was passed to :func:`sweep`.
      storage: see :func:`open_storage`.
      name: may be left out where the storage has one study.

    Raises:
      FileNotFoundError: there is no such folder or file.
      ValueError: there is no such study, or it is not one of nnkit's.
      ConnectionError, OSError, ImportError: as :func:`open_storage`.

    >>> import tempfile
    >>> space = {"lr": search.log_uniform(1e-5, 1.0)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = search.begin_study(space, metric="val_loss", run_dir=folder)
    ...     search.open_study(folder).metric
    'val_loss'
    """
    optuna = require_optuna()
    if run_dir is None and storage is None:
        raise TypeError("open_study needs to know where: pass the run folder, or storage=...")
    folder, spec = _place(run_dir, storage)
    _check_there(spec)
    opened = open_storage(spec)
    names = sorted(study.study_name for study in opened.get_all_studies())
    if not names:
        raise ValueError(f"there is no study in {shown(spec)}: nothing has been begun there")
    if name is None and len(names) > 1:
        raise ValueError(
            f"there are {len(names)} studies in {shown(spec)}: pass name=, one of {', '.join(names)}"
        )
    name = names[0] if name is None else name
    if name not in names:
        raise unknown_name("study", name, names)
    study = optuna.load_study(study_name=name, storage=opened, pruner=optuna.pruners.NopPruner())
    if RECORD not in study.user_attrs:
        raise ValueError(f"the study {name!r} in {shown(spec)} was not made by nnkit.search")
    return Study(study, folder, shown(spec))


def _place(run_dir: Any, storage: Any) -> tuple[Path | None, Any]:
    """The folder of a search, and where its study is."""
    folder = None if run_dir is None else Path(run_dir)
    if storage is None and folder is not None:
        storage = folder / FILE
    return folder, storage


def _check_there(spec: Any) -> None:
    """Raises where opening would make a file that is not there."""
    if not isinstance(spec, str | os.PathLike):
        return
    text = os.fspath(spec)
    path = text.removeprefix("journal:").removeprefix("sqlite:///")
    if "://" not in path and not Path(path).exists():
        raise FileNotFoundError(
            f"there is no study in {str(path)!r}: no such file; was the search begun elsewhere?"
        )
