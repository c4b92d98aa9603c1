"""``nnkit search`` and ``nnkit search resume``."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nnkit import search, train
from nnkit.cli.search_best import print_best
from nnkit.cli.search_live import Board, watched
from nnkit.cli.search_place import Place, keep_settings, keep_trials, place_of, settings_of
from nnkit.cli.search_program import Program
from nnkit.cli.search_settings import OfASearch, SearchSettings, check_search, joined, record_of
from nnkit.cli.settings import resolved
from nnkit.search.pruning import Pruner, median, successive_halving
from nnkit.search.study import FILE, Study, begin_study, open_study

__all__ = ["Resume", "Search"]


@dataclasses.dataclass(frozen=True)
class _OfAWorker(OfASearch):
    """The same with what each worker has for itself."""

    workers: int | None = None
    """Threads of this process that train at the same time. [one a core; accelerators: one a device]"""
    max_time: float | None = None
    """Begin no more trials after so many seconds."""
    storage: str | None = None
    """Where the study is: a SQLite file, journal:FILE for a folder that machines share, or
    postgresql://USER@HOST/NAME. [study.db in the search's folder]"""
    study: str | None = None
    """The study's name in --storage."""


@dataclasses.dataclass(frozen=True)
class Search(SearchSettings, _OfAWorker):
    """Search hyper-parameters: train with many settings, and record what each gives on the validation part.

    Trials are drawn by --sampler from --space; every other setting of "nnkit train" is the same for all of them.
    The test part is left alone: "nnkit search retrain" uses it, once. Ctrl-C and SIGTERM keep every trial that
    has ended, and the last line says how to go on.

    With --storage and --study any number of workers search together. Those that come later need these two alone.
    """

    def __call__(self) -> int:
        given = SearchSettings(**{f.name: getattr(self, f.name) for f in dataclasses.fields(SearchSettings)})
        if self.storage is None:
            if self.study is not None:
                raise ValueError(
                    "--study names a study within --storage: give that too, or --name for a run folder"
                )
            return self._begin_folder(given)
        study = _found(self.storage, self.study, given.space is not None)
        if study is None:
            check_search(given)
            return _begin(given, Place(None, self.storage, self.study), self)
        settings = joined(given, settings_of(study), study.name)
        return _go_on(study, settings, Place(None, self.storage, study.name), self)

    def _begin_folder(self, given: SearchSettings) -> int:
        check_search(given)
        name = given.name or f"{resolved(given.config).dataset.replace('/', '-')}-{given.model}-search"
        folder = given.runs / name
        if (folder / FILE).exists() and not given.overwrite:
            raise FileExistsError(
                f"there is a search in {str(folder)!r}: 'nnkit search resume {shlex.quote(str(folder))}' goes on with "
                "it, --name begins another and --overwrite deletes it"
            )
        return _begin(given, Place(folder, None, None), self)


@dataclasses.dataclass(frozen=True)
class Resume:
    """Go on with a search: train the trials that are missing, or more of them.

    Its settings come from the study.
    """

    run: str
    """The search's folder, or the storage that it is in."""
    study: str | None = None
    """The study's name, where a storage has several."""
    trials: int | None = None
    """Another number of trials for the whole study, those before included."""
    data_dir: Path | None = None
    """Where its data are now, if they have moved."""
    batch: int | None = None
    """How many trials are drawn and run together. [as before]"""
    workers: int | None = None
    """Threads of this process that train at the same time. [one a core; accelerators: one a device]"""
    max_time: float | None = None
    """Begin no more trials after so many seconds."""

    def __call__(self) -> int:
        place = place_of(self.run, self.study)
        study = place.open()
        changes = {"trials": self.trials, "data_dir": self.data_dir, "batch": self.batch}
        changes = {name: value for name, value in changes.items() if value is not None}
        settings = dataclasses.replace(settings_of(study), **changes)
        check_search(settings)
        return _go_on(study, settings, dataclasses.replace(place, name=study.name), self)


