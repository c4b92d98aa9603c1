"""``nnkit search retrain``: the run folder of a trial, tested once."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from nnkit import search, train
from nnkit.cli.recipe import Outcome, leave
from nnkit.cli.report import print_table
from nnkit.cli.search_place import Place, place_of, settings_of
from nnkit.cli.search_program import Program
from nnkit.cli.settings import Settings
from nnkit.search.choose import complete_trial
from nnkit.search.final import final_test, final_tests
from nnkit.search.records import Trial
from nnkit.search.study import Study
from nnkit.train.files import write_atomically
from nnkit.train.runs import plain, provenance
from nnkit.types import Schedule

__all__ = ["Retrain"]


@dataclasses.dataclass(frozen=True)
class Retrain:
    """Train a trial of a search again and leave its run folder, for nnkit eval, predict and export.

    It goes through the program of the search and comes to the recorded numbers, bit for bit on the machine and the
    versions that it was searched with. Then it is evaluated on the test part, once for the whole search: the study
    keeps that, and another test needs --again.
    """

    run: str
    """The search's folder, or the storage that it is in."""
    trial: int | None = None
    """Which one. [the best]"""
    seed: int | None = None
    """With which seed; the parts of the data stay those of the search. [the first of the search]"""
    fold: int | None = None
    """Without which fold, where the search has folds. [0]"""
    study: str | None = None
    """The study's name, where a storage has several."""
    folder: Path | None = None
    """Where the run goes. [trial-N-seedS within the search's folder]"""
    data_dir: Path | None = None
    """Where the data are now, if they have moved."""
    overwrite: bool = False
    """Replace a run in that folder."""
    again: bool = False
    """Test although the test part was used before; the study says so then."""

    def __call__(self) -> int:
        place = place_of(self.run, self.study)
        study = place.open()
        place = dataclasses.replace(place, name=study.name)
        if (before := final_tests(study)) and not self.again:
            raise ValueError(
                f"the test part was used: {before[-1]}. What is chosen after that is chosen by the test: --again tests "
                "all the same, and the study says so"
            )
        settings = settings_of(study)
        if self.data_dir is not None:
            settings = dataclasses.replace(settings, data_dir=self.data_dir)
        trial = study.best if self.trial is None else complete_trial(study, self.trial)
        seed = trial.seeds[0] if self.seed is None else self.seed
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed must be a whole number from 0 to 2**32 - 1, got {seed}")
        if self.fold is not None and settings.folds is None:
            raise ValueError(f"--fold {self.fold} is of a search with folds, and this one has none")
        if settings.folds is not None and not 0 <= (self.fold or 0) < settings.folds:
            raise ValueError(f"fold must be from 0 to {settings.folds - 1}, got {self.fold}")
        program = Program(settings.config, study.space, pruned=settings.pruner is not None)
        return self._retrained(study, trial, seed, program, place)

    def _retrained(self, study: Study, trial: Trial, seed: int, program: Program, place: Place) -> int:
        fold = None if study.folds is None else self.fold or 0
        name = f"trial-{trial.number}-seed{seed}" + ("" if fold is None else f"-fold{fold}")
        folder = self.folder or place.home / name
        # The seed of the settings is the split's, by which nnkit eval finds the same parts again.
        own = {"runs": folder.parent, "name": folder.name, "fold": fold or 0}
        one = dataclasses.replace(program.settings(trial.params), **own)
        changed: list[str] = []

        def test(trial: Trial) -> Mapping[str, float]:
            begun = time.monotonic()
            ts, history = search.retrain(study, program.train_fn, trial.number, seed, fold=fold)
            seconds = time.monotonic() - begun
            changed.extend(_compared(study, trial, seed, fold, history))
            rows = list(_rows(history, program.trainer(one)[1]))
            train.write_metrics(folder, rows)
            train.append_records(folder, rows)
            _write_origin(folder, study, trial, seed, place)
            outcome = leave(folder, program.network(one), ts, rows, program.parts(fold or 0), seconds)
            return {name: float(value) for name, value in outcome._asdict().items()}

        with _new_folder(folder, one, seed, self.overwrite):
            tested = final_test(study, test, trial.number, again=self.again)
        print_table(f"trial {trial.number}, in {folder}", {f"seed {seed}": Outcome(**tested.numbers)})
        for line in changed:
            print(line, file=sys.stderr)
        return int(bool(changed) and trial.how == "exact")


@contextmanager
def _new_folder(folder: Path, one: Settings, seed: int, overwrite: bool) -> Iterator[None]:
    """A run folder that is gone again where nothing came of it."""
    train.create_run(folder, one, seed=seed, overwrite=overwrite)
    try:
        yield
    finally:
        if not (folder / "result.json").exists():
            shutil.rmtree(folder)


def _compared(
    study: Study, trial: Trial, seed: int, fold: int | None, history: Mapping[str, np.ndarray]
) -> list[str]:
    """Prints the number that was recorded and the one that came now; says what differs."""
    one = {name: np.asarray(a)[None] for name, a in history.items()}
    now = float(search.score(one, study.metric, study.at, study.mode)[0])
    if seed not in trial.seeds:
        print(
            f"{study.metric} {now!r} with seed {seed}, which was not among the search's {list(trial.seeds)}"
        )
        return []
    assert trial.values is not None
    at = (list(trial.seeds).index(seed), *(() if fold is None else (fold,)))
    before = float(trial.values[at])
    of_fold = "" if fold is None else f" of fold {fold}"
    print(f"{study.metric}{of_fold} {now!r}, recorded {before!r}")
    wrong = [name for name, a in one.items() if not _same(a[0], trial.history[name][at])]
    if not wrong:
        return []
    if trial.how == "mapped":
        return [
            f"it was searched side by side with others (--members mapped): {', '.join(wrong)} differ by rounding"
        ]
    here = provenance()
    where = [
        f"{what} {name} was {getattr(trial, what).get(name)!r} and is {value!r}"
        for what in ("versions", "device")
        for name, value in plain(here[what], what).items()
        if getattr(trial, what).get(name) != value
    ]
    return [
        f"{', '.join(wrong)} differ from what was recorded: {'; '.join(where) or 'with the same versions'}"
    ]


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(np.asarray(a, np.float64), np.asarray(b, np.float64), equal_nan=True)


def _rows(history: Mapping[str, np.ndarray], rate: Schedule) -> Iterator[dict[str, Any]]:
    """The rows of the epochs that were trained, with the rate of each one's last step."""
    before = 0
    for i, step in enumerate(np.asarray(history["step"]).tolist()):
        if step > before:
            yield {
                **{name: np.asarray(a)[i] for name, a in history.items()},
                "learning_rate": float(rate(step - 1)),
            }
        before = step


def _write_origin(folder: Path, study: Study, trial: Trial, seed: int, place: Place) -> None:
    """search.json: of which search and trial the run is."""
    found = {
        "study": study.name,
        "where": str(place),
        "trial": trial.number,
        "seed": seed,
        "params": trial.params,
    }
    text = json.dumps(plain(found, "origin"), indent=1, ensure_ascii=False)
    write_atomically(folder / "search.json", text.encode() + b"\n")
