"""Where a search is: in a run folder, or as a study in some storage; and its settings there."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from nnkit.cli.search_settings import SearchSettings, of_record, record_of
from nnkit.search.storage import shown
from nnkit.search.study import Study, open_study

__all__ = ["Place", "keep_settings", "keep_trials", "place_of", "settings_of"]

_ATTRIBUTE = "nnkit search"
_PATIENCE = 10.0
"""Seconds in which whoever made a study says what its settings are."""


@dataclasses.dataclass(frozen=True)
class Place:
    """A run folder, or a storage and a study's name in it."""

    folder: Path | None
    storage: str | None
    name: str | None

    def open(self) -> Study:
        """The study that is there."""
        return open_study(self.folder, storage=self.storage, name=self.name)

    @property
    def words(self) -> list[str]:
        """As arguments of a command."""
        if self.folder is not None:
            return [str(self.folder)]
        return [shown(self.storage), *(["--study", self.name] if self.name else [])]

    @property
    def home(self) -> Path:
        """Where the files go that come of it."""
        return self.folder if self.folder is not None else Path("runs") / (self.name or "search")

    def __str__(self) -> str:
        return str(self.folder) if self.folder is not None else f"{shown(self.storage)}, study {self.name!r}"


def place_of(run: str, study: str | None) -> Place:
    """What the words of a command mean: a folder, or a storage and perhaps a name."""
    if Path(run).is_dir() and study is None:
        return Place(Path(run), None, None)
    return Place(None, run, study)


def settings_of(study: Study) -> SearchSettings:
    """The settings with which ``nnkit search`` began a study.

    Raises:
      ValueError: it was begun by another program.
    """
    deadline = time.monotonic() + (0 if study.optuna.get_trials(deepcopy=False) else _PATIENCE)
    while (found := study.optuna.user_attrs.get(_ATTRIBUTE)) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return of_record(found)


def keep_settings(study: Study, settings: SearchSettings) -> SearchSettings:
    """Writes the settings into a study that has none, and gives those that are there then."""
    if _ATTRIBUTE not in study.optuna.user_attrs:
        study.optuna.set_user_attr(_ATTRIBUTE, record_of(settings))
    return settings_of(study)


def keep_trials(study: Study, trials: int | None) -> None:
    """Writes that the search is to have so many trials: whoever goes on later goes on to these."""
    there = settings_of(study)
    if trials != there.trials:
        study.optuna.set_user_attr(_ATTRIBUTE, record_of(dataclasses.replace(there, trials=trials)))