def _found(storage: str, name: str | None, begins: bool) -> Study | None:
    """The study in a storage; None where there is none and it can be begun."""
    try:
        return open_study(storage=storage, name=name)
    except (ValueError, FileNotFoundError):
        if begins:
            return None
        raise


def _begin(given: SearchSettings, place: Place, worker: Any) -> int:
    """Begins a search: its folder and its study."""
    settings = dataclasses.replace(
        given, **{n: v for n, v in record_of(given).items() if getattr(given, n) is None}
    )
    space = check_search(settings)
    program = Program(settings.config, space, pruned=settings.pruner is not None)
    folder = place.folder
    if folder is not None:
        about = {"search": record_of(settings)}
        train.create_run(folder, about, seed=settings.seed, overwrite=settings.overwrite)
    with _removed_if_refused(folder):
        study = begin_study(space, **_asked(settings), run_dir=folder, storage=place.storage, name=place.name)
        place = dataclasses.replace(place, name=study.name)
        settings = joined(given, keep_settings(study, settings), study.name)
        status = _run(study, settings, program, place, worker)
    return print_best(study, place, 5) if status is None else status


def _go_on(study: Study, settings: SearchSettings, place: Place, worker: Any) -> int:
    """Goes on with a study, or joins it."""
    program = Program(settings.config, study.space, pruned=settings.pruner is not None)
    keep_trials(study, settings.trials)
    status = _run(study, settings, program, place, worker)
    return print_best(study, place, 5) if status is None else status


def _asked(settings: SearchSettings) -> dict[str, Any]:
    """What a study is asked, of which all its workers must know the same."""
    return {
        "metric": settings.metric,
        "mode": "max" if settings.metric == "val_accuracy" else "min",
        "at": settings.at,
        "seeds": settings.seed_list,
        "folds": settings.folds,
        "sampler": settings.sampler,
    }


def _run(study: Study, settings: SearchSettings, program: Program, place: Place, worker: Any) -> int | None:
    """This worker's part of the search; the exit status where a signal has ended it."""
    full = resolved(settings.config)
    trials = settings.trials or 0
    print(
        f"{full.dataset}, {full.model}: {trials} trials of {full.epochs} epochs drawn by {settings.sampler} from "
        f"{settings.space}; in {place}",
        flush=True,
    )
    there = settings_of(study)
    local = {
        n: getattr(settings, n) for n in ("data_dir", "batch") if getattr(settings, n) != getattr(there, n)
    }
    options = [word for n, value in local.items() for word in (f"--{n.replace('_', '-')}", str(value))]
    going_on = f"go on with: {shlex.join(['nnkit', 'search', 'resume', *place.words, *options])}"
    board = Board(study, str(place), trials, worker.max_time)
    try:
        with watched(board) as callback:
            search.sweep(
                program.train_fn,
                study.space,
                **_asked(settings),
                trials=trials,
                batch=settings.batch,
                members=settings.members,
                workers=worker.workers,
                pruner=None if settings.pruner is None else PRUNERS[settings.pruner](),
                sampler_seed=settings.seed,
                max_time=worker.max_time,
                run_dir=study.folder,
                storage=place.storage,
                name=study.name,
                callbacks=[callback],
                progress=False,
            )
    except (KeyboardInterrupt, SystemExit) as error:
        board.look()
        print(f"interrupted: {board.counts()}, all of them kept in {place}", file=sys.stderr)
        print(going_on, file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else int(error.code or 0)
    board.look()
    if board.done < trials:
        print(f"{board.counts()}\n{going_on}", file=sys.stderr)
    return None


PRUNERS: dict[str, Callable[[], Pruner]] = {"successive-halving": successive_halving, "median": median}


@contextmanager
def _removed_if_refused(folder: Path | None) -> Iterator[None]:
    """Removes a new folder where what was asked is refused before there is a trial in it."""
    try:
        yield
    except (ValueError, TypeError, ImportError):
        if folder is not None and not ((folder / FILE).exists() and open_study(folder).trials):
            shutil.rmtree(folder)
        raise
