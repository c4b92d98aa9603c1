"""How several workers begin one study: one makes it and says what for, the others find that they want the same."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from nnkit.search.records import RECORD
from nnkit.search.space import Space
from nnkit.search.storage import quiet

if TYPE_CHECKING:
    import optuna

__all__ = ["agree", "make"]


def make(storage: Any, name: str, mode: str) -> bool:
    """Makes the study, and says whether it was this process that made it."""
    from optuna.exceptions import DuplicatedStudyError
    from optuna.study import StudyDirection

    direction = StudyDirection.MINIMIZE if mode == "min" else StudyDirection.MAXIMIZE
    try:
        with quiet():
            storage.create_new_study([direction], name)
    except DuplicatedStudyError:
        return False
    return True


def agree(study: optuna.Study, space: Space, asked: dict[str, Any], *, made: bool, where: str) -> None:
    """Writes what is asked of a new study; of one that is there, raises unless it was asked the same."""
    deadline = time.monotonic() + (0 if made else _PATIENCE)
    while (there := study.user_attrs.get(RECORD)) is None:
        if not made and study.get_trials(deepcopy=False):
            raise ValueError(
                f"the study {study.study_name!r} in {where} was not made by nnkit.search: pass another name="
            )
        if time.monotonic() >= deadline:
            # It is this process that made it, or the one that did has died before it could say what for.
            study.set_user_attr(RECORD, asked)
            made = True
        else:
            time.sleep(0.02)
    differing = []
    if words := space.difference(there["space"]):
        differing.append(f"another space ({words})")
    for what in ("metric", "mode", "at", "seeds", "folds"):
        if there[what] != asked[what]:
            differing.append(f"another {what} ({there[what]!r} there, {asked[what]!r} here)")
    if differing:
        raise ValueError(
            f"the study {study.study_name!r} in {where} has {' and '.join(differing)}: ask it the same, or begin "
            "another study with name= or run_dir="
        )


_PATIENCE = 5.0
"""Seconds that whoever finds a study without a record waits for its maker to write it."""
